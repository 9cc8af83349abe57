"""classification_totals_, held against torch.argmax; ties, NaN, bad input."""

import pytest
import torch

from skinfast.ops import classification_totals_
from skinfast.testing import devices, dtypes, in_layout

NAN, INF = float("nan"), float("inf")
ONES = torch.ones


def totals_of(loss, logits, labels):
    totals = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, device=logits.device)
    classification_totals_(totals, loss, logits, labels)
    return totals.tolist()


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (64, 7), (300, 3)])
def test_equals_pure_pytorch(device, dtype, layout, rows, classes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator).to(device, dtype)
    labels = torch.randint(classes, (rows,), generator=generator).to(device)
    loss = torch.tensor(0.7, device=device, dtype=dtype)
    correct = int((logits.argmax(1) == labels).sum())
    assert rows == 1 or 0 < correct < rows
    expected = [1.0 + loss.item() * rows, 2.0 + correct, 3.0 + rows]
    assert totals_of(loss, in_layout(logits, layout), in_layout(labels, layout)) == expected


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize(
    "row", [[1, 3, 3, 2], [NAN, 1, INF, NAN], [0, NAN, INF, NAN], [-INF] * 4, [0, -0.0, -1, -1]]
)
def test_answers_as_argmax_does(device, row):
    logits = torch.tensor([row] * 4, device=device, dtype=torch.float32)
    labels = torch.arange(4, device=device)
    *_, correct, _ = totals_of(torch.zeros((), device=device), logits, labels)
    assert correct == 2 + 1
    only = labels[logits.argmax(1)[:1]]
    assert totals_of(torch.zeros((), device=device), logits[:1], only)[1] == 3


@pytest.mark.parametrize("device", devices())
def test_dtypes_of_loss_and_logits_may_differ_and_batches_be_empty(device):
    for dtype in dtypes(device):
        logits = torch.eye(3, device=device, dtype=dtype)
        loss = torch.tensor(0.5, device=device)
        labels = torch.arange(3, device=device)
        assert totals_of(loss, logits, labels) == [2.5, 5, 6]
        assert totals_of(loss, logits[:0], labels[:0]) == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"totals": torch.zeros(3)}, "totals has dtype float32; it needs float64"),
        ({"totals": torch.zeros(4).double()}, r"totals has shape \[4\]; it needs \[3\]"),
        ({"totals": torch.zeros(6).double()[::2]}, "totals has gaps"),
        ({"mean_loss": ONES(1)}, r"mean_loss has shape \[1\]; it needs \[\]"),
        ({"logits": ONES(3)}, "logits has shape"),
        ({"logits": ONES(2, 0)}, "logits has shape .*; it needs at least one class"),
        ({"labels": torch.zeros(3).long()}, r"labels has shape \[3\]; it needs \[2\]"),
        ({"labels": torch.zeros(2).int()}, "labels has dtype int32; it needs int64"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    good = {
        "totals": torch.zeros(3).double(),
        "mean_loss": torch.zeros(()),
        "logits": ONES(2, 3),
        "labels": torch.zeros(2).long(),
    }
    with pytest.raises(RuntimeError, match=f"^classification_totals_: {message}"):
        classification_totals_(**{**good, **change})
    assert torch.equal(good["totals"], torch.zeros(3).double())
