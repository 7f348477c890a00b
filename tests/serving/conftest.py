"""Servers, each at a port of its own, which end with their test."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from served import Server


@pytest.fixture
def port() -> int:
    """A port that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture
def serve(port: int, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Begin to serve, with the arguments of the command; one server at a time."""
    begun: list[Server] = []

    def begin(*arguments: object) -> Server:
        for earlier in begun:
            earlier.close()
        begun.append(Server(tmp_path / "server.log", port, *arguments))
        return begun[-1]

    yield begin
    for each in begun:
        each.close()
