"""Every method on a GPU learns what it learns on the processor; `scripts/run check gpu` runs this on one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_model  # noqa: F401  (a fixture)

from tesseraq_gguf import Recipe, convert
from tesseraq_gguf.conversion.progress import SilentProgress
from tesseraq_gguf.learning.reconstruction import BlockResult
from tesseraq_gguf.models import ModelSource

CASES: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq"},
    "awq": {"method": "awq", "type": "tsq3"},
    "awq+gptq": {"method": "awq+gptq"},
    "omniquant": {"method": "omniquant"},
    "tesseraq": {"finish": "distill", "embedding_type": "tsq4"},
    "tesseraq from awq+gptq": {"init": "awq+gptq", "type": "tsq3"},
    "tesseraq in codebooks": {"type": "bcq4", "codebooks": "model"},
    "tesseraq in ptq1_61": {"type": "ptq1_61"},
    "tesseraq in q4_0": {"type": "q4_0", "init": "omniquant"},
    "lrq": {"method": "lrq", "type": "tsq3"},
    "flexround": {"method": "flexround", "type": "tsq4", "init": "none"},
    "ptq161": {"method": "ptq161", "type": "ptq1_61"},
    "budget": {"method": "gptq", "target_bpw": 2.75},
    "rounded activations": {"type": "tsq4", "activations": "a4", "kv_bits": 8},
}


class Losses(SilentProgress):
    """Remembers the loss of every block."""

    def __init__(self) -> None:
        self.before: list[float] = []
        self.after: list[float] = []

    def block(self, result: BlockResult, blocks: int) -> None:
        assert result.loss_before is not None and result.loss_after is not None
        self.before.append(result.loss_before)
        self.after.append(result.loss_after)


@pytest.mark.runtime
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_as_on_the_processor(
    case: str,
    make_model: Callable[[str], ModelSource],  # noqa: F811
    long_text: Path,
    tmp_path: Path,
) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        options: dict[str, Any] = {"preset": "fast", "samples": 8, "seqlen": 64, "calibration": str(long_text)} | CASES[
            case
        ]
        found[device] = Losses()
        model = str(make_model("llama-256").folder)
        convert(Recipe(model, tmp_path / f"{device}.gguf", device=device, **options), found[device])
    # products in bfloat16, and Adam's steps with them, end elsewhere, but as well
    assert found["cuda"].before == pytest.approx(found["cpu"].before, rel=0.1)
    assert found["cuda"].after == pytest.approx(found["cpu"].after, rel=0.3)
