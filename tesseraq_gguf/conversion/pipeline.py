"""The road from a model to a file: load, learn block by block, write, verify. `convert` is the whole of it."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch

from tesseraq_gguf.compute.activations import ActivationRounding
from tesseraq_gguf.compute.devices import learning_dtype, resolve_device
from tesseraq_gguf.compute.hidden_states import Place, choose_place
from tesseraq_gguf.compute.parallel import Team, joined
from tesseraq_gguf.compute.schemes import Range
from tesseraq_gguf.conversion.identity import (
    SENSITIVITY_TOKENS,
    identity_of,
    metadata_of,
    preprocessing_of,
    schedule_of,
)
from tesseraq_gguf.conversion.program import learning_program
from tesseraq_gguf.conversion.progress import Progress, SilentProgress
from tesseraq_gguf.conversion.report import ConversionReport, report_on
from tesseraq_gguf.conversion.type_plan import TypePlan, check_grid, plan_plain, plan_types, within_budget
from tesseraq_gguf.conversion.work_directory import (
    BEFORE,
    CARRIED,
    CHECKED,
    CODEBOOKS,
    EMBEDDINGS,
    FINAL,
    PREPROCESSED,
    ROTATED,
    STATE,
    TYPES,
    WorkDirectory,
    finished_block,
    shared_work,
)
from tesseraq_gguf.converter.writer import check_output, write_gguf, write_plain
from tesseraq_gguf.errors import TesseraqError, UsageError
from tesseraq_gguf.evaluation.divergence import Quantised, divergence
from tesseraq_gguf.learning.bit_budget import CostMeter
from tesseraq_gguf.learning.calibration import Calibration, held_out_for, load_calibration
from tesseraq_gguf.learning.codebooks import model_codebooks
from tesseraq_gguf.learning.distillation import Distillation
from tesseraq_gguf.learning.embeddings import dequantized, round_embeddings
from tesseraq_gguf.learning.preprocessing import check_installed
from tesseraq_gguf.learning.reconstruction import BlockResult, Reconstruction
from tesseraq_gguf.learning.rounding import round_blocks
from tesseraq_gguf.learning.sensitivity import Sensitivity, measure_sensitivity
from tesseraq_gguf.methods.building import method_of
from tesseraq_gguf.methods.rare_experts import RARE
from tesseraq_gguf.models import Decoder, ModelSource, resolve_model
from tesseraq_gguf.models.decoder import LoadedBlock
from tesseraq_gguf.models.experts import expert_of
from tesseraq_gguf.models.residual_rotation import rotated_model
from tesseraq_gguf.paths import temporary_sibling
from tesseraq_gguf.recipe.recipe import Recipe
from tesseraq_gguf.recipe.rules import read_rules, rules_of
from tesseraq_gguf.runtime.source import SourceTree, ensure_source
from tesseraq_gguf.types.facts import WITH_CODEBOOKS, tensor_type
from tesseraq_gguf.types.grids import grid_for
from tesseraq_gguf.types.quantized import QuantizedTensor, plain_vector

_CODEBOOK_TOKENS = 2048
"""Calibration tokens that a model's own codebooks are designed from, beside its weights."""


def convert(recipe: Recipe, progress: Progress | None = None) -> ConversionReport:
    """Learn a model and write it as a GGUF file. Every error a user can cause is a `TesseraqError`.

    The same recipe again goes on after the last finished block; the file appears under its name only when it is whole
    and verified.

    Args:
        recipe: what to make.
        progress: told what happens.
    """
    if not isinstance(recipe, Recipe):
        raise UsageError(f"convert takes a Recipe, such as Recipe('demo', 'out.gguf'), not {type(recipe).__name__}")
    progress = progress or SilentProgress()
    started = time.monotonic()
    for wanted in map(tensor_type, recipe.candidates if recipe.budgeted else (recipe.type,)):
        if not wanted.is_float:
            check_grid(recipe, grid_for(wanted.name, wanted.block_weights, recipe.granularity))
    check_output(recipe.out)
    # tensors are copied by their names in a GGUF file; rules name them as the learner does
    source = resolve_model(recipe.model, progress.stage, expanded=recipe.learns or bool(recipe.rules))
    check_output(recipe.out, source)
    tree = ensure_source(progress)
    device = resolve_device(recipe.device)
    if not recipe.learns:  # whatever llama.cpp's converter takes: the learner need not know the architecture
        progress.stage(f"Writing {recipe.out.name} in {recipe.type}; nothing is learned")
        write_plain(
            source,
            recipe.out,
            recipe.type,
            types=plan_plain(recipe, source, tree).in_file(),
            say=progress.note,
            progress=progress.advance,
            tree=tree,
        )
        return report_on(recipe, 0, {}, set(), started)
    decoder = Decoder(source, device)
    with joined(recipe.calibrates) as team:
        return _convert_learned(recipe, source, decoder, team, tree, progress, started)


