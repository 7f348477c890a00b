"""Measure one architecture: what the process of its own does."""

from __future__ import annotations

import re
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from saved_logits import answered, logit_error, saved_logits
from tiny_models import TEXT, VOCABULARY

from check.architectures.columns import FILES, MADE, WALK, Outcome
from check.architectures.forks import talk_to_fork
from check.architectures.models import Unavailable, named, save
from tesseraq_gguf.compute.parallel import joined
from tesseraq_gguf.conversion.budget import choose_types
from tesseraq_gguf.conversion.progress import SilentProgress
from tesseraq_gguf.conversion.quantise import quantise
from tesseraq_gguf.conversion.run import Run, begin
from tesseraq_gguf.conversion.write import write
from tesseraq_gguf.converter import writer
from tesseraq_gguf.errors import TesseraqError
from tesseraq_gguf.models import Decoder, resolve_model
from tesseraq_gguf.models.pieces import Piece
from tesseraq_gguf.models.quantised import final_states
from tesseraq_gguf.recipe.recipe import Recipe
from tesseraq_gguf.runtime.source import ensure_source
from tesseraq_gguf.types.grids import grid_of
from tesseraq_gguf.types.quantized import QuantizedTensor, load_tensors

WALK_LIMIT, FILE_LIMIT = 1e-3, 1e-3
_CONTEXT, _CHUNKS = 64, 2


def outcomes(name: str, folder: Path, columns: Sequence[str]) -> Iterator[tuple[str, Outcome]]:
    """Yield the outcome of every column as soon as it is known; of later ones nothing can be said without a model.

    Args:
        name: of the architecture.
        folder: takes all files.
        columns: what to measure.
    """
    writer._talk = talk_to_fork
    model = folder / "tiny"  # llama.cpp expects more tokens of models that are called phi3
    made = _tried(lambda: save(named(name), model))
    yield MADE, made
    if not made.good:
        return
    for column in columns:
        if column == WALK:
            yield column, _tried(lambda: _walk_error(model), WALK_LIMIT)
        elif column in FILES:
            measure = partial(_file_error, model, folder, FILES[column])
            yield column, _tried(measure, FILE_LIMIT)


_FOLDERS = re.compile(r"[.\w-]*/(?:[^\s/]+/)+")
"""What a message says of folders, which are others on every machine."""

_PREFIXES = re.compile(r"tiny: |[\d.]+ E \w+: error loading model: |[\d.]+ E \w+: |error loading model: ")
"""What stands before a message: the model's name, the time at which llama.cpp said it, and where."""


def _tried(measure: Callable[[], Any], limit: float | None = None) -> Outcome:
    """What came of a measurement: an error of the program's own is a reason, and so is any other."""
    try:
        found = measure()
    except Unavailable as error:
        return Outcome(reason=str(error), unavailable=True)
    except Exception as error:
        traceback.print_exc()
        return Outcome(reason=reason_of(error))
    if limit is None:
        return Outcome()
    value, notes = found
    reason = "" if value <= limit else f"error {value:.1e}"
    return Outcome(reason=reason, error=value, notes=notes)


def reason_of(error: Exception) -> str:
    """What an error says first, as it stands in the table: what to do about it is for users of real models."""
    said = str(error).strip().splitlines()
    kind = "" if isinstance(error, (TesseraqError, AssertionError)) else f"{type(error).__name__}: "
    ends = [line for line in said if re.search("fatal error|GGML_ASSERT|error loading model", line)]
    told = (ends or said or [f"{type(error).__name__} without a message"])[0]
    return kind + _FOLDERS.sub("", _PREFIXES.sub("", told)).partition(". ")[0]


def _walk_error(folder: Path) -> tuple[float, list[str]]:
    """Relative error of logits of the walk, block by block, on two samples at once."""
    tokens = torch.randint(3, VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(0))
    decoder = Decoder(resolve_model(str(folder)), torch.device("cpu"))
    decoder.check_weights()
    expected = _logits(folder, tokens)
    with torch.no_grad():
        got = decoder.head.logits(final_states(decoder, tokens), decoder.output_weight())
    return float((got - expected).norm() / expected.norm()), []


def _logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [samples, length, vocabulary] of transformers."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    missing = [name for name in info["missing_keys"] if "rotary" not in name]
    if missing:
        raise TesseraqError(f"transformers finds no {missing[0]} in what it saved")
    with torch.no_grad():
        return model.eval()(tokens, use_cache=False).logits.float()  # type: ignore[no-any-return]


def _file_error(model: Path, folder: Path, settings: Mapping[str, Any]) -> tuple[float, list[str]]:
    """Error of llama.cpp's logits against torch's on the weights that were learned; what the program noted."""
    out, text = folder / "out.gguf", folder / "text.txt"
    text.write_text(TEXT * 60, encoding="utf-8")
    calibrated: dict[str, Any] = (
        {} if settings["method"] == "rtn" else {"calibration": str(text), "preset": "fast", "samples": 8, "seqlen": 64}
    )
    recipe = Recipe(
        str(model), out, embedding_type="f32", fresh=True, work_dir=folder / "work", **settings, **calibrated
    )
    tensors, notes = _converted(recipe)
    tokens, got, _ = saved_logits(out, text, _CONTEXT, _CHUNKS)
    expected = answered(_logits(_with(model, tensors, folder / "reference"), tokens))
    with_experts = Decoder(resolve_model(str(model)), torch.device("cpu")).has_experts
    return (_usual_error if with_experts else logit_error)(got, expected), notes


def _usual_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Error of logits [chunks, positions, vocabulary] at the median position.

    What llama.cpp rounds on the way makes it choose another expert now and then, where two are as good.
    """
    pairs = zip(got.flatten(0, 1), expected.flatten(0, 1), strict=True)
    return float(torch.tensor([logit_error(*pair) for pair in pairs]).median())


class _Noting(SilentProgress):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def _converted(recipe: Recipe) -> tuple[dict[str, QuantizedTensor], list[str]]:
    """Make a file as `convert` does, and return what was learned as well."""
    progress = _Noting()
    decoder = Decoder(resolve_model(recipe.model), torch.device("cpu"))
    with (
        joined(recipe.calibrates) as team,
        begin(recipe, decoder, team, ensure_source(progress), progress) as (run, model),
    ):
        model = choose_types(run, model)
        told = quantise(run, model)
        write(run, model, told.ranges)
        return _learned(run, len(decoder)), progress.notes


def _learned(run: Run, blocks: int) -> dict[str, QuantizedTensor]:
    return {n: t for file in run.work.files(blocks, finish=False) for n, t in load_tensors(file)[0].items()}


def _with(model: Path, tensors: Mapping[str, QuantizedTensor], folder: Path) -> Path:
    """Write a checkpoint with what was learned in the place of its own, float32, for transformers to load."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder)
    decoder = Decoder(resolve_model(str(model)), torch.device("cpu"))
    pieces = decoder.pieces()
    state: dict[str, torch.Tensor] = {}
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as stored:
            state |= {name: stored.get_tensor(name).float() for name in stored.keys()}  # noqa: SIM118  (not a dict)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    for name, tensor in tensors.items():
        values = grid_of(tensor.type).dequantize(tensor) if tensor.is_matrix else tensor.arrays["values"]
        place = pieces.get(name) or Piece(decoder.stored_name(name), tuple(values.shape), len(values))
        place.view(state[place.stored]).copy_(values)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder
