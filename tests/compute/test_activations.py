"""Rounded activations: the arithmetic against numpy, the gradient, and the places of a block where they are rounded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import loss_of, mlp_problem
from tiny_models import make_model  # noqa: F401  (a fixture)

from tesseraq_gguf.compute.activations import ActivationRounding, round_between, round_tokens
from tesseraq_gguf.compute.kernel_arithmetic import codebook_blocks, fp4_blocks, integer_blocks
from tesseraq_gguf.compute.schemes import (
    KEY_VALUE_BITS,
    SCHEMES,
    ActivationScheme,
    from_metadata,
    scheme_of,
    to_metadata,
)
from tesseraq_gguf.errors import FileFormatError, ModelError, UsageError
from tesseraq_gguf.methods.lrq import lrq
from tesseraq_gguf.models import Decoder

CPU = torch.device("cpu")
TOKENS = torch.randint(4, 300, (2, 40), generator=torch.Generator().manual_seed(0))


def reference(x: np.ndarray, bits: int) -> np.ndarray:
    """Asymmetric rounding of each row, in double precision, level by level."""
    levels = 2**bits - 1
    out = np.empty_like(x, np.float64)
    for i, row in enumerate(x.astype(np.float64)):
        low, high = min(row.min(), 0.0), max(row.max(), 0.0)
        step = (high - low) / levels or 1.0
        zero = round(-low / step)
        out[i] = (np.clip(np.rint(row / step) + zero, 0, levels) - zero) * step
    return out


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 20), bits=st.sampled_from([3, 4, 6, 8]), shift=st.floats(-3, 3))
def test_tokens_are_rounded_as_the_formula_says(seed, bits, shift):
    x = np.random.default_rng(seed).standard_normal((3, 40)).astype(np.float32) + np.float32(shift)
    got = round_tokens(torch.from_numpy(x), bits).double().numpy()
    step = (np.maximum(x.max(1), 0) - np.minimum(x.min(1), 0)) / (2**bits - 1)
    # a value halfway between two levels may go to either
    off = np.abs(got - reference(x, bits)) / step[:, None]
    assert ((off < 1e-3) | (np.abs(off - 1) < 1e-3)).all()
    assert (off < 1e-3).mean() > 0.97
    # nothing is clipped: ends are at most half a step off, or a whole one where zero moved to a level
    assert (np.abs(got - x) <= 1.001 * step[:, None]).all()


def test_zeros_and_constants_stay():
    x = torch.tensor([[0.0, 0.0, 0.0], [5.0, 5.0, 5.0], [-2.0, -2.0, 0.0]])
    torch.testing.assert_close(round_tokens(x, 3), x)


def test_a_static_range_clips_and_its_gradient_stops_there():
    x = torch.tensor([-9.0, -1.0, 0.0, 0.4, 2.0, 9.0], requires_grad=True)
    rounded = round_between(x, torch.tensor(-1.0), torch.tensor(2.0), 8)
    torch.testing.assert_close(rounded, torch.tensor([-1.0, -1.0, 0.0, 0.4, 2.0, 2.0]), atol=3 / 255, rtol=0)
    rounded.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]


def test_names_are_read_and_wrong_ones_refused():
    assert scheme_of("a8-static", None) == ActivationScheme(8, "static", None)
    assert scheme_of("a4", 8) == ActivationScheme(4, "range", 8)
    assert scheme_of("a4-codebooks", None) == ActivationScheme(4, "codebooks", None)
    assert not scheme_of("none", None).rounds
    assert str(scheme_of("a8-static", 8)) == "a8-static kv8"
    with pytest.raises(UsageError, match="a8-static"):
        scheme_of("a5", None)
    with pytest.raises(UsageError, match="--kv-bits 5"):
        scheme_of("a8", 5)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("bits", [None, *KEY_VALUE_BITS])
def test_metadata_comes_back(name, bits):
    scheme, ranges = scheme_of(name, bits), {"layers.0.q.weight": (-1.5, 2.25)}
    assert from_metadata(to_metadata(scheme, ranges)) == (scheme, ranges)
    assert from_metadata(to_metadata(scheme, {})) == (scheme, {})


def test_metadata_of_files_made_before_there_were_forms_comes_back():
    before = '{"bits": 8, "static": true, "key_value_bits": null}'
    assert from_metadata(before) == (scheme_of("a8-static", None), {})
    before = '{"bits": 4, "static": false, "key_value_bits": 8}'
    assert from_metadata(before) == (scheme_of("a4", 8), {})


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"bits": 4, "form": "strange"}', '{"bits": 8, "more": 1}', '{"ranges": {"a": 3}}']
)
def test_damaged_metadata_is_named(text):
    with pytest.raises(FileFormatError, match=r"tesseraq\.activations"):
        from_metadata(text)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "phi-fused"])
def test_a_block_rounds_what_its_matrices_are_fed(kind, make_model):  # noqa: F811
    decoder = Decoder(make_model(kind), CPU)
    hidden, recorded = decoder.stem(TOKENS)
    block, arguments = decoder.load_block(0), recorded.arguments[0]
    seen: dict[str, torch.Tensor] = {}
    rounding = ActivationRounding(ActivationScheme(4))
    spy = dataclasses.replace(rounding)
    object.__setattr__(spy, "feed", lambda name, x: seen.setdefault(name, rounding.feed(name, x)))
    with torch.no_grad():
        plain, rounded = block.run(hidden, arguments), block.run(hidden, arguments, rounding=spy)
    assert seen.keys() == block.matrices().keys()
    for x in seen.values():  # four bits: no token has more than 16 values
        assert max(len(token.unique()) for token in x.flatten(0, -2)) <= 16
    assert not torch.allclose(plain, rounded)
    # nothing is left behind
    with torch.no_grad():
        torch.testing.assert_close(block.run(hidden, arguments), plain, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "phi-fused"])
def test_keys_and_values_are_rounded_where_a_cache_would_keep_them(kind, make_model):  # noqa: F811
    decoder = Decoder(make_model(kind), CPU)
    hidden, recorded = decoder.stem(TOKENS)
    block, arguments = decoder.load_block(0), recorded.arguments[0]
    with torch.no_grad():
        plain = block.run(hidden, arguments)
        errors = [
            (
                block.run(hidden, arguments, rounding=ActivationRounding(ActivationScheme(None, key_value_bits=b)))
                - plain
            ).norm()
            for b in (8, 3)
        ]
    assert 0 < errors[0] < 0.2 * errors[1]


def test_attention_without_a_cache_is_refused():
    problem = mlp_problem("tsq4", 64, 128)
    rounding = ActivationRounding(ActivationScheme(None, key_value_bits=8))
    with pytest.raises(ModelError, match="takes no cache"):
        problem.block.run(problem.inputs[:1], {}, rounding=rounding)


def test_ranges_are_the_lowest_and_highest_input():
    problem = mlp_problem("tsq4", 64, 128)
    fed = problem.block.module.get_submodule("norm")(problem.inputs)
    low, high = problem.input_ranges()["up"]
    assert low == pytest.approx(float(fed.min()))
    assert high == pytest.approx(float(fed.max()))
    assert problem.input_ranges().keys() == {"up", "down"}


@pytest.mark.parametrize("name", ["a8-blocks", "a4-blocks", "a4-codebooks", "a4-fp4"])
def test_blocks_are_rounded_as_kernels_do_and_gradients_pass(name):
    scheme = scheme_of(name, None)
    rounding = ActivationRounding(scheme)
    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(5), requires_grad=True)
    rounded = rounding.feed("up", x)
    forms: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"codebooks": codebook_blocks, "fp4": fp4_blocks}
    expected = forms.get(scheme.form) or partial(integer_blocks, bits=scheme.bits or 0)
    torch.testing.assert_close(rounded.detach(), expected(x.detach()), rtol=1e-6, atol=1e-6)
    rounded.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))
    narrow = torch.randn(2, 40)
    assert rounding.feed("up", narrow) is narrow


def test_a_models_own_codebooks_serve_its_activations_too():
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(5))
    own = torch.linspace(-31, 31, 16).round().to(torch.int8).repeat(8, 1)
    rounded = ActivationRounding(scheme_of("a4-codebooks", None), codebooks={"bcq4": own}).feed("up", x)
    torch.testing.assert_close(rounded, codebook_blocks(x, own), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["a8-static", "a4", "a4-codebooks"])
def test_learning_for_rounded_activations_is_better_with_them(name):
    """What is learned with rounded activations is at home with them: better than what was learned without."""
    scheme = scheme_of(name, None)
    plain, rounding = mlp_problem("tsq3", 64, 128), mlp_problem("tsq3", 64, 128)
    ranges = rounding.input_ranges() if scheme.static else {}
    rounding.rounding = ActivationRounding(scheme, ranges)
    nearest = {n: rounding.grids[n].quantize(w) for n, w in rounding.matrices().items()}
    before = loss_of(rounding, nearest)
    with_them = loss_of(rounding, lrq(100, 4, 32).learn(rounding))
    without = loss_of(rounding, lrq(100, 4, 32).learn(plain))
    assert with_them < {"a8-static": 0.49, "a4": 0.66, "a4-codebooks": 0.6}[name] * before
    assert with_them < 1.02 * without
