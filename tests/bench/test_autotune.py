"""bench/gpu/autotune.py with stand-ins for the GPU: what it records, and what check_gpu keeps."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

GPU = Path(__file__).resolve().parents[2] / "bench" / "gpu"


@pytest.fixture
def autotune(monkeypatch):
    """On the CPU, on a clock that charges every call the same."""
    monkeypatch.syspath_prepend(str(GPU))
    import autotune

    monkeypatch.setattr(autotune, "DEVICE", "cpu")
    # float64 in place of float16, which a CPU refuses.
    kinds = {torch.bfloat16: "kBFloat16", torch.float64: "kHalf"}
    monkeypatch.setattr(autotune, "DTYPES", kinds)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(autotune, "graphed", lambda call: call)
    monkeypatch.setattr(autotune, "stopwatch", lambda device: lambda call, repeats: 1e-3)
    monkeypatch.setattr(autotune, "has_persistent_kernels", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    yield autotune
    for name in ("autotune", "figures", "small_shapes", "tools"):
        sys.modules.pop(name, None)


@pytest.fixture
def convolutions(autotune):
    pointwise = autotune.Convolution(2, 8, 4, 3, 16, 1, 1, 4, 3, (1, 1), (0, 0))
    return [pointwise, autotune.Convolution(2, 16, 5, 4, 8, 3, 3, 3, 2, (2, 2), (1, 1))]


def test_every_operation_is_measured_and_training_in_bfloat16_first(
    autotune, convolutions, tmp_path
):
    assert autotune.measure_all(convolutions, 1, tmp_path / "times.json") == 0
    measured = autotune.read(tmp_path / "times.json")
    assert [m.dtype for m in measured] == sorted(m.dtype for m in measured)  # bfloat16 first
    first = [m.operation for m in measured if m.dtype == "kBFloat16"]
    assert set(first) == set(autotune.OPERATIONS)
    assert set(first[-4:]) == set(autotune.INFERENCE)
    of_all = [m for m in measured if m[1:4] == ("kBFloat16", "kForward", convolutions[0])]
    assert list(of_all[0].times) == ["cudnn", *autotune.kernels()]
    assert len({m[1:4] for m in measured}) == len(measured)


def test_a_kernel_that_fails_or_differs_is_recorded_and_the_rest_goes_on(
    autotune, convolutions, tmp_path, monkeypatch
):
    real = autotune.call_of

    def call_of(operation, *arguments):
        call = real(operation, *arguments)

        def made():
            kernel = os.environ.get("SKINFAST_CONV2D")
            if kernel == "tile128x128" and operation == "kForward":
                raise RuntimeError("an illegal\naccess")
            return call() + (kernel == "tile128x64" and operation == "kWeightGradient")

        return made

    monkeypatch.setattr(autotune, "call_of", call_of)
    assert autotune.measure_all(convolutions[1:], 1, tmp_path / "times.json") == 4
    written = json.loads((tmp_path / "times.json").read_text())
    assert [(f["kernel"], f["operation"]) for f in written["failures"]] == [
        ("tile128x128", "kForward"),
        ("tile128x64", "kWeightGradient"),
    ] * 2
    assert written["failures"][0]["reason"] == "an illegal access"
    assert "against float32" in written["failures"][1]["reason"]
    times = {m.operation: list(m.times) for m in autotune.read(tmp_path / "times.json")}
    assert times["kForward"] == ["cudnn", "tile128x64"]
    assert times["kWeightGradient"] == ["cudnn", "tile128x128"]


def test_the_table_is_made_from_what_check_gpu_keeps(autotune, convolutions, tmp_path):
    import figures

    times = {"cudnn": 9.0, "tile128x64": 3.0}
    kinds = "some GPU", "kBFloat16", "kForward"
    measurements = [autotune.Measurement(*kinds, v, times) for v in convolutions]
    autotune.write(measurements, tmp_path / "times.json")
    stage = {"name": "autotune", "figures": figures.of_json(tmp_path / "times.json")}
    other = {"name": "tests", "figures": {"tests": 7}}
    (tmp_path / "check_gpu.json").write_text(json.dumps({"stages": [other, stage]}))
    (tmp_path / "without.json").write_text(json.dumps({"stages": [other]}))
    files = [str(tmp_path / name) for name in ("check_gpu.json", "without.json")]
    assert autotune.main(["--read", *files, "--output", str(tmp_path / "table.h")]) == 0
    assert (tmp_path / "table.h").read_text() == autotune.table(measurements)
    assert "Conv2dChoice, 2>" in autotune.table(measurements)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_where_it_is_not_possible_it_says_why_last(autotune, tmp_path, capsys):
    import tools

    code = autotune.main(["--output", str(tmp_path / "times.json")])
    assert code == tools.NOT_POSSIBLE
    assert capsys.readouterr().err.startswith("autotune: there is no CUDA GPU")


def test_a_sanitizer_sees_every_tensor_core_kernel_in_every_operation(autotune, monkeypatch):
    import small_shapes

    seen = set()
    real = autotune.call_of

    def call_of(operation, *arguments):
        call = real(operation, *arguments)

        def made():
            seen.add((os.environ["SKINFAST_CONV2D"], operation))
            return call()

        return made

    monkeypatch.setattr(autotune, "call_of", call_of)
    monkeypatch.setattr(small_shapes, "has_persistent_kernels", lambda: True)
    assert small_shapes.call_tensor_cores() > len(seen)
    for operation in autotune.OPERATIONS:
        kernels = {kernel for kernel, made in seen if made == operation}
        with_statistics = operation.endswith("Statistics")
        assert kernels == ({"persistent128x64"} if with_statistics else set(autotune.kernels()))
    assert "offset" in small_shapes.LAYOUTS
