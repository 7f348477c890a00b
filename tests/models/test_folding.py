"""Folding: which folds each architecture has, and that they leave its blocks' functions as they are."""

from __future__ import annotations

import pytest
import torch
from tiny_models import KINDS, MIXTURES, experts
from torch import nn

from tesseraq_gguf.models import Decoder
from tesseraq_gguf.models.decoder import LoadedBlock
from tesseraq_gguf.models.folding import folds

CPU = torch.device("cpu")
TOKENS = torch.randint(4, 300, (2, 48), generator=torch.Generator().manual_seed(0))

ATTENTION = ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
VALUES = ("self_attn.v_proj", ("self_attn.o_proj",))
MLP = ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"))
UP = ("mlp.up_proj", ("mlp.down_proj",))
PLAIN = [ATTENTION, VALUES, MLP, UP]
EXPECTED = dict.fromkeys(KINDS, PLAIN) | {
    **{kind: [ATTENTION, VALUES, ("pre_feedforward_layernorm", MLP[1]), UP] for kind in ("gemma2", "gemma3")},
    **{kind: [ATTENTION, VALUES, *((up, (down,)) for _, up, down in experts(kind))] for kind in MIXTURES},
    "phi-fused": [
        ("input_layernorm", ("self_attn.qkv_proj",)),
        ("self_attn.qkv_proj", ("self_attn.o_proj",)),
        ("post_attention_layernorm", ("mlp.gate_up_proj",)),
        ("mlp.gate_up_proj", ("mlp.down_proj",)),
    ],
}
EXPECTED["qwen2-moe"].insert(2, ("mlp.shared_expert.up_proj", ("mlp.shared_expert.down_proj",)))


@pytest.fixture
def load(make_model):
    """Return a function that gives a kind's second block, hidden states for it, and its arguments."""

    def load(kind):
        decoder = Decoder(make_model(kind), CPU)
        hidden, inputs = decoder.stem(TOKENS)
        return decoder.load_block(1), hidden[:1], inputs.arguments[1]

    return load


def _factors(channels):
    return 0.3 + 2.7 * torch.rand(channels, generator=torch.Generator().manual_seed(channels))


def _run(block, hidden, arguments):
    with torch.no_grad():
        return block.run(hidden, arguments)


def _assert_equal(got, expected, hidden):
    # against what the block adds: hidden states alone would hide a small branch
    assert (got - expected).norm() <= 1e-5 * (expected - hidden).norm()


@pytest.mark.parametrize("kind", KINDS)
def test_every_fold_is_found_and_exact(kind, load):
    block, hidden, arguments = load(kind)
    expected = _run(block, hidden, arguments)
    found = folds(block, arguments, hidden, block.matrices().keys())
    assert [(fold.producer, fold.consumers) for fold in found] == EXPECTED[kind]
    before = {name: p.detach().clone() for name, p in block.module.named_parameters()}
    assert block.replaced == {}
    for fold in found:
        fold.apply(block, _factors(fold.channels))
        _assert_equal(_run(block, hidden, arguments), expected, hidden)
    after = dict(block.module.named_parameters())
    changed = {name for name, p in before.items() if not torch.equal(p, after[name])}
    assert changed == block.replaced.keys()
    assert changed >= {f"{name}.weight" for fold in found for name in (fold.producer, *fold.consumers)}


@pytest.mark.parametrize(("kind", "offset"), [("llama", 0.0), ("gemma3", 1.0)])
def test_norms_that_store_one_less_are_recognised(kind, offset, load):
    block, hidden, arguments = load(kind)
    found = folds(block, arguments, hidden, block.matrices().keys())
    assert [f.offset for f in found if f.producer.endswith("layernorm")] == [offset, offset]


def test_biases_follow_their_rows(load):
    block, hidden, arguments = load("llama-bias")
    for fold in folds(block, arguments, hidden, block.matrices().keys()):
        fold.apply(block, _factors(fold.channels))
    vectors = {name for name, value in block.replaced.items() if value.dim() == 1}
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert vectors == norms | {"self_attn.v_proj.bias", "mlp.up_proj.bias"}


def test_query_heads_of_a_group_share_their_values_factors(load):
    block, hidden, arguments = load("llama")  # 4 query heads of 32, 2 of values
    fold = next(f for f in folds(block, arguments, hidden, block.matrices().keys()) if f.producer.endswith("v_proj"))
    heads = torch.arange(64).view(2, 1, 32).expand(2, 2, 32)
    assert torch.equal(fold.spread, heads.flatten())


def test_fused_rows(load):
    block, hidden, arguments = load("phi-fused")
    found = {f.producer: f for f in folds(block, arguments, hidden, block.matrices().keys())}
    values, up = found["self_attn.qkv_proj"], found["mlp.gate_up_proj"]
    assert (values.first, values.channels) == (128 + 64, 64)  # after queries and keys
    assert (up.first, up.channels) == (192, 192)  # after the gates


def test_a_matrix_that_is_not_learned_is_left_alone(load):
    block, hidden, arguments = load("llama")
    learnable = block.matrices().keys() - {"self_attn.k_proj", "mlp.down_proj"}
    found = folds(block, arguments, hidden, learnable)
    assert [(fold.producer, fold.consumers) for fold in found] == [VALUES, MLP]


class _Block(nn.Module):
    """A block for what real architectures do between a producer and its consumer."""

    def __init__(self, habit: str) -> None:
        super().__init__()
        self.habit = habit
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 24)
        self.inner = nn.RMSNorm(24)
        self.down = nn.Linear(24, 16)

    def forward(self, x):
        h = self.norm(x)
        inside = self.up(h)
        if self.habit == "gelu":
            inside = nn.functional.gelu(inside)
        if self.habit == "relu":
            inside = nn.functional.relu(inside)
        if self.habit == "norm":
            inside = self.inner(inside)
        out = self.down(inside)
        return x + out + (h if self.habit == "used elsewhere" else 0)


@pytest.mark.parametrize(
    ("habit", "expected"),
    [
        ("none", [("norm", ("up",)), ("up", ("down",))]),
        ("relu", [("norm", ("up",)), ("up", ("down",))]),  # relu(x / s) = relu(x) / s
        ("gelu", [("norm", ("up",))]),
        ("norm", [("norm", ("up",)), ("inner", ("down",))]),
        ("used elsewhere", [("up", ("down",))]),
    ],
)
def test_what_would_change_the_block_is_dropped(habit, expected):
    torch.manual_seed(3)
    module = _Block(habit).requires_grad_(False)
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    block = LoadedBlock(0, "layers.0.", module)
    hidden = torch.randn(1, 20, 16)
    before = _run(block, hidden, {})
    found = folds(block, {}, hidden, {"up", "down"})
    assert [(fold.producer, fold.consumers) for fold in found] == expected
    for fold in found:
        fold.apply(block, _factors(fold.channels))
    _assert_equal(_run(block, hidden, {}), before, hidden)
    assert ("norm.bias" in block.replaced) == (habit != "used elsewhere")
