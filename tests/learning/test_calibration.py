from __future__ import annotations

import json
import shutil
from unittest.mock import Mock

import pytest
import torch
from tiny_models import make_model  # noqa: F401  (a fixture)

from tesseraq_gguf.errors import CalibrationError
from tesseraq_gguf.learning.calibration import held_out_for, load_calibration, tokens_of
from tesseraq_gguf.models import ModelSource


@pytest.mark.parametrize("begins", [True, False])
def test_pieces_begin_as_the_model_expects(begins, make_model, long_text, tmp_path):  # noqa: F811
    from transformers import AutoTokenizer

    shutil.copytree(make_model("llama").folder, tmp_path / "copy")
    source = ModelSource("copy", tmp_path / "copy")
    settings = source.folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"add_bos_token": begins}))
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    tokens = load_calibration(source, str(long_text), 6, 32, seed=0).tokens
    assert tokens.shape == (6, 32)
    assert (tokens[:, 0] == tokenizer.bos_token_id).tolist() == [begins] * 6
    ids = tokenizer(long_text.read_text(), add_special_tokens=False).input_ids
    body = 32 - begins
    pieces = {tuple(ids[i : i + body]) for i in range(0, len(ids), body)}
    assert all(tuple(row[begins:].tolist()) in pieces for row in tokens)


def test_the_seed_draws(make_model, long_text):  # noqa: F811
    source = make_model("llama")
    first, again, other = (load_calibration(source, str(long_text), 8, 24, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.tokens, again.tokens)
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


def test_sequences_held_out_are_others(make_model, long_text):  # noqa: F811
    source = make_model("llama")
    alone = load_calibration(source, str(long_text), 8, 24, seed=1)
    found = load_calibration(source, str(long_text), 8, 24, seed=1, held_out=held_out_for(8))
    assert torch.equal(found.tokens, alone.tokens)  # holding out takes nothing away
    assert alone.held_out.shape == (0, 24)
    assert found.held_out.shape == (4, 24)
    assert found.fingerprint() != alone.fingerprint()
    again = {tuple(row.tolist()) for row in load_calibration(source, str(long_text), 12, 24, seed=1).tokens}
    assert {tuple(row.tolist()) for row in torch.cat([found.tokens, found.held_out])} == again


@pytest.mark.parametrize(("samples", "wanted"), [(1, 4), (8, 4), (64, 4), (65, 5), (128, 8), (512, 32)])
def test_a_sixteenth_is_held_out_and_four_at_least(samples, wanted):
    assert held_out_for(samples) == wanted


@pytest.mark.parametrize(
    ("pieces", "samples", "parts"),
    [(12, 8, (8, 4)), (9, 8, (6, 3)), (4, 8, (3, 1)), (4, 512, (3, 1)), (3, 2, (1, 2)), (2, 1, (1, 1)), (5, 1, (1, 4))],
)
def test_a_short_text_is_shared(pieces, samples, parts, monkeypatch):
    text = torch.arange(pieces * 8).view(pieces, 8)
    monkeypatch.setattr("tesseraq_gguf.learning.calibration._pieces", lambda *_: text)
    found = load_calibration(Mock(), None, samples, 8, 0, held_out=held_out_for(samples))
    assert (len(found.tokens), len(found.held_out)) == parts
    assert sorted(torch.cat([found.tokens, found.held_out])[:, 0].tolist()) == text[:, 0].tolist()


def test_one_sequence_leaves_none_to_hold_out(monkeypatch):
    monkeypatch.setattr("tesseraq_gguf.learning.calibration._pieces", lambda *_: torch.zeros(1, 8, dtype=torch.int64))
    assert len(load_calibration(Mock(), None, 1, 8, 0).tokens) == 1
    with pytest.raises(CalibrationError, match="at least 2 are needed"):
        load_calibration(Mock(), None, 1, 8, 0, held_out=4)


def test_the_built_in_text_needs_nothing(make_model):  # noqa: F811
    assert load_calibration(make_model("llama"), None, 64, 256, seed=0).tokens.shape == (64, 256)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no calibration text"), ("", "is empty"), ("  \n", "is empty"), ("too few words", "too short")],
)
def test_no_calibration_text(content, message, make_model, tmp_path):  # noqa: F811
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CalibrationError, match=message):
        load_calibration(make_model("llama"), str(path), 16, 64, seed=0)


def test_a_folder_is_no_text(make_model, tmp_path):  # noqa: F811
    with pytest.raises(CalibrationError, match="cannot be read"):
        load_calibration(make_model("llama"), str(tmp_path), 16, 64, seed=0)


def test_a_text_set_that_cannot_be_fetched(make_model, monkeypatch):  # noqa: F811
    import datasets

    def refuse(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(CalibrationError, match=r"wikitext2 could not be fetched \(no network\)"):
        load_calibration(make_model("llama"), "wikitext2", 4, 16, seed=0)


def test_a_text_set_is_read_as_far_as_needed(make_model, monkeypatch):  # noqa: F811
    import datasets

    taken = []

    def rows(path, configuration, split, streaming):
        assert (path, split, streaming) == ("allenai/c4", "train", True)
        for i in range(10**6):
            taken.append(i)
            yield {"text": "the quick brown fox jumps over the lazy dog " * 20}

    monkeypatch.setattr(datasets, "load_dataset", rows)
    assert load_calibration(make_model("llama"), "c4", 4, 16, seed=0).tokens.shape == (4, 16)
    assert len(taken) < 10


def test_names_of_special_tokens_can_be_plain_text(make_model):  # noqa: F811
    source = make_model("llama")
    assert 2 in tokens_of(source, "the </s> fox")[1]  # the end of a sequence
    plain = tokens_of(source, "the </s> fox", special=False)[1]
    assert 2 not in plain
    assert len(plain) > len(tokens_of(source, "the </s> fox")[1])
