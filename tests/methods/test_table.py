"""The table of methods: each of its rows can be built, without torch until then, and says what is true of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tesseraq_gguf import Recipe
from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.methods.awq import AWQ, ClipSearch
from tesseraq_gguf.methods.building import method_of
from tesseraq_gguf.methods.gptq import GPTQ
from tesseraq_gguf.methods.omniquant import OmniQuant
from tesseraq_gguf.methods.ptq161 import Ptq161
from tesseraq_gguf.methods.qep import QEP
from tesseraq_gguf.methods.rotated import Rotated
from tesseraq_gguf.methods.scaled_rounding import ScaledRounding
from tesseraq_gguf.methods.start import AsItStarts, Nearest
from tesseraq_gguf.methods.table import METHODS, STAGES, STARTS, Settings
from tesseraq_gguf.methods.tesseraq import SOFT_SHARE, TesseraQ
from tesseraq_gguf.types.grids import GRIDS

SETTINGS = Settings(6, 4, 6e-2, 1e-2, width=64, own={"rank": None, "parts": "scales"})
STARTED = {
    "gptq": GPTQ(), "awq+gptq": GPTQ(), "qep": QEP(), "awq+qep": QEP(), "awq": ClipSearch(),
    "omniquant": OmniQuant(30, 4), "none": Nearest(),
}  # fmt: skip


def test_importing_the_table_is_cheap():
    code = "import tesseraq_gguf.methods.table, sys; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_stages_are_those_of_the_method():
    assert len(SOFT_SHARE) == STAGES
    assert SETTINGS.all_steps == 120


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", [row.name for row in METHODS.values() if row.begins])
def test_what_learns_begins_at_any_start(name, start):
    method: Any = method_of(name, start, SETTINGS)
    if STARTS[start].scaled:
        assert isinstance(method, AWQ)
        method = method.then
    assert method.initialisation == STARTED[start]


def test_methods_are_built_with_what_was_asked_for():
    assert method_of("tesseraq", "gptq", SETTINGS) == TesseraQ(6, 4, 6e-2, 1e-2, 1e-2, initialisation=GPTQ())
    assert method_of("ptq161", "awq", SETTINGS) == Ptq161(120, 4, "scales")
    for name in ("lrq", "flexround"):
        method = method_of(name, "none", SETTINGS)
        assert isinstance(method, ScaledRounding)
        assert (method.steps, method.batch) == (120, 4)


def test_the_others_are_as_they_start():
    found = {name: method_of(name, "none", SETTINGS) for name, row in METHODS.items() if row.start}
    assert found == {
        "awq+gptq": AWQ(AsItStarts(GPTQ())),
        "gptq": AsItStarts(GPTQ()),
        "awq+qep": AWQ(AsItStarts(QEP())),
        "qep": AsItStarts(QEP()),
        "awq": AWQ(AsItStarts(ClipSearch())),
        "omniquant": AsItStarts(OmniQuant(30, 4)),
        "rtn": AsItStarts(Nearest()),
    }


def test_rotations_go_around_everything():
    rotated = Settings(6, 4, 6e-2, 1e-2, 64, rotate=True)
    assert method_of("rtn", "awq", rotated) == Rotated(AsItStarts(Nearest()))


@pytest.mark.parametrize("row", [*METHODS.values(), *STARTS.values()], ids=lambda row: row.name)
def test_a_row_refuses_the_grids_it_cannot_use(row):
    for grid in GRIDS.values():
        if row.needs and not getattr(grid, row.needs):
            with pytest.raises(UsageError, match=f"it is not possible in|{row.name} is not possible in"):
                row.check(grid)
        else:
            row.check(grid)


def test_a_recipe_gives_a_method_its_own_options_and_no_others():
    settings = Recipe("m", Path("o"), method="lrq", rank=8, rotate=True, preset="fast").method_settings(64)
    assert settings == Settings(6, 4, 6e-2, 1e-2, 64, True, {"rank": 8})
    assert Recipe("m", Path("o")).method_settings(64).own == {}
    assert Recipe("m", Path("o"), type="ptq1_61", method="ptq161").method_settings(64).own == {"parts": "cosine"}
