"""Types of matrices that are not learned: what llama.cpp leaves alone, what fits, and what a GGUF file has already."""

from __future__ import annotations

from typing import Any

from tesseraq_gguf.gguf_files.gguf_file import TensorInfo
from tesseraq_gguf.types.facts import ORDERED_TYPES, WITH_CODEBOOKS, tensor_type

EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
OUTPUT = "output.weight"

KEPT = (
    "_norm.weight", "ffn_gate_inp", "position_embd", "token_types", "ssm_conv1d", "shortconv.conv", "time_mix_",
    "altup", "laurel", "per_layer_model_proj", "attn_rel_b", "indexer.proj",
)  # fmt: skip
"""Matrices that llama.cpp wants in 32 bits: what its own converter and llama-quantize leave alone."""


def fitting_type(wanted: str, columns: int) -> str:
    """Return the type of a matrix with rows of so many weights: the wanted one, or f16 where that does not fit."""
    return tensor_type(wanted).name if tensor_type(wanted).fits(columns) else "f16"


def is_kept(tensor: TensorInfo) -> bool:
    """Whether a tensor of a GGUF file is copied as it is, whatever is asked for."""
    return len(tensor.shape) < 2 or not tensor.name.endswith(".weight") or any(k in tensor.name for k in KEPT)


def smaller_type(tensor: TensorInfo, wanted: str) -> str:
    """Return the smaller of a matrix's type in a GGUF file and the one that is wanted for it."""
    wanted = fitting_type(wanted, tensor.shape[0])
    if tensor.type in (*ORDERED_TYPES, *WITH_CODEBOOKS):  # neither an order of columns nor codebooks are copied
        return wanted
    return tensor.type if tensor.bits_per_weight <= tensor_type(wanted).bits_per_weight else wanted


def matrix_of_gguf(tensor: TensorInfo, factor: bool = False, own_factor: bool = False) -> dict[str, Any]:
    """Return what `FileMatrix` has to say of a matrix in a GGUF file, names of its checkpoint apart."""
    copied = tensor.type not in (*ORDERED_TYPES, *WITH_CODEBOOKS)
    return {
        "columns": tensor.shape[0],
        "weights": tensor.weights,
        "forced": tensor.type if is_kept(tensor) else None,
        "own": tensor.type if copied else None,
        "own_bytes": tensor.bytes,
        "layers": tensor.shape[2] if len(tensor.shape) > 2 else 1,
        "factor": factor,
        "own_factor": own_factor,
    }
