"""`scripts/run check architectures`: its table, that crashes end no run, and a few architectures of each kind."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    """Let `check` be imported, as running a script does."""
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


def _task(name: str) -> Iterator[tuple[str, int]]:
    yield "first", 1
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "slow":
        os.fork()  # which holds the pipe as well
        time.sleep(60)
    if name == "failing":
        raise ValueError("of no value")
    yield "second", 2


def test_a_crash_and_a_time_limit_end_one_process_alone(tmp_path: Path) -> None:
    from check.architectures.forks import in_forks

    found = {e.name: e for e in in_forks(["good", "killed", "slow", "failing"], _task, 4, 5, tmp_path)}
    assert found["good"].told == [("first", 1), ("second", 2)]
    assert {name: e.reason for name, e in found.items()} == {
        "good": "",
        "killed": "ended by signal 9",
        "slow": "took more than 5 s",
        "failing": "ended in an error",
    }
    assert found["slow"].seconds < 50
    assert found["killed"].told == [("first", 1)]
    assert "of no value" in (tmp_path / "failing").read_text()


def test_the_table_says_every_reason_once() -> None:
    from check.architectures.__main__ import entry_of
    from check.architectures.columns import COLUMNS, Outcome
    from check.architectures.forks import Ended
    from check.architectures.page import table

    note = "attn_k_b of 2 blocks, in rows of 32 weights, is q8_0: not learned"
    good = Ended("llama", [(column, Outcome(error=1e-4, notes=[note])) for column in COLUMNS])
    crashed = Ended("mistral", [("made", Outcome()), ("walk", Outcome(error=0.0))], "ended by signal 11")
    refused = Ended("qwen2", [("made", Outcome()), *((c, Outcome("no a|b")) for c in COLUMNS[1:])])
    missing = Ended("phi", [("made", Outcome("transformers does not have it", unavailable=True))])
    entries = {e.name: entry_of(e, COLUMNS[1:]) for e in (good, crashed, refused, missing)}
    lines = table(entries).splitlines()
    assert lines[0].startswith("1 of 4 have every ✔.")
    assert lines[-4:] == [
        "| `llama` | dense | ✔ | ✔ | ✔ | ✔ | `attn_k_b` |",
        "| `mistral` | dense | ✔ | ended by signal 11 | not reached | not reached |  |",
        "| `qwen2` | dense | no a\\|b | as before | as before | as before |  |",
        "| `phi` | dense | transformers does not have it | as before | as before | as before |  |",
    ]


def test_a_cause_stands_beside_a_figure_and_in_place_of_a_message() -> None:
    from check.architectures.columns import COLUMNS, Outcome
    from check.architectures.page import Entry, table

    figures = [Outcome(), Outcome(), *(Outcome(f"error {e}", error=e) for e in (0.16, 0.14, 0.16))]
    refused = [Outcome(), Outcome(), *[Outcome("llama.cpp does not know the architecture OPTForCausalLM")] * 3]
    entries = {
        name: Entry(dict(zip(COLUMNS, outcomes, strict=True)), "2026-01-01", 1.0)
        for name, outcomes in (("phimoe", figures), ("opt", refused))
    }
    opt, phimoe = table(entries).splitlines()[-2:]
    assert opt == "| `opt` | dense | ✔ | llama.cpp does not have it | as before | as before |  |"
    assert "| error 0.16: llama.cpp norms without " in phimoe
    assert phimoe.endswith("| error 0.14 | as before |  |")
    good = Entry(dict.fromkeys(COLUMNS, Outcome()), "2026-01-01", 1.0)
    with pytest.raises(ValueError, match="opt has every ✔: take its obstacle out"):
        table({"opt": good})


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "0.00.025.387 E llama_model_load: error loading model: check_tensor_dims: tensor 'a' not found\n"
            "0.00.025.400 E llama_model_load_from_file_impl: failed to load model",
            "check_tensor_dims: tensor 'a' not found",
        ),
        ("#14 in _start ()\n../src/graph.cpp:20: fatal error\n30: No such file", "graph.cpp:20: fatal error"),
        ("assert x.ndim == 2", "assert x.ndim == 2"),
        ("", "AssertionError without a message"),
    ],
)  # fmt: skip
def test_a_reason_is_the_message_alone(said: str, reason: str) -> None:
    from check.architectures.measure import reason_of

    from tesseraq_gguf.errors import ModelError

    assert reason_of(AssertionError(said)) == reason
    assert reason_of(ModelError("tiny: llama.cpp does not know it")) == "llama.cpp does not know it"
    assert reason_of(KeyError("a")) == "KeyError: 'a'"


def test_what_is_not_measured_again_stays() -> None:
    from check.architectures.columns import Outcome
    from check.architectures.page import Entry

    earlier = Entry({"made": Outcome(), "walk": Outcome("bad"), "gptq": Outcome()}, "2026-01-01", 1.0)
    entry = Entry({"made": Outcome(), "walk": Outcome()}, "2026-01-02", 2.0).beside(earlier)
    assert entry.outcomes == {"made": Outcome(), "walk": Outcome(), "gptq": Outcome()}


@pytest.mark.runtime
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "bloom", "gpt_oss", "granitemoe", "lfm2"])
def test_a_few_of_each_kind_are_learned(name: str, tmp_path: Path) -> None:
    """Rows turned round, fused, interleaved with biases, stacked and joined; blocks of two kinds."""
    from check.architectures.forks import in_forks
    from check.architectures.measure import outcomes

    (tmp_path / "files").mkdir()
    task = partial(_measured, outcomes, tmp_path)
    (ended,) = in_forks([name], task, 1, 300, tmp_path)
    assert {column: outcome.reason for column, outcome in ended.told} == {"made": "", "walk": "", "gptq": ""}
    assert not ended.reason


def _measured(outcomes, folder: Path, name: str):
    return outcomes(name, folder / "files", ["walk", "gptq"])