def _convert_learned(
    recipe: Recipe,
    source: ModelSource,
    decoder: Decoder,
    team: Team,
    tree: SourceTree,
    progress: Progress,
    started: float,
) -> ConversionReport:
    """Learn a model's matrices, together with the other processes of the team, and write the file."""
    recipe = replace(recipe, processes=team.size)
    calibration = _calibration(recipe, source, progress)
    if calibration:
        decoder.check_tokens(calibration.tokens)
        _check_team(team, recipe, len(calibration.tokens), decoder)
    text = _text_to_learn(recipe, source, decoder, team, progress)
    if text:
        decoder.check_tokens(text.tokens)
    progress.stage("Asking llama.cpp's converter about the model")
    plan = plan_types(recipe, source, decoder, tree)
    for name, reason in plan.fallbacks.items():
        progress.note(f"{name} {reason}")
    autocast = learning_dtype(decoder.device)
    identity = identity_of(recipe, source.fingerprint(), calibration, autocast, plan, decoder.embedding_name())
    identity |= preprocessing_of(recipe, text)
    with shared_work(team, lambda: WorkDirectory(_work_folder(recipe), identity, recipe.fresh)) as work:
        _check_weights(decoder, team, work, progress)
        original = decoder
        resumed, kept_start, ranges = 0, 0, dict[str, Range]()
        if recipe.rotate:
            decoder = _rotate(recipe, decoder, team, progress)
            if decoder.source != source:
                source = decoder.source
                plan = plan_types(recipe, source, decoder, tree)
        if recipe.budgeted and calibration:
            plan = _within_budget(recipe, plan, source, decoder, calibration, team, work, progress)
        codebooks = _codebooks(recipe, decoder, plan.types | plan.outside, calibration, work, progress)
        before = None
        if text is not None:
            decoder, before = _preprocess(
                recipe, decoder, plan, codebooks, calibration, text, autocast, team, work, identity, progress
            )
        for result in _results(recipe, decoder, plan, codebooks, calibration, autocast, team, work, progress):
            if not result.resumed:
                work.keep(result)
            resumed += result.resumed
            kept_start += result.verdict is not None and result.verdict.kept_start
            if result.rare:
                progress.note(_rare(result))
            ranges |= result.ranges
            progress.block(result, len(decoder))
        if not team.first:
            report = team.from_first(
                lambda: report_on(recipe, resumed, plan.fallbacks, plan.learned_in_file(), started)
            )
            _leave(recipe)
            return report
        work = work.alone()
        if recipe.finish == "distill" and calibration:
            _finish(recipe, decoder, calibration, autocast, work, progress)
        if before is not None:
            _carry(before, decoder, work, recipe.finish != "none")
        distance = None
        if calibration:
            progress.stage("Measuring the model's answers on sequences held out")
            model = _quantised(recipe, decoder, work, ranges, codebooks)
            with _memory_explained(decoder):
                distance = divergence(original, model, calibration.held_out, autocast, progress.advance)
        progress.stage(f"Writing and verifying {recipe.out.name}")
        write_gguf(
            source,
            recipe.out,
            work.files(len(decoder), recipe.finish != "none"),
            types=plan.in_file(),
            metadata=metadata_of(recipe, tensor_type(plan.main_type(decoder)).file_type, calibration, ranges),
            say=progress.note,
            progress=progress.advance,
            tree=tree,
        )
        if recipe.budgeted:
            _keep_choice(recipe, plan, progress)
        if recipe.work_dir is None:
            work.remove()
    return team.from_first(
        lambda: replace(
            report_on(recipe, resumed, plan.fallbacks, plan.learned_in_file(), started),
            divergence=distance,
            held_out=calibration.held_out.numel() if calibration else 0,
            kept_start=kept_start,
        )
    )


