"""What `skinfast selfcheck` finds on this machine; its checks of ops are those of tests/ops."""

from skinfast import _selfcheck


def test_optimizer_and_models_pass():
    checks = [*_selfcheck._check_optimizer(), *_selfcheck._check_models()]
    assert len(checks) >= 4
    assert [check.failure for check in checks] == [""] * len(checks)


def test_a_difference_is_named(monkeypatch):
    monkeypatch.setattr(_selfcheck, "Adam", lambda params, lr: _Lazy())
    (check, *_) = _selfcheck._check_optimizer(steps=1)
    assert "not close" in check.failure


class _Lazy:
    def step(self):
        pass
