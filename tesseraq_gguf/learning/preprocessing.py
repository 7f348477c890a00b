"""Quantisation preprocessing (PTQ1.61, arXiv 2502.13179, §3.3): make a model that takes quantisation better.

The model is quantised once. Low-rank adapters are learned on the dequantised model, as a language model on a text, and
merged into it; the result is what is quantised in the end. Adapters have rank 64 on queries, keys, values, gate, up and
down, α = 16, dropout 0.1; AdamW, rate 1e-4 over 10,000 steps, falling as a cosine. With fewer steps the rate is higher.

Unlike the walk over the blocks, this needs the whole model in memory, in float32 with the adapters' gradients.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.models.decoder import Decoder
from tesseraq_gguf.models.finite import check_finite
from tesseraq_gguf.models.prequantised import QUANTIZATION_FILE, plain_config
from tesseraq_gguf.models.quantised import Quantised
from tesseraq_gguf.models.source import ModelSource, save_weights
from tesseraq_gguf.models.whole import whole_model
from tesseraq_gguf.paths import temporary_sibling
from tesseraq_gguf.types.grids import grid_of
from tesseraq_gguf.types.quantized import ORDER, QuantizedTensor

PAPER_STEPS = 10_000
"""Steps that the paper's rate is for."""

_PAPERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
"""Matrices that the paper gives adapters, as most architectures call them."""


def check_installed() -> None:
    """Find out whether adapters can be made.

    Raises:
        UsageError: peft is not installed.
    """
    if find_spec("peft") is None:
        raise UsageError("--preprocess needs peft. Run: pip install 'tesseraq-gguf[preprocess]'")


_LEAVE_OUT = "Leave --preprocess out, or give the blocks more bits (--type, --tensor-type)"
"""What to do about a model that adapters cannot learn on."""


