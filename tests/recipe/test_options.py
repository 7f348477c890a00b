"""What a recipe takes: fields in the forms people write them in, one line for the rest, nothing ignored in silence."""

# A recipe and the Python API take more forms than their annotations say, and refuse the rest in words.
# mypy: disable-error-code="arg-type"

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tesseraq_gguf import Recipe, convert, evaluate, inspect
from tesseraq_gguf.arguments import ON_COMMAND_LINE
from tesseraq_gguf.compute.schemes import KEY_VALUE_BITS, SCHEMES
from tesseraq_gguf.errors import TesseraqError, UsageError
from tesseraq_gguf.evaluation.simulation import Simulation
from tesseraq_gguf.learning.own_text import OwnText
from tesseraq_gguf.methods.table import METHODS, PARTS
from tesseraq_gguf.recipe.options import (
    CODEBOOKS,
    FINISHES,
    GRANULARITIES,
    INITIALISATIONS,
    OPTIONS,
    identity_of,
    said_of,
    settings_of,
)
from tesseraq_gguf.recipe.presets import PRESETS
from tesseraq_gguf.recipe.readers import AUTO

PAIRS = (("down_proj", "tsq3"), ("layers.0", "q4_0"))


def test_every_field_is_declared_and_nothing_else():
    assert sorted(OPTIONS) == sorted(field.name for field in dataclasses.fields(Recipe))


CHANGES: dict[str, dict[str, Any]] = {
    "model": {},
    "out": {},
    "type": {"type": "tsq3"},
    "rules": {"target_bpw": 3.0, "rules": "down=f16"},
    "target_bpw": {"target_bpw": 3.0},
    "target_size": {"target_size": "1G"},
    "candidates": {"target_bpw": 3.0, "candidates": "tsq2,q4_0"},
    "embedding_type": {"target_bpw": 3.0, "embedding_type": "f16"},
    "output_type": {"target_bpw": 3.0, "output_type": "f16"},
    "mmproj": {"mmproj": "mmproj.gguf"},
    "mmproj_type": {"mmproj": "mmproj.gguf", "mmproj_type": "q8_0"},
    "no_mtp": {"no_mtp": True},
    "split": {"split": "4G"},
    "preset": {"preset": "fast"},
    "method": {"method": "gptq"},
    "init": {"init": "none"},
    "calibration": {"calibration": "text.txt"},
    "samples": {"samples": 8},
    "seqlen": {"seqlen": 64},
    "imatrix": {"method": "rtn", "imatrix": "imatrix.gguf"},
    "write_imatrix": {"write_imatrix": "imatrix.gguf"},
    "token": {"token": "hf_secret"},
    "device": {"device": "cuda"},
    "memory_budget": {"memory_budget": "1G"},
    "work_dir": {"work_dir": "work"},
    "fresh": {"fresh": True},
    "seed": {"seed": 3},
    "processes": {"processes": 8},
    "rotate": {"rotate": True},
    "granularity": {"granularity": "channel"},
    "activations": {"activations": "a8"},
    "kv_bits": {"kv_bits": 8},
    "rank": {"method": "lrq", "rank": 4},
    "parts": {"type": "ptq1_61", "method": "ptq161", "parts": "mask"},
    "preprocess": {"preprocess": "text.txt"},
    "preprocess_steps": {"preprocess": "text.txt", "preprocess_steps": 3},
    "codebooks": {"type": "bcq4", "codebooks": "model"},
    "finish": {"finish": "distill"},
    "finish_steps": {"finish": "distill", "finish_steps": 3},
}
"""A recipe that has each option, where it has a meaning."""


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_changes_what_it_declares_to_change(name):
    option, changed = OPTIONS[name], CHANGES[name]
    before = Recipe("m", "o", **{key: value for key, value in changed.items() if key != name})
    after = Recipe("m", "o", **changed)
    assert (option.identity(before) != option.identity(after)) == (identity_of(before) != identity_of(after))
    assert option.said(after) in said_of(after)
    told = {key: value for key, value in option.metadata(after).items() if value is not None}
    assert told.items() <= settings_of(after).items()
    assert not told or settings_of(before) != settings_of(after)


