"""A decoder-only transformers model of which at most one decoder block has weights in memory.

The model is built on the meta device (no memory). `stem` runs everything before the first block (embedding,
positions, masks) and keeps what the model hands to each block; `load_block` gives one block its weights from the
safetensors files; `mean_loss` and `answer_gradient` run final norm and output.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tesseraq_gguf.errors import ModelError
from tesseraq_gguf.models.source import ModelSource

CAUSAL_LM_ENDINGS = ("ForCausalLM", "LMHeadModel")


@dataclass
class LoadedBlock:
    """One decoder block with its weights.

    Attributes:
        index: position in the model.
        prefix: what stands before the block's parameter names in the checkpoint, such as `model.layers.3.`.
        module: the transformers block, float32, parameters frozen.
    """

    index: int
    prefix: str
    module: nn.Module

    def matrices(self) -> dict[str, nn.Linear]:
        """Return the linear layers of the block by module name: the matrices that methods learn."""
        return {name: m for name, m in self.module.named_modules() if isinstance(m, nn.Linear)}

    def run(self, hidden: Tensor, arguments: dict[str, Any], weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Run the block.

        Args:
            hidden: [batch, length, hidden].
            arguments: what the model hands to this block besides hidden states.
            weights: matrices [out, in] by module name to use in place of the block's own.
        """
        replaced = {f"{name}.weight": w for name, w in (weights or {}).items()}
        out = functional_call(self.module, replaced, (hidden,), arguments)
        return out if isinstance(out, Tensor) else out[0]


@dataclass(frozen=True)
class BlockInputs:
    """What the model hands to its blocks besides hidden states, recorded for one sequence length.

    Attributes:
        arguments: one dict of keyword arguments per block (masks, rotary tables); shared objects stay shared.
    """

    arguments: list[dict[str, Any]]


