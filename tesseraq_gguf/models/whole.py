"""A model whole in memory, as transformers has it, for the few things that need that."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from tesseraq_gguf.models.source import ModelSource
from tesseraq_gguf.models.weights import open_checkpoint


def whole_model(source: ModelSource, dtype: torch.dtype) -> Any:
    """Load a causal language model of transformers, on the CPU; quantised matrices are dequantised.

    Raises:
        ModelError: the checkpoint is quantised in a way that is not understood, or holds numbers that are not finite.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, GenerationConfig

    weights = open_checkpoint(source)
    if not weights.dequantized:
        return AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype)
    config = AutoConfig.from_pretrained(source.folder)
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    state = {name: weights.read(name).to(dtype) for name in weights}
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    return model
