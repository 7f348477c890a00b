"""What is said of a machine, and when it is said to be amiss."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from tesseraq_gguf.errors import EvaluationError, RuntimeMissingError
from tesseraq_gguf.evaluation import doctor, trial
from tesseraq_gguf.evaluation.speed import Speed
from tesseraq_gguf.evaluation.trial import Trial
from tesseraq_gguf.gguf_files.inspection import inspect
from tesseraq_gguf.runtime.load import check_loads
from tesseraq_gguf.runtime.locate import Runtime

RESULTS = Path(__file__).parents[2] / "docs" / "results"

USUAL = Trial(Speed(300.0, 30.0), Speed(100.0, 10.0))


@pytest.fixture
def runtime(tmp_path):
    return Runtime(tmp_path, {"instruction_sets": ["AVX2"], "built": "2026-11-30T01:02:03+00:00"})


@pytest.fixture
def quiet(monkeypatch, runtime):
    """A machine on which nothing is amiss."""
    monkeypatch.setattr(doctor, "find_runtime", lambda *_: runtime)
    monkeypatch.setattr(doctor, "_features", lambda _: "CPU : AVX2 = 1 | REPACK = 1 |")
    monkeypatch.setattr(doctor, "cpu_flags", lambda: {"avx2"})
    monkeypatch.setattr(doctor, "find_gpus", list)
    monkeypatch.setattr(doctor.psutil, "cpu_percent", lambda interval: 3.0)
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: SimpleNamespace(available=8e9, total=16e9))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e11))
    monkeypatch.setattr(doctor, "try_speed", lambda _: USUAL)


def found(topic, **options):
    (only,) = (finding for finding in doctor.examine(**options) if finding.topic == topic)
    return only


def test_nothing_is_amiss_on_a_machine_that_has_everything(quiet, tmp_path):
    every = list(doctor.examine(here=tmp_path))
    assert [f.state for f in every] == ["good"] * 8 and not any(f.advice for f in every)
    topics = ["versions", "runtime", "processor", "GPU", "memory", "disk, cache", "disk, here", "speed"]
    assert [f.topic for f in every] == topics
    assert "kernels: AVX2: 8 rows" in every[2].said
    assert "prompts 3.0 ×" in every[-1].said and "answers 3.0 ×" in every[-1].said
    assert [f.topic for f in doctor.examine(timed=False, here=tmp_path)] == topics[:-1]


@pytest.mark.parametrize(
    ("features", "kernels"),
    [
        ("CPU : AVX2 = 1 | AVX512 = 1 | AVX512_VBMI = 1 | AVX512_VNNI = 1 |", "AVX-512 with VNNI and VBMI"),
        ("CPU : AVX2 = 1 | AVX512 = 1 | AVX512_VBMI = 0 | AVX512_VNNI = 1 |", "AVX-512 with VNNI: "),
        ("CPU : AVX_VNNI = 1 | AVX2 = 1 | AVX512 = 1 |", "AVX2 with VNNI"),
        ("CPU : NEON = 1 | ARM_FMA = 1 | DOTPROD = 1 |", "ARM's int8 dot products"),
        ("CPU : NEON = 1 | MATMUL_INT8 = 1 | DOTPROD = 1 |", "ARM's int8 matrix products"),
        ("CPU : SSE3 = 1 | LLAMAFILE = 1 |", None),
    ],
)
def test_kernels_follow_from_what_llama_cpp_says(features, kernels):
    said = doctor._kernels(features)
    assert said is None if kernels is None else said.startswith(kernels)


def test_a_runtime_that_is_missing_is_said_with_what_to_run(quiet, monkeypatch, tmp_path):
    def missing(*_):
        raise RuntimeMissingError("no runtime is installed; run: this")

    monkeypatch.setattr(doctor, "find_runtime", missing)
    every = list(doctor.examine(here=tmp_path))
    assert [f.topic for f in every if f.state == "bad"] == ["runtime"]
    assert next(f for f in every if f.state == "bad").advice.endswith("run: this")
    assert "speed" not in {f.topic for f in every}


def test_a_runtime_that_does_not_start_is_to_be_built_anew(quiet, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_features", lambda _: "")
    every = [f for f in doctor.examine(here=tmp_path) if f.topic == "runtime"]
    assert [f.state for f in every] == ["good", "bad"]
    assert every[1].advice.endswith("tesseraq-gguf runtime build --force")


def test_instruction_sets_that_are_not_used_are_named(quiet, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "cpu_flags", lambda: {"avx2", "fma"})
    processor = found("processor", here=tmp_path)
    assert processor.state == "poor" and "no use of FMA." in processor.advice


@pytest.mark.parametrize(
    ("change", "topic", "advice"),
    [
        (("psutil.virtual_memory", lambda: SimpleNamespace(available=1e9, total=2e9)), "memory", "free some"),
        (("shutil.disk_usage", lambda _: SimpleNamespace(free=1e9)), "disk, here", "--work-dir"),
        (("shutil.disk_usage", lambda _: SimpleNamespace(free=1e9)), "disk, cache", "TESSERAQ_GGUF_CACHE"),
        (("os.access", lambda *_: False), "disk, here", "another folder"),
        (("_version", lambda name: None if name == "torch" else "1"), "versions", "pip install torch"),
    ],
)
def test_what_is_short_is_said(change, topic, advice, quiet, monkeypatch, tmp_path):
    monkeypatch.setattr(f"tesseraq_gguf.evaluation.doctor.{change[0]}", change[1])
    finding = found(topic, here=tmp_path)
    assert finding.state != "good" and advice in finding.advice


def test_a_gpu_that_nothing_uses_is_said(quiet, monkeypatch, tmp_path):
    def only_the_processors(backend="cpu"):
        if backend == "cuda":
            raise RuntimeMissingError("none")
        return Runtime(tmp_path, {})

    monkeypatch.setattr(doctor, "find_gpus", lambda: [SimpleNamespace(name="RTX", capability="8.9")])
    monkeypatch.setattr(doctor, "find_runtime", only_the_processors)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    gpu, its_runtime = (f for f in doctor.examine(here=tmp_path) if f.topic == "GPU")
    assert gpu.said == "RTX (8.9)" and "CUDA build of torch" in gpu.advice
    assert its_runtime.advice.endswith("--backend cuda")


@pytest.mark.parametrize(
    ("ours", "busy", "portable", "advice"),
    [
        (Speed(100.0, 30.0), 3.0, False, "throttled"),
        (Speed(300.0, 10.0), 3.0, False, "throttled"),
        (Speed(100.0, 30.0), 90.0, False, "90 % of the processors"),
        (Speed(100.0, 30.0), 3.0, True, "this very processor"),
    ],
)
def test_a_slow_machine_is_said_to_be_one(ours, busy, portable, advice, quiet, monkeypatch, runtime, tmp_path):
    monkeypatch.setattr(doctor, "try_speed", lambda _: Trial(ours, USUAL.theirs))
    monkeypatch.setattr(doctor.psutil, "cpu_percent", lambda interval: busy)
    runtime.manifest["portable"] = portable
    speed = found("speed", here=tmp_path)
    assert speed.state == "poor" and advice in speed.advice


def test_a_runtime_that_fails_while_it_is_timed_is_bad(quiet, monkeypatch, tmp_path):
    def fail(_):
        raise EvaluationError("llama-bench failed on a file: a trap")

    monkeypatch.setattr(doctor, "try_speed", fail)
    assert found("speed", here=tmp_path).state == "bad"


def test_what_is_usual_stands_in_the_pages():
    """The rows of both types on each machine, prompts first."""
    ratios = []
    for page in ("speed.md", "speed-zen5.md"):
        text = (RESULTS / page).read_text(encoding="utf-8")
        rates = [
            re.search(rf"^\| {t} \| ([\d.]+) \| [\d%]+ \| ([\d.]+) \|", text, re.MULTILINE) for t in ("tsq2", "q4_0")
        ]
        ours, theirs = ([float(rate) for rate in found.groups()] for found in rates)
        ratios.append([a / b for a, b in zip(ours, theirs, strict=True)])
    for usual, measured in zip((trial.USUAL_PROMPT, trial.USUAL_ANSWER), zip(*ratios, strict=True), strict=True):
        assert usual == pytest.approx((min(measured), max(measured)), abs=0.05)


@pytest.mark.runtime
@pytest.mark.parametrize("type", [trial.OURS, trial.THEIRS])
def test_the_model_of_the_trial_is_of_one_type_and_loads(type, tmp_path):
    trial.write_trial(tmp_path / "trial.gguf", type)
    seen = inspect(tmp_path / "trial.gguf")
    assert {t.type: t.tensors for t in seen.types} == {type: 9, "f32": 3}
    check_loads(tmp_path / "trial.gguf")


@pytest.mark.runtime
def test_the_runtime_says_what_it_chose():
    features = doctor._features(doctor.find_runtime())
    assert doctor._kernels(features)


def test_the_command_prints_a_line_each_and_ends_by_what_it_found(quiet, run, monkeypatch):
    told = run("doctor")
    assert (told.code, told.err) == (0, "")
    assert [line[0] for line in told.out.splitlines()] == ["✓"] * 8
    monkeypatch.setattr(doctor, "_features", lambda _: "")
    told = run("doctor", "--no-speed")
    assert told.code == 1 and "✗ runtime" in told.out and "→ build it anew" in told.out
    told = run("doctor", "--no-speed", "--json")
    assert told.code == 1
    assert {row["topic"]: row["state"] for row in json.loads(told.out)}["memory"] == "good"