def test_options_that_decide_what_blocks_learn_say_so():
    """A new option joins one of both: what decides nothing in the blocks, or what makes another run."""
    silent = {
        "model", "out", "type", "calibration", "preprocess", "preprocess_steps",  # what is read, and what becomes of it
        "mmproj", "mmproj_type", "no_mtp", "split", "imatrix", "write_imatrix",
        "token", "device", "memory_budget", "work_dir", "fresh",
        "finish", "finish_steps",
    }  # fmt: skip
    empty = {name for name, option in OPTIONS.items() if not option.identity(Recipe("m", "o"))}
    assert empty == silent


@pytest.mark.parametrize("value", [7, "", "  ", "hf_secret two", "hf_secrét", b"hf_secret"])
def test_a_token_is_shown_nowhere_even_where_it_is_refused(value):
    with pytest.raises(UsageError, match="token must be a token") as caught:
        Recipe("m", "o", token=value)
    assert "secr" not in str(caught.value)
    recipe = Recipe("m", "o", token=" hf_secret\n")
    assert recipe.token == "hf_secret"
    told = f"{recipe!r} {identity_of(recipe)} {settings_of(recipe)} {said_of(recipe)}"
    assert "hf_secret" not in told


@pytest.mark.parametrize(
    ("field", "value", "means"),
    [
        ("model", Path("a/model"), "a/model"),
        ("out", "out.gguf", Path("out.gguf")),
        ("type", "Q4_0", "q4_0"),
        ("type", np.str_("tsq3"), "tsq3"),
        ("rules", {"down_proj": "TSQ3", "layers.0": "q4_0"}, PAIRS),
        ("rules", [["down_proj", "tsq3"], ("layers.0", "q4_0")], PAIRS),
        ("rules", ["down_proj=tsq3", "layers.0=q4_0"], PAIRS),
        ("rules", "down_proj=tsq3\n\n# said\nlayers.0=Q4_0\n", PAIRS),
        ("target_bpw", 3, 3.0),
        ("target_bpw", np.float32(2.5), 2.5),
        ("target_size", "1.5M", 1_500_000),
        ("target_size", np.int64(10**6), 10**6),
        ("method", "GPTQ", "gptq"),
        ("rotate", np.bool_(True), True),
        ("samples", np.int32(8), 8),
        ("samples", torch.tensor(8), 8),
        ("seqlen", np.uint8(64), 64),
        ("memory_budget", "1G", 10**9),
        ("calibration", Path("text.txt"), "text.txt"),
        ("device", torch.device("cpu"), "cpu"),
        ("embedding_type", "TSQ4", "tsq4"),
        ("output_type", "F16", "f16"),
        ("work_dir", "work", Path("work")),
        ("kv_bits", np.int64(8), 8),
    ],
)
def test_what_people_write_is_what_was_meant(field, value, means):
    recipe = Recipe(**({"model": "m", "out": "o.gguf"} | {field: value}))
    found = getattr(recipe, field)
    assert found == means
    assert type(found) is type(means)


def test_candidates_in_any_form():
    for form in ("TSQ2, tsq3", ["tsq2", "TSQ3", "tsq3"], ("tsq2", "tsq3")):
        assert Recipe("m", "o", target_bpw=2.5, candidates=form).candidates == ("tsq2", "tsq3")


def test_the_embedding_has_the_type_that_serves():
    assert Recipe("m", "o").embedding_type == "q8_0"
    assert Recipe("m", "o", type="f16").embedding_type == "f16"
    assert Recipe("m", "o", target_size="1G").embedding_type == AUTO
    assert Recipe("m", "o", target_size="1G", embedding_type="f16").embedding_type == "f16"
    again = dataclasses.replace(Recipe("m", "o", target_size="1G"), processes=2)
    assert (again.embedding_type, again.processes) == (AUTO, 2)


