"""Children that are forked: they are what an interpreter of their own would be, and none is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tesseraq_gguf.converter import nursery

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="processes are forked on Linux alone")

PLAYED = """
import json, os, resource, sys, time
from pathlib import Path

def main(arguments):
    play = json.loads(Path(arguments[0]).read_text())
    print(os.environ.get("PLAYED"), Path.cwd(), resource.getrlimit(resource.RLIMIT_FSIZE)[0], os.getpid(), flush=True)
    print("to the log", file=sys.stderr)
    if play == "wait":
        time.sleep(100)
    if play == "die":
        os.kill(os.getpid(), 9)
    return 0
"""


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """One in which a worker does something else: what it finds, it says."""
    package = tmp_path / "site" / "sitecustomize.py"
    package.parent.mkdir()
    package.write_text(
        "import sys, types\n"
        f"played = types.ModuleType('tesseraq_gguf.converter.worker')\nexec({PLAYED!r}, played.__dict__)\n"
        "for heavy in ('torch', 'transformers'):\n"
        "    sys.modules[heavy] = types.ModuleType(heavy)\n"
        "sys.modules['transformers'].AutoConfig = sys.modules['transformers'].AutoTokenizer = None\n"
        "import tesseraq_gguf.converter as converter\n"
        "sys.modules[played.__name__] = converter.worker = played\n"
    )
    yield os.environ | {"PYTHONPATH": str(package.parent)}
    nursery._close()


def play(environment, tmp_path, what="speak"):
    """What a child says, and the log."""
    job, log = tmp_path / "job", tmp_path / "log"
    job.write_text(json.dumps(what))
    with log.open("w+") as stream, nursery.child(job, environment, stream) as said:
        lines = said.read().splitlines()
    return lines, log.read_text()


def test_a_child_has_the_environment_the_folder_and_the_streams_that_it_is_given(environment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (line,), log = play(environment | {"PLAYED": "first"}, tmp_path)
    assert line.split()[:2] == ["first", str(tmp_path)] and log == "to the log\n"
    served = nursery._kept[0].process.pid
    (other,), _ = play(environment | {"PLAYED": "second"}, tmp_path)
    assert other.split()[0] == "second" and other.split()[-1] != line.split()[-1]
    assert nursery._kept[0].process.pid == served


def test_limits_and_variables_that_imports_look_at_take_another_nursery(environment, tmp_path):
    import resource

    play(environment, tmp_path)
    first = nursery._kept[0].process
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        (line,), _ = play(environment, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert line.split()[2] == str(1 << 20)
    assert first.poll() is not None
    second = nursery._kept[0].process.pid
    play(environment | {"HF_HOME": str(tmp_path)}, tmp_path)
    assert nursery._kept[0].process.pid != second


def test_a_nursery_that_is_gone_is_replaced(environment, tmp_path):
    play(environment, tmp_path)
    nursery._kept[0].process.kill()
    nursery._kept[0].process.wait()
    assert play(environment, tmp_path)[1] == "to the log\n"


def test_where_there_is_no_nursery_a_child_has_an_interpreter_of_its_own(environment, tmp_path, monkeypatch):
    monkeypatch.setattr(nursery, "_nursery", lambda _: SimpleNamespace(socket=Closed()))
    monkeypatch.setattr(nursery, "_interpreter", lambda *_: open(os.devnull))  # noqa: SIM115, PTH123
    assert play(environment, tmp_path) == ([], "")


@pytest.mark.parametrize("error", [AttributeError, PermissionError])
def test_nothing_is_forked_where_processes_cannot_be_told_apart(error, monkeypatch):
    def refuse(_):
        raise error

    monkeypatch.setattr(os, "pidfd_open", refuse)
    assert not nursery._can_fork.__wrapped__()
    monkeypatch.undo()
    assert nursery._can_fork.__wrapped__()


class Closed:
    """A socket that nobody serves."""

    def sendmsg(self, *_):
        raise BrokenPipeError


def test_a_child_that_dies_has_said_all(environment, tmp_path):
    lines, log = play(environment, tmp_path, "die")
    assert len(lines) == 1 and log == "to the log\n"


def test_a_child_that_is_left_is_ended(environment, tmp_path):
    (tmp_path / "job").write_text('"wait"')
    with (
        (tmp_path / "log").open("w") as log,
        pytest.raises(KeyboardInterrupt),
        nursery.child(tmp_path / "job", environment, log) as said,
    ):
        number = int(said.readline().split()[-1])
        assert psutil.pid_exists(number)
        raise KeyboardInterrupt
    assert not psutil.pid_exists(number)


def test_nothing_outlives_a_parent_that_is_killed(environment, tmp_path):
    (tmp_path / "job").write_text('"wait"')
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom tesseraq_gguf.converter import nursery\n"
        "with nursery.child(Path(sys.argv[1]), os.environ, sys.stderr) as said:\n"
        "    print(nursery._kept[0].process.pid, said.readline().split()[-1], flush=True)\n    said.read()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "job")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as parent:
        assert parent.stdout is not None
        kept, number = map(int, parent.stdout.readline().split())
        parent.send_signal(signal.SIGKILL)
    for _ in range(100):
        if not psutil.pid_exists(kept):
            break
        time.sleep(0.05)
    assert not psutil.pid_exists(kept)
    os.kill(number, signal.SIGKILL)  # a real worker looks at its standard input


def test_a_nursery_has_imported_what_children_need():
    """Else it would save nothing."""
    code = "from tesseraq_gguf.converter import nursery, worker; import sys; print('gguf' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "False\n"  # a child takes the one that its job names
    assert Path(nursery.__file__).name == "nursery.py"
