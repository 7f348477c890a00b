"""Two processes learn what one learns: the same draws, gradients averaged, one writer, and a run that goes on."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from problems import mlp_problem
from tiny_models import TEXT, make_model  # noqa: F401  (a fixture)

from tesseraq_gguf.compute.parallel import Team
from tesseraq_gguf.methods.gptq import GPTQ
from tesseraq_gguf.methods.tesseraq import SoftMatrix
from tesseraq_gguf.recipe.recipe import Recipe


@pytest.mark.parametrize(("samples", "batch", "size"), [(8, 4, 2), (9, 4, 4), (13, 6, 3), (4, 4, 2)])
def test_processes_draw_what_one_draws(samples, batch, size):
    problem = mlp_problem("tsq2", 64, 64)
    problem.inputs = torch.zeros(samples, 1, 64)
    alone = [sorted(problem.draw(batch).tolist()) for _ in range(5)]
    assert all(len(set(step)) == batch for step in alone)
    together: list[list[int]] = [[] for _ in range(5)]
    for rank in range(size):
        team = Team(rank, size)
        share = team.share(torch.arange(samples))
        mine = dataclasses.replace(
            problem,
            inputs=problem.inputs[: len(share)],
            generator=torch.Generator().manual_seed(2),
            team=team,
            samples=samples,
        )
        for step in together:
            drawn = share[mine.draw(batch)].tolist()
            assert len(drawn) == batch // size
            step += drawn
    assert [sorted(step) for step in together] == alone


@pytest.mark.parametrize("size", [2, 4])
def test_averaged_gradients_are_those_of_one_process(size):
    problem = mlp_problem("tsq2", 128, 192)
    starts = GPTQ().start(problem)

    def gradients(team: Team) -> list[torch.Tensor]:
        matrices = {name: SoftMatrix(start, problem.grids[name]) for name, start in starts.items()}
        part = dataclasses.replace(
            problem,
            inputs=team.share(problem.inputs),
            targets=team.share(problem.targets),
            generator=torch.Generator().manual_seed(2),
            team=team,
            samples=len(problem.inputs),
        )
        part.loss({name: m.weight() for name, m in matrices.items()}, part.draw(4)).backward()
        variables = [v for m in matrices.values() for v in (m.rounding, m.tuning, m.zero)]
        return [v.grad for v in variables if v.grad is not None]

    alone = gradients(Team())
    together = zip(*(gradients(Team(rank, size)) for rank in range(size)), strict=True)
    for want, got in zip(alone, together, strict=True):
        torch.testing.assert_close(sum(got) / size, want, rtol=1e-4, atol=float(1e-5 * want.abs().max()))


def test_every_sample_is_drawn_in_the_long_run():
    problem = mlp_problem("tsq2", 64, 64)
    counts = torch.zeros(len(problem.inputs))
    for _ in range(400):
        counts[problem.draw(3)] += 1
    assert counts.min() > 0.6 * counts.mean()


def test_shares_are_all_samples_once():
    samples = torch.arange(11)
    for size in (1, 2, 3):
        teams = [Team(rank, size) for rank in range(size)]
        assert sorted(int(s) for team in teams for s in team.share(samples)) == list(range(11))
        for first in (0, 1, 5, 11):
            assert sum(team.count(first) for team in teams) == first


JOINED = """
import torch
from tesseraq_gguf.compute.parallel import joined

with joined() as team:
    assert team.size == torch.distributed.get_world_size() == 2
    assert team.from_first(lambda: team.rank) == 0
assert not torch.distributed.is_initialized()
with joined(together=False) as team:
    assert team.size == 1
    assert not torch.distributed.is_initialized()
