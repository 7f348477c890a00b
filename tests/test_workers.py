"""Tests share the machine's cores where more than one file runs, and what makes them fail does so in any process."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import workers

CORES = 8
ENOUGH = 100 * workers.MEMORY


@pytest.mark.parametrize(
    ("files", "cores", "memory", "expected"),
    [
        (100, CORES, ENOUGH, CORES),
        (3, CORES, ENOUGH, 3),
        (1, CORES, ENOUGH, 0),
        (0, CORES, ENOUGH, 0),
        (100, 1, ENOUGH, 0),
        (100, CORES, 5 * workers.MEMORY - 1, 4),
        (100, CORES, workers.MEMORY // 2, 0),
    ],
)
def test_there_are_no_more_than_files_and_cores_and_memory(files: int, cores: int, memory: int, expected: int) -> None:
    assert workers.workers(files, cores, memory) == expected


def test_files_are_counted_once(tmp_path: Path) -> None:
    for name in ("test_a.py", "test_b.py", "conftest.py", "deep/test_c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    a = str(tmp_path / "test_a.py")
    assert workers.files([str(tmp_path)]) == 3
    assert workers.files([a]) == 1
    assert workers.files([f"{a}::test_x[a::b]", f"{a}::test_y", str(tmp_path / "deep")]) == 2


@pytest.fixture
def some_tests(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Two files, one of which fails and skips, on a machine of two cores."""
    monkeypatch.delenv("PYTEST_XDIST_AUTO_NUM_WORKERS", raising=False)
    monkeypatch.setattr(workers, "usable_processors", lambda: {0, 1})
    monkeypatch.setattr(workers.psutil, "virtual_memory", lambda: type("Memory", (), {"available": ENOUGH}))
    for plugin in ("skips.py", "workers.py"):  # other processes look for them beside the tests
        shutil.copy(Path(__file__).with_name(plugin), pytester.path)
    pytester.makeconftest('pytest_plugins = ["skips", "workers"]')
    process = "import os\ndef test_process(): open(f'{os.getpid()}.pid', 'w').close()\n"
    pytester.makepyfile(
        test_a=process, test_b=process + "import pytest\ndef test_skips(): pytest.skip('needs a harp')\n"
    )
    return pytester


def run(tests: pytest.Pytester, *arguments: str) -> tuple[pytest.RunResult, int]:
    """Run the tests as `scripts/test` does; return the result and how many processes had a part."""
    result = tests.runpytest_inprocess("-p", "no:cacheprovider", "-n", "auto", "--dist", "loadfile", *arguments)
    return result, len(list(tests.path.glob("*.pid")))


def test_two_files_run_in_two_processes_and_say_why_tests_skip(some_tests: pytest.Pytester) -> None:
    result, processes = run(some_tests, "-ra")
    result.assert_outcomes(passed=2, skipped=1)
    assert processes == 2
    result.stdout.fnmatch_lines(["SKIPPED*needs a harp"])


def test_a_skip_that_nobody_expected_fails_in_another_process_too(some_tests: pytest.Pytester) -> None:
    result, _ = run(some_tests, "--strict-skips")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*nobody expected it*: needs a harp"])
    assert "1 failed, 2 passed" in result.outlines[-1]


@pytest.mark.parametrize("arguments", [("test_b.py",), ("test_b.py::test_process",), ("-n", "0"), ("-s",), ("--pdb",)])
def test_who_looks_on_has_them_in_one_process(some_tests: pytest.Pytester, arguments: tuple[str, ...]) -> None:
    result, processes = run(some_tests, *arguments)
    assert result.ret == 0
    assert processes == 1
    assert not any("worker" in line for line in result.outlines)
