"""Uploads to a server of this machine that has the hub's routes, interrupted and begun again."""

from __future__ import annotations

import hashlib
import re
import traceback

import pytest
from hub_server import PART, TOKEN, store  # noqa: F401  (a fixture)
from huggingface_hub import constants

from tesseraq_gguf.errors import PublishingError, UsageError
from tesseraq_gguf.publishing.upload import Hub, read_target


@pytest.fixture
def folder(tmp_path):
    """Files of all three ways: within the commit, in one request, in several."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "README.md").write_text("# a card\n")
    for index, size in enumerate((30_000, 45_000, 3 * PART + 17, 2 * PART)):
        (folder / f"M-Q{index + 2}_K.gguf").write_bytes(bytes([index]) * (size - 4) + b"abcd")
    return folder


def test_every_byte_arrives_once_through_two_interruptions(store, folder):  # noqa: F811
    hub, told = Hub("me/model"), []
    hub.check()
    wanted = {path.name: path.read_bytes() for path in folder.iterdir()}
    store.breaks = [1]  # in the body of the second file
    with pytest.raises(PublishingError, match="run the same command again"):
        hub.upload(folder)
    assert store.commits == 0
    store.breaks = [2]  # in the first of several requests of the third
    with pytest.raises(PublishingError, match="run the same command again"):
        hub.upload(folder)
    assert store.commits == 0
    assert store.files == {}
    store.breaks = []
    address = hub.upload(folder, lambda *step: told.append(step))
    assert address.endswith("0" * 40)
    assert store.files == wanted
    assert store.commits == 1
    large = [data for name, data in wanted.items() if name.endswith(".gguf")]
    assert sum(store.received.values()) == sum(map(len, large))
    assert store.received.keys() == {*_pieces(large)}
    assert told[-1][1] == told[-1][2]


def _pieces(large):
    for data in large:
        oid = hashlib.sha256(data).hexdigest()
        yield from [oid] if len(data) < PART else [f"{oid}/{n + 1}" for n in range(-(-len(data) // PART))]


def test_a_token_stands_nowhere_when_it_is_refused(store, folder, monkeypatch):  # noqa: F811
    wrong = "hf_zyxwvutsrqponmlkjihgfedcba"
    hub = Hub("me/model", wrong)
    assert wrong not in repr(hub)
    for what in (hub.check, lambda: hub.upload(folder)):
        with pytest.raises(PublishingError, match="does not let this token write") as caught:
            what()
        told = "".join(traceback.format_exception(caught.value))
        assert wrong not in told
        assert "Bearer" not in told
        assert caught.value.__context__ is None
    assert store.commits == 0


def test_what_an_error_of_the_client_says_has_no_token(monkeypatch):
    hub = Hub("me/model", TOKEN)
    said = hub._phrase(ValueError(f"bad header Bearer {TOKEN} and hf_otherothersecret"))
    assert not re.search(r"hf_\w+", said)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(PublishingError, match="a token is needed"):
        Hub("me/model").check()


def test_a_hub_out_of_reach_is_one_line(store, folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PublishingError, match="cannot be reached") as caught:
        Hub("me/model").upload(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", ["hub:", "hub:me", "hub:me/a/b", "hub:me/../x", "hub:/x", "hub:me/a b"])
def test_targets_that_are_no_repository(target):
    with pytest.raises(UsageError, match="must be hub:OWNER/NAME"):
        read_target(target)
    assert read_target("folder") is None
    assert read_target("hub:me/my-model.GGUF") == "me/my-model.GGUF"
