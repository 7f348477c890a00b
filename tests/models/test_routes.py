"""Routes: which channels may change places in each architecture, and that its blocks stay the same functions."""

from __future__ import annotations

import pytest
import torch
from tiny_models import KINDS, MIXTURES, experts
from torch import nn

from tesseraq_gguf.models import Decoder
from tesseraq_gguf.models.decoder import LoadedBlock
from tesseraq_gguf.models.routes import readers, routes

CPU = torch.device("cpu")
TOKENS = torch.randint(4, 300, (1, 48), generator=torch.Generator().manual_seed(0))

VALUES = ({("self_attn.v_proj", 0)}, ("self_attn.o_proj",))
MLP = ({("mlp.gate_proj", 0), ("mlp.up_proj", 0)}, ("mlp.down_proj",))
EXPECTED = {kind: [VALUES, MLP] for kind in KINDS} | {
    **{kind: [VALUES, *(({(gate, 0), (up, 0)}, (down,)) for gate, up, down in experts(kind))] for kind in MIXTURES},
    "phi-fused": [
        ({("self_attn.qkv_proj", 192)}, ("self_attn.o_proj",)),
        ({("mlp.gate_up_proj", 0), ("mlp.gate_up_proj", 192)}, ("mlp.down_proj",)),
    ],
}
SHARED = ({("mlp.shared_expert.gate_proj", 0), ("mlp.shared_expert.up_proj", 0)}, ("mlp.shared_expert.down_proj",))
EXPECTED["qwen2-moe"].insert(1, SHARED)
HEADS = {"qwen3-moe": 64, "llama-576": 64, "qwen2": 64, "qwen3": 64, "gemma3": 64}


@pytest.fixture
def load(make_model):
    """Return a function that gives a kind's second block, hidden states for it, and its arguments."""

    def load(kind):
        decoder = Decoder(make_model(kind), CPU)
        hidden, inputs = decoder.stem(TOKENS)
        return decoder.load_block(1), hidden, inputs.arguments[1]

    return load


def found_in(block, hidden, arguments, multiple=4):
    groups = readers(block, arguments, hidden)
    return routes(block, arguments, hidden, block.matrices().keys(), groups, multiple)


def shuffled(route, seed=1):
    random = torch.Generator().manual_seed(seed)
    runs = range(0, route.channels, route.run)
    return torch.cat([first + torch.randperm(route.run, generator=random) for first in runs])


def same(block, hidden, arguments, expected):
    with torch.no_grad():
        got = block.run(hidden, arguments)
    # against what the block adds: hidden states alone would hide a small branch
    return float((got - expected).norm()) <= 1e-5 * float((expected - hidden).norm())


@pytest.mark.parametrize("kind", KINDS)
def test_every_route_is_found_and_exact(kind, load):
    block, hidden, arguments = load(kind)
    with torch.no_grad():
        expected = block.run(hidden, arguments)
    found = found_in(block, hidden, arguments)
    assert [(set(route.producers), route.consumers) for route in found] == EXPECTED[kind]
    values, *within = found
    assert values.run == HEADS.get(kind, 32)  # channels do not leave their head
    assert all(inner.run == inner.channels for inner in within)
    before = {name: p.detach().clone() for name, p in block.module.named_parameters()}
    for route in found:
        route.apply(block, shuffled(route))
        assert same(block, hidden, arguments, expected)
    changed = {name for name, p in block.module.named_parameters() if not torch.equal(p, before[name])}
    assert changed == block.replaced.keys()
    assert changed >= {f"{n}.weight" for r in found for n in (*(p for p, _ in r.producers), *r.consumers)}


def test_biases_move_with_their_rows(load):
    block, hidden, arguments = load("llama-bias")
    for route in found_in(block, hidden, arguments):
        route.apply(block, shuffled(route))
    biases = {name for name in block.replaced if name.endswith("bias")}
    assert biases == {"self_attn.v_proj.bias", "mlp.gate_proj.bias", "mlp.up_proj.bias"}


def test_runs_that_do_not_fit_are_no_route(load):
    block, hidden, arguments = load("llama")  # heads of 32, 192 channels between gate and down
    assert [r.consumers for r in found_in(block, hidden, arguments, multiple=64)] == [("mlp.down_proj",)]
    assert found_in(block, hidden, arguments, multiple=128) == []


def test_a_matrix_that_is_not_learned_is_left_alone(load):
    block, hidden, arguments = load("llama")
    groups = readers(block, arguments, hidden)
    learnable = block.matrices().keys() - {"self_attn.v_proj", "mlp.gate_proj"}
    assert routes(block, arguments, hidden, learnable, groups, 4) == []


def test_inputs_that_are_read_together(load):
    block, hidden, arguments = load("qwen3")
    assert readers(block, arguments, hidden) == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ]


def test_numbers_of_inputs_become_numbers_of_channels(load):
    block, hidden, arguments = load("llama")  # 4 query heads of 32 read 2 of values
    route = found_in(block, hidden, arguments)[0]
    of_inputs = torch.arange(128.0)
    pairs = of_inputs.view(2, 2, 32)
    assert torch.equal(route.channel_scores(of_inputs, "sum"), pairs.sum(1).flatten())
    assert torch.equal(route.channel_scores(of_inputs, "amax"), pairs.amax(1).flatten())


class _Block(nn.Module):
    """A block without a gate, with what may stand between its matrices."""

    def __init__(self, between) -> None:
        super().__init__()
        self.up = nn.Linear(16, 24)
        self.between = between
        self.down = nn.Linear(24, 16)

    def forward(self, x):
        return x + self.down(self.between(self.up(x)))


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        (nn.GELU(), 24),
        (nn.Identity(), 24),
        (nn.LayerNorm(24, elementwise_affine=False), 24),
        (nn.Softmax(-1), 24),
        (nn.Conv1d(48, 48, 3, padding=1), None),
    ],
)
def test_permutations_pass_through_what_treats_channels_alike(between, expected):
    torch.manual_seed(3)
    module = _Block(between).requires_grad_(False)
    block, hidden = LoadedBlock(0, "layers.0.", module), torch.randn(1, 48, 16)
    found = found_in(block, hidden, {})
    assert [route.run for route in found] == ([expected] if expected else [])