@dataclass(frozen=True)
class Preprocessing:
    """The schedule.

    Attributes:
        steps: AdamW steps.
        batch: sequences of a step.
        rank: of the adapters.
        alpha: adapters are multiplied by alpha / rank.
        dropout: of what adapters are fed.
        rate: peak learning rate for the paper's steps.
        growth: exponent with which the rate grows by the ratio of the paper's steps to `steps`.
        kept: steps after which the state is kept, so that a killed run goes on there.
    """

    steps: int = PAPER_STEPS
    batch: int = 4
    rank: int = 64
    alpha: int = 16
    dropout: float = 0.1
    rate: float = 1e-4
    growth: float = 0.5
    kept: int = 25

    def run(
        self,
        quantised: Quantised,
        tokens: Tensor,
        seed: int,
        out: Path,
        report: Callable[[int, int], None] = lambda *_: None,
    ) -> ModelSource:
        """Learn adapters and write the merged model, unless it is there.

        Args:
            quantised: what the first quantisation made of the model.
            tokens: the text, int64 [sequences, length].
            seed: makes the run repeatable.
            out: the folder to write, which appears only when it is whole. State is kept in a file beside it.
            report: called with (steps done, steps in all).

        Returns:
            The merged model.

        Raises:
            NotFiniteError: gradients are not finite.
        """
        decoder = quantised.decoder
        source, state = decoder.source, out.with_name(f"{out.name}.pt")
        merged = replace(source, folder=out, gguf=None)
        if not out.is_dir():
            with torch.random.fork_rng(devices=[decoder.device] if decoder.device.type == "cuda" else []):
                torch.manual_seed(seed)
                adapted = self._adapted(*dequantised_model(decoder, quantised.blocks)).to(decoder.device).train()
                learned = self._learn(adapted, quantised, tokens, state, report)
            with temporary_sibling(out) as partial:
                partial.mkdir()
                for file in source.folder.iterdir():
                    if file.is_file() and ".safetensors" not in file.name and file.name != QUANTIZATION_FILE:
                        shutil.copyfile(file, partial / file.name)
                config = json.dumps(plain_config(source.config()), indent=2)
                (partial / "config.json").write_text(config, encoding="utf-8")
                save_weights(learned, partial)
            state.unlink(missing_ok=True)
        return merged

    def _adapted(self, model: Any, names: list[str]) -> Any:
        """The model with adapters at the modules named."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=names, task_type="CAUSAL_LM"
        )
        return get_peft_model(model, config)

    def _learn(
        self, adapted: Any, quantised: Quantised, tokens: Tensor, state: Path, report: Callable[[int, int], None]
    ) -> Any:
        device, autocast = quantised.decoder.device, quantised.autocast
        variables = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
        rate = self.rate * (PAPER_STEPS / self.steps) ** self.growth
        adam = torch.optim.AdamW(variables.values(), lr=rate, weight_decay=0)
        slower = torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.steps)
        first = _restore(state, variables, adam, slower, device)
        report(first, self.steps)
        for step in range(first, self.steps):
            chosen = self._chosen(step, len(tokens))
            adam.zero_grad()
            for sequence in tokens[chosen].split(1):  # one by one: answers to a whole vocabulary are large
                given = sequence.to(device)
                with torch.autocast(device.type, autocast, enabled=autocast != torch.float32):
                    loss = adapted(input_ids=given, labels=given, use_cache=False).loss
                (loss / len(chosen)).backward()
            gradients = {name: v.grad for name, v in variables.items() if v.grad is not None}
            check_finite(gradients, "the gradients of the adapters", _LEAVE_OUT)
            adam.step()
            slower.step()
            if (step + 1) % self.kept == 0:
                _keep(state, step + 1, variables, adam, slower, device)
            report(step + 1, self.steps)
        return adapted.merge_and_unload().eval()

    def _chosen(self, step: int, sequences: int) -> Tensor:
        """Sequences of a step: all in turn, in a new order each time round."""
        picked = []
        for place in range(step * self.batch, (step + 1) * self.batch):
            turn, position = divmod(place, sequences)
            picked.append(torch.randperm(sequences, generator=torch.Generator().manual_seed(turn))[position])
        return torch.stack(picked)


def dequantised_model(
    decoder: Decoder, blocks: Callable[[int], Mapping[str, QuantizedTensor]]
) -> tuple[Any, list[str]]:
    """Build the whole model with quantised matrices, dequantised.

    Args:
        decoder: the model.
        blocks: what was made of each block, by checkpoint name.

    Returns:
        The transformers model, float32 on the CPU, nothing of it learned, and the module names of those of its
        quantised matrices that the paper gives adapters; of all where none is called as there.
    """
    model = whole_model(decoder.source, torch.float32).requires_grad_(False)
    parameters = dict(model.named_parameters())
    names = []
    for index in range(len(decoder)):
        tensors = blocks(index)
        for name, tensor in tensors.items():
            if tensor.is_matrix:
                weight = grid_of(tensor.type).dequantize(tensor)
                order = tensors.get(f"{name.removesuffix('.weight')}{ORDER}")
                if order is not None:
                    weight = weight[:, order.arrays["values"].long().argsort()]
                parameters[name].data.copy_(weight)
                names.append(name.removesuffix(".weight"))
            elif tensor.plain:
                parameters[name].data.copy_(tensor.arrays["values"])
    papers = [name for name in names if name.rpartition(".")[2] in _PAPERS]
    return model, papers or names


def _keep(
    state: Path, step: int, variables: Mapping[str, Tensor], adam: Any, slower: Any, device: torch.device
) -> None:
    kept = {
        "step": step,
        "variables": {name: v.detach().cpu() for name, v in variables.items()},
        "adam": adam.state_dict(),
        "slower": slower.state_dict(),
        "random": torch.get_rng_state(),
        "device_random": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }
    with temporary_sibling(state) as partial:
        torch.save(kept, partial)


def _restore(state: Path, variables: Mapping[str, Tensor], adam: Any, slower: Any, device: torch.device) -> int:
    """Take back what was kept, if anything was; return the steps done."""
    if not state.is_file():
        return 0
    kept = torch.load(state, map_location="cpu", weights_only=True)
    for name, variable in variables.items():
        variable.data.copy_(kept["variables"][name])
    adam.load_state_dict(kept["adam"])
    slower.load_state_dict(kept["slower"])
    torch.set_rng_state(kept["random"])
    if kept["device_random"] is not None:
        torch.cuda.set_rng_state(kept["device_random"], device)
    return int(kept["step"])
