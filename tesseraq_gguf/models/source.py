"""From what the user calls MODEL to a folder with a config and a tokenizer, and to files with weights.

A Hugging Face folder is used where it stands. A hub id is downloaded (`hub`). Of a GGUF file (and of the built-in
models, which are some) the folder has config and tokenizer alone, made of its header and kept in the cache; weights are
read from the file, and what is copied to the output is the file's.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from tesseraq_gguf.errors import FileFormatError, ModelError
from tesseraq_gguf.gguf_files.gguf_file import open_gguf
from tesseraq_gguf.models.built_in import BUILT_IN, built_in_file
from tesseraq_gguf.models.hub import DEFAULT_HUB, Hub, is_hub_id
from tesseraq_gguf.paths import cache_folder, temporary_sibling
from tesseraq_gguf.tensor_files import narrowest, write_tensors

Say = Callable[[str], None]

_TOKENIZER = re.compile(r"(tokenizer|vocab|merges|tekken|spiece).*\.(json|txt)|.*\.(model|tiktoken)")
NO_TOKENIZER = (
    "there is no tokenizer in its folder: put the files of the original model's beside config.json, "
    "such as tokenizer.json or tokenizer.model"
)

_SENSES = ("vision_config", "audio_config", "vision_encoder", "whisper_config")

_ADAPTER = "adapter_config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(?P<before>.*-)\d{5}-of-(?P<count>\d{5})\.safetensors")

_HEADER_FOLDER = 1
"""Grows when the folder made of a GGUF file's header changes."""


