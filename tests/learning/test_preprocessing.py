"""Preprocessing: the dequantised model is the learner's, adapters are learned and merged, and a killed run goes on."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_model  # noqa: F401  (a fixture)

from tesseraq_gguf.errors import NotFiniteError, UsageError
from tesseraq_gguf.learning import preprocessing
from tesseraq_gguf.learning.preprocessing import Preprocessing, dequantised_model
from tesseraq_gguf.learning.rounding import round_blocks
from tesseraq_gguf.models import Decoder
from tesseraq_gguf.models.quantised import Quantised

CPU = torch.device("cpu")


@pytest.fixture
def decoder(make_model):  # noqa: F811
    return Decoder(make_model("llama-256-bias"), CPU)


@pytest.fixture
def blocks(decoder):
    results = list(round_blocks(decoder, dict.fromkeys(decoder.matrix_shapes(), "ptq1_61"), lambda _: None))
    return cache(lambda index: results[index].tensors)


def text():
    return torch.randint(4, 300, (6, 16), generator=torch.Generator().manual_seed(1)) % 17 + 4


def run(decoder, blocks, out, steps=6, report=lambda *_: None):
    return Preprocessing(steps=steps, batch=2, kept=2, rate=1e-3).run(
        Quantised(decoder, blocks), text(), 0, out, report
    )


def test_the_dequantised_model_is_the_learners(decoder, blocks):
    model, names = dequantised_model(decoder, blocks)
    assert len(names) == 2 * 6  # all but the attention's output
    tokens = text()
    hidden, recorded = decoder.stem(tokens)
    with torch.no_grad():
        for index in range(len(decoder)):
            block = decoder.load_block(index)
            weights = block.adopt(blocks(index))
            hidden = torch.cat([block.run(h, recorded.arguments[index], weights) for h in hidden.split(1)])
        norm, head = decoder.final_norm()[1], decoder.output_weight()
        torch.testing.assert_close(model(tokens).logits, norm(hidden) @ head.T, rtol=1e-3, atol=1e-3)


def test_adapters_learn_the_text_and_are_merged(decoder, blocks, tmp_path):
    source = run(decoder, blocks, tmp_path / "merged", steps=30)
    before, _ = dequantised_model(decoder, blocks)
    merged = Decoder(source, CPU)
    start = dict(before.named_parameters())
    moved = {
        n
        for n, p in load_file(source.folder / "model.safetensors").items()
        if not torch.allclose(p.float(), start[n], atol=1e-3)
    }
    assert moved
    assert not any("o_proj" in name or "norm" in name or "embed" in name for name in moved)
    assert {name.split(".")[-2] for name in moved} <= {
        "q_proj",
        "k_proj",
        "v_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    tokens = text()
    with torch.no_grad():
        hidden, recorded = merged.stem(tokens)
        for index in range(len(merged)):
            block = merged.load_block(index)
            hidden = torch.cat([block.run(h, recorded.arguments[index]) for h in hidden.split(1)])
        first = before(input_ids=tokens, labels=tokens).loss
    assert merged.mean_loss(hidden, tokens) < float(first) - 0.1


class _Stop(Exception):  # noqa: N818
    pass


def test_a_killed_run_goes_on_where_it_was(decoder, blocks, tmp_path):
    whole = run(decoder, blocks, tmp_path / "whole")

    def stop(done, total):
        if done == 5:
            raise _Stop

    out = tmp_path / "broken"
    with pytest.raises(_Stop):
        run(decoder, blocks, out, report=stop)
    assert not out.exists()
    told = []
    again = run(decoder, blocks, out, report=lambda done, total: told.append(done))
    assert told == [4, 5, 6]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "whole"]
    pair = [load_file(source.folder / "model.safetensors") for source in (whole, again)]
    assert all(torch.equal(pair[0][name], pair[1][name]) for name in pair[0])
    # what is there is not made again
    run(decoder, blocks, out, report=lambda done, total: pytest.fail("learned again"))


def test_without_peft_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(preprocessing, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"pip install 'tesseraq-gguf\[preprocess\]'"):
        preprocessing.check_installed()


def test_gradients_that_are_not_finite_stop_it(decoder, blocks, tmp_path, monkeypatch):
    def wild(*given):
        model, names = dequantised_model(*given)
        model.model.norm.weight.fill_(torch.inf)
        return model, names

    monkeypatch.setattr(preprocessing, "dequantised_model", wild)
    with pytest.raises(NotFiniteError, match=r"layers\.0\..*: the gradients of the adapters"):
        run(decoder, blocks, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
