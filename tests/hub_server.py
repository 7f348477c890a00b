"""The routes of the hub that an upload takes, on this machine: it keeps what arrives, and breaks when it is told to.

Small files come within a commit, larger ones by LFS: asked for in a batch, sent in one request or in several, and then
named by a commit. Xet, the hub's newer way, needs its own servers and is left out.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import http_backoff

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"
"""Of the account that may write."""

LARGE = 20_000
"""Files from this size on are LFS's."""

PART = 60_000
"""Files from this size on come in several requests, of so many bytes."""


class Store:
    """What a server has and what it was sent.

    Args:
        token: of the account that may write.
    """

    def __init__(self, token: str) -> None:
        self.token = token
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.files: dict[str, bytes] = {}
        self.received: Counter[str] = Counter()
        """Bytes that arrived whole, by object, or by object and part."""
        self.commits = 0
        self.created: list[dict[str, Any]] = []
        self.breaks: list[int] = []
        """After how many bodies the connection breaks, each for one upload."""
        self.bodies = 0
        self.url = ""

    def broken(self) -> bool:
        """Whether the connection breaks here."""
        if self.breaks and self.bodies >= self.breaks[0]:
            return True
        self.bodies += 1
        return False


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def store(self) -> Store:
        return self.server.store  # type: ignore[attr-defined,no-any-return]

    def log_message(self, *_: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            read = b""
            while size := int(self.rfile.readline(), 16):
                read += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return read
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, data: Any = None, code: int = 200, headers: dict[str, str] | None = None) -> None:
        body = b"" if data is None else json.dumps(data).encode()
        self.send_response(code)
        for name, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _allowed(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {self.store.token}":
            return True
        self._body()
        self._answer({"error": f"no: {self.headers.get('Authorization')}"}, 401)
        return False

    def do_GET(self) -> None:
        if self._allowed():
            self._answer({"name": "me", "type": "user", "auth": {}})

    def do_POST(self) -> None:
        path = self.path.partition("?")[0]
        if not path.startswith("/complete/") and not self._allowed():  # its address is signed
            return
        body = self._body()
        if path == "/api/repos/create":
            self.store.created.append(json.loads(body))
            self._answer({"url": f"{self.store.url}/me/model"})
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [(f["path"], "lfs" if f["size"] >= LARGE else "regular") for f in files]
            self._answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes]})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [self._object(o["oid"], o["size"]) for o in json.loads(body)["objects"]]
            self._answer({"transfer": "multipart", "objects": objects})
        elif path.startswith("/complete/"):
            oid = path.rpartition("/")[2]
            parts = [self.store.parts[oid, part["partNumber"]] for part in json.loads(body)["parts"]]
            self._keep(oid, b"".join(parts))
            self._answer({})
        elif "/commit/" in path:
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._answer({"error": path}, 404)

    def do_PUT(self) -> None:
        if self.store.broken():
            self.close_connection = True
            self.connection.close()
            return
        body, (_, kind, oid, *part) = self._body(), self.path.split("/")
        self.store.received["/".join([oid, *part])] += len(body)
        if kind == "part":
            self.store.parts[oid, int(part[0])] = body
        else:
            self._keep(oid, body)
        self._answer(headers={"ETag": hashlib.md5(body).hexdigest()})

    def _object(self, oid: str, size: int) -> dict[str, Any]:
        url = self.store.url
        if oid in self.store.objects:
            return {"oid": oid, "size": size}
        upload: dict[str, Any] = {"href": f"{url}/single/{oid}"}
        if size >= PART:
            count = -(-size // PART)
            header = {str(n): f"{url}/part/{oid}/{n}" for n in range(1, count + 1)} | {"chunk_size": str(PART)}
            upload = {"href": f"{url}/complete/{oid}", "header": header}
        return {"oid": oid, "size": size, "actions": {"upload": upload}}

    def _keep(self, oid: str, data: bytes) -> None:
        assert hashlib.sha256(data).hexdigest() == oid
        self.store.objects[oid] = data

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.store.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.store.files[value["path"]] = self.store.objects[value["oid"]]
        self.store.commits += 1
        self._answer(
            {"commitUrl": f"{self.store.url}/me/model/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
        )


@contextmanager
def hub_server(token: str) -> Iterator[Store]:
    """Run a server, and give what it keeps."""
    store = Store(token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.store = store  # type: ignore[attr-defined]
    store.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """What a server keeps, which is the hub for the client; the client does not try again for minutes."""
    with hub_server(TOKEN) as store:
        for module in ("huggingface_hub.constants", "huggingface_hub.hf_api.constants"):
            monkeypatch.setattr(f"{module}.ENDPOINT", store.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.lfs.http_backoff", partial(http_backoff, max_retries=0))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield store
