"""What the header of a GGUF file says of its model, as a config of transformers.

What counts is what llama.cpp computes from the file, so values and their defaults are those of the `load_arch_hparams`
of its architectures (src/models/*.cpp of the pinned source). A key of the header is taken, or is one that llama.cpp
does not read for this architecture; any other may change the function, and the file is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tesseraq_gguf.errors import ModelError
from tesseraq_gguf.gguf_files.gguf_file import PROJECTOR, ArrayValue, GgufFile, TensorInfo

_INSTEAD = "Give the model as a Hugging Face folder"

_UNREAD = {
    "pooling_type", "tensor_data_layout", "use_parallel_residual", "rope.scaling.finetuned",
    "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_log_multiplier",
}  # fmt: skip
"""Keys that llama.cpp does not read, or that change nothing, for any architecture of this file."""

_SLIDING_GEMMA2 = 4096
_LOCAL_BASE = 10000.0
_ATTENTION_CAP, _FINAL_CAP = 50.0, 30.0
"""Defaults of llama.cpp."""

Config = dict[str, Any]


class Header:
    """The metadata of a file's architecture; what nobody took is asked for at the end.

    Args:
        file: the file.
    """

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.architecture = str(file.get("general.architecture", ""))
        self.tensors: dict[str, TensorInfo] = {t.name: t for t in file.tensors}
        self.taken: set[str] = set()
        self.used: set[str] = set()

    def refuse(self, what: str) -> ModelError:
        """Return the error that says why this file cannot be the model."""
        return ModelError(f"{self.file.path.name} {what}. {_INSTEAD}")

    def take(self, key: str, default: Any = None) -> Any:
        """Return a value, a list where it is an array, or the default."""
        name = f"{self.architecture}.{key}"
        self.taken.add(key)
        value = self.file.get(name)
        if isinstance(value, ArrayValue):
            value = self.file.numbers(name)
        return default if value is None else value

    def need(self, key: str) -> Any:
        """Return a value that must be there."""
        value = self.take(key)
        if value is None:
            raise self.refuse(
                f"has no {self.architecture}.{key} in its header, without which llama.cpp has no such model"
            )
        return value

    def one(self, key: str, default: Any = None, none: int | None = None) -> Any:
        """Return a number that may be given for every layer: the same for all, but for those that have `none`."""
        value = self.need(key) if default is None else self.take(key, default)
        values = [v for v in (value if isinstance(value, list) else [value]) if v != none]
        if len(set(values)) != 1:
            raise self.refuse(f"has blocks of different shapes ({self.architecture}.{key}), which cannot be learned")
        return values[0]

    def vector(self, name: str) -> NDArray[np.float64] | None:
        """Return the numbers of a float32 tensor that is a part of the rotary embedding; None if it is not there."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        if tensor.type != "f32" or len(tensor.shape) != 1:
            raise self.refuse(f"has {name} in {tensor.type}, which must be a vector in f32")
        self.used.add(name)
        return np.frombuffer(self.file.data(tensor).tobytes(), "<f4").astype(np.float64)

    def has(self, *tensors: str) -> bool:
        """Whether the first block has one of these tensors."""
        return any(f"blk.0.{name}" in self.tensors for name in tensors)

    def check(self) -> None:
        """Refuse keys that nobody took.

        Raises:
            ModelError: there are some.
        """
        prefix = f"{self.architecture}."
        known = self.taken | _UNREAD
        unknown = [k for k in self.file.entries if k.startswith(prefix) and k.removeprefix(prefix) not in known]
        if unknown:
            keys = ", ".join(map(repr, unknown))
            raise self.refuse(f"says {keys}, which is not understood here and may change what the model computes")


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding of some layers, as llama.cpp computes it.

    Attributes:
        dimensions: how many of a head's dimensions are turned.
        base: of the wavelengths.
        scale: positions are multiplied by it.
        factors: what wavelengths are multiplied by, for short and for long contexts, float64 [dimensions / 2]; None
            if by nothing.
        original: tokens of a short context.
        yarn: whether YaRN blends scaled and original wavelengths.
        attention: sine and cosine are multiplied by it.
    """

    dimensions: int
    base: float
    scale: float = 1.0
    factors: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
    original: int = 0
    yarn: bool = False
    attention: float = 1.0

    def frequencies(self, long: bool = False) -> NDArray[np.float64]:
        """Radians per position, float64 [dimensions / 2]; `long` for a context of more than `original` tokens."""
        pairs = np.arange(self.dimensions // 2)
        turns = self.base ** (-2.0 * pairs / self.dimensions)
        if self.factors is not None:
            turns = turns / self.factors[long]
        if not self.yarn:
            return turns * self.scale
        low, high = (self._correction(beta) for beta in (32.0, 1.0))
        low, high = max(0.0, math.floor(low)), min(self.dimensions - 1.0, math.ceil(high))
        ramp = 1 - np.clip((pairs - low) / max(0.001, high - low), 0, 1)
        return turns * self.scale * (1 - ramp) + turns * ramp

    def _correction(self, beta: float) -> float:
        """The pair that turns `beta` times within the original context."""
        return self.dimensions * math.log(self.original / (beta * 2 * math.pi)) / (2 * math.log(self.base))

    def parameters(self, head: int) -> Config:
        """Return transformers' `rope_parameters` for heads of this size."""
        found: Config = {"rope_type": "default", "rope_theta": self.base}
        found["partial_rotary_factor"] = self.dimensions / head
        if self.yarn:
            return found | {
                "rope_type": "yarn", "factor": 1 / self.scale, "original_max_position_embeddings": self.original,
                "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": self.attention,
            }  # fmt: skip
        if self.factors is not None or self.attention != 1:
            short, long = self.factors or (np.ones(self.dimensions // 2),) * 2
            # of all that transformers knows, this alone takes any factor for any frequency
            return found | {
                "rope_type": "longrope", "short_factor": (short / self.scale).tolist(),
                "long_factor": (long / self.scale).tolist(), "factor": 1.0, "attention_factor": self.attention,
                "original_max_position_embeddings": self.original,
            }  # fmt: skip
        if self.scale != 1:
            return found | {"rope_type": "linear", "factor": 1 / self.scale}
        return found


def _rotary(header: Header, head: int, with_factors: bool = False) -> Rotary:
    """Read the rotary embedding of all layers, or of those that see the whole context."""
    dimensions = header.take("rope.dimension_count", head)
    kind = header.take("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise header.refuse(f"scales its rotary embedding by {kind!r}, which is not known here")
    factor = header.take("rope.scaling.factor") or header.take("rope.scale_linear") or 1.0
    header.take("rope.scale_linear")
    if header.take("rope.scaling.alpha"):
        raise header.refuse("has a rope.scaling.alpha, which is not known here")
    context = header.need("context_length")
    original = header.take("rope.scaling.original_context_length", context)
    attention = header.take("rope.scaling.attn_factor", 1.0)
    scale = 1.0 if kind == "none" else 1.0 / factor
    yarn = kind == "yarn" and scale != 1
    if yarn:
        attention *= 1 + 0.1 * math.log(factor) if factor > 1 else 1.0
    factors = None
    if with_factors:
        one, short, long = (header.vector(f"rope_{name}.weight") for name in ("freqs", "factors_short", "factors_long"))
        if one is not None:
            factors = one, one
        elif short is not None and long is not None:
            factors = short, long
    if factors is not None and (yarn or any(len(f) != dimensions // 2 or not (f > 0).all() for f in factors)):
        raise header.refuse("has factors of its rotary frequencies that do not fit the rest of its header")
    base = header.take("rope.freq_base", 10000.0)
    return Rotary(dimensions, base, scale, factors, original, yarn, attention)


@dataclass(frozen=True)
class Described:
    """A model as a file describes it.

    Attributes:
        header: where it stands.
        kind: its row in the table of architectures.
        config: for transformers, `model_type` included.
        rotaries: by type of layer, the empty name if all layers have the same.
    """

    header: Header
    kind: Kind
    config: Config
    rotaries: dict[str, Rotary]


@dataclass(frozen=True)
class Kind:
    """One architecture of llama.cpp that is read.

    Attributes:
        model_type: transformers' name of it.
        class_name: transformers' class.
        describe: makes config and rotary embeddings out of the header.
        permuted: whether rows of q and k stand in llama.cpp's rotary order, in which pairs are neighbours.
        shifted: whether norms hold 1 + what transformers keeps.
        vocabulary: the architecture under which transformers reads the vocabulary.
    """

    model_type: str
    class_name: str
    describe: Callable[[Header], tuple[Config, dict[str, Rotary]]]
    permuted: bool = False
    shifted: bool = False
    vocabulary: str = ""


def describe(file: GgufFile) -> Described:
    """Read the header of a file that is to be the model.

    Raises:
        ModelError: of an architecture that is not known here, or it says what is not understood.
    """
    header = Header(file)
    name = header.architecture
    if name == PROJECTOR:
        raise ModelError(
            f"{file.path} holds what images and sound go through on their way to a model, and no model: "
            "give the file of the model itself"
        )
    if name == "llama" and header.take("expert_count"):
        name = "mixtral"
    if name == "olmo2" and header.take("attention.sliding_window"):
        name = "olmo3"
    if name not in KINDS:
        known = ", ".join(k for k in KINDS if k not in ("mixtral", "olmo3"))
        raise header.refuse(f"is of the architecture {header.architecture!r}; GGUF files are read as models of {known}")
    kind = KINDS[name]
    config, rotaries = kind.describe(header)
    header.check()
    return Described(header, kind, config | {"model_type": kind.model_type}, rotaries)


def _common(header: Header) -> tuple[Config, int]:
    """What all have: shapes, vocabulary, special tokens; and the size of a head."""
    hidden, heads = header.need("embedding_length"), header.one("attention.head_count")
    head = header.take("attention.key_length", hidden // heads)
    if header.take("attention.value_length", hidden // heads) != head:
        raise header.refuse("has values of another length than keys, which is not known here")
    if not header.take("attention.causal", True):
        raise header.refuse("has attention to later tokens: it is no model that writes")
    if "token_embd.weight" not in header.tensors:
        raise header.refuse("has no token_embd.weight")
    vocabulary = header.tensors["token_embd.weight"].shape[-1]
    for unread in ("vocab_size", "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"):
        header.take(unread)  # the tensor says the first; of the others an architecture reads one
    tokens = {name: header.file.get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL.items()}
    config = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": header.one("feed_forward_length"),
        "num_hidden_layers": header.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": header.one("attention.head_count_kv", heads, none=0),  # 0 in blocks without attention
        "head_dim": head,
        "max_position_embeddings": header.need("context_length"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    return config | {n: t if isinstance(t, int) and t < vocabulary else None for n, t in tokens.items()}, head


_SPECIAL = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def _usual(header: Header) -> tuple[Config, dict[str, Rotary]]:
    """RMS norms, a gated feed-forward network, one rotary embedding."""
    config, head = _common(header)
    header.take("attention.sliding_window")  # not read: llama.cpp looks at the whole context
    rotary = _rotary(header, head, header.architecture in _WITH_FACTORS)
    config |= {
        "rms_norm_eps": header.need("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "rope_parameters": rotary.parameters(head),
    }
    return config, {"": rotary}


_WITH_FACTORS = ("llama", "phi3", "granite")


def _llama(header: Header) -> tuple[Config, dict[str, Rotary]]:
    config, rotaries = _usual(header)
    biases = {"attention_bias": header.has("attn_q.bias"), "mlp_bias": header.has("ffn_up.bias")}
    return config | biases, rotaries


def _smollm3(header: Header) -> tuple[Config, dict[str, Rotary]]:
    """Every fourth block has no rotary embedding."""
    config, rotaries = _llama(header)
    turned = [int(index % 4 < 3) for index in range(config["num_hidden_layers"])]
    return config | {"no_rope_layers": turned, "use_sliding_window": False, "sliding_window": None}, rotaries


def _arcee(header: Header) -> tuple[Config, dict[str, Rotary]]:
    config, rotaries = _llama(header)
    return config | {"hidden_act": "relu2"}, rotaries


def _seed_oss(header: Header) -> tuple[Config, dict[str, Rotary]]:
    config, rotaries = _llama(header)
    return config | {"attention_out_bias": header.has("attn_output.bias")}, rotaries


def _olmo3(header: Header) -> tuple[Config, dict[str, Rotary]]:
    """Blocks that look at a window do not scale their rotary embedding."""
    config, rotaries = _usual(header)
    everywhere, blocks = rotaries[""], config["num_hidden_layers"]
    types = _layer_types(header, blocks, 4)
    rotaries = {
        "full_attention": everywhere,
        "sliding_attention": Rotary(everywhere.dimensions, header.take("rope.freq_base_swa", everywhere.base)),
    }
    config |= {
        "layer_types": types,
        "sliding_window": header.need("attention.sliding_window"),
        "rope_parameters": {name: rotary.parameters(config["head_dim"]) for name, rotary in rotaries.items()},
    }
    return config, {name: rotary for name, rotary in rotaries.items() if name in types}


def _lfm2(header: Header) -> tuple[Config, dict[str, Rotary]]:
    """Blocks that have no heads of keys are short convolutions."""
    config, rotaries = _usual(header)
    if header.take("attention.sliding_window"):
        raise header.refuse("looks at a window of the context, which transformers' LFM2 does not")
    heads, blocks = header.need("attention.head_count_kv"), config["num_hidden_layers"]
    each = heads if isinstance(heads, list) else [heads] * blocks
    config |= {
        "norm_eps": config["rms_norm_eps"],
        "layer_types": ["full_attention" if count else "conv" for count in each],
        "conv_L_cache": header.need("shortconv.l_cache"),
        "conv_bias": False,
        "block_auto_adjust_ff_dim": False,
    }
    return config, rotaries


def _mixtral(header: Header) -> tuple[Config, dict[str, Rotary]]:
    config, rotaries = _usual(header)
    experts = {
        "num_local_experts": header.need("expert_count"),
        "num_experts_per_tok": header.need("expert_used_count"),
    }
    return config | experts | {"sliding_window": None}, rotaries


def _qwen(header: Header) -> tuple[Config, dict[str, Rotary]]:
    config, rotaries = _usual(header)
    return config | {"use_sliding_window": False, "attention_bias": header.has("attn_q.bias")}, rotaries


def _qwen_moe(header: Header) -> tuple[Config, dict[str, Rotary]]:
    config, rotaries = _qwen(header)
    used = header.one("expert_used_count")
    inner = header.one("expert_feed_forward_length", config["intermediate_size"] // used)
    config |= {
        "num_experts": header.need("expert_count"),
        "num_experts_per_tok": used,
        "moe_intermediate_size": inner,
        "norm_topk_prob": header.architecture == "qwen3moe",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "qkv_bias": config["attention_bias"],
    }
    if header.architecture == "qwen2moe":
        config["shared_expert_intermediate_size"] = header.take(
            "expert_shared_feed_forward_length", config["intermediate_size"]
        )
    return config, rotaries


def _olmoe(header: Header) -> tuple[Config, dict[str, Rotary]]:
    config, rotaries = _usual(header)
    experts = {"num_experts": header.need("expert_count"), "num_experts_per_tok": header.one("expert_used_count")}
    return config | experts | {"norm_topk_prob": False, "clip_qkv": None}, rotaries


def _phi3(header: Header) -> tuple[Config, dict[str, Rotary]]:
    config, rotaries = _usual(header)
    return config | {"sliding_window": None, "original_max_position_embeddings": rotaries[""].original}, rotaries


def _granite(header: Header) -> tuple[Config, dict[str, Rotary]]:
    config, rotaries = _llama(header)
    if not header.take("rope.scaling.finetuned", True):
        raise header.refuse("has no rotary embedding (granite.rope.scaling.finetuned), which is not known here")
    config |= {
        "logits_scaling": header.need("logit_scale"),
        "residual_multiplier": header.take("residual_scale") or 1.0,
        "embedding_multiplier": header.take("embedding_scale") or 1.0,
        "attention_multiplier": header.take("attention.scale") or config["head_dim"] ** -0.5,
    }
    return config, rotaries


def _gemma(header: Header) -> tuple[Config, dict[str, Rotary]]:
    config, head = _common(header)
    rotary = _rotary(header, head)
    config |= {
        "rms_norm_eps": header.need("attention.layer_norm_rms_epsilon"),
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "rope_parameters": rotary.parameters(head),
    }
    return config, {"": rotary}


def _gemma_attention(config: Config, layers_of_27b: int) -> Config:
    """The scale of the attention, which llama.cpp knows by the number of blocks: the 27B models are the odd ones."""
    odd = config["num_hidden_layers"] == layers_of_27b
    return {
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"] if odd else config["head_dim"]
    }


def _layer_types(header: Header, blocks: int, pattern: int) -> list[str]:
    """Which blocks look at a window only: all but every last of `pattern`, unless the header says otherwise."""
    said = header.take("attention.sliding_window_pattern", pattern)
    sliding = (
        [bool(s) for s in said] if isinstance(said, list) else [not said or i % said < said - 1 for i in range(blocks)]
    )
    if len(sliding) != blocks:
        raise header.refuse(f"has a pattern of sliding windows for {len(sliding)} blocks, and {blocks} blocks")
    return ["sliding_attention" if s else "full_attention" for s in sliding]


def _gemma2(header: Header) -> tuple[Config, dict[str, Rotary]]:
    config, rotaries = _gemma(header)
    if header.take("rope.freq_base_swa", rotaries[""].base) != rotaries[""].base:
        raise header.refuse("has two rotary embeddings, which transformers' Gemma 2 has not")
    config |= _gemma_attention(config, 46) | {
        "layer_types": _layer_types(header, config["num_hidden_layers"], 2),
        "sliding_window": header.take("attention.sliding_window", _SLIDING_GEMMA2),
        "attn_logit_softcapping": header.take("attn_logit_softcapping", _ATTENTION_CAP),
        "final_logit_softcapping": header.take("final_logit_softcapping", _FINAL_CAP),
    }
    return config, rotaries


def _gemma3(header: Header) -> tuple[Config, dict[str, Rotary]]:
    config, rotaries = _gemma(header)
    everywhere = rotaries[""]
    window, blocks = header.take("attention.sliding_window", 0), config["num_hidden_layers"]
    types = _layer_types(header, blocks, 6) if window else ["full_attention"] * blocks
    rotaries = {
        "full_attention": everywhere,
        "sliding_attention": Rotary(everywhere.dimensions, header.take("rope.freq_base_swa", _LOCAL_BASE)),
    }
    config |= _gemma_attention(config, 62) | {
        "layer_types": types,
        "sliding_window": window or config["max_position_embeddings"],
        "final_logit_softcapping": header.take("final_logit_softcapping") or None,
        "rope_parameters": {name: rotary.parameters(config["head_dim"]) for name, rotary in rotaries.items()},
    }
    return config, {name: rotary for name, rotary in rotaries.items() if name in types}


def _layer_norms(header: Header) -> tuple[Config, dict[str, Rotary]]:
    """Norms with a mean, and one rotary embedding."""
    config, head = _common(header)
    header.take("attention.sliding_window")
    rotary = _rotary(header, head)
    epsilon = header.need("attention.layer_norm_epsilon")
    names = ("norm_eps", "norm_epsilon", "layer_norm_eps")
    return config | dict.fromkeys(names, epsilon) | {"rope_parameters": rotary.parameters(head)}, {"": rotary}


def _starcoder2(header: Header) -> tuple[Config, dict[str, Rotary]]:
    config, rotaries = _layer_norms(header)
    activation = {"hidden_act": "gelu_pytorch_tanh", "sliding_window": None}
    return config | activation | {"use_bias": header.has("attn_q.bias", "ffn_up.bias")}, rotaries


def _stablelm(header: Header) -> tuple[Config, dict[str, Rotary]]:
    config, rotaries = _layer_norms(header)
    config |= {
        "hidden_act": "silu",
        "use_qkv_bias": header.has("attn_q.bias"),
        "qk_layernorm": header.has("attn_q_norm.weight"),
        "use_parallel_residual": not header.has("ffn_norm.weight"),
    }
    return config, rotaries


def _nemotron(header: Header) -> tuple[Config, dict[str, Rotary]]:
    config, rotaries = _layer_norms(header)
    biases = {"attention_bias": header.has("attn_q.bias"), "mlp_bias": header.has("ffn_up.bias")}
    partial = {"partial_rotary_factor": rotaries[""].dimensions / config["head_dim"]}
    return config | biases | partial | {"hidden_act": "relu2"}, rotaries


KINDS: dict[str, Kind] = {
    "llama": Kind("llama", "LlamaForCausalLM", _llama, permuted=True),
    "mixtral": Kind("mixtral", "MixtralForCausalLM", _mixtral, permuted=True),
    "qwen2": Kind("qwen2", "Qwen2ForCausalLM", _qwen),
    "qwen3": Kind("qwen3", "Qwen3ForCausalLM", _qwen),
    "qwen2moe": Kind("qwen2_moe", "Qwen2MoeForCausalLM", _qwen_moe),
    "qwen3moe": Kind("qwen3_moe", "Qwen3MoeForCausalLM", _qwen_moe),
    "olmoe": Kind("olmoe", "OlmoeForCausalLM", _olmoe, vocabulary="llama"),
    "phi3": Kind("phi3", "Phi3ForCausalLM", _phi3),
    "granite": Kind("granite", "GraniteForCausalLM", _granite, permuted=True, vocabulary="llama"),
    "smollm3": Kind("smollm3", "SmolLM3ForCausalLM", _smollm3, permuted=True, vocabulary="llama"),
    "arcee": Kind("arcee", "ArceeForCausalLM", _arcee, permuted=True, vocabulary="llama"),
    "seed_oss": Kind("seed_oss", "SeedOssForCausalLM", _seed_oss, vocabulary="llama"),
    "olmo2": Kind("olmo2", "Olmo2ForCausalLM", _llama, vocabulary="llama"),
    "olmo3": Kind("olmo3", "Olmo3ForCausalLM", _olmo3, vocabulary="llama"),
    "lfm2": Kind("lfm2", "Lfm2ForCausalLM", _lfm2, vocabulary="llama"),
    "gemma2": Kind("gemma2", "Gemma2ForCausalLM", _gemma2, shifted=True),
    "gemma3": Kind("gemma3_text", "Gemma3ForCausalLM", _gemma3, shifted=True),
    "starcoder2": Kind("starcoder2", "Starcoder2ForCausalLM", _starcoder2),
    "stablelm": Kind("stablelm", "StableLmForCausalLM", _stablelm),
    "nemotron": Kind("nemotron", "NemotronForCausalLM", _nemotron, shifted=True),
}
"""By llama.cpp's name of the architecture; a Llama with experts is a Mixtral, an OLMo 2 with windows an OLMo 3."""