class _Recorder(nn.Module):
    """Stands in for a block: remembers its keyword arguments, returns the hidden states unchanged."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}
        # models read such attributes of their blocks while they loop over them
        for name in ("attention_type", "layer_type", "is_sliding", "layer_idx"):
            if hasattr(block, name):
                setattr(self, name, getattr(block, name))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            raise ModelError(
                "this architecture hands positional arguments to its decoder blocks, which is not supported"
            )
        self.arguments = kwargs
        return hidden_states


class Decoder:
    """A model whose decoder blocks are visited one after the other.

    Args:
        source: the model's files.
        device: where blocks, embedding and activations live.

    Raises:
        ModelError: not a decoder-only language model, or its blocks cannot be found.
    """

    def __init__(self, source: ModelSource, device: torch.device) -> None:
        self.source = source
        self.device = device
        self._files = source.weight_map()
        self._model = _skeleton(source)
        self.config = self._model.config.get_text_config()
        self._blocks_name, self._blocks = _find_blocks(self._model, self.config.num_hidden_layers)

    def __len__(self) -> int:
        """Return the number of decoder blocks."""
        return len(self._blocks)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.config.hidden_size)

    def block_prefix(self, index: int) -> str:
        """Return the checkpoint prefix of block `index`, with its final dot."""
        return f"{self._blocks_name}.{index}."

    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """Return the shape [out, in] of every matrix of every block by checkpoint name, without loading anything."""
        return {
            f"{self.block_prefix(i)}{name}.weight": (m.out_features, m.in_features)
            for i, block in enumerate(self._blocks)
            for name, m in block.named_modules()
            if isinstance(m, nn.Linear)
        }

    def load_block(self, index: int) -> LoadedBlock:
        """Give block `index` its weights: a new float32 module on the device, in evaluation mode, all frozen."""
        prefix = self.block_prefix(index)
        module = copy.deepcopy(self._blocks[index])
        self._fill(module, prefix)
        return LoadedBlock(index, prefix, module.to(self.device).eval().requires_grad_(False))

    @torch.no_grad()
    def stem(self, tokens: Tensor) -> tuple[Tensor, BlockInputs]:
        """Run what comes before the first block.

        Args:
            tokens: int64 [samples, length].

        Returns:
            Hidden states float32 [samples, length, hidden] on the CPU, and what each block is handed.
        """
        recorders = [_Recorder(b) for b in self._blocks]
        base = self._model.base_model
        with (
            self._embedding(),
            _replaced(self._model, self._blocks_name, nn.ModuleList(recorders)),
            _identity_norm(base),
        ):
            outputs = []
            for sample in tokens.split(1):
                result = base(input_ids=sample.to(self.device), use_cache=False)
                outputs.append(result.last_hidden_state.float().cpu())
        return torch.cat(outputs), BlockInputs([r.arguments for r in recorders])

    @torch.no_grad()
    def mean_loss(self, hidden: Tensor, tokens: Tensor) -> float:
        """Return the mean cross-entropy in nats per token of final hidden states [samples, length, hidden]."""
        norm, head = self._head()
        total = 0.0
        for h, t in zip(hidden, tokens, strict=True):
            logits = self._logits(norm, head, h.to(self.device))
            total += float(nn.functional.cross_entropy(logits[:-1], t[1:].to(self.device), reduction="sum"))
        return total / (tokens.shape[0] * (tokens.shape[1] - 1))

    def answer_gradient(self, hidden: Tensor, generator: torch.Generator) -> Tensor:
        """Gradient of the log-probability of answers drawn from the model itself.

        Args:
            hidden: final hidden states, float32 [samples, length, hidden].
            generator: draws one answer per position.

        Returns:
            The gradient with respect to `hidden`, of the same shape, on the CPU.
        """
        norm, head = self._head()
        gradients = []
        for h in hidden:
            h = h.to(self.device).requires_grad_()
            logits = self._logits(norm, head, h)
            uniform = torch.rand(len(h), 1, generator=generator).to(self.device)
            drawn = torch.searchsorted(logits.detach().softmax(-1).cumsum(-1), uniform).clamp_max(logits.shape[-1] - 1)
            score = logits.log_softmax(-1).gather(1, drawn).sum()
            gradients.append(torch.autograd.grad(score, h)[0].cpu())
        return torch.stack(gradients)

    def _head(self) -> tuple[nn.Module, Tensor]:
        name, norm = _final_norm(self._model.base_model)
        norm = copy.deepcopy(norm)
        self._fill(norm, f"{self._base_prefix()}{name}.")
        return norm.to(self.device).requires_grad_(False), self._output_weight()

    def _logits(self, norm: nn.Module, head: Tensor, hidden: Tensor) -> Tensor:
        logits = (norm(hidden) @ head.T).float()
        soft_cap = getattr(self.config, "final_logit_softcapping", None)
        return soft_cap * torch.tanh(logits / soft_cap) if soft_cap else logits

    def _output_weight(self) -> Tensor:
        name = "lm_head.weight"
        if name not in self._files:
            embedding = self._model.get_input_embeddings()
            name = next(f"{n}.weight" for n, m in self._model.named_modules() if m is embedding)
        return self._read(name).float().to(self.device)

    def _base_prefix(self) -> str:
        return f"{self._model.base_model_prefix}."

    def _read(self, name: str) -> Tensor:
        from safetensors import safe_open

        base = self._base_prefix()
        stored = next((n for n in (name, name.removeprefix(base)) if n in self._files), None)
        if stored is None:
            raise ModelError(f"{self.source.name}: the weight files have no tensor {name}")
        with safe_open(self._files[stored], "pt") as tensors:
            return tensors.get_tensor(stored)  # type: ignore[no-any-return]

    def _fill(self, module: nn.Module, prefix: str) -> None:
        state = {}
        for name, tensor in module.state_dict(keep_vars=True).items():
            stored = self._read(prefix + name)
            if stored.shape != tensor.shape:
                raise ModelError(
                    f"{self.source.name}: {prefix + name} has shape {tuple(stored.shape)}, "
                    f"config.json implies {tuple(tensor.shape)}"
                )
            state[name] = stored.float()
        module.load_state_dict(state, assign=True)

    @contextmanager
    def _embedding(self) -> Iterator[None]:
        """Give the modules that the stem needs their weights, in the dtype of the file, for a while."""
        norm = _final_norm(self._model.base_model)[0]
        outside = [
            (name, module)
            for name, module in self._model.base_model.named_modules()
            if any(p.is_meta for p in module.parameters(recurse=False))
            and not f"{self._base_prefix()}{name}".startswith(self._blocks_name)
            and name != norm
        ]
        empty = [(module, n, p) for _, module in outside for n, p in module.named_parameters(recurse=False)]
        for name, module in outside:
            for n, _ in list(module.named_parameters(recurse=False)):
                weight = self._read(f"{self._base_prefix()}{name}.{n}").to(self.device)
                setattr(module, n, nn.Parameter(weight, requires_grad=False))
        self._move_buffers()
        try:
            yield
        finally:
            for module, n, parameter in empty:
                setattr(module, n, parameter)

    def _move_buffers(self) -> None:
        for module in self._model.base_model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:
                    setattr(module, name, buffer.to(self.device))


def _skeleton(source: ModelSource) -> Any:
    """Build the transformers model with parameters on the meta device and computed buffers (rotary tables) for real."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    named = source.config().get("architectures") or []
    if not any(str(a).endswith(CAUSAL_LM_ENDINGS) for a in named):
        kind = ", ".join(map(str, named)) or "unnamed"
        raise ModelError(f"{source.name} is not a decoder-only language model (config.json says: {kind})")
    try:
        config = AutoConfig.from_pretrained(source.folder)
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(
                f"{source.name} is an encoder-decoder model; only decoder-only language models can be learned"
            )
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    except (ValueError, KeyError, OSError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"{source.name}: transformers cannot build this model: {reason}") from error
    return model.eval().requires_grad_(False)


def _find_blocks(model: Any, count: int) -> tuple[str, nn.ModuleList]:
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == count
            and any(isinstance(m, nn.Linear) for m in module.modules())
        ):
            return name, module
    raise ModelError(
        f"{type(model).__name__}: no list of {count} decoder blocks with linear layers found in this architecture"
    )


def _final_norm(base: nn.Module) -> tuple[str, nn.Module]:
    for name in ("norm", "final_layernorm", "ln_f", "final_layer_norm"):
        if isinstance(getattr(base, name, None), nn.Module):
            return name, getattr(base, name)
    raise ModelError(f"{type(base).__name__}: the final norm of this architecture was not found")


@contextmanager
def _identity_norm(base: nn.Module) -> Iterator[None]:
    name, _ = _final_norm(base)
    with _replaced(base, name, nn.Identity()):
        yield


@contextmanager
def _replaced(root: nn.Module, name: str, replacement: nn.Module) -> Iterator[None]:
    parent_name, _, leaf = name.rpartition(".")
    parent = root.get_submodule(parent_name)
    original = getattr(parent, leaf)
    setattr(parent, leaf, replacement)
    try:
        yield
    finally:
        setattr(parent, leaf, original)
