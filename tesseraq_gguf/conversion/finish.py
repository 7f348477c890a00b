"""The last pass over the quantised model."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict

from tesseraq_gguf.conversion.outside import dequantized_outside, types_outside
from tesseraq_gguf.conversion.program import learning_program
from tesseraq_gguf.conversion.run import Model, Run
from tesseraq_gguf.conversion.work_directory import FINAL, finished_block
from tesseraq_gguf.learning.calibration import Calibration
from tesseraq_gguf.learning.distillation import Distillation
from tesseraq_gguf.models.quantised import Quantised


def finish(run: Run, model: Model) -> None:
    """Run the last pass that the recipe asks for, unless an earlier run has, and tell what it bought."""
    if run.recipe.finish != "distill" or run.calibration is None:
        return
    distillation = Distillation(steps=run.recipe.settings.finish_steps)
    how = asdict(distillation)
    how |= {"program": learning_program(("learning/distillation",)), "outside": types_outside(run.work)}
    schedule = json.dumps(how)
    earlier = run.work.tensors(FINAL)
    if earlier is None or earlier[1]["schedule"] != schedule:
        notes = _distil(run, model, run.calibration, distillation, schedule)
    else:
        notes = earlier[1]
    before, after = json.loads(notes["before"]), json.loads(notes["after"])
    verdict = "" if after < before else ": no better, so this pass is undone"
    run.progress.note(
        f"divergence from the model's answers on sequences held out: {before:.4f} -> {after:.4f}{verdict}"
    )


def _distil(
    run: Run, model: Model, calibration: Calibration, distillation: Distillation, schedule: str
) -> dict[str, str]:
    """Learn and keep what was learned; return what is noted of it."""
    run.progress.stage("Learning scales and norms of the whole model from its answers")
    work = run.work
    folder = work.scratch(f"last-pass-{hashlib.sha256(schedule.encode()).hexdigest()[:8]}")
    with run.memory_explained():
        quantised = Quantised(model.decoder, work.block, dequantized_outside(work), autocast=run.autocast)
        distilled = distillation.run(quantised, calibration, run.recipe.seed, folder, run.progress.advance)
        work.forget(FINAL)  # an earlier pass is over no longer: its blocks are replaced one by one
        for index in range(len(model.decoder)):
            work.keep_tensors(finished_block(index), distilled.blocks(index))
        measured = {"before": json.dumps(distilled.before), "after": json.dumps(distilled.after)}
        notes = {"schedule": schedule, **measured}
        work.keep_tensors(FINAL, distilled.final, notes)
    shutil.rmtree(folder, ignore_errors=True)
    return notes
