"""Compiled arithmetic: the same numbers, and a way on where nothing can be compiled."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from tesseraq_gguf.compute import fusion
from tesseraq_gguf.compute.fusion import fused
from tesseraq_gguf.methods import scaled_rounding, tesseraq


def _inputs(groups: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(groups)
    names = ("gradient", "weight", "log", "rounding")
    large = {name: torch.randn(groups, 64, generator=random) for name in names}
    large["log"] *= 0.1
    scale = torch.rand(groups, 1, generator=random) + 0.5
    zero = 3 * torch.rand(groups, 1, generator=random)
    return large | {"scale": scale, "zero": zero, "base": torch.randint(0, 3, (groups, 64), generator=random).float()}


@pytest.mark.slow
def test_compiled_functions_give_what_they_say():
    """In a process of its own: what other tests have imported is in the way of the compiler behind torch.compile."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "12 functions compared\n" * 3


def _compare() -> None:
    """Of two sizes each, without a word in the log; a code may go either way at a tie, which none is here."""
    fusion.WORTH = 1
    logging.getLogger(fusion.__name__).warning = lambda *said: sys.exit(str(said))  # type: ignore[method-assign]
    for gap, vector in ((None, 1), (torch.tensor(3.0), 1), (torch.tensor(3.0), 8)):
        compared = 0
        for groups in (40, 72):
            x = _inputs(groups)
            rounding, gaps = x["rounding"][:, : 64 // vector], gap if gap is None else gap.expand(groups, 64)
            soft = (rounding, x["base"], gaps, x["scale"], x["zero"], vector)
            hard = (x["weight"], x["log"], x["scale"], x["zero"])
            for function, arguments in (
                (tesseraq._soft_weight, (*soft, torch.float32)),
                (tesseraq._soft_weight, (*soft, torch.bfloat16)),
                (tesseraq._soft_weight_backward, (x["gradient"], *soft)),
                (scaled_rounding._round, (*hard, 7, torch.float32)),
                (scaled_rounding._round, (*hard, 7, torch.bfloat16)),
                (scaled_rounding._round_backward, (x["gradient"], *hard, 7)),
            ):
                got, want = function(*arguments), function.__wrapped__(*arguments)
                for g, w in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (got, want)), strict=True):
                    torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)
                compared += 1
        print(f"{compared} functions compared")


def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch, caplog):
    calls = []

    def broken(function, **_):
        def call(*_arguments):
            calls.append(1)
            raise RuntimeError("no compiler here\nand much more")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(fusion, "WORTH", 10)
    double = fused(lambda x, y: 2 * x + y)
    x = torch.arange(12.0)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            torch.testing.assert_close(double(x, 1), 2 * x + 1)
    assert len(calls) == 1
    assert [r.message for r in caplog.records] == [
        "learning takes longer here, torch.compile does not work: no compiler here"
    ]
    torch.testing.assert_close(double(x[:5], 1), 2 * x[:5] + 1)


def test_small_matrices_are_not_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    assert fused(lambda x: x + 1)(torch.zeros(3)).tolist() == [1, 1, 1]


if __name__ == "__main__":
    _compare()
