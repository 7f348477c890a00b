"""Comparing files: what is found position by position, what that amounts to, and what is kept of it."""

from __future__ import annotations

import csv
import json
import math
import os
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from split_files import split

from tesseraq_gguf.errors import EvaluationError, UsageError
from tesseraq_gguf.evaluation import side_by_side
from tesseraq_gguf.evaluation.comparison import Request, answers_of, compare
from tesseraq_gguf.evaluation.comparison_page import front, page
from tesseraq_gguf.evaluation.generation import repeated
from tesseraq_gguf.evaluation.perplexity import evaluate
from tesseraq_gguf.evaluation.side_by_side import Findings, Positions, Text, _compared

EVERYDAY = Path(__file__).parents[2] / "scripts" / "tasks" / "everyday.yaml"


class Given:
    """A model that answers what it is given, float32 [positions, vocabulary]."""

    def __init__(self, logits):
        self.logits, self.forgot = logits, 0

    def forget(self):
        self.forgot += 1

    def rows(self, tokens, first):
        yield from ((at, self.logits[at].copy()) for at in range(first, len(tokens)))


def softmax(logits):
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), words=st.integers(2, 300), loud=st.sampled_from([0.1, 1.0, 10.0, 40.0]))
def test_a_chunk_has_the_divergence_of_exact_probabilities(seed, words, loud):
    random = np.random.default_rng(seed)
    base, other = (loud * random.standard_normal((16, words)).astype(np.float32) for _ in range(2))
    tokens = tuple(int(t) for t in random.integers(0, words, 16))
    sides: list[Any] = [Given(base), Given(other), Given(base)]
    found, same = (Positions(*array[:, None]) for array in _compared(sides, tokens, 8))
    p, q = softmax(base[8:15]), softmax(other[8:15])
    counted = np.log(p) > -16
    expected = np.where(counted, p * (np.log(p) - np.log(q)), 0).sum(-1)
    np.testing.assert_allclose(found.kld[0], expected, rtol=1e-4, atol=1e-5)
    places = np.arange(7), np.array(tokens[9:])
    np.testing.assert_allclose(found.nll[0], -np.log(q[places]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.base_nll[0], -np.log(p[places]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.dp[0], q[places] - p[places], atol=1e-5)
    assert np.array_equal(found.same[0], p.argmax(-1) == q.argmax(-1))
    assert not same.kld.any() and not same.dp.any() and same.same.all()
    assert all(side.forgot == 1 for side in sides)


def test_figures_are_those_of_the_positions():
    random = np.random.default_rng(0)
    nll, base, kld, dp = random.random((4, 3, 50)).astype(np.float32)
    same = (random.random((3, 50)) > 0.3).astype(np.float32)
    found = answers_of(Positions(nll, base, kld, dp, same))
    assert found.tokens == 150
    assert found.perplexity == pytest.approx(math.exp(nll.mean()))
    assert found.perplexity_error == pytest.approx(found.perplexity * nll.std(ddof=1) / math.sqrt(150), rel=1e-3)
    assert found.log_ratio == pytest.approx(nll.mean() - base.mean(), abs=1e-6)
    assert found.log_ratio_error == pytest.approx((nll - base).std(ddof=1) / math.sqrt(150), rel=1e-3)
    assert found.kld == pytest.approx(kld.mean())
    assert found.kld_maximum == kld.max()
    quantiles = [found.kld_median, found.kld_90, found.kld_99, found.kld_999]
    assert quantiles == pytest.approx(list(np.quantile(kld, [0.5, 0.9, 0.99, 0.999])))
    assert found.rms_dp == pytest.approx(math.sqrt((dp**2).mean()))
    assert found.same_top == pytest.approx(same.mean())


@pytest.fixture(scope="module")
def files(tiny_model, tmp_path_factory) -> list[Path]:
    """The tiny Llama in f16, q4_0 and tsq2."""
    from tesseraq_gguf import Recipe, convert

    folder = tmp_path_factory.mktemp("compared")
    made: dict[str, dict[str, Any]] = {"f16": {}} | {type: {"method": "rtn"} for type in ("q4_0", "tsq2")}
    for type, options in made.items():
        convert(Recipe(str(tiny_model), folder / f"{type}.gguf", type=type, **options))
    return [folder / f"{type}.gguf" for type in made]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(side_by_side, "cache_folder", lambda kind: tmp_path / kind)
    return tmp_path / "comparisons"


@pytest.mark.runtime
def test_figures_are_llama_perplexitys(files, long_text, cache):
    reference, *others = files
    found = compare(Request(reference, tuple(others), long_text, 64, 8, timed=False))
    for each in found.files:
        theirs = evaluate(each.file, long_text, 64, 8, reference)
        assert each.answers.kld == pytest.approx(theirs.kld, abs=1e-4)
        assert each.answers.perplexity == pytest.approx(theirs.perplexity, rel=1e-4)
        assert each.answers.perplexity_error == pytest.approx(theirs.perplexity_error, rel=1e-3)
        # it keeps the reference's logits in 16 bits, where two may become equal
        assert each.answers.same_top == pytest.approx(theirs.top1_agreement, abs=0.02)
        assert each.memory["weights"] == pytest.approx(each.facts.bytes, rel=0.5)
        assert min(each.memory.values()) > 0
    own = evaluate(reference, long_text, 64, 8)
    assert found.reference.answers.perplexity == pytest.approx(own.perplexity, rel=1e-4)
    assert found.reference.answers.kld == 0


@pytest.mark.runtime
def test_a_run_goes_on_and_takes_more_files(files, long_text, cache, monkeypatch):
    reference, q4, tsq2 = files
    ran: list[int] = []
    original = side_by_side._compared

    def counted(sides, tokens, first):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(len(sides) - 1)
        return original(sides, tokens, first)

    monkeypatch.setattr(side_by_side, "_compared", counted)
    request = Request(reference, (q4,), long_text, 64, 4, timed=False)
    with pytest.raises(KeyboardInterrupt):
        compare(request)
    assert ran == [1, 1, 1]
    ran[:] = [0]
    one = compare(request)
    assert ran == [0, 1]  # the chunk that was missing
    ran[:] = []
    monkeypatch.setattr(side_by_side, "_compared", lambda *each: ran.append(len(each[0]) - 1) or original(*each))
    two = compare(replace(request, files=(q4, tsq2)))
    assert ran == [1, 1, 1, 1]
    assert two.files[0].answers == one.files[0].answers
    ran[:] = []
    fresh = compare(replace(request, files=(q4, tsq2), fresh=True))
    assert ran == [2, 2, 2, 2]
    assert [f.answers for f in fresh.files] == [f.answers for f in two.files]
    # what is damaged counts for nothing
    for place in cache.glob("*.npy"):
        place.write_bytes(place.read_bytes()[:100])
    assert compare(request).files[0].answers == one.files[0].answers


@pytest.mark.runtime
def test_files_that_memory_does_not_hold_together_run_one_after_the_other(files, long_text, cache, monkeypatch):
    monkeypatch.setattr(side_by_side, "_free_memory", lambda: 0)
    said = []
    found = compare(
        Request(files[0], tuple(files[1:3]), long_text, 64, 2, timed=False), lambda what, *_: said.append(what)
    )
    assert set(said) == {"comparing, part 1 of 2", "comparing, part 2 of 2"}
    assert [f.answers.tokens for f in found.files] == [62, 62]


def test_what_is_not_finite_is_refused(tmp_path, tiny_gguf, cache, monkeypatch):
    monkeypatch.setattr(side_by_side, "find_runtime", lambda: type("Runtime", (), {"manifest": {}}))
    found = Findings(tiny_gguf, tiny_gguf, Text(np.zeros((2, 16), np.int32), {}, 32))
    with pytest.raises(EvaluationError, match="not a number"):
        found.add(np.full((5, 7), np.nan, np.float32))
    assert found.done == 0 and not cache.exists()


@pytest.mark.runtime
def test_what_is_no_text_is_refused(tiny_gguf, base_gguf, tmp_path):
    for data in (b"a\xff" * 1000, b"a" * 1000 + "ä".encode()[:1], "\ud800".encode("utf-8", "surrogatepass") * 500):
        (tmp_path / "text").write_bytes(data)
        with pytest.raises(UsageError, match="text is not UTF-8 text: byte"):
            compare(Request(tiny_gguf, (base_gguf,), tmp_path / "text", 64))


def test_a_file_is_given_once_and_not_alone(tiny_gguf, long_text):
    with pytest.raises(UsageError, match=r"tiny\.gguf is given twice"):
        compare(Request(tiny_gguf, (tiny_gguf,), long_text))
    with pytest.raises(UsageError, match="nothing to compare"):
        compare(Request(tiny_gguf, (), long_text))


@pytest.mark.runtime
def test_the_command_writes_what_it_is_asked_for(files, long_text, cache, run, tmp_path):
    page_, table, plot = tmp_path / "page.html", tmp_path / "table.csv", tmp_path / "plot.svg"
    places = ("--report", page_, "--csv", table, "--plot", plot)
    answer = run("compare", *files, "--text", long_text, "--ctx", 64, "--chunks", 2, "--json", *places)
    assert answer.code == 0, answer.err
    said = json.loads(answer.out)
    assert [Path(row["file"]) for row in said["files"]] == files[1:]
    assert all(row["prompt_speed"] > 0 and row["answer_speed"] > 0 for row in (said["reference"], *said["files"]))
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    assert [row["file"] for row in rows] == [str(file) for file in files]
    assert [float(row["kld"]) for row in rows] == [0.0, *(row["kld"] for row in said["files"])]
    assert ET.parse(plot).getroot().tag.endswith("svg")
    text = page_.read_text(encoding="utf-8")
    assert all(file.name in text for file in files) and text.count("<svg") == 2
    again = ("compare", *files, "--text", long_text, "--ctx", 64, "--chunks", 2, "--no-speed", "--generate", 2)
    shown = run(*again, "--report", page_)
    assert "tsq2.gguf" in shown.out and "t/s" not in shown.out and "repeated" in shown.out
    assert "What they write" in page_.read_text(encoding="utf-8")


@pytest.mark.runtime
def test_every_file_is_asked_the_same_tasks(files, long_text, cache, run, tmp_path):
    pytest.importorskip("lm_eval")
    page_, asked = tmp_path / "page.html", ("--tasks", EVERYDAY, "--limit", 6, "--shots", 1)
    command = ("compare", *files[:2], "--text", long_text, "--ctx", 64, "--chunks", 2, "--no-speed", *asked)
    found = run(*command, "--report", page_, "--json")
    assert found.code == 0, found.err
    reference, other = (lambda f: (f["reference"], f["files"][0]))(json.loads(found.out))
    alone = json.loads(run("eval", files[1], *asked, "--json").out)["tasks"]
    assert {f"task_{row['task']} {row['metric']}": row["value"] for row in alone}.items() <= other.items()
    assert reference.keys() == other.keys()
    shown = page_.read_text(encoding="utf-8")
    assert "everyday acc_norm" in shown and "Items asked: everyday 6." in shown
    assert "everyday acc" in " ".join(run(*command).out.split())
    missing = run("compare", *files[:2], "--text", long_text, "--tasks", tmp_path / "none.yaml")
    assert missing.code and "no task file at" in missing.err


@pytest.mark.runtime
def test_names_and_texts_of_strangers_do_nothing_in_the_page(files, long_text, cache):
    found = compare(Request(files[0], (files[2],), long_text, 64, 2, timed=False))
    hostile = replace(found.files[0], file=Path("<script>alert(1)</script>.gguf"))
    pieces = dict.fromkeys(found.text.pieces, "<img src=x onerror=alert(1)>")
    text = page(replace(found, files=(hostile,), text=replace(found.text, pieces=pieces)))
    assert "<script" not in text and "<img" not in text


def test_what_is_repeated_is_counted_in_rows_of_four_words():
    assert repeated("one two three four five six seven eight") == 0
    assert repeated("a b c") == repeated("") == 0
    assert repeated("la " * 13) == 0.9
    assert repeated("a b c d e a b c d e") == pytest.approx(2 / 7)


def test_the_front_has_what_nothing_smaller_is_below():
    class File:
        def __init__(self, bpw, kld):
            self.facts, self.answers = type("F", (), {"bpw": bpw}), type("A", (), {"kld": kld})

    files: list[Any] = [File(2, 1.0), File(3, 1.2), File(4, 0.5), File(4, 0.6), File(5, 0.5)]
    assert front(files) == [files[0], files[2]]


def test_what_was_found_of_a_file_in_parts_is_not_that_of_other_parts(tiny_gguf, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(side_by_side, "find_runtime", lambda: type("Runtime", (), {"manifest": {}}))
    parts, text = split(tiny_gguf, tmp_path, [2]), Text(np.zeros((2, 16), np.int32), {}, 32)
    Findings(tiny_gguf, parts[0], text).add(np.ones((5, 7), np.float32))
    assert Findings(tiny_gguf, parts[0], text).done == 1
    os.utime(parts[1], (1, 2**31))
    assert Findings(tiny_gguf, parts[0], text).done == 0
