"""Inference on more than one machine: llama.cpp's RPC backend with our types, and the answer of one process."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from saved_logits import logit_error, saved_logits
from tiny_models import LOUD, make_model  # noqa: F401  (a fixture)

from tesseraq_gguf import Recipe, convert
from tesseraq_gguf.models import ModelSource
from tesseraq_gguf.runtime import Runtime

pytestmark = pytest.mark.runtime

RULES = (("q_proj", "tsq3"), ("k_proj", "tsq4"), ("v_proj", "bcq4"), ("o_proj", "bcq4_a4"), ("gate|up", "ptq1_61"))


@pytest.fixture(scope="module")
def model(make_model: Callable[..., ModelSource], tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A tiny Llama that has every type of ours."""
    out = tmp_path_factory.mktemp("rpc") / "all.gguf"
    convert(Recipe(str(make_model("llama-256", LOUD).folder), out, type="tsq2", rules=RULES, method="rtn"))
    return out


@pytest.fixture
def servers(runtime: Runtime, tmp_path: Path) -> Iterator[list[tuple[str, Path]]]:
    """Two servers: endpoint and log."""
    started, found = [], []
    try:
        for number in range(2):
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            log = tmp_path / f"server-{number}.log"
            with log.open("wb") as out:
                command = [str(runtime.tool("ggml-rpc-server")), "--host", "127.0.0.1", "--port", str(port), "-t", "1"]
                started.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT))
            for _ in range(100):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert started[-1].poll() is None, log.read_text()
                time.sleep(0.1)
            found.append((f"127.0.0.1:{port}", log))
        yield found
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_two_servers_answer_as_one_process_does(
    runtime: Runtime, model: Path, long_text: Path, servers: list[tuple[str, Path]]
) -> None:
    _, local, _ = saved_logits(model, long_text, 128, 2, runtime=runtime)
    endpoints = ",".join(endpoint for endpoint, _ in servers)
    # one block goes to the first server, the other and the output matrix to the second
    share = ("--rpc", endpoints, "-ngl", "99", "--tensor-split", "1,2", "-v")
    _, remote, said = saved_logits(model, long_text, 128, 2, *share, runtime=runtime)
    assert logit_error(remote, local) < 2e-3  # sums in another order; wrong weights come to 1
    for number, (endpoint, log) in enumerate(servers):
        assert re.search(rf"layer +{number} assigned to device RPC{number}", said), said
        # the first time it only asks how much there would be
        sizes = re.findall(rf"RPC\d*\[{re.escape(endpoint)}\] model buffer size = +([\d.]+) MiB", said)
        assert sizes and float(sizes[-1]) > 0, said
        assert "Accepted client connection" in log.read_text(errors="replace")


def test_a_server_of_another_llama_cpp_is_refused(runtime: Runtime, model: Path, long_text: Path) -> None:
    """Upstream speaks version 7: it would take our operators for others."""
    with socket.create_server(("127.0.0.1", 0)) as upstream:
        endpoint = f"127.0.0.1:{upstream.getsockname()[1]}"
        command = [str(runtime.tool("llama-perplexity")), "-m", str(model), "-f", str(long_text), "--rpc", endpoint]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        upstream.settimeout(60)
        connection, _ = upstream.accept()
        with connection, connection.makefile("rb") as sent:  # read whole: one message may come in several pieces
            size = int.from_bytes(sent.read(9)[1:], "little")  # after the command: how many bytes follow
            sent.read(size)
            answer = bytes([7, 0, 0]).ljust(4 + size, b"\0")  # the version, and as many capabilities as were sent
            connection.sendall(len(answer).to_bytes(8, "little") + answer)
            said, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "RPC server version mismatch: 7.0.0" in said
