"""Evaluation: what is read from llama-perplexity, and what is said when it fails."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tesseraq_gguf.errors import EvaluationError, RuntimeMissingError, UsageError
from tesseraq_gguf.evaluation import perplexity as evaluation
from tesseraq_gguf.evaluation.perplexity import evaluate
from tesseraq_gguf.gguf_files.inspection import open_gguf

PLAIN = """\
perplexity: tokenizing the input ..
perplexity: calculating perplexity over 3 chunks, n_ctx=64, batch_size=64, n_seq=1
perplexity: 0.01 seconds per pass - ETA 0.00 minutes
[1]11.1234,[2]12.5,[3]23.4567,
Final estimate: PPL = 23.4567 +/- 1.23456
"""
TABLE = """\
kl_divergence: computing over 2 chunks, n_ctx=64, batch_size=64, n_seq=1
chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence              Δp RMS            Same top p
   1      10.6123 ±    3.1482       0.00031 ±    0.00012       0.00130 ±    0.00002     0.100 ±  0.010 %    99.107 ±  0.510 %
   2      17.9432 ±    3.2513      -0.00031 ±    0.00012       0.01230 ±    0.00002       nan ±   -nan %    98.107 ±  0.510 %

"""  # noqa: E501
SUMMARY = """\
====== Perplexity statistics ======
Mean PPL(Q)                   :  17.943210 ±   3.251300
Mean PPL(base)                :  17.000000 ±   3.000000
Mean ln(PPL(Q)/PPL(base))     :   0.053990 ±   0.000120
====== KL divergence statistics ======
Mean    KLD:   0.012345 ±   0.000020
Maximum KLD:   0.500000
Median  KLD:   0.010000
====== Token probability statistics ======
Mean    Δp: -0.100 ± 0.010 %
Same top p: 98.107 ± 0.510 %
"""


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Return a function that puts a shell script in the place of llama-perplexity."""
    file = tmp_path / "llama-perplexity"
    runtime = SimpleNamespace(tool=lambda _name: file)
    monkeypatch.setattr(evaluation, "find_runtime", lambda: runtime)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()

    def write(script: str) -> Path:
        (tmp_path / "plain").write_text(PLAIN)
        (tmp_path / "table").write_text(TABLE)
        (tmp_path / "summary").write_text(TABLE + SUMMARY)
        file.write_text(f"#!/bin/sh\ncd {tmp_path}\n{script}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        return tmp_path

    return write


@pytest.fixture
def text(long_text):
    return long_text


def test_perplexity(tool, tiny_gguf, text):
    folder = tool('echo "$@" > arguments; cat plain')
    seen = []
    result = evaluate(tiny_gguf, text, ctx=64, chunks=3, watch=lambda *step: seen.append(step))
    assert (result.perplexity, result.perplexity_error) == (23.4567, 1.23456)
    assert result.kld is None
    assert result.top1_agreement is None
    assert result.bytes == tiny_gguf.stat().st_size
    assert 16 < result.bpw < 32
    assert result.parts == 1
    figures = ["perplexity", "perplexity_error", "kld", "top1_agreement", "bytes", "bpw", "parts"]
    assert list(result.to_json()) == figures
    assert seen[-1] == ("model", 3, 3)
    arguments = (folder / "arguments").read_text().split()
    for name, value in {"-m": tiny_gguf, "-f": text, "-c": 64, "--chunks": 3}.items():
        assert arguments[arguments.index(name) + 1] == str(value)


@pytest.mark.parametrize(("answer", "perplexity", "kld"), [("summary", 17.94321, 0.012345), ("table", 17.9432, 0.0123)])
def test_divergence(answer, perplexity, kld, tool, tiny_gguf, text):
    folder = tool(f'case "$*" in *--kl-divergence) cat {answer};; *) cat plain;; esac')
    result = evaluate(tiny_gguf, text, ctx=64, reference=tiny_gguf)
    assert (result.perplexity, result.kld, result.top1_agreement) == (perplexity, kld, 0.98107)
    assert not list((folder / "temporary").iterdir())


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "kill -ILL $$",
            "instruction set of another processor. Build it again on this one: tesseraq-gguf runtime build",
        ),
        ("kill -SEGV $$", "was killed by SIGSEGV"),
        ("echo 'error: no such file'; echo; exit 3", "failed with exit code 3: error: no such file"),
        (
            "echo '0.1 E llama_model_load: error loading model: bad type'; echo '0.2 E x: unable to load'; exit 1",
            "failed with exit code 1: bad type",
        ),
        ("echo hello", "gave no perplexity: hello"),
        ("true", "gave no perplexity: it said nothing"),
    ],
)
def test_a_failing_tool(script, message, tool, tiny_gguf, text):
    tool(script)
    with pytest.raises(EvaluationError, match="llama-perplexity") as failed:
        evaluate(tiny_gguf, text, ctx=64)
    assert message in str(failed.value)
    assert "\n" not in str(failed.value)


NOTHING = "[1]nan,[2]-nan,\n0.1 E Unexpected negative standard deviation of log(prob)\n"
NAN_SUMMARY = SUMMARY.replace("17.943210 ±   3.251300", "nan ± -nan").replace("0.012345 ±   0.000020", "nan ± nan")


