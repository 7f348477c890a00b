"""A run: what stands for one conversion from its beginning to its end, and the model as one stage hands it on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tesseraq_gguf.compute.devices import learning_dtype
from tesseraq_gguf.compute.parallel import Team
from tesseraq_gguf.conversion import mix
from tesseraq_gguf.conversion.identity import identity_of, preprocessing_of
from tesseraq_gguf.conversion.importance import Importance, read_importance
from tesseraq_gguf.conversion.progress import Progress
from tesseraq_gguf.conversion.start_file import StartFile
from tesseraq_gguf.conversion.texts import Texts, read_texts
from tesseraq_gguf.conversion.type_plan import TypePlan, plan_types
from tesseraq_gguf.conversion.work_directory import CHECKED, WorkDirectory, shared_work, work_folder
from tesseraq_gguf.errors import TesseraqError
from tesseraq_gguf.learning.calibration import Calibration
from tesseraq_gguf.models import Decoder, ModelSource
from tesseraq_gguf.recipe.readers import AUTO
from tesseraq_gguf.recipe.recipe import Recipe
from tesseraq_gguf.runtime.source import SourceTree
from tesseraq_gguf.types.grids import MatrixGrids, OwnCodebooks


@dataclass(frozen=True)
class Run:
    """One conversion. Every stage takes it, with a `Model`, and returns the model that the next stage takes.

    Attributes:
        recipe: what to make.
        original: the model as it came.
        texts: what is learned from.
        team: the processes that learn together.
        work: where all that is finished is kept.
        tree: the patched llama.cpp.
        progress: told what happens.
        importance: the importance matrix that rounding to nearest goes by, if there is one.
        start: the file that learning begins at, if it begins at one.
    """

    recipe: Recipe
    original: Decoder
    texts: Texts
    team: Team
    work: WorkDirectory
    tree: SourceTree
    progress: Progress
    importance: Importance | None = None
    start: StartFile | None = None

    @property
    def autocast(self) -> torch.dtype:
        """Dtype of matrix products while learning; float32 means no autocast."""
        return learning_dtype(self.original.device)

    @property
    def calibration(self) -> Calibration | None:
        """The text that blocks are learned on; None where nothing is calibrated."""
        return self.texts.calibration

    @property
    def held_out(self) -> int:
        """Tokens that nothing is learned on."""
        return self.calibration.held_out.numel() if self.calibration else 0

    @property
    def weighed(self) -> Mapping[str, Tensor]:
        """What the importance matrix says of matrices, float32 [in] by checkpoint name."""
        return self.importance.by_matrix if self.importance else {}

    @property
    def finishes(self) -> bool:
        """Whether a last pass leaves blocks of its own."""
        return self.recipe.finish != "none"

    def inside(self, work: WorkDirectory) -> Run:
        """Return the run with another work directory."""
        return replace(self, work=work)

    def alone(self) -> Run:
        """Return the run for the first process, which goes on alone after the walk over the blocks."""
        return self.inside(self.work.alone())

    def check_weights(self) -> None:
        """Stop at weights that are missing or not finite, unless an earlier run has looked at them."""
        if self.work.note(CHECKED) is None:
            self.progress.stage("Checking the model's weights")
            self.team.from_first(lambda: self.original.check_weights(self.progress.advance))
            self.work.keep_note(CHECKED, "all of them are there, and finite")

    def end(self) -> None:
        """Remove the work directory, unless the recipe names one."""
        if self.recipe.work_dir is None:
            self.work.remove()

    @contextmanager
    def memory_explained(self) -> Iterator[None]:
        """Say what to do where the device's memory is too small.

        Raises:
            TesseraqError: it is.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise TesseraqError(
                f"not enough memory on {self.original.device}: use fewer --samples, a smaller --seqlen, or --device cpu"
            ) from error


@dataclass(frozen=True)
class Model:
    """The model to quantise, as a stage leaves it.

    Attributes:
        source: the model that the file is written from, but for what is learned.
        decoder: the model whose matrices are quantised. Preprocessing gives it other weights than `source` has.
        plan: types of all matrices.
        codebooks: its own ones, of types that have any.
    """

    source: ModelSource
    decoder: Decoder
    plan: TypePlan
    codebooks: OwnCodebooks = field(default_factory=dict)

    def grids(self, granularity: str = "group") -> MatrixGrids:
        """Return what gives the matrices their grids, with what shares a scale: `group` or `channel`."""
        return MatrixGrids(granularity, self.codebooks, self.plan.scaled)


@contextmanager
def begin(
    recipe: Recipe, decoder: Decoder, team: Team, tree: SourceTree, progress: Progress
) -> Iterator[tuple[Run, Model]]:
    """Read the texts, plan the types and open the work directory: a run begins, and ends with its work directory.

    Raises:
        UsageError: the recipe cannot be meant for this model, the importance matrix is of another one, or the work
            directory belongs to another run.
        FileFormatError: the importance matrix cannot be read.
        ModelError: llama.cpp's converter, or the learner, cannot read the model.
        CalibrationError: a text cannot be used.
    """
    recipe = replace(recipe, processes=team.size)
    texts = read_texts(recipe, decoder, team, progress)
    plan, start = types_of(recipe, decoder, tree, progress)
    importance = read_importance(recipe.imatrix, plan, decoder.source.name) if recipe.imatrix else None
    for said in (plan.fallbacks, importance.said if importance else {}):
        for note in counted(said):
            progress.note(note)
    source, autocast = decoder.source, learning_dtype(decoder.device)
    identity = identity_of(recipe, source.fingerprint(), texts.calibration, autocast, plan, decoder.embedding_name())
    identity |= preprocessing_of(recipe, texts.preprocessing) | ({"start": start.fingerprint} if start else {})
    identity |= {"imatrix": importance.fingerprint() if importance else None}
    with shared_work(team, lambda: WorkDirectory(work_folder(recipe), identity, recipe.fresh)) as work:
        run = Run(recipe, decoder, texts, team, work, tree, progress, importance, start)
        yield run, Model(source, decoder, plan)


def types_of(
    recipe: Recipe, decoder: Decoder, tree: SourceTree, progress: Progress
) -> tuple[TypePlan, StartFile | None]:
    """Plan the types of a model, budgets apart, and open the file that learning begins at, if it begins at one."""
    progress.stage("Asking llama.cpp's converter about the model")
    start = StartFile(recipe.start_file, decoder) if recipe.start_file else None
    plan = plan_types(recipe, decoder, tree, start.types if start else {})
    if start:
        plan = plan.with_factors(start.scaled)
    if recipe.mix:
        settled = recipe.rules or recipe.output_type or recipe.embedding_type != AUTO
        besides = ", but for what other options say" if settled else ""
        progress.note(f"{recipe.type} as llama-quantize has it{besides}: {mix.counted(plan.in_file())}")
    return plan, start


def counted(said: Mapping[str, str]) -> Iterator[str]:
    """Yield what is said of matrices, once for all whose names differ in numbers alone."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, reason in said.items():
        groups.setdefault((re.sub(r"\b\d+\b", "*", name), reason), []).append(name)
    for (pattern, reason), names in groups.items():
        yield f"{names[0]} {reason}" if len(names) == 1 else f"{pattern} ({len(names)} matrices) {reason}"
