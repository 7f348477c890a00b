"""What a run is and what its file says of it: as they were recorded, so that earlier work and files stay what they are.

`recorded_runs.json` has both for many recipes. A change there makes work directories of before useless, or files that
say something else: it must be meant.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tesseraq_gguf import Recipe
from tesseraq_gguf.conversion import identity
from tesseraq_gguf.conversion.identity import identity_of, metadata_of, preprocessing_of
from tesseraq_gguf.conversion.type_plan import TypePlan
from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.learning.calibration import Calibration
from tesseraq_gguf.recipe.options import command_of

RUNS = json.loads(Path(__file__).with_name("recorded_runs.json").read_text(encoding="utf-8"))
TOKENS = torch.arange(24).reshape(3, 8)


@pytest.mark.parametrize("options", [each["options"] for each in RUNS], ids=str)
def test_the_command_in_a_file_makes_the_same_recipe(options, run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    seen = []

    def capture(recipe, _progress):
        seen.append(recipe)
        raise UsageError("seen")

    monkeypatch.setattr("tesseraq_gguf.conversion.pipeline.convert", capture)
    alone = {name: value for name, value in options.items() if name != "processes"}
    recipe = Recipe("OWNER/model@main", tmp_path / "other.gguf", device="cpu", work_dir=Path("w"), fresh=True, **alone)
    program, *words = command_of(recipe)
    assert program == "tesseraq-gguf"
    run(*words)
    assert seen == [replace(recipe, out=Path("out.gguf"), work_dir=None, fresh=False)]


def test_a_command_has_names_in_place_of_paths(tmp_path):
    for name in ("model", "start.gguf", "text.txt"):
        (tmp_path / name).touch()
    options = {"init": f"file:{tmp_path}/start.gguf", "calibration": tmp_path / "text.txt", "processes": 2}
    words = command_of(Recipe(tmp_path / "model", tmp_path / "my.gguf", write_imatrix=tmp_path / "i.gguf", **options))
    assert shlex.join(words) == (
        "torchrun --nproc-per-node=2 -m tesseraq_gguf convert model out.gguf --init file:start.gguf "
        "--calibration text.txt"
    )
    rules = (("down|up", "q8_0"), ("lm_head", "f16"))
    mixed = Recipe("demo", Path("out.gguf"), type="q4_k_m", rules=rules, embedding_type="q6_k")
    assert shlex.join(command_of(mixed)) == (
        "tesseraq-gguf convert demo out.gguf --type q4_k_m --tensor-type 'down|up=q8_0' --tensor-type lm_head=f16 "
        "--embedding-type q6_k"
    )


@pytest.mark.parametrize("recorded", RUNS, ids=[str(each["options"]) for each in RUNS])
def test_identity_and_metadata_are_those_recorded(recorded, monkeypatch):
    monkeypatch.setattr(identity, "learning_program", lambda: "PROGRAM")
    monkeypatch.setattr(torch, "__version__", "TORCH")
    recipe = Recipe("model", Path("out.gguf"), **recorded["options"])
    calibration = Calibration("python-topics", TOKENS, TOKENS[:1] + 1) if recipe.calibrates else None
    text = Calibration("own", TOKENS + 5) if recipe.preprocess else None
    main = recipe.candidates[0] if recipe.budgeted else recipe.type
    plan = TypePlan({"layers.0.a": main, "layers.0.b": "tsq3"}, {"embed": "tsq4", "head": "q4_0"}, {"norm": "f32"}, {})
    found = identity_of(recipe, "0123abcd", calibration, torch.bfloat16, plan, "embed")
    found |= preprocessing_of(recipe, text)
    # a run compares what it is with what an earlier one was by key: their order is nobody's
    assert json.dumps(found, sort_keys=True) == json.dumps(recorded["identity"], sort_keys=True)
    ranges = {"layers.0.a": (-1.5, 2.25)} if recipe.scheme.static else {}
    monkeypatch.setattr(identity, "version", lambda _: "VERSION")
    said = metadata_of(recipe, 500, calibration, ranges)
    assert json.dumps(said) == json.dumps(recorded["metadata"])
