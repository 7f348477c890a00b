"""Files that appear only when they are whole, and what a killed process leaves."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tesseraq_gguf.paths import temporary_sibling

HANGING = """
import sys, time
from pathlib import Path
from tesseraq_gguf.paths import temporary_sibling
with temporary_sibling(Path(sys.argv[1])) as partial:
    partial.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path):
    """Return a process that has written half of a file."""
    command = [sys.executable, "-c", HANGING, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.wait()


def names(folder):
    return [p.name for p in folder.iterdir()]


def test_the_file_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(ZeroDivisionError), temporary_sibling(tmp_path / "out") as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert names(tmp_path) == []
    with temporary_sibling(tmp_path / "out") as partial:
        partial.write_text("whole")
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"]


def test_what_a_killed_process_left_is_removed(tmp_path, writer):
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert len(names(tmp_path)) == 1
    with temporary_sibling(tmp_path / "out") as partial:
        partial.write_text("whole")
    assert names(tmp_path) == ["out"]


def test_what_a_living_process_writes_stays(tmp_path, writer):
    with temporary_sibling(tmp_path / "out") as partial:
        partial.write_text("whole")
    assert len(names(tmp_path)) == 2
    assert writer.poll() is None
