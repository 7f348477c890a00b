"""llama.cpp's own conversion classes, as much of them as is asked."""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tesseraq_gguf.converter.row_order import Placement, Unplaceable, block_index, placements
from tesseraq_gguf.errors import ModelError
from tesseraq_gguf.models.experts import aliases
from tesseraq_gguf.models.pieces import Stored
from tesseraq_gguf.models.prequantised import scheme_of
from tesseraq_gguf.models.source import ModelSource
from tesseraq_gguf.models.speculation import has_head
from tesseraq_gguf.models.weights import SafetensorsCheckpoint
from tesseraq_gguf.types.facts import tensor_type


class Converter:
    """One conversion class of llama.cpp for one Hugging Face folder.

    Args:
        job: names the folder.
        file_type: type of the matrices that nobody decides about; f16 for those it does not fit.
        projector: take the class that writes what images and sound go through, not the one for text.

    Attributes:
        model: the class' instance. It reads the checkpoint by itself until it is fed.
    """

    def __init__(self, job: dict[str, Any], file_type: str, projector: bool = False) -> None:
        import gguf
        from conversion import ModelBase

        self._job, folder = job, Path(job["folder"])
        source = ModelSource(job["name"], folder)
        # transformers, which reads the settings, keeps some under other names than classes know
        parameters = source.config() | ModelBase.load_hparams(folder, False)
        if not parameters.get("architectures"):
            parameters["architectures"] = source.architectures()
        load = ModelBase.load_hparams  # classes read the folder's settings again
        ModelBase.load_hparams = staticmethod(
            lambda where, *more, **named: (
                copy.deepcopy(parameters) if Path(where) == folder else load(where, *more, **named)
            )
        )
        kind = _conversion_class(job["name"], parameters, projector)
        if not projector and _leaves_head_out(job, kind):
            kind.no_mtp = True
        guess = gguf.LlamaFileType(tensor_type(file_type).file_type)
        name = job["name"].rpartition("/")[2]
        model = kind(folder, guess, Path(job["out"]), model_name=name)
        self.model: Any = getattr(model, "impl", model)  # some let another class do all of the work
        if folder.name != name:
            self.model.dir_model_card = _named_card(folder, Path(job["scratch"]) / name)
        self._names = self._checkpoint_names()

    def _checkpoint_names(self) -> dict[str, str]:
        """Names as the class calls them, also by what they are called with and without the usual prefix."""
        stored, names = self._stored_names(), dict[str, str]()
        own = dict.fromkeys([*self.model.model_tensors, *stored.values()])
        for name in own:
            names[f"model.{name}"] = name
            names[name.removeprefix("model.")] = name
        return names | stored | {name: name for name in own}

    def _stored_names(self) -> dict[str, str]:
        """What the class calls tensors of the weight files, as far as it takes notice of them.

        Matrices that are packed there have the names that they have unpacked.
        """
        folder = Path(self._job["folder"])
        if self._job["gguf"] or not any(folder.glob("model*.safetensors")):
            return {}
        source = ModelSource(self._job["name"], folder)
        with contextlib.suppress(ModelError):  # the class may read it nevertheless
            if scheme_of(source) is not None:
                return self._owned(SafetensorsCheckpoint(source))
        called = {name: self._filtered(name) for name in source.weight_map()}
        return {name: own for name, own in called.items() if own is not None and own in self.model.model_tensors}

    def _owned(self, weights: SafetensorsCheckpoint) -> dict[str, str]:
        """What the class calls the tensors of a checkpoint of which it takes notice, by stored name."""
        tensors, found = self.model.model_tensors, {}
        for name in weights:
            own = self._filtered(name)
            codes = self._filtered(weights.parts(name)[0]) if name in weights.dequantized else own
            if own is not None and codes in tensors:
                found[name] = own
        return found

    def name(self, checkpoint_name: str) -> str:
        """Return what the class calls a tensor."""
        found = next((self._names[alias] for alias in aliases(checkpoint_name) if alias in self._names), None)
        if found is None:
            raise Unplaceable("llama.cpp's converter does not know it")
        return found

    def names_of(self, checkpoint_names: Iterable[str]) -> dict[str, str]:
        """Return checkpoint names by what the class calls them; those that it does not know are left out."""
        found = {}
        for name in checkpoint_names:
            with contextlib.suppress(Unplaceable):
                found[self.name(name)] = name
        return found

    def feed(self, weights: SafetensorsCheckpoint) -> None:
        """Give the class all weights as the learner reads them, dequantised, in place of what it would read."""
        from conversion.base import LazyTorchTensor

        model, fed = self.model, {}
        for name, own in self._owned(weights).items():
            meta = LazyTorchTensor.meta_with_dtype_and_shape(weights.dtype(name), weights.shape(name))
            fed[own] = partial(LazyTorchTensor, meta=meta, args=(name,), func=weights.read)
        for name in weights.hidden:
            model.model_tensors.pop(self._filtered(name), None)
        model.model_tensors.update(fed)
        model.hparams.pop("quantization_config", None)

        def dequant_model() -> None:
            """It is done: nothing is repacked, and the file's type is the one that is asked for."""
            model._is_nvfp4 = model._is_mxfp4 = False

        model.dequant_model = dequant_model

    def reads_its_own(self) -> bool:
        """Whether the class has a way of its own to read quantised checkpoints, for its architecture alone."""
        from conversion import ModelBase

        return type(self.model).dequant_model is not ModelBase.dequant_model

    def read(
        self, weights: SafetensorsCheckpoint, names: Iterable[str]
    ) -> Iterator[tuple[str, Any, Callable[[Any], Any]]]:
        """Give the tensors of the checkpoint as llama.cpp reads them, where it knows how.

        Args:
            weights: the same checkpoint.
            names: which tensors, by stored name.

        Yields:
            The name, the shape, and what gives rows of it, float32.
        """
        from conversion.base import LazyTorchTensor

        tensors = self.model.model_tensors
        known = bool(not weights.dequantized or self._dequantized(weights))
        for name in names:
            own = self._filtered(name)
            if own in tensors and (known or name not in weights.dequantized):
                tensor = tensors[own]()

                def part(rows: Any, tensor: Any = tensor) -> Any:
                    return LazyTorchTensor.to_eager(tensor[rows]).float()

                yield name, tuple(tensor.shape), part

    def _dequantized(self, weights: SafetensorsCheckpoint) -> bool:
        """Let the class dequantise its tensors; tell whether it knew how."""
        try:
            self.model.dequant_model()
        except Exception:  # assertions, missing keys, whatever a scheme that it does not know leads it to
            return False
        scales = {part for name in weights.dequantized for part in weights.parts(name) if part != name}
        return not any(self._filtered(name) in self.model.model_tensors for name in scales)

    def _filtered(self, name: str) -> str | None:
        """What the class calls a tensor of the files; None if it takes no notice of it."""
        item = self.model.filter_tensors((name, None))
        return item[0] if item else None

    def placements(self, tensors: Sequence[Stored]) -> dict[str, list[Placement]]:
        """Find where the rows of matrices go, by checkpoint name.

        Args:
            tensors: what the matrices are stored in, by checkpoint name.

        Raises:
            Unplaceable: the class does more than to move rows.
        """
        return placements(self.model.modify_tensors, [replace(t, name=self.name(t.name)) for t in tensors])

    def modified(self, name: str, weights: Any) -> list[tuple[str, Any]]:
        """Return what the class makes of weights."""
        own = self.name(name)
        return list(self.model.modify_tensors(weights, own, block_index(own)))