WRONG = [
    ("model", None, "model must be a string or a path, not None"),
    ("model", "", "model must not be empty"),
    ("model", 3, "model must be a string or a path, not 3"),
    ("out", b"out.gguf", "out must be a string or a path"),
    ("type", None, "type must be the name of a tensor type, not None"),
    ("type", "q9", "unknown tensor type 'q9'"),
    ("rules", None, "rules must be pairs"),
    ("rules", 7, "rules must be pairs"),
    ("rules", [7], "rules must be a pair"),
    ("rules", {"down_proj": None}, "rules must be a pair"),
    ("rules", {"down_proj": "q9"}, "unknown tensor type 'q9'"),
    ("rules", {"down_proj(": "tsq2"}, "no regular expression"),
    ("rules", [("a{99999999999}", "tsq2")], "no regular expression"),
    ("rules", {"": "tsq2"}, "not of the form"),
    ("rules", ["down_proj"], "not of the form"),
    ("target_bpw", float("inf"), "target_bpw must be a number above 0, not inf"),
    ("target_bpw", float("nan"), "target_bpw must be a number above 0, not nan"),
    ("target_bpw", 0, "target_bpw must be a number above 0, not 0"),
    ("target_bpw", -1.5, "target_bpw must be a number above 0, not -1.5"),
    ("target_bpw", True, "target_bpw must be a number, not True"),
    ("target_bpw", "2.5", "target_bpw must be a number, not '2.5'"),
    ("target_size", 1e9, "target_size must be a whole number of bytes, or a size such as '200M', not 1000000000.0"),
    ("target_size", "much", "'much' is no size"),
    ("target_size", "9" * 500, "is no size"),
    ("target_size", 0, "target_size must be at least 1 byte, not 0"),
    ("method", None, "method must be one of tesseraq"),
    ("method", "magic", "unknown method 'magic'"),
    ("rotate", 1, "rotate must be True or False, not 1"),
    ("rotate", None, "rotate must be True or False, not None"),
    ("samples", 8.0, "samples must be a whole number, not 8.0"),
    ("samples", "8", "samples must be a whole number, not '8'"),
    ("samples", True, "samples must be a whole number, not True"),
    ("samples", 0, "samples must be at least 1, not 0"),
    ("seqlen", 32.0, "seqlen must be a whole number, not 32.0"),
    ("seqlen", 7, "seqlen must be at least 8 tokens, not 7"),
    ("seed", -1, "seed must be at least 0, not -1"),
    ("seed", 2**70, "seed must be less than"),
    ("seed", None, "seed must be a whole number, not None"),
    ("kv_bits", 5, "kv_bits 5 is not possible"),
    ("kv_bits", 8.0, "kv_bits must be a whole number"),
    ("memory_budget", [], "memory_budget must be a whole number"),
    ("device", None, "device must be a string or a path"),
    ("embedding_type", "PTQ1_61", "columns of the embedding have no order"),
    ("output_type", "ptq1_61", "columns of the embedding have no order"),
    ("embedding_type", 8, "embedding_type must be the name of a tensor type, not 8"),
    ("work_dir", 3, "work_dir must be a string or a path, not 3"),
    ("fresh", "no", "fresh must be True or False, not 'no'"),
    ("processes", 0, "processes must be at least 1"),
]