def _check_weights(decoder: Decoder, team: Team, work: WorkDirectory, progress: Progress) -> None:
    """Stop at weights that are missing or not finite, unless an earlier run has looked at them."""
    if work.note(CHECKED) is None:
        progress.stage("Checking the model's weights")
        team.from_first(lambda: decoder.check_weights(progress.advance))
        work.keep_note(CHECKED, "all of them are there, and finite")


def _rotate(recipe: Recipe, decoder: Decoder, team: Team, progress: Progress) -> Decoder:
    """Rotate the residual stream where the model allows it; blocks rotate what is inside them."""
    if decoder.source.gguf:  # what is not learned is copied from there, as it is
        progress.note("values within heads are rotated; for the residual stream give the Hugging Face folder instead")
        return decoder
    team.from_first(lambda: None)  # until the first process has opened the work directory, which must be empty then
    progress.stage("Rotating the residual stream")
    folder = _work_folder(recipe) / ROTATED
    # every process for itself: hosts may share no disk, and all come to the same
    with _memory_explained(decoder):
        source = rotated_model(decoder, folder, recipe.seed, progress.advance if team.first else lambda *_: None)
    if source is None:
        progress.note("this model's residual stream cannot be rotated; values within heads are, where that folds")
        return decoder
    if decoder.output_name() == decoder.embedding_name():
        progress.note("rotation gives the model an output matrix of its own: it was the embedding")
    return Decoder(source, decoder.device)


def _leave(recipe: Recipe) -> None:
    """Remove a rotated copy that this host made for itself; on the first process' host it is a part of its work."""
    folder = _work_folder(recipe)
    if recipe.rotate and not (folder / STATE).exists():
        shutil.rmtree(folder / ROTATED, ignore_errors=True)
        (folder / f"{ROTATED}.lock").unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()


def _rare(result: BlockResult) -> str:
    """What is said of the experts of a block that calibration hardly visited."""
    experts = list(dict.fromkeys(str(expert_of(name)) for name in result.rare))
    named = f"expert {experts[0]} was" if len(experts) == 1 else f"experts {', '.join(experts)} were"
    return f"block {result.index + 1}: {named} fed fewer than {RARE} calibration tokens: rounded with care, not learned"


def _check_team(team: Team, recipe: Recipe, samples: int, decoder: Decoder) -> None:
    """Refuse teams that cannot share a step's sequences evenly, or a model's experts."""
    if team.size > 1 and decoder.has_experts:
        raise UsageError("several processes cannot share a model with experts yet: run one, without torchrun")
    batch = recipe.settings.batch
    if team.size > 1 and (batch % team.size or samples < batch):
        sizes = ", ".join(str(n) for n in range(1, batch + 1) if batch % n == 0)
        raise UsageError(
            f"a step has {batch} of {samples} sequences, which {team.size} processes cannot share: "
            f"start {sizes} with torchrun --nproc-per-node"
        )


def _calibration(recipe: Recipe, source: ModelSource, progress: Progress) -> Calibration | None:
    if not recipe.calibrates:
        return None
    settings = recipe.settings
    progress.stage("Reading the calibration text")
    wanted = held_out_for(settings.samples)
    calibration = load_calibration(
        source, recipe.calibration, settings.samples, settings.length, recipe.seed, held_out=wanted
    )
    here, apart = len(calibration.tokens), len(calibration.held_out)
    if here < settings.samples:
        progress.note(
            f"the calibration text gives {here + apart} sequences of {settings.length} tokens, fewer than the "
            f"{settings.samples + wanted} asked for: {here} are learned on, {apart} held out"
        )
    return calibration