@dataclass(frozen=True)
class ModelSource:
    """The files of one model.

    Attributes:
        name: how messages and metadata call the model.
        folder: Hugging Face layout: config.json, *.safetensors (sharded or not), tokenizer files. Of a GGUF file it
            has no weights. Of one that is only copied there is none: it is the file itself, lest another model's that
            stands beside it be read.
        gguf: the GGUF file that the weights are in, if they are in one; its metadata is then copied to the output.
        keeps_head: whether a head for speculation, if it has one, goes into the file.
    """

    name: str
    folder: Path
    gguf: Path | None = None
    keeps_head: bool = True

    def config(self) -> dict[str, Any]:
        """Return the parsed config.json."""
        return json.loads((self.folder / "config.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]

    def senses(self) -> list[str]:
        """Return what config.json calls the settings of what images and sound go through; nothing of text alone."""
        config = self.config()
        return [name for name in _SENSES if config.get(name)]

    def gguf_parts(self) -> tuple[Path, ...]:
        """Return the GGUF file, or all parts of it, that the weights are in; nothing if they are in none."""
        return open_gguf(self.gguf).parts if self.gguf else ()

    def architectures(self) -> list[str]:
        """Return what config.json calls the model's class, or what transformers makes of its `model_type`.

        Raises:
            ModelError: it says neither.
        """
        config = self.config()
        named = [str(name) for name in config.get("architectures") or []]
        if not named:
            from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

            known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config.get("model_type")))
            named = [known] if isinstance(known, str) else []
        if not named:
            raise ModelError(
                f"{self.name}: config.json names no architectures, and no model_type whose architecture is known: "
                'add "architectures", such as ["LlamaForCausalLM"]'
            )
        return named

    def has_tokenizer(self) -> bool:
        """Whether there is any file that a tokenizer could be made of."""
        names = {file.name for file in self.folder.iterdir()} - {"tokenizer_config.json"}
        return any(map(_TOKENIZER.fullmatch, names))

    def weight_map(self) -> dict[str, Path]:
        """Return the safetensors file of every tensor, by the tensor's checkpoint name.

        Raises:
            ModelError: a file is missing, truncated or not a safetensors file.
        """
        from safetensors import SafetensorError, safe_open

        listed = self._listed()
        names: dict[str, Path] = {}
        for file in self._weight_files(listed):
            if not file.is_file():
                raise ModelError(
                    f"{self.name}: {file.name} is listed in {_INDEX} but is not there. Download the model again."
                )
            try:
                with safe_open(file, "pt") as tensors:
                    names.update(dict.fromkeys(tensors.keys(), file))
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{self.name}: {file.name} cannot be read ({error}). Download the file again."
                ) from error
        if not names:
            raise ModelError(
                f"{self.name}: no model*.safetensors file in {self.folder}. Save the model with safetensors first."
            )
        if odd := next(iter(sorted(names.keys() ^ (listed or names).keys())), None):
            where = "is in the weight files but not in" if odd in names else "is not where it should be by"
            raise ModelError(
                f"{self.name}: {odd} {where} {_INDEX}: files of two saves are mixed. Save the model again."
            )
        return names

    def _listed(self) -> dict[str, str] | None:
        """The name of the file of every tensor, as the index has it; None without an index."""
        index = self.folder / _INDEX
        if not index.is_file():
            return None
        try:
            listed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return dict(listed)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ModelError(
                f"{self.name}: {_INDEX} cannot be read ({error or type(error).__name__}). Download it again."
            ) from error

    def _weight_files(self, listed: Mapping[str, str] | None) -> list[Path]:
        """The files of the model, where transformers and llama.cpp's converter would take the same.

        transformers takes `model.safetensors` before an index, the converter takes it the other way round; without an
        index the converter takes every file whose name begins so.
        """
        single = self.folder / _SINGLE
        files = {single} if single.is_file() else set[Path]()
        named = {self.folder / f for f in listed.values()} if listed else set(self.folder.glob("model*.safetensors"))
        if files and named != files:
            other = next(f.name for f in sorted(named) if f != single)
            raise ModelError(
                f"{self.name}: {_SINGLE} and {other} stand side by side, and nothing says which is the model: "
                "remove the files of the other save."
            )
        shards = [(f, match) for f in named if (match := _SHARD.fullmatch(f.name))]
        for file, match in shards:
            count = int(match["count"])
            wanted = {match["before"] + f"{n:05d}-of-{match['count']}.safetensors" for n in range(1, count + 1)}
            if missing := sorted(wanted - {f.name for f, _ in shards}):
                said = f"is not listed in {_INDEX}" if listed else "is not there"
                raise ModelError(
                    f"{self.name}: {missing[0]} {said}, but {file.name} is one of {count} parts. "
                    "Download the model again."
                )
        return sorted(named)

    def fingerprint(self) -> str:
        """Return a hash of the config's text and of name, size and time of the weight files."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for file in self.gguf_parts() or sorted(self.folder.glob("*.safetensors")):
            stat = file.stat()
            digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
        return digest.hexdigest()[:16]


def resolve_model(
    model: str, say: Say = lambda _: None, understood: bool = True, hub: Hub = DEFAULT_HUB
) -> ModelSource:
    """Find or fetch the files of `model`: a folder, a `.gguf` file, a built-in model, or a hub id.

    Args:
        model: as given on the command line.
        say: receives one line for each step that takes long.
        understood: make config and tokenizer of a GGUF file, for which its architecture must be known here. What only
            copies tensors needs none.
        hub: where a hub id is downloaded from.

    Raises:
        ModelError: nothing of that name, or it cannot be read.
    """
    if model in BUILT_IN:
        return gguf_source(built_in_file(model, say), model, say, understood)
    path = Path(model).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path} is neither a model folder nor a .gguf file")
        return gguf_source(path, path.stem, say, understood)
    if path.suffix == ".gguf" or path.is_absolute() or model.startswith(".") or not is_hub_id(model):
        raise ModelError(
            f"no model at {model}. Give a folder, a .gguf file, a hub id such as Qwen/Qwen3-0.6B, or "
            f"{' or '.join(map(repr, BUILT_IN))}"
        )
    return ModelSource(model.partition("@")[0], _from_folder(hub.fetch(model, say)).folder)


def _from_folder(path: Path) -> ModelSource:
    config = path / "config.json"
    if (path / _ADAPTER).is_file():
        raise ModelError(
            f"{path} holds an adapter{_adapted(path / _ADAPTER)}, not a model: merge it first "
            "(merge_and_unload and save_pretrained of peft) and give the folder of the merged model"
        )
    try:
        if not isinstance(json.loads(config.read_text(encoding="utf-8")), dict):
            raise ModelError(f"{config} holds no settings of a model")
    except FileNotFoundError:
        raise ModelError(f"{path} has no config.json: not a Hugging Face model folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ModelError(f"{config} cannot be read: {error}") from error
    return ModelSource(path.resolve().name, path.resolve())


def _adapted(config: Path) -> str:
    """What an adapter is for, as far as its file tells."""
    try:
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, OSError, AttributeError):
        base = None
    return f" for {base}" if base else ""


def gguf_source(file: Path, name: str, say: Say = lambda _: None, understood: bool = True) -> ModelSource:
    """Make config and tokenizer of a GGUF file in the cache, once for all files that have the same.

    Args:
        file: the file; of a split one the first part.
        name: what the model is to be called.
        say: receives a line if it takes long.
        understood: whether to do that. Otherwise the header is read alone.

    Raises:
        ModelError: the file cannot be read, or what it says of its model is not understood.
    """
    from tesseraq_gguf.models.gguf_config import describe
    from tesseraq_gguf.models.gguf_model import GgufCheckpoint, digest_of, write_header_folder

    try:
        opened = open_gguf(file)
        if not understood:
            return ModelSource(name, _absolute(file), gguf=_absolute(file))
        folder = cache_folder("models") / f"{digest_of(describe(opened))[:24]}-header-{_HEADER_FOLDER}"
        with FileLock(f"{folder}.lock"):
            if not (folder / "config.json").is_file():
                say(f"Reading the vocabulary of {file.name}")
                weights = GgufCheckpoint(opened, name)
                with temporary_sibling(folder) as partial:
                    partial.mkdir()
                    write_header_folder(weights, partial)
    except FileFormatError as error:
        raise ModelError(str(error)) from error
    return ModelSource(name, folder, gguf=_absolute(file))


def _absolute(file: Path) -> Path:
    """A path that holds in any folder, and keeps the name, by which the parts of a split file are found."""
    return file.parent.resolve() / file.name


def save_weights(model: Any, folder: Path) -> None:
    """Write the weights of a transformers model as one safetensors file, in the narrowest dtypes that hold them."""
    embedding, weights = model.get_input_embeddings().weight.data_ptr(), {}
    for name, tensor in model.state_dict().items():
        if name in model.all_tied_weights_keys and tensor.data_ptr() == embedding:
            continue
        weights[name] = narrowest(tensor)
    write_tensors(weights, folder / "model.safetensors", {"format": "pt"})
