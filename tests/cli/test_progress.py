"""The display of a conversion."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from tesseraq_gguf.cli.progress import ConvertProgress, TimeLeft, block_line, losses
from tesseraq_gguf.learning.reconstruction import BlockResult
from tesseraq_gguf.methods.held_out import Verdict


@pytest.mark.parametrize(
    ("result", "line"),
    [
        (BlockResult(2, {}, 1234.4, 87.1, 62.3), "block  3/18  loss 1234 → 87.1 (7 %)  62 s"),
        (BlockResult(17, {}, 0.5, 0.25, 1.0, resumed=True), "block 18/18  loss 0.5 → 0.25 (50 %)  from an earlier run"),
        (BlockResult(0, {}, None, None, 0.6), "block  1/18  1 s"),
        (BlockResult(0, {}, None, 12.5, 0.6), "block  1/18  loss 12.5  1 s"),
        (BlockResult(0, {}, 0.0, 0.0, 0.6), "block  1/18  loss 0 → 0  1 s"),
        (
            BlockResult(0, {}, 100.0, 10.0, 5.0, verdict=Verdict(15.0, 12.5, False)),
            "block  1/18  loss 100 → 10 (10 %)  held out 12.5  5 s",
        ),
        (
            BlockResult(0, {}, 100.0, 20.0, 5.0, verdict=Verdict(15.0, 17.5, True)),
            "block  1/18  loss 100 → 20 (20 %)  held out 15, which learning made 17.5: undone  5 s",
        ),
    ],
)
def test_block_line(result, line):
    assert block_line(result, 18) == line


def test_without_a_terminal_there_are_only_lines():
    out = io.StringIO()
    with ConvertProgress(Console(file=out, width=40)) as progress:
        progress.stage("learning")
        for index in range(3):
            for done in range(50):
                progress.step(index, 3, done, 50, "rounding")
            progress.block(BlockResult(index, {}, 100.0, 10.0, 5.0), 3)
        progress.note("a note about [brackets] that is much longer than the forty columns of this console")
        progress.advance(3, 4)
    lines = out.getvalue().splitlines()
    assert lines[0] == "learning"
    assert lines[1:4] == [f"block {i}/3  loss 100 → 10 (10 %)  5 s" for i in (1, 2, 3)]
    assert lines[4:] == ["a note about [brackets] that is much longer than the forty columns of this console"]


def test_on_a_terminal_there_are_bars_with_the_time_left():
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True)
    with ConvertProgress(console) as progress:
        progress.stage("learning")
        progress.block(BlockResult(0, {}, 100.0, 10.0, 300.0), 3)
        progress.step(1, 3, 25, 50, "stage 10 of 20")
    assert "block 2/3" in out.getvalue()
    assert "8 min left" in out.getvalue()


def test_on_a_terminal_it_says_what_is_done_and_draws_losses():
    out = io.StringIO()
    with ConvertProgress(Console(file=out, width=120, force_terminal=True)) as progress:
        progress.stage("learning")
        progress.block(BlockResult(0, {}, 100.0, 1.0, 300.0), 3)
        progress.step(1, 3, 0, 0, "looking for scales of channels")
        progress._bars.refresh()
    assert "looking for scales of channels" in out.getvalue()
    assert "losses of blocks  █ → ▁" in out.getvalue()
    assert re.search(r"memory  \d+\.\d GB", out.getvalue())


@pytest.mark.parametrize(
    ("blocks", "drawn"),
    [
        ([(1000.0, 1.0), (100.0, 10.0)], "█▆ → ▁▃"),
        ([(None, 1.0), (None, 1e7)], "▁█"),
        ([(5.0, 5.0)], "▁ → ▁"),
        ([(0.0, 0.0), (2.0, float("inf"))], "▁▁ → ▁·"),
        ([(1.0, 1.0)] * 100, "▁" * 24 + " → " + "▁" * 24),
    ],
)
def test_losses_are_drawn_on_one_scale(blocks, drawn):
    assert losses(blocks) == drawn


def test_time_left_comes_from_learned_blocks_only():
    left = TimeLeft()
    assert left.text(10) == ""
    left.finished(0, None)
    assert left.seconds(10) is None
    left.step(1, 0.0, now=100.0)
    left.step(1, 0.5, now=110.0)
    assert left.seconds(10) == pytest.approx(8.5 * 20)
    left.finished(1, 30.0)
    assert left.seconds(10) == pytest.approx(8 * 30)
    assert left.text(10) == "4 min left"
    assert left.text(3) == "30 s left"