def _codebooks(
    recipe: Recipe,
    decoder: Decoder,
    types: Mapping[str, str],
    calibration: Calibration | None,
    work: WorkDirectory,
    progress: Progress,
) -> torch.Tensor | None:
    """Design the model's own codebooks, unless an earlier run has; None where the universal ones serve."""
    if recipe.codebooks == "universal" or not set(types.values()) & set(WITH_CODEBOOKS):
        return None
    stored = work.tensors(CODEBOOKS)
    if stored is None:
        progress.stage("Designing codebooks")
        few = calibration.tokens[: max(1, _CODEBOOK_TOKENS // calibration.tokens.shape[1])] if calibration else None
        found = model_codebooks(decoder, few, recipe.seed)
        work.keep_tensors(CODEBOOKS, {CODEBOOKS: plain_vector(found)})
        return found
    return stored[0][CODEBOOKS].arrays["values"].to(torch.int8)


def _results(
    recipe: Recipe,
    decoder: Decoder,
    plan: TypePlan,
    codebooks: torch.Tensor | None,
    calibration: Calibration | None,
    autocast: torch.dtype,
    team: Team,
    work: WorkDirectory,
    progress: Progress,
) -> Iterator[BlockResult]:
    types, outside = plan.types, plan.outside
    if calibration is None:
        _embeddings(decoder, outside, None, codebooks, work, progress)
        progress.stage(f"Rounding {len(types)} matrices in {len(decoder)} blocks")
        yield from round_blocks(decoder, types, work.finished, recipe.granularity, codebooks)
        return
    stored = [work.finished(index) for index in range(len(decoder))]
    finished = None not in stored
    if finished and _types_outside(work) == outside:
        yield from (result for result in stored if result is not None)
        return
    del stored
    walk = Reconstruction(
        decoder=decoder,
        method=method_of(recipe.method, recipe.start, recipe.method_settings(decoder.hidden_size)),
        types=types,
        seed=recipe.seed,
        autocast=autocast,
        report=lambda block, done, total: progress.step(block, len(decoder), done, total),
        granularity=recipe.granularity,
        activations=recipe.scheme,
        codebooks=codebooks,
        salient=recipe.method_row.salient,
        team=team,
        empty=_place(recipe, decoder, calibration, team, progress).empty,
    )
    with _memory_explained(decoder):
        progress.stage("Measuring which channels the model's answer depends on")
        sensitivity = team.from_first(
            lambda: measure_sensitivity(decoder, _few(calibration), recipe.seed, progress.advance)
        )
        _embeddings(decoder, outside, sensitivity, codebooks, work, progress)
        if finished:  # only the matrices outside have other types than before
            yield from (result for index in range(len(decoder)) if (result := work.finished(index)))
            return
        progress.stage(
            f"Learning {len(types)} matrices in {len(decoder)} blocks with {recipe.method} on {decoder.device}"
        )
        yield from walk.run(
            calibration.tokens,
            sensitivity.blocks,
            work.finished,
            lambda: _dequantized_embeddings(work),
            calibration.held_out,
        )


def _work_folder(recipe: Recipe) -> Path:
    return recipe.work_dir or recipe.out.with_name(f"{recipe.out.name}.tesseraq-work")


def _place(recipe: Recipe, decoder: Decoder, calibration: Calibration, team: Team, progress: Progress) -> Place:
    """Where the hidden states of the two chains are kept."""
    tokens = sum(team.share(sequences).numel() for sequences in (calibration.tokens, calibration.held_out))
    size = 2 * tokens * decoder.hidden_size * torch.float32.itemsize
    place = choose_place(size, decoder.device, recipe.memory_budget, _work_folder(recipe))
    if place.name == "disk":
        progress.note(f"{size / 1e9:.1f} GB of activations are kept in {place.folder}: a larger budget would be faster")
    return place


def _text_to_learn(
    recipe: Recipe, source: ModelSource, decoder: Decoder, team: Team, progress: Progress
) -> Calibration | None:
    """Read the text of the preprocessing, if there is one: as many sequences as its steps can take."""
    if recipe.preprocess is None:
        return None
    check_installed()
    if team.size > 1:
        raise UsageError("--preprocess needs the whole model in one process: it is not possible under torchrun")
    if decoder.has_experts:
        raise UsageError("--preprocess cannot give adapters to experts: leave it out for this model")
    progress.stage("Reading the text to preprocess with")
    schedule = schedule_of(recipe)
    wanted = schedule.steps * schedule.batch
    return load_calibration(source, recipe.preprocess, wanted, recipe.settings.length, recipe.seed)


def _preprocess(
    recipe: Recipe,
    decoder: Decoder,
    plan: TypePlan,
    codebooks: torch.Tensor | None,
    calibration: Calibration | None,
    text: Calibration,
    autocast: torch.dtype,
    team: Team,
    work: WorkDirectory,
    identity: Mapping[str, object],
    progress: Progress,
) -> tuple[Decoder, WorkDirectory]:
    """Quantise once, learn on the dequantised model and merge, as far as no earlier run has.

    Returns:
        The model to quantise in the end, and where what the first quantisation made is kept.
    """
    first = {key: value for key, value in identity.items() if key != "preprocess"}
    with WorkDirectory(work.folder / BEFORE, first, fresh=False) as before:
        merged = work.folder / PREPROCESSED
        if not merged.is_dir():
            for result in _results(recipe, decoder, plan, codebooks, calibration, autocast, team, before, progress):
                if not result.resumed:
                    before.keep(result)
                progress.block(result, len(decoder))
            progress.stage("Learning on the quantised model")
        with _memory_explained(decoder):
            source = schedule_of(recipe).run(
                decoder, before.block, text.tokens, recipe.seed, autocast, merged, progress.advance
            )
    return Decoder(source, decoder.device), before


def _carry(before: WorkDirectory, decoder: Decoder, work: WorkDirectory, finish: bool) -> None:
    """Keep vectors that only the first quantisation changed: the model that was quantised last has them."""
    carried: dict[str, QuantizedTensor] = {}
    for index in range(len(decoder)):
        again = work.block(index, finish).keys()
        carried |= {name: t for name, t in before.block(index).items() if t.plain and name not in again}
    if carried:
        work.keep_tensors(CARRIED, carried)


def _few(calibration: Calibration) -> torch.Tensor:
    """The sequences that the sensitivity is measured on, int64 [samples, length]."""
    return calibration.tokens[: max(1, SENSITIVITY_TOKENS // calibration.tokens.shape[1])]


def _within_budget(
    recipe: Recipe,
    plan: TypePlan,
    source: ModelSource,
    decoder: Decoder,
    calibration: Calibration,
    team: Team,
    work: WorkDirectory,
    progress: Progress,
) -> TypePlan:
    """Choose types, or take the choice of an earlier run of the same recipe."""
    kept = work.note(TYPES)
    if kept is not None:
        return plan.ruled(read_rules(kept.splitlines()), decoder)

    def choose() -> TypePlan:
        progress.stage("Measuring what each matrix costs in each type")
        meter = CostMeter(plan.candidates(recipe, decoder), recipe.granularity)
        measure_sensitivity(decoder, _few(calibration), recipe.seed, progress.advance, meter)
        return within_budget(recipe, plan, source, decoder, meter, _few(calibration))

    with _memory_explained(decoder):
        chosen = team.from_first(choose)
    work.keep_note(TYPES, rules_of(chosen.chosen, ""))
    return chosen


def _keep_choice(recipe: Recipe, plan: TypePlan, progress: Progress) -> None:
    """Write the chosen types beside the file, to be read, edited and given to --tensor-types."""
    place = recipe.out.with_name(f"{recipe.out.name}.types")
    said = f"types of {recipe.out.name}, chosen for {recipe.budget}; for --tensor-types"
    with temporary_sibling(place) as partial:
        partial.write_text(rules_of(plan.chosen, said), encoding="utf-8")
    counts = Counter(plan.chosen.values())
    progress.note(f"{', '.join(f'{n} matrices in {t}' for t, n in sorted(counts.items()))}; the choice is in {place}")


@contextmanager
def _memory_explained(decoder: Decoder) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TesseraqError(
            f"not enough memory on {decoder.device}: use fewer --samples, a smaller --seqlen, or --device cpu"
        ) from error


def _embeddings(
    decoder: Decoder,
    types: Mapping[str, str],
    sensitivity: Sensitivity | None,
    codebooks: torch.Tensor | None,
    work: WorkDirectory,
    progress: Progress,
) -> None:
    """Round the matrices outside the blocks, as far as no earlier run has rounded them to the same types."""
    if _types_outside(work) == types or not work.writes:
        return
    kept = {name: tensor for name, tensor in _outside(work).items() if types.get(name) == tensor.type}
    new = {name: type for name, type in types.items() if name not in kept}
    if new:
        progress.stage(f"Rounding {' and '.join(new)}")
        kept |= round_embeddings(decoder, new, sensitivity, progress.advance, codebooks)
    if kept:
        work.keep_tensors(EMBEDDINGS, kept)
    else:
        work.forget(EMBEDDINGS)


def _outside(work: WorkDirectory) -> dict[str, QuantizedTensor]:
    """What is kept of embedding and output matrix."""
    stored = work.tensors(EMBEDDINGS)
    return stored[0] if stored else {}


def _types_outside(work: WorkDirectory) -> dict[str, str]:
    return {name: tensor.type for name, tensor in _outside(work).items()}


def _dequantized_embeddings(work: WorkDirectory) -> dict[str, torch.Tensor]:
    return dequantized(_outside(work))


def _quantised(
    recipe: Recipe, decoder: Decoder, work: WorkDirectory, ranges: Mapping[str, Range], codebooks: torch.Tensor | None
) -> Quantised:
    """The model as the file will have it."""
    finish, scheme = recipe.finish != "none", recipe.scheme
    final = work.tensors(FINAL) if finish else None

    def rounding(block: LoadedBlock) -> ActivationRounding | None:
        return ActivationRounding(scheme, block.by_module(ranges), codebooks) if scheme.rounds else None

    return Quantised(
        decoder,
        lambda index: work.block(index, finish),
        _dequantized_embeddings(work),
        final[0] if final else {},
        rounding,
    )


def _finish(
    recipe: Recipe,
    decoder: Decoder,
    calibration: Calibration,
    autocast: torch.dtype,
    work: WorkDirectory,
    progress: Progress,
) -> None:
    """Run the last pass, unless an earlier run has, and tell what it bought."""
    how = asdict(Distillation(steps=recipe.settings.finish_steps))
    how |= {"program": learning_program(("learning/distillation",)), "outside": _types_outside(work)}
    schedule = json.dumps(how)
    earlier = work.tensors(FINAL)
    if earlier is None or earlier[1]["schedule"] != schedule:
        progress.stage("Learning scales and norms of the whole model from its answers")
        folder = work.scratch(f"last-pass-{hashlib.sha256(schedule.encode()).hexdigest()[:8]}")
        with _memory_explained(decoder):
            distilled = Distillation(steps=recipe.settings.finish_steps).run(
                decoder,
                work.block,
                calibration.tokens,
                calibration.held_out,
                recipe.seed,
                autocast,
                folder,
                progress.advance,
                _dequantized_embeddings(work),
            )
            work.forget(FINAL)  # an earlier pass is over no longer: its blocks are replaced one by one
            for index in range(len(decoder)):
                work.keep_tensors(finished_block(index), distilled.blocks(index))
            measured = {"before": json.dumps(distilled.before), "after": json.dumps(distilled.after)}
            notes = {"schedule": schedule, **measured}
            work.keep_tensors(FINAL, distilled.final, notes)
        shutil.rmtree(folder, ignore_errors=True)
    else:
        notes = earlier[1]
    before, after = json.loads(notes["before"]), json.loads(notes["after"])
    verdict = "" if after < before else ": no better, so this pass is undone"
    progress.note(f"divergence from the model's answers on sequences held out: {before:.4f} -> {after:.4f}{verdict}")