@pytest.mark.parametrize(("field", "value", "message"), WRONG, ids=[f"{f}-{str(v)[:20]}" for f, v, _ in WRONG])
def test_what_cannot_be_meant_is_one_line(field, value, message):
    with pytest.raises(UsageError) as caught:
        Recipe(**({"model": "m", "out": "o.gguf"} | {field: value}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_candidates_that_cannot_be_meant():
    for wrong in ((), "", [3], None, {"tsq2": 1}, ("f16", "bf16"), ("q9",)):
        with pytest.raises(UsageError):
            Recipe("m", "o", target_bpw=3.0, candidates=wrong)


IGNORED = [
    ({"type": "f16", "rank": 4}, "type f16 learns nothing: rank"),
    ({"type": "F16", "method": "gptq"}, "type f16 learns nothing: method"),
    ({"type": "f16", "granularity": "channel"}, "learns nothing: granularity"),
    ({"type": "bf16", "kv_bits": 8}, "learns nothing: kv_bits"),
    ({"type": "f16", "activations": "a8"}, "learns nothing: activations"),
    ({"type": "f16", "finish": "distill"}, "learns nothing: finish"),
    ({"type": "f16", "samples": 8}, "learns nothing: samples"),
    ({"type": "f16", "rotate": True}, "learns nothing: rotate"),
    ({"type": "f16", "embedding_type": "tsq4"}, "embedding_type: 'tsq4' can only be learned"),
    ({"type": "f16", "output_type": "q4_0"}, "output_type: 'q4_0' can only be learned"),
    ({"type": "f16", "rules": {"down": "tsq2"}}, "rules down: 'tsq2' can only be learned"),
    ({"type": "f16", "target_bpw": 3.0}, "give one of them"),
    ({"rank": 4}, "rank is lrq's alone"),
    ({"parts": "mask"}, "parts are ptq161's alone"),
    ({"method": "gptq", "init": "awq"}, "method gptq knows one way: init"),
    ({"method": "rtn", "init": "awq"}, "method rtn learns nothing: init"),
    ({"method": "rtn", "finish": "distill"}, "method rtn learns nothing: finish"),
    ({"method": "rtn", "samples": 8}, "method rtn uses no calibration: samples"),
    ({"method": "rtn", "preset": "best"}, "method rtn uses no calibration: preset"),
    ({"method": "rtn", "rotate": True, "preset": "best"}, "method rtn learns nothing: preset"),
    ({"candidates": ("tsq2",)}, "no target to choose types for: candidates"),
    ({"target_bpw": 3.0, "type": "tsq3"}, "give one of them"),
    ({"target_bpw": 3.0, "target_size": 10**9}, "two budgets"),
    ({"embedding_type": "auto"}, "target_size only"),
    ({"codebooks": "model"}, "have codebooks, not tsq2: codebooks"),
    ({"model": "demo", "token": "hf_secret"}, "demo is not downloaded from the hub: token"),
    ({"model": ".", "token": "hf_secret"}, ". is not downloaded from the hub: token"),
    ({"finish_steps": 5}, "finish_steps must go with finish distill"),
    ({"preprocess_steps": 5}, "preprocess_steps must go with preprocess TEXT"),
    ({"finish": "distill", "granularity": "channel"}, "not possible with granularity channel"),
    ({"finish": "distill", "activations": "a4"}, "not possible with rounded ones"),
]


@pytest.mark.parametrize(("options", "message"), IGNORED, ids=[str(o) for o, _ in IGNORED])
def test_what_would_be_ignored_is_refused(options, message):
    with pytest.raises(UsageError) as caught:
        Recipe(**{"model": "m", "out": "o"} | options)
    assert message in str(caught.value)


def test_options_that_do_have_an_effect():
    Recipe("m", "o", codebooks="model", rules={"down": "bcq4"})
    Recipe("m", "o", codebooks="model", embedding_type="bcq4")
    Recipe("m", "o", method="rtn", target_bpw=3.0, samples=8)
    Recipe("m", "o", method="rtn", preprocess="text.txt", preset="fast", seqlen=32)
    Recipe("m", "o", type="f16", output_type="q8_0", rules={"down": "q8_0"})
    Recipe("m", "o", target_size="1G", candidates="q4_0,f16", output_type="f16")


def test_the_command_line_hears_of_its_options():
    token = ON_COMMAND_LINE.set(True)
    try:
        with pytest.raises(UsageError, match="--kv-bits 5 is not possible"):
            Recipe("m", "o", kv_bits=5)
        with pytest.raises(UsageError, match="--method gptq knows one way: --init"):
            Recipe("m", "o", method="gptq", init="awq")
    finally:
        ON_COMMAND_LINE.reset(token)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda file: convert("demo"), "convert takes a Recipe"),
        (lambda file: convert(None), "convert takes a Recipe"),
        (lambda file: inspect(None), "file must be a string or a path, not None"),
        (lambda file: inspect("nowhere.gguf"), "no file at nowhere.gguf"),
        (lambda file: evaluate(None, "text.txt"), "file must be a string or a path, not None"),
        (lambda file: evaluate(file, 3), "text must be a string or a path, not 3"),
        (lambda file: evaluate(file, "nowhere.txt"), "no text at nowhere.txt"),
        (lambda file: evaluate("nowhere.gguf", "nowhere.txt"), "no file at nowhere.gguf"),
        (lambda file: evaluate(file, "nowhere.txt", ctx=512.0), "ctx must be a whole number, not 512.0"),
        (lambda file: evaluate(file, "nowhere.txt", ctx="512"), "ctx must be a whole number, not '512'"),
        (lambda file: evaluate(file, "nowhere.txt", chunks=True), "chunks must be a whole number, not True"),
        (lambda file: evaluate(file, "nowhere.txt", reference=7), "reference must be a string or a path, not 7"),
        (lambda file: Simulation().evaluate(file, None), "text must be a string or a path, not None"),
        (lambda file: OwnText().write(None, "own.txt"), "model must be a string or a path, not None"),
        (lambda file: OwnText().write(Path("nowhere.gguf"), "own.txt"), "no model at nowhere.gguf"),
        (lambda file: OwnText().write("demo", 3), "out must be a string or a path, not 3"),
        (lambda file: OwnText(tokens=1e5), "tokens must be a whole number, not 100000.0"),
        (lambda file: OwnText(length="8"), "length must be a whole number, not '8'"),
        (lambda file: OwnText(seed=None), "seed must be a whole number, not None"),
        (lambda file: OwnText().write("demo", "own.txt", device=0), "device must be a string or a path, not 0"),
    ],
)
def test_other_functions_say_in_one_line_what_cannot_be_meant(call, message, tiny_gguf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TesseraqError) as caught:
        call(tiny_gguf)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