def feed(job: dict[str, Any], converter: Converter, learned: bool) -> None:
    """Give a converter the weights, unless nothing is learned and it alone can read them."""
    safetensors = any(Path(job["folder"]).glob("model*.safetensors"))
    if learned or (safetensors and not converter.reads_its_own()):
        converter.feed(SafetensorsCheckpoint(ModelSource(job["name"], Path(job["folder"]))))


def _leaves_head_out(job: dict[str, Any], kind: Any) -> bool:
    """Whether a class is to write no head for speculation: it was asked for, or the files have lost it.

    Raises:
        ModelError: the class always writes it.
    """
    folder = Path(job["folder"])
    safetensors = any(folder.glob("model*.safetensors"))
    there = not safetensors or has_head(ModelSource(job["name"], folder))
    if there and not job["keeps_head"] and not kind.supports_mtp_export and not getattr(kind, "skip_mtp", False):
        raise ModelError(
            f"{job['name']}: llama.cpp's converter cannot leave the head for speculation of this model out"
        )
    return bool(kind.supports_mtp_export and not (there and job["keeps_head"]))


def _conversion_class(model: str, parameters: dict[str, Any], projector: bool) -> Any:
    """The class of llama.cpp that writes the text part of a model, or its projector."""
    from conversion import ModelType, get_model_architecture, get_model_class

    wanted = ModelType.MMPROJ if projector else ModelType.TEXT
    names = [get_model_architecture(parameters, wanted), *parameters["architectures"]]
    if not projector:  # the class that its language model would have on its own
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        inside = parameters.get("text_config") or {}
        names.append(str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(inside.get("model_type")))))
    for name in names:
        with contextlib.suppress(NotImplementedError):
            return get_model_class(name, mmproj=projector)
    if projector:
        raise ModelError(f"{model}: llama.cpp writes no projector for the architecture {names[0]}")
    raise ModelError(f"{model}: llama.cpp does not know the architecture {names[0]}")


def _named_card(folder: Path, card: Path) -> Path:
    """Copy what a model says of itself into a folder of its name: a hub's snapshot is called by its commit.

    The converter reads base name, size and fine-tune out of the folder's name.
    """
    card.mkdir(exist_ok=True)
    for file in ("README.md", "config.json", "generation_config.json"):
        if (folder / file).is_file():
            shutil.copyfile(folder / file, card / file)
    return card