@pytest.mark.parametrize(
    ("reference", "model", "named"),
    [
        (None, NOTHING, "the perplexity of tiny.gguf is nan, not a number"),
        (None, PLAIN.replace("PPL = 23.4567", "PPL = inf"), "the perplexity of tiny.gguf is inf, not a number"),
        (None, PLAIN.replace("1.23456", "-nan"), "the perplexity's standard error of tiny.gguf is nan"),
        (NOTHING, SUMMARY, "the perplexity of reference.gguf is nan, not a number"),
        (PLAIN, NAN_SUMMARY, "the perplexity of tiny.gguf is nan, not a number"),
        (PLAIN, TABLE.replace("17.9432", "nan"), "the perplexity of tiny.gguf is nan, not a number"),
        (PLAIN, SUMMARY.replace("0.012345 ±", "nan ±"), "the divergence of tiny.gguf is nan, not a number"),
        (PLAIN, TABLE.replace("0.01230 ±", "-nan ±"), "the divergence of tiny.gguf is nan, not a number"),
        (PLAIN, SUMMARY.replace("98.107 ±", "nan ±"), "the agreement of tiny.gguf is nan, not a number"),
    ],
)
def test_figures_that_are_no_numbers(reference, model, named, tool, tiny_gguf, text, run, monkeypatch):
    folder = tool('case "$*" in *--kl-divergence) cat m;; *reference.gguf*) cat r;; *) cat m;; esac')
    (folder / "m").write_text(model)
    (folder / "r").write_text(reference or "")
    monkeypatch.chdir(folder)
    for name in ("tiny.gguf", "reference.gguf"):
        (folder / name).write_bytes(tiny_gguf.read_bytes())
    options = ["--reference", "reference.gguf"] if reference else []
    answer = run("eval", "tiny.gguf", "--text", text, "--ctx", 64, "--json", *options)
    assert (answer.code, answer.out) == (1, "")
    assert named in answer.error


def test_a_text_that_is_too_short(tool, tiny_gguf, text):
    tool("echo 'perplexity: the data file you provided tokenizes to only 100 tokens'")
    with pytest.raises(UsageError, match="is too short: 100 tokens; chunks of 64 need at least 128"):
        evaluate(tiny_gguf, text, ctx=64)


def test_a_disk_without_room_is_noticed_before_it_is_full(tool, tiny_gguf, text, monkeypatch):
    folder = tool("cat plain; exec sleep 60")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    started = time.monotonic()
    with pytest.raises(EvaluationError, match="comparing 3 chunks with the reference needs"):
        evaluate(tiny_gguf, text, ctx=64, reference=tiny_gguf)
    assert time.monotonic() - started < 30
    assert not list((folder / "temporary").iterdir())


def test_an_interrupt_stops_the_tool(tool, tiny_gguf, text):
    folder = tool("echo $$ > pid; cat plain; exec sleep 60")

    def interrupt(*_step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_gguf, text, ctx=64, watch=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "pid").read_text()), 0)


def test_a_reference_with_another_vocabulary(tool, tiny_gguf, text, monkeypatch):
    tool("cat plain")
    counts = {"tiny.gguf": 320, "reference.gguf": 100}
    monkeypatch.setattr(evaluation, "vocabulary_size", lambda file: counts[file.name])
    with pytest.raises(UsageError, match="vocabulary has 100 tokens, not 320"):
        evaluate(tiny_gguf, text, reference="reference.gguf")


@pytest.mark.runtime
def test_the_real_tool_finds_a_file_equal_to_itself(tiny_gguf, text):
    try:
        alone = evaluate(tiny_gguf, text, ctx=64, chunks=4)
        same = evaluate(tiny_gguf, text, ctx=64, chunks=4, reference=tiny_gguf)
    except RuntimeMissingError as error:
        pytest.fail(f"{error} (scripts/test does it)")
    assert same.perplexity == pytest.approx(alone.perplexity, rel=1e-3)
    assert same.kld == pytest.approx(0, abs=1e-4)
    assert same.top1_agreement is not None and same.top1_agreement > 0.99


@pytest.mark.runtime
@pytest.mark.parametrize(
    "options", [[], ["--reference", "good"], ["--simulate"], ["--simulate", "--reference", "good"]]
)
def test_a_broken_model_has_no_figures(options, run, tiny_gguf, text, tmp_path):
    (norm,) = (tensor for tensor in open_gguf(tiny_gguf).tensors if tensor.name == "output_norm.weight")
    content = bytearray(tiny_gguf.read_bytes())
    content[norm.offset : norm.offset + norm.bytes] = np.full(norm.weights, np.nan, np.float32).tobytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(content)
    options = [str(tiny_gguf) if option == "good" else option for option in options]
    answer = run("eval", broken, "--text", text, "--ctx", 64, "--chunks", 2, "--json", *options)
    assert (answer.code, answer.out) == (1, "")
    if "--simulate" not in options:
        assert "broken.gguf is nan, not a number" in answer.error


@pytest.mark.runtime
def test_why_llama_cpp_refuses_a_file(run, tiny_gguf, text, tmp_path):
    file = tmp_path / "renamed.gguf"
    file.write_bytes(tiny_gguf.read_bytes().replace(b"blk.1.attn_norm.weight", b"blk.1.attn_morn.weight"))
    reason = "tensor 'blk.1.attn_norm.weight' not found"
    for command in ("eval FILE --text TEXT", "chat FILE -p hi", "serve FILE --port 18080"):
        if "serve" in command and os.name != "posix":
            continue
        answer = run(*command.replace("FILE", str(file)).replace("TEXT", str(text)).split())
        assert reason in answer.error, command


@pytest.mark.runtime
def test_the_real_tool_refuses_a_short_text(tiny_gguf, text):
    with pytest.raises(UsageError, match="is too short"):
        evaluate(tiny_gguf, text, ctx=4096)
