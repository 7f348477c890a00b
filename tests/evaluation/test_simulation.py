"""Whole models in torch: the figures are llama-perplexity's definitions, and a file brings its own scheme."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_models import LOUD, TEXT, make_model  # noqa: F401  (a fixture)

from tesseraq_gguf.compute.schemes import ACTIVATIONS_KEY, ActivationScheme, from_metadata, scheme_of
from tesseraq_gguf.conversion.pipeline import convert
from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.evaluation.perplexity import evaluate
from tesseraq_gguf.evaluation.simulation import Simulation, chunks_of, measure
from tesseraq_gguf.gguf_files.gguf_file import open_gguf
from tesseraq_gguf.recipe.recipe import Recipe

CTX = 64


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT * 30)
    return file


@pytest.fixture(scope="module")
def made(make_model, text, tmp_path_factory):  # noqa: F811
    """Return a function that converts a tiny model in a scheme, once."""
    folder = tmp_path_factory.mktemp("made")
    source = make_model("llama", LOUD)

    def make(**options) -> object:
        out = folder / ("-".join(f"{k}={v}" for k, v in options.items()).replace("/", "_") + ".gguf")
        if not out.exists():
            common: dict[str, Any] = {"calibration": str(text), "samples": 6, "seqlen": 32, "preset": "fast"}
            if options.get("type") == "f32" or options.get("method") == "rtn":
                common = {}
            embedding = "f32" if options.get("type") == "f32" else "q8_0"
            convert(Recipe(str(source.folder), out, embedding_type=embedding, **common, **options))
        return out

    return make


def test_the_second_half_of_every_chunk_counts():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 11, (3, 8), generator=generator)
    hidden, wanted = (torch.randn(3, 8, 5, generator=generator) for _ in range(2))
    head = torch.randn(5, 11, generator=generator)

    def answers(h):
        return (h @ head).log_softmax(-1)

    perplexity, error, kld, top = measure(hidden, tokens, answers, wanted, answers)
    losses, divergences, same = [], [], []
    for chunk in range(3):
        for position in (4, 5, 6):
            p, q = answers(wanted[chunk, position]).double(), answers(hidden[chunk, position]).double()
            losses.append(-float(q[tokens[chunk, position + 1]]))
            divergences.append(float((p.exp() * (p - q)).sum()))
            same.append(int(p.argmax()) == int(q.argmax()))
    mean = sum(losses) / 9
    variance = sum((x - mean) ** 2 for x in losses) / 9
    assert perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    assert error == pytest.approx(perplexity * math.sqrt(variance / 8), rel=1e-5)
    assert kld == pytest.approx(sum(divergences) / 9, rel=1e-4)
    assert top == pytest.approx(sum(same) / 9)
    assert measure(hidden, tokens, answers)[2:] == (None, None)


@pytest.mark.slow
def test_what_is_no_number_stays_none():
    """NaN is no divergence of 0, and no answer at all no perplexity of 10^304."""
    tokens = torch.randint(0, 11, (1, 8), generator=torch.Generator().manual_seed(0))
    hidden = torch.zeros(1, 8, 11)
    flat = hidden.log_softmax(-1)

    def constant(value):
        return lambda states: torch.full_like(states, value)

    def uniform(states):
        return states.log_softmax(-1)

    assert math.isnan(measure(hidden, tokens, constant(math.nan))[0])
    assert measure(hidden, tokens, constant(-math.inf))[0] == math.inf
    assert math.isnan(measure(hidden, tokens, uniform, hidden, constant(math.nan))[2] or 0)
    assert math.isnan(measure(hidden, tokens, constant(math.nan), hidden, uniform)[2] or 0)
    masked = flat.clone()
    masked[..., 3] = -math.inf  # a token that the reference never says
    masked = masked.log_softmax(-1)
    found = measure(hidden, tokens, uniform, hidden, lambda states: masked[0, : len(states)])
    assert found[2] == pytest.approx(math.log(11 / 10), rel=1e-5)


@pytest.mark.runtime
@pytest.mark.parametrize(("type", "scheme"), [("bcq2", "none"), ("bcq4", "none"), ("bcq4_a4", "a4-codebooks")])
def test_a_model_with_its_own_codebooks_is_read_with_them(type, scheme, made, text):
    """Torch and llama.cpp are as far from the model. Four bits flip with the last bit of a sum: no more is asked."""
    out, plain = made(type=type, method="rtn", codebooks="model"), made(type="f32")
    found = Simulation(scheme_of(scheme, None)).evaluate(out, text, CTX, 2, plain)
    wanted = evaluate(out, text, CTX, 2, plain)
    assert found.kld == pytest.approx(wanted.kld, rel=0.05)


@pytest.mark.slow
def test_another_file_of_that_name_in_the_working_directory_is_left_alone(made, text, tmp_path, monkeypatch):
    out = made(type="tsq3", method="rtn")
    expected = Simulation().evaluate(out, text, CTX, 1)
    (tmp_path / out.name).write_bytes(b"no model")
    monkeypatch.chdir(tmp_path)
    assert Simulation().evaluate(out, text, CTX, 1) == expected


def test_chunks_are_cut_as_llama_perplexity_does():
    assert chunks_of(range(10, 20), None, 3, None).tolist() == [[10, 11, 12], [13, 14, 15], [16, 17, 18]]
    assert chunks_of(range(10, 20), 1, 3, 2).tolist() == [[1, 10, 11], [1, 13, 14]]
    with pytest.raises(UsageError, match="too short"):
        chunks_of(range(10), None, 11, None)


@pytest.mark.slow
@pytest.mark.runtime
def test_without_rounding_it_finds_what_llama_perplexity_finds(made, text):
    from tesseraq_gguf.evaluation.perplexity import evaluate

    learned, plain = made(type="tsq3", method="rtn"), made(type="f32")
    wanted = evaluate(learned, text, CTX, 3, plain)
    got = Simulation().evaluate(learned, text, CTX, 3, plain)
    assert got.perplexity == pytest.approx(wanted.perplexity, rel=0.02)
    assert got.perplexity_error == pytest.approx(wanted.perplexity_error, rel=0.05)
    assert got.kld == pytest.approx(wanted.kld, rel=0.1, abs=1e-3)
    assert (got.bytes, got.bpw) == (wanted.bytes, wanted.bpw)


@pytest.mark.slow
def test_a_file_brings_its_scheme_and_its_ranges(made, text):
    options = {"type": "tsq4", "method": "lrq", "activations": "a8-static", "kv_bits": 8}
    out = made(**options)
    scheme, ranges = from_metadata(open_gguf(out).get(ACTIVATIONS_KEY))
    assert scheme == ActivationScheme(8, "static", 8)
    assert len(ranges) == 2 * 7
    assert all(low <= 0 <= high and low < high for low, high in ranges.values())
    own = Simulation().evaluate(out, text, CTX, 2)
    assert own == Simulation(scheme).evaluate(out, text, CTX, 2)
    assert own != Simulation(ActivationScheme()).evaluate(out, text, CTX, 2)
    # three bits hurt more than eight
    plain = made(type="f32")
    schemes = (scheme_of(name, None) for name in ("none", "a8", "a3"))
    some = [Simulation(scheme).evaluate(out, text, CTX, 2, plain).kld or 0 for scheme in schemes]
    assert some[0] < some[2]
    assert some[1] < 0.5 * some[2]


@pytest.mark.slow
def test_ranges_survive_a_killed_run(made, text, tmp_path, make_model, monkeypatch):  # noqa: F811
    """A run that was stopped after its first block ends with the same file."""
    from tesseraq_gguf.conversion.progress import SilentProgress

    whole = made(type="tsq4", method="lrq", activations="a8-static", kv_bits=8)
    recipe = Recipe(
        str(make_model("llama", LOUD).folder), tmp_path / whole.name, type="tsq4", method="lrq",
        activations="a8-static", kv_bits=8, calibration=str(text), samples=6, seqlen=32, preset="fast",
    )  # fmt: skip

    class Stopping(SilentProgress):
        def block(self, result, blocks):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(recipe, Stopping())
    report = convert(recipe)
    assert report.resumed == 1
    assert recipe.out.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_static_rounding_needs_ranges(made, text):
    with pytest.raises(UsageError, match="measured by convert"):
        Simulation(scheme_of("a8-static", None)).evaluate(made(type="tsq3", method="rtn"), text, CTX, 1)
