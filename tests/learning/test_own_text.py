"""A model's own text: drawn from the model's distribution, the same for a seed, and good for calibration."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_model  # noqa: F401  (a fixture)
from transformers import AutoModelForCausalLM

from tesseraq_gguf.cli.app import main
from tesseraq_gguf.errors import ModelError, UsageError
from tesseraq_gguf.learning.calibration import load_calibration
from tesseraq_gguf.learning.own_text import OwnText, sample


@pytest.fixture
def source(make_model):  # noqa: F811
    return make_model("llama")


@pytest.fixture
def network(source):
    """The tiny model with opinions: as it comes, all tokens are about as likely."""
    network = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    network.lm_head.weight.data *= 20
    return network


def test_tokens_come_from_the_models_distribution(network):
    count = 4096
    rows = torch.stack(sample(network, 1, count, 2, seed=0))
    assert (rows[:, 0] == 1).all()
    with torch.no_grad():
        expected = network(rows[:1, :1]).logits[0, -1].softmax(-1)
    seen = torch.bincount(rows[:, 1], minlength=len(expected)) / count
    # the mean of a multinomial's distance from its own probabilities is below this bound (Cauchy-Schwarz)
    bound = (expected * (1 - expected) / count).sqrt().sum() / 2
    assert (seen - expected).abs().sum() / 2 < 1.2 * bound
    assert bound < 0.2  # else the line above would hold of anything


def test_a_token_follows_all_those_before_it(network):
    """Documents are drawn side by side, with a cache: what was drawn must be as likely as is expected of it."""
    rows = torch.stack([row for row in sample(network, 1, 64, 12, seed=3) if len(row) == 12])
    with torch.no_grad():
        logs = network(rows[:, :-1]).logits.log_softmax(-1)
    drawn = logs.gather(2, rows[:, 1:, None]).mean()
    expected = (logs.exp() * logs).sum(-1).mean()
    assert drawn.item() == pytest.approx(expected.item(), abs=0.15)


def test_a_seed_gives_the_same_file_and_another_another(source, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert OwnText(30 * 24, 24, seed).write(str(source.folder), tmp_path / name, "cpu") == 30
    first, again, other = ((tmp_path / name).read_text() for name in "abc")
    assert first == again != other


def test_own_text_calibrates(source, tmp_path):
    OwnText(2048, length=64).write(str(source.folder), tmp_path / "own.txt", "cpu")
    tokens = load_calibration(source, str(tmp_path / "own.txt"), 8, 32, seed=0).tokens
    assert tokens.shape == (8, 32)


@pytest.mark.parametrize(
    ("out", "tokens", "length", "message"),
    [
        ("own.txt", 100, 256, "--tokens must be at least 256"),
        ("own.txt", 100, 1, "length must be at least 2"),
        (".", 512, 256, "is a folder"),
        ("none/own.txt", 512, 256, "there is no folder"),
    ],
)
def test_what_cannot_be_meant(out, tokens, length, message, source, tmp_path):
    with pytest.raises(UsageError, match=message):
        OwnText(tokens, length).write(str(source.folder), tmp_path / out)


def test_no_model(tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        OwnText().write(str(tmp_path / "nowhere"), tmp_path / "own.txt")


def test_a_model_that_writes_no_text(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="not a decoder-only language model"):
        OwnText().write(str(tmp_path / "bert"), tmp_path / "own.txt")


def test_the_command_says_what_it_wrote(source, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["write-text", str(source.folder), str(tmp_path / "own.txt"), "--tokens", "256", "--seqlen", "32"])
    assert end.value.code == 0
    assert "own.txt: 8 documents" in capsys.readouterr().out
    assert (tmp_path / "own.txt").read_text().strip()