"""


def test_processes_part_before_they_end(tmp_path):
    script = tmp_path / "joined.py"
    script.write_text(JOINED)
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run([*start, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def convert(processes: int, out, source, text, *options: str) -> subprocess.CompletedProcess:
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    command = [*(start if processes > 1 else [sys.executable]), "-m", "tesseraq_gguf", "convert", str(source.folder)]
    command += [str(out), "--calibration", str(text), "--samples", "9", "--seqlen", "32", "--preset", "fast", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT * 30)
    return file


@pytest.mark.slow
@pytest.mark.parametrize(("options", "tolerance"), [(("--init", "awq"), 0.1), (("--rotate",), 0.2)])
def test_two_processes_learn_what_one_learns(options, tolerance, make_model, text, tmp_path):  # noqa: F811
    source, losses = make_model("llama"), []
    for processes in (1, 2):
        done = convert(processes, tmp_path / f"{processes}.gguf", source, text, *options)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Runs on:") == 1  # one process speaks
        losses.append([float(x) for x in re.findall(r"^block .* → ([\d.]+) ", done.stderr, re.MULTILINE)])
    # sums in another order: Adam makes other codes of it, which are as good
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    assert not list(tmp_path.glob("*.tesseraq-work*"))


@pytest.mark.parametrize(("processes", "sequences"), [(1, 2), (2, 2), (4, 4)])
def test_a_step_has_a_sequence_for_each_process(processes, sequences, tmp_path):
    assert Recipe("model", tmp_path / "x.gguf", preset="balanced", processes=processes).settings.batch == sequences


@pytest.mark.slow
def test_a_team_that_cannot_share_a_step_is_told_so(make_model, text, tmp_path):  # noqa: F811
    done = convert(3, tmp_path / "x.gguf", make_model("llama"), text)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "3 processes cannot share" in lines[0]
    assert not (tmp_path / "x.gguf").exists()


@pytest.fixture
def two_hosts():
    """Return the commands that run something in each of two network namespaces, which a wire joins, and an address."""
    if shutil.which("ip") is None:
        pytest.skip("needs ip, of iproute2")
    names = [f"tq-{os.getpid()}-{end}" for end in "ab"]
    wires = [f"tq{os.getpid()}{end}" for end in "ab"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", wires[0], "netns", names[0], "type", "veth", "peer", "name", wires[1], "netns", names[1])
        for place, (name, wire) in enumerate(zip(names, wires, strict=True)):
            ip("-n", name, "addr", "add", f"10.77.0.{place + 1}/24", "dev", wire)
            for each in (wire, "lo"):
                ip("-n", name, "link", "set", each, "up")
    except (OSError, subprocess.CalledProcessError):
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        pytest.skip("needs network namespaces, which only root may make, if anybody")
    yield [(["ip", "netns", "exec", n], w) for n, w in zip(names, wires, strict=True)], "10.77.0.1"
    for name in names:
        ip("netns", "del", name)


@pytest.mark.slow
@pytest.mark.network
def test_two_hosts_learn_what_one_learns(two_hosts, make_model, text, tmp_path):  # noqa: F811
    hosts, address = two_hosts
    source = make_model("llama")
    running = []
    for rank, (inside, wire) in enumerate(hosts):
        folder = tmp_path / f"host-{rank}"  # what hosts have of their own
        folder.mkdir()
        start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank)]
        start += ["--nproc-per-node", "1", "--master-addr", address, "--master-port", "29517"]
        command = [*inside, *start, "-m", "tesseraq_gguf", "convert", str(source.folder), str(folder / "out.gguf")]
        command += ["--calibration", str(text), "--samples", "9", "--seqlen", "32", "--preset", "fast", "--rotate"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": wire}
        running.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        )
    try:
        said = [process.communicate(timeout=600) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], said
    alone = convert(1, tmp_path / "alone.gguf", source, text, "--rotate")
    losses = [
        [float(x) for x in re.findall(r"^block .* → ([\d.]+) ", stderr, re.MULTILINE)]
        for stderr in (said[0][1], alone.stderr)
    ]
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=0.2)  # another seed makes a tenth of it
    assert [[file.name for file in (tmp_path / f"host-{rank}").iterdir()] for rank in (0, 1)] == [["out.gguf"], []]
