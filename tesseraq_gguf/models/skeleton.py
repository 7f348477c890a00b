"""From a checkpoint to the transformers model whose text part is learned: no weights, no towers for images or sound.

A vision-language checkpoint is built as what transformers makes text with. What only images or sound go through is
taken out: it needs no memory, and no walk can mistake its blocks for those of the language model.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn

from tesseraq_gguf.errors import ModelError, TesseraqError
from tesseraq_gguf.models import attention
from tesseraq_gguf.models.source import ModelSource
from tesseraq_gguf.models.stand_ins import put

_CAUSAL_LM_ENDINGS = ("ForCausalLM", "LMHeadModel")


class _Absent(nn.Module):
    """Stands where a tower was."""

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        raise ModelError("this architecture runs its towers for images or sound on text alone, which is not supported")


def skeleton(source: ModelSource) -> Any:
    """Build the transformers model with parameters on the meta device and computed buffers (rotary tables) for real.

    Raises:
        ModelError: no decoder-only language model, or one that transformers cannot build.
    """
    from accelerate import init_empty_weights

    _check_kind(source)
    attention.register()
    try:
        with init_empty_weights(include_buffers=False):
            model = _built(source)
    except TesseraqError:
        raise
    except Exception as error:  # configs and models raise whatever a missing or odd entry leads them to
        reason = str(error).strip().split("\n")[0]
        if not isinstance(error, (ValueError, OSError, ImportError)):
            reason = f"{type(error).__name__}: {reason}"
        raise ModelError(f"{source.name}: transformers cannot build this model: {reason}") from error
    _name_base(model)
    _remove_towers(model)
    model.set_experts_implementation("eager")  # takes weights of any strides (`stand_ins.varied`)
    return model.eval().requires_grad_(False)


def text_model(model: Any) -> nn.Module:
    """Return what a model of text, or the text part of another, runs its blocks in."""
    return model.get_decoder()  # type: ignore[no-any-return]


def _check_kind(source: ModelSource) -> None:
    named = source.architectures()
    if any(name.endswith(_CAUSAL_LM_ENDINGS) or name in _makes_text() for name in named):
        return
    raise ModelError(f"{source.name} is not a decoder-only language model (config.json says: {', '.join(named)})")


def _makes_text() -> set[str]:
    """Classes of transformers that make text of text beside images or sound."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    return set(map(str, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values()))


def _built(source: ModelSource) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

    config = AutoConfig.from_pretrained(source.folder)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{source.name} is an encoder-decoder model; only decoder-only language models can be learned")
    text_alone = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or not _is_of_parts(config)
    kind: Any = AutoModelForCausalLM if text_alone else AutoModelForMultimodalLM
    return attention.built(lambda name: kind.from_config(config, attn_implementation=name, dtype=torch.float32))


def _name_base(model: Any) -> None:
    """Give the base model its true name, where transformers has another (Llama 4's model of text)."""
    if not hasattr(model, model.base_model_prefix):
        embedding, parts = model.get_input_embeddings(), model.named_children()
        model.base_model_prefix = next(n for n, part in parts if any(m is embedding for m in part.modules()))


def _is_of_parts(config: Any) -> bool:
    return config.get_text_config() is not config


def _remove_towers(model: Any) -> None:
    """Take out the models within a model that are neither its text model, nor around that, nor inside it."""
    from transformers import PreTrainedModel

    text = text_model(model)
    kept = {id(module) for module in text.modules()}
    kept |= {id(module) for module in model.modules() if any(inner is text for inner in module.modules())}
    towers = [n for n, m in model.named_modules() if isinstance(m, PreTrainedModel) and id(m) not in kept]
    for name in towers:
        if not any(name.startswith(f"{outer}.") for outer in towers):
            put(model, name, _Absent())
