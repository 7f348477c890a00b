"""What a run is and what its file says of it: as they were recorded, so that earlier work and files stay what they are.

`recorded_runs.json` has both for many recipes. A change there makes work directories of before useless, or files that
say something else: it must be meant.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tesseraq_gguf import Recipe
from tesseraq_gguf.conversion import identity
from tesseraq_gguf.conversion.identity import identity_of, metadata_of, preprocessing_of
from tesseraq_gguf.conversion.type_plan import TypePlan
from tesseraq_gguf.learning.calibration import Calibration

RUNS = json.loads(Path(__file__).with_name("recorded_runs.json").read_text(encoding="utf-8"))
TOKENS = torch.arange(24).reshape(3, 8)


@pytest.mark.parametrize("run", RUNS, ids=[str(run["options"]) for run in RUNS])
def test_identity_and_metadata_are_those_recorded(run, monkeypatch):
    monkeypatch.setattr(identity, "learning_program", lambda: "PROGRAM")
    monkeypatch.setattr(torch, "__version__", "TORCH")
    recipe = Recipe("model", Path("out.gguf"), **run["options"])
    calibration = Calibration("python-topics", TOKENS, TOKENS[:1] + 1) if recipe.calibrates else None
    text = Calibration("own", TOKENS + 5) if recipe.preprocess else None
    main = recipe.candidates[0] if recipe.budgeted else recipe.type
    plan = TypePlan({"layers.0.a": main, "layers.0.b": "tsq3"}, {"embed": "tsq4", "head": "q4_0"}, {"norm": "f32"}, {})
    found = identity_of(recipe, "0123abcd", calibration, torch.bfloat16, plan, "embed")
    found |= preprocessing_of(recipe, text)
    # a run compares what it is with what an earlier one was by key: their order is nobody's
    assert json.dumps(found, sort_keys=True) == json.dumps(run["identity"], sort_keys=True)
    ranges = {"layers.0.a": (-1.5, 2.25)} if recipe.scheme.static else {}
    said = metadata_of(recipe, 500, calibration, ranges)
    assert json.dumps(said) == json.dumps(run["metadata"])
