"""Models of the hub, against a server on this machine that speaks its routes; the hub's client is the real one."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest
from huggingface_hub import constants

from tesseraq_gguf.errors import ModelError
from tesseraq_gguf.models import resolve_model
from tesseraq_gguf.models.hub import DEFAULT_HUB, Hub, is_hub_id

TOKEN = "hf_a-token-that-nobody-may-see"
MAIN, OLD = "a" * 40, "b" * 40


@dataclass
class Served:
    """What the server has, and what befell it.

    Attributes:
        files: of each commit.
        revisions: branches and tags.
        gated: whether files are given to those alone who bring the token.
        private: whether nothing is.
        cut: after how many bytes of a weight file the connection breaks, once.
        asked: method, path and range of every request.
    """

    files: dict[str, dict[str, bytes]]
    revisions: dict[str, str]
    gated: bool = False
    private: bool = False
    cut: int | None = None
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)

    def paths(self, method: str) -> set[str]:
        return {path.rpartition("/")[2] for m, path, _ in self.asked if m == method and "/resolve/" in path}


class _Handler(BaseHTTPRequestHandler):
    served: Served
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _refuse(self, status: int, code: str, message: str = "no") -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _give(self, body: bytes, status: int = 200, cut: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
            if cut is not None:
                self.close_connection = True

    def _answer(self) -> None:
        served, path = self.served, unquote(self.path.partition("?")[0])
        served.asked.append((self.command, path, self.headers.get("Range")))
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.headers.get("Authorization") and not known:
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        if not path.removeprefix("/api/models").startswith("/some/model") or (served.private and not known):
            return self._refuse(401 if not known else 404, "RepoNotFound")
        if asked := re.fullmatch(r"/api/models/some/model(?:/revision/(.+))?", path):
            commit = self._commit(asked[1] or "main")
            return self._json(self._about(commit)) if commit else self._refuse(404, "RevisionNotFound")
        if asked := re.fullmatch(r"/api/models/some/model/tree/([^/]+)/?", path):
            commit = self._commit(asked[1])
            return self._json(self._tree(commit)) if commit else self._refuse(404, "RevisionNotFound")
        revision, name = path.removeprefix("/some/model/resolve/").split("/", 1)
        commit = self._commit(revision)
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        if served.gated and not known:
            return self._refuse(401, "GatedRepo")
        return self._file(commit, name)

    def _commit(self, revision: str) -> str | None:
        return revision if revision in self.served.files else self.served.revisions.get(revision)

    def _json(self, data: object) -> None:
        self._give(json.dumps(data).encode(), Content_Type="application/json")

    def _about(self, commit: str) -> dict[str, object]:
        siblings = [{"rfilename": name} for name in self.served.files[commit]]
        return {"id": "some/model", "modelId": "some/model", "sha": commit, "siblings": siblings, "tags": []}

    def _tree(self, commit: str) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
            for name, body in self.served.files[commit].items()
        ]

    def _file(self, commit: str, name: str) -> None:
        body = self.served.files[commit].get(name)
        if body is None:
            return self._refuse(404, "EntryNotFound")
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        cut = None
        if self.command == "GET" and name.endswith(".safetensors"):
            cut, self.served.cut = self.served.cut, None
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        return self._give(body[start:], 206 if start else 200, cut, **headers)


@pytest.fixture
def served(make_model, tmp_path, monkeypatch) -> Iterator[Served]:
    """A tiny model on the hub, and an empty cache."""
    files = {f.name: f.read_bytes() for f in make_model("llama").folder.iterdir()}
    more: tuple[str, ...] = (
        "pytorch_model.bin",
        "original/consolidated.00.pth",
        "consolidated.safetensors",
        "model.gguf",
        "a.onnx",
    )
    more = (*more, "onnx/config.json", "original/model.safetensors", "tf_model.h5", "picture.png", "README.md")
    old = files | {"config.json": files["config.json"] + b"\n"}
    at = Served({MAIN: files | dict.fromkeys(more, b"much"), OLD: old}, {"main": MAIN, "v1": OLD, "refs/pr/1": OLD})
    handler = type("Handler", (_Handler,), {"served": at})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    yield at
    server.shutdown()
    server.server_close()


def refusal(model: str, hub: Hub = DEFAULT_HUB) -> str:
    with pytest.raises(ModelError) as caught:
        resolve_model(model, hub=hub)
    text = str(caught.value)
    assert "\n" not in text
    assert TOKEN not in text
    return text


@pytest.mark.parametrize(
    ("model", "is_one"),
    [
        ("Qwen/Qwen3-0.6B", True),
        ("Qwen/Qwen3-0.6B@main", True),
        ("a/b@refs/pr/1", True),
        ("a/b@", False),
        ("a/b/c", False),
        ("b@main", False),
        ("a/b@x y", False),
    ],
)
def test_what_could_be_a_model_of_the_hub(model, is_one):
    assert is_hub_id(model) == is_one


def test_only_what_a_conversion_needs_is_downloaded(served, make_model):
    said: list[str] = []
    steps: list[tuple[int, int]] = []
    source = resolve_model("some/model", said.append, hub=Hub(advance=lambda *step: steps.append(step)))
    plain = make_model("llama").folder
    assert {f.name: f.read_bytes() for f in source.folder.iterdir()} == {
        f.name: f.read_bytes() for f in plain.iterdir()
    }
    assert served.paths("GET") == {f.name for f in plain.iterdir()}
    assert source.name == "some/model"
    size = sum(f.stat().st_size for f in plain.iterdir())
    assert said == [f"Downloading some/model from the hub ({-(-size // 1_000_000)} MB)"]
    assert steps[-1][1] == -(-size // 2**20)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert steps[-1][0] == size // 2**20
    said.clear()
    served.asked.clear()
    assert resolve_model("some/model", said.append).folder == source.folder
    assert not served.paths("GET")
    assert not said


@pytest.mark.parametrize("revision", ["v1", "refs/pr/1", OLD])
def test_a_revision_is_taken(revision, served):
    source = resolve_model(f"some/model@{revision}")
    assert (source.folder / "config.json").read_bytes() == served.files[OLD]["config.json"]
    assert source.name == "some/model"
    assert source.folder != resolve_model("some/model").folder


def test_a_revision_that_is_not_there(served):
    assert "some/model has no revision v9: its branches and tags stand at http" in refusal("some/model@v9")
    assert f"has no revision {'c' * 40}" in refusal(f"some/model@{'c' * 40}")


def test_a_model_that_is_not_there(served):
    text = refusal("some/other")
    assert "no folder some/other here, and the hub did not give it: there is no model of that name" in text
    assert "or it wants a token: token, the environment's HF_TOKEN" in text
    assert "or the token may not read it" in refusal("some/other", Hub(TOKEN))


def test_a_folder_has_no_revisions(served, tmp_path, monkeypatch):
    (tmp_path / "some/folder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "some/folder here has no revisions (leave @main out), and the hub did not" in refusal("some/folder@main")


def test_a_gated_model_wants_a_token(served, monkeypatch):
    served.gated = True
    text = refusal("some/model")
    assert re.search(r"some/model is gated: accept its conditions at http\S+/some/model and give its token: ", text)
    assert not [path for path in served.paths("GET") if path.endswith(".safetensors")]
    assert "some/model: the hub does not take this token" in refusal("some/model", Hub("hf_wrong"))
    assert resolve_model("some/model", hub=Hub(TOKEN)).folder.is_dir()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    served.private = True
    assert resolve_model("some/model@v1").folder.is_dir()


def test_a_token_is_called_as_the_user_calls_it(served):
    from tesseraq_gguf.arguments import ON_COMMAND_LINE

    served.gated = True
    assert "token: token, the environment's HF_TOKEN" in refusal("some/model")
    command_line = ON_COMMAND_LINE.set(True)
    try:
        assert "token: --token, the environment's HF_TOKEN" in refusal("some/model")
    finally:
        ON_COMMAND_LINE.reset(command_line)


def test_without_a_network_the_cache_serves(served, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "it is not in the cache as a whole, and HF_HUB_OFFLINE forbids" in refusal("some/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = resolve_model("some/model").folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    served.asked.clear()
    assert resolve_model("some/model").folder == folder
    assert not served.asked
    next(folder.glob("*.safetensors")).unlink()
    assert "HF_HUB_OFFLINE forbids" in refusal("some/model")


def test_a_hub_out_of_reach(served, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached, and it is not in the cache" in refusal("some/model")


def test_a_transfer_that_breaks_goes_on(served, make_model, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    served.cut = 1000
    folder = resolve_model("some/model").folder
    assert all((folder / name).read_bytes() == served.files[MAIN][name] for name in served.paths("GET"))
    ranges = [r for method, path, r in served.asked if method == "GET" and path.endswith(".safetensors")]
    assert "bytes=1000-" in ranges


def test_a_full_disk(served, monkeypatch):
    import shutil

    usage = shutil.disk_usage("/")
    monkeypatch.setattr("tesseraq_gguf.models.hub.shutil.disk_usage", lambda _: usage._replace(free=1000))
    text = refusal("some/model")
    assert re.search(r"some/model needs \d+ MB, and 1 MB are free in .*: make room", text)
    assert not served.paths("GET")


def test_a_disk_that_fills_up(served, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    assert re.search(r"the disk of .*hub is full\. Make room and run the same command again", refusal("some/model"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a-q4.gguf", "README.md"], r"holds GGUF files alone, such as a-q4\.gguf"),
        (["config.json", "pytorch_model.bin"], r"PyTorch's pickles \(pytorch_model\.bin\)"),
        (["README.md"], r"some/model has no config\.json"),
        (["config.json"], r"some/model has no \*\.safetensors file"),
    ],
)
def test_a_repository_without_a_model_is_not_downloaded(names, message, served):
    served.files[MAIN] = dict.fromkeys(names, b"{}")
    assert re.search(message, refusal("some/model"))
    assert not served.paths("GET")


def test_a_token_is_shown_nowhere(tmp_path):
    assert TOKEN not in repr(Hub(TOKEN))
