"""The page that tells how a conversion went."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from tiny_models import make_model  # noqa: F401  (a fixture)

from tesseraq_gguf.conversion.page import page
from tesseraq_gguf.conversion.report import BlockReport, ConversionReport
from tesseraq_gguf.methods.held_out import Verdict
from tesseraq_gguf.methods.problem import Mark
from tesseraq_gguf.printing import short


@pytest.fixture
def report(tiny_gguf):
    curve = tuple(Mark("rounding", 10 * k, 8.0 / k) for k in range(1, 4))
    blocks = (
        BlockReport(0, 10.0, 2.5, Verdict(4.0, 3.0, False), 1.5, False, curve),
        BlockReport(1, 20.0, 8.0, Verdict(7.5, 9.0, True), 1.5, True, curve),
    )
    return ConversionReport(
        tiny_gguf, 1234, 4.5, 2.25, 2, 1, 3.0, {"layers.0.odd.weight": "37 columns"}, "any llama.cpp",
        divergence=0.25, held_out=128, kept_start=1, learned=blocks,
    )  # fmt: skip


def test_it_says_what_the_report_does(report):
    text = page(report)
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)]
    assert ["1", "10", "2.5", "25.0 %", "4", "3", "end", "1.5"] in rows
    assert ["2", "20", "8", "40.0 %", "7.5", "9", "start", "1.5"] in rows
    assert ["layers.0.odd.weight", "37 columns"] in rows
    assert "<strong>0.2500</strong>" in text and "undone in 1 of 2 blocks" in text
    assert text.count("<svg") == 2


def test_what_was_not_learned_has_no_losses(report):
    rounded = tuple(BlockReport(i, None, None, None, 0.1, False, ()) for i in range(2))
    text = page(replace(report, learned=rounded, divergence=None))
    assert "<svg" not in text and "Losses" not in text
    assert "<svg" not in page(replace(report, learned=()))


def test_names_of_strangers_do_nothing(report):
    text = page(replace(report, fallbacks={"<script>alert(1)</script>": "<b>"}))
    assert "<script>alert" not in text and "&lt;script&gt;" in text


@pytest.mark.slow
def test_the_command_writes_it(run, make_model, long_text, tmp_path):  # noqa: F811
    out, place = tmp_path / "out.gguf", tmp_path / "page.html"
    learn = ("--preset", "fast", "--samples", 4, "--seqlen", 32, "--device", "cpu", "--calibration", long_text)
    made = run("convert", make_model("llama").folder, out, *learn, "--type", "q4_0", "--report", place, "--json")
    assert made.code == 0, made.err
    blocks = json.loads(made.out)["learned"]
    assert [block["index"] for block in blocks] == [0, 1]
    assert blocks[0]["curve"][0]["doing"] == "stage 1 of 20, 80 % soft"
    text = place.read_text(encoding="utf-8")
    assert "tesseraq-gguf convert" in text and short(blocks[1]["loss_after"]) in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.gguf", "page.html"]


@pytest.mark.parametrize(
    ("place", "more", "said"),
    [
        ("page.txt", (), "its name must end in .html"),
        ("nowhere/page.html", (), "nowhere does not exist"),
        ("page.html", ("--dry-run",), "--dry-run learns nothing"),
        ("text.html", (), "text.html, which is used"),
    ],
)
def test_a_place_that_cannot_be_meant_is_refused_at_once(place, more, said, run, tmp_path):
    (tmp_path / "text.html").write_text("some text")
    told = run(
        "convert", "demo", tmp_path / "out.gguf", "--report", tmp_path / place, *more,
        "--calibration", tmp_path / "text.html",
    )  # fmt: skip
    assert told.code and said in told.err
    assert (tmp_path / "text.html").read_text() == "some text"
