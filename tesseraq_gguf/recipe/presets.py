"""Presets: how much calibration and learning a run spends, the rows of one table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """How much calibration and learning a run spends.

    Attributes:
        samples: calibration sequences.
        length: tokens of a sequence.
        steps: Adam steps in each of the 20 stages of progressive adaptive rounding.
        batch: sequences of a step.
        rounding_rate: learning rate of the rounding variables ν.
        parameter_rate: learning rate of scales and zero-points.
        finish_steps: Adam steps of the last pass, if there is one.
    """

    samples: int
    length: int
    steps: int
    batch: int
    rounding_rate: float
    parameter_rate: float
    finish_steps: int


PRESETS = {
    "fast": Preset(samples=128, length=256, steps=6, batch=4, rounding_rate=6e-2, parameter_rate=1e-2, finish_steps=50),
    "balanced": Preset(
        samples=512, length=256, steps=50, batch=2, rounding_rate=3e-2, parameter_rate=5e-3, finish_steps=200
    ),
    "best": Preset(
        samples=512, length=2048, steps=250, batch=4, rounding_rate=1e-3, parameter_rate=1e-3, finish_steps=1000
    ),
}
"""`best` is the paper's setting (arXiv 2410.19103, §4.1); the others spend less and take larger steps. Rates are for
types of 2 bits, those of more take shares of them (`methods.tesseraq.parameter_share`)."""

PREPROCESSING_STEPS = {"fast": 100, "balanced": 500, "best": 10_000}
"""AdamW steps of quantisation preprocessing, by preset; the paper's are `best`'s."""
