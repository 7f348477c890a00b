"""The texts of a run: what blocks are learned on, and what preprocessing learns on."""

from __future__ import annotations

from dataclasses import dataclass

from tesseraq_gguf.compute.parallel import Team
from tesseraq_gguf.conversion.identity import schedule_of
from tesseraq_gguf.conversion.progress import Progress
from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.learning.calibration import Calibration, held_out_for, load_calibration
from tesseraq_gguf.learning.preprocessing import check_installed
from tesseraq_gguf.models import Decoder
from tesseraq_gguf.recipe.recipe import Recipe


@dataclass(frozen=True)
class Texts:
    """Token sequences of a run.

    Attributes:
        calibration: what blocks are learned on, and what is held out; None where nothing is calibrated.
        preprocessing: what preprocessing learns on; None where there is none.
    """

    calibration: Calibration | None = None
    preprocessing: Calibration | None = None


def read_texts(recipe: Recipe, decoder: Decoder, team: Team, progress: Progress) -> Texts:
    """Read the texts that a recipe needs.

    Raises:
        CalibrationError: a text is missing, unreadable, empty or too short.
        UsageError: the team cannot share the sequences, or nothing can be preprocessed here.
    """
    calibration = _calibration(recipe, decoder, progress) if recipe.calibrates else None
    if calibration:
        _check_team(team, recipe, len(calibration.tokens))
    return Texts(calibration, _preprocessing(recipe, decoder, team, progress) if recipe.preprocess else None)


def _calibration(recipe: Recipe, decoder: Decoder, progress: Progress) -> Calibration:
    settings = recipe.settings
    progress.stage("Reading the calibration text")
    wanted = held_out_for(settings.samples)
    calibration = load_calibration(
        decoder.source, recipe.calibration, settings.samples, settings.length, recipe.seed, held_out=wanted
    )
    here, apart = len(calibration.tokens), len(calibration.held_out)
    if here < settings.samples:
        progress.note(
            f"the calibration text gives {here + apart} sequences of {settings.length} tokens, fewer than the "
            f"{settings.samples + wanted} asked for: {here} are learned on, {apart} held out"
        )
    decoder.check_tokens(calibration.tokens)
    return calibration


def _check_team(team: Team, recipe: Recipe, samples: int) -> None:
    """Refuse teams that cannot share a step's sequences evenly."""
    batch = recipe.settings.batch
    if team.size > 1 and (batch % team.size or samples < batch):
        sizes = ", ".join(str(n) for n in range(1, batch + 1) if batch % n == 0)
        raise UsageError(
            f"a step has {batch} of {samples} sequences, which {team.size} processes cannot share: "
            f"start {sizes} with torchrun --nproc-per-node"
        )


def _preprocessing(recipe: Recipe, decoder: Decoder, team: Team, progress: Progress) -> Calibration:
    """Read as many sequences as the steps of the preprocessing can take."""
    check_installed()
    if team.size > 1:
        raise UsageError("--preprocess needs the whole model in one process: it is not possible under torchrun")
    if decoder.has_experts:
        raise UsageError("--preprocess cannot give adapters to experts: leave it out for this model")
    progress.stage("Reading the text to preprocess with")
    schedule = schedule_of(recipe)
    wanted = schedule.steps * schedule.batch
    text = load_calibration(decoder.source, recipe.preprocess, wanted, recipe.settings.length, recipe.seed)
    decoder.check_tokens(text.tokens)
    return text