ODD = st.sampled_from(
    [
        None,
        True,
        0,
        1,
        -3,
        8,
        2**64,
        0.5,
        32.0,
        float("nan"),
        float("inf"),
        "",
        "1G",
        "tsq2",
        b"x",
        [],
        {},
        (),
        object(),
    ]
)
SENSIBLE = {
    "type": st.sampled_from(["tsq2", "q4_k", "bcq4", "ptq1_61", "f16", "Q8_0"]),
    "rules": st.sampled_from([(), {"down": "tsq3"}, "down=f16", [("up", "q8_0")]]),
    "target_bpw": st.sampled_from([None, 2.5, 4]),
    "target_size": st.sampled_from([None, "1G", 10**8]),
    "candidates": st.sampled_from([("tsq2", "tsq3"), "q4_0,f16"]),
    "method": st.sampled_from(list(METHODS)),
    "init": st.sampled_from(INITIALISATIONS),
    "rotate": st.booleans(),
    "finish": st.sampled_from(FINISHES),
    "finish_steps": st.sampled_from([None, 3]),
    "rank": st.sampled_from([None, 4]),
    "parts": st.sampled_from(PARTS),
    "granularity": st.sampled_from(GRANULARITIES),
    "activations": st.sampled_from(SCHEMES),
    "kv_bits": st.sampled_from([None, *KEY_VALUE_BITS]),
    "codebooks": st.sampled_from(CODEBOOKS),
    "preprocess": st.sampled_from([None, "text.txt"]),
    "preprocess_steps": st.sampled_from([None, 3]),
    "preset": st.sampled_from(list(PRESETS)),
    "samples": st.sampled_from([None, 8]),
    "embedding_type": st.sampled_from([None, AUTO, "f16", "tsq4", "PTQ1_61"]),
    "output_type": st.sampled_from([None, "q8_0", "tsq3"]),
}


@settings(max_examples=400, deadline=None)
@given(options=st.fixed_dictionaries({}, optional=SENSIBLE))
def test_options_together_are_a_recipe_or_one_line(options):
    try:
        recipe = Recipe("m", "o", **options)
    except TesseraqError as error:
        assert "\n" not in str(error)
        return
    assert Recipe(**{f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}) == recipe
    assert recipe.settings.batch >= 1
    assert recipe.calibrates <= recipe.learns


@settings(max_examples=400, deadline=None)
@given(field=st.sampled_from(list(OPTIONS)), value=ODD)
def test_odd_values_are_a_recipe_or_one_line(field, value):
    try:
        Recipe(**({"model": "m", "out": "o"} | {field: value}))
    except TesseraqError as error:
        assert "\n" not in str(error)
