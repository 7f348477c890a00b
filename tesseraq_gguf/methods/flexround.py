"""FlexRound (Lee et al., arXiv 2306.00317): every weight is divided by a learned number of its own before rounding.

    S = S2 + r      S2 [out, in], r [out, 1], both 0 at first

in the frame of `scaled_rounding`. It has as many variables as there are weights; LRQ is its child with fewer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tesseraq_gguf.methods.scaled_rounding import ScaledRounding
from tesseraq_gguf.methods.start import NEAREST, Initialisation
from tesseraq_gguf.methods.table import Settings

RATES = {2: 2.5e-3, 3: 1.25e-3, 4: 1.25e-3, 8: 8e-5}
"""Learning rates for 5000 steps, by bits: that of LRQ's comparison for 3 (arXiv 2407.11534, appendix) halved, as
measured on a whole model (docs/notes/steps-and-rates.md).
"""


class FullDivisor:
    """S = S2 + r of a matrix [out, in].

    Attributes:
        variables: S2 [out, in] and r [out, 1].
    """

    def __init__(self, weight: Tensor) -> None:
        full, row = torch.zeros_like(weight), torch.zeros_like(weight[:, :1])
        self.variables = [full.requires_grad_(), row.requires_grad_()]

    def log(self, dtype: torch.dtype) -> Tensor:
        """S, float32 [out, in]."""
        full, row = self.variables
        return full + row


def flexround(steps: int, batch: int, initialisation: Initialisation = NEAREST) -> ScaledRounding:
    """Return the method with so many Adam steps per block, of `batch` samples each."""
    return ScaledRounding(
        lambda weight, _: FullDivisor(weight), RATES, steps=steps, batch=batch, initialisation=initialisation
    )


def build(settings: Settings, start: Initialisation) -> ScaledRounding:
    """Return the method for its row of the table."""
    return flexround(settings.all_steps, settings.batch, start)
