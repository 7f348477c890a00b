# needs: extras=test
"""Break the code in small ways, one at a time, and see whether a fast test notices.

Every mutation is run in a fork of this process, which has imported what takes long: torch and transformers. A mutation
is killed when a test fails on it or does not end; it survives when all pass.

    scripts/run check mutate                          the named mutations, then 100 drawn ones
    scripts/run check mutate --named                  only those with a name
    scripts/run check mutate --drawn 20 --only grids  20 drawn ones, of files whose path contains this
    scripts/run check mutate --list                   what would be run
"""

from __future__ import annotations

import argparse
import compileall
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from check.mutate.drawn import draw
from check.mutate.mutation import Mutation, StaleError
from check.mutate.named import named

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).resolve().parents[3]
KILLED, SURVIVED, ENDLESS = "killed", "survived", "killed (no end)"
PATIENCE = 2
"""How many times as long as all tests take without a mutation they may take with one."""
SLOW = ("pytest", "hypothesis", "torch", "sentencepiece", "gguf", "safetensors.torch", "datasets",
        "transformers.models.llama.modeling_llama", "transformers.models.gemma3.modeling_gemma3")  # fmt: skip
"""What tests import and takes long, none of it ours."""
LONG = 2.0
"""Seconds of the processor beyond which a test is not a fast one."""
INSTALLED = {"converter": "convert", "cpp_kernels": "cpp_kernels"}
"""Folders that an installation puts into the package."""


class QuickestFirst:
    """Plugin of pytest: tests begin with those that took least time when it ran last, and leave out the long ones.

    Args:
        file: keeps seconds of the processor by test.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self._seen: dict[str, float] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Choose and order them."""
        items.sort(key=lambda item: self._known.get(item.nodeid, 0.0))
        long = [item for item in items if self._known.get(item.nodeid, 0.0) > LONG]
        items[:] = items[: len(items) - len(long)]
        config.hook.pytest_deselected(items=long)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Note when it begins."""
        self._seen[nodeid] = time.process_time()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Note what it took, with what was made for it."""
        self._seen[nodeid] = time.process_time() - self._seen[nodeid]

    def pytest_sessionfinish(self) -> None:
        """Keep what is new."""
        self._file.write_text(json.dumps(self._seen | self._known), encoding="utf-8")


@dataclass(frozen=True)
class Outcome:
    """What became of a mutation."""

    mutation: Mutation
    state: str
    seconds: float


def main() -> None:
    """Run what was asked for and print a table, and the survivors."""
    given = _parser().parse_args()
    try:
        chosen = [] if given.only else named(ROOT)
    except StaleError as error:
        sys.exit(f"error: {error}")
    if not given.named:
        chosen += draw(ROOT, given.drawn, given.seed, given.only)
    if given.list:
        for mutation in chosen:
            print(f"{_where(mutation)}: {mutation.name}\n{mutation.diff()}\n")
        return
    with _copied_tree() as tree:
        for module in SLOW:
            importlib.import_module(module)
        outcomes = list(_run(chosen, tree))
    print(json.dumps([_as_json(o) for o in outcomes], indent=1) if given.json else _table(outcomes))
    sys.exit(any(o.state == SURVIVED and not o.mutation.drawn for o in outcomes))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/run check mutate", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--named", action="store_true", help="run only the mutations that have a name")
    parser.add_argument("--drawn", type=int, default=100, metavar="N", help="draw so many (100)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only drawn ones, of files whose path contains this")
    parser.add_argument("--seed", type=int, default=0, help="draw others (0)")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument("--list", action="store_true", help="say what would be run, and run nothing")
    return parser


def _run(chosen: list[Mutation], tree: Path) -> Iterator[Outcome]:
    state, usual = _tested(tuple(sorted({test for m in chosen for test in m.tests})), tree, patience=3600)
    if state != SURVIVED:
        log = (tree.parent / "log").read_text(encoding="utf-8", errors="replace")
        sys.exit(f"{log}\nerror: these tests do not pass without any mutation")
    for number, mutation in enumerate(chosen, 1):
        file = tree / mutation.file
        file.write_text(mutation.after, encoding="utf-8")
        state, seconds = _tested(mutation.tests, tree, patience=60 + PATIENCE * usual)
        file.write_text(mutation.before, encoding="utf-8")
        shutil.copystat(ROOT / mutation.file, file)  # what was compiled of it before counts again
        said = f"{number}/{len(chosen)} {state} in {seconds:.0f} s: {_where(mutation)}: {mutation.name}"
        print(said, file=sys.stderr, flush=True)
        if state == SURVIVED:
            print(mutation.diff(), file=sys.stderr, flush=True)
        yield Outcome(mutation, state, seconds)


def _tested(tests: tuple[str, ...], tree: Path, patience: float) -> tuple[str, float]:
    """Run fast tests in a fork, for so many seconds at most; return what became of them, and the seconds."""
    started = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _become_pytest(tests, tree)
    state = ENDLESS
    try:
        while time.monotonic() - started < patience:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                state = SURVIVED if status == 0 else KILLED
                break
            time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError):  # what a test started ends with it
            os.killpg(child, signal.SIGKILL)
        if state == ENDLESS:
            os.waitpid(child, 0)
    return state, time.monotonic() - started


def _become_pytest(tests: tuple[str, ...], tree: Path) -> None:
    """Run pytest in the tree, in this process, which ends with it."""
    code = 3
    try:
        os.setsid()
        log = os.open(tree.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.chdir(tree)
        os.environ["PYTHONPATH"] = str(tree)  # for what tests start
        sys.path.insert(0, str(tree))
        import pytest

        chosen = ["-m", "not slow and not runtime", "--strict-markers"]
        quiet = ["-x", "-q", "--assert=plain", "-p", "no:cacheprovider", f"--basetemp={tree.parent / 'temporary'}"]
        code = int(pytest.main([*quiet, *chosen, *tests], plugins=[QuickestFirst(tree.parent / "durations.json")]))
    finally:
        sys.stdout.flush()
        os._exit(code)


@contextmanager
def _copied_tree() -> Iterator[Path]:
    """Copy what git knows or might; the package is found in the copy, whatever is installed."""
    # byte code is recognised by time and size of its source, in which two mutations may be alike: there is only that of
    # files as they are
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0")
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        tree = Path(folder) / "tree"
        for name in filter(None, names):
            source, copy = ROOT / name, tree / name
            if source.is_file():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, copy)
        for name, place in INSTALLED.items():
            (tree / "tesseraq_gguf" / name).symlink_to(tree / place)
        compileall.compile_dir(tree, quiet=2)
        yield tree


def _where(mutation: Mutation) -> str:
    return f"{mutation.file}:{mutation.line}"


def _as_json(outcome: Outcome) -> dict[str, object]:
    m = outcome.mutation
    facts: dict[str, object] = {"name": m.name, "file": m.file, "line": m.line, "diff": m.diff(), "drawn": m.drawn}
    return facts | {"state": outcome.state, "seconds": round(outcome.seconds, 1)}


def _table(outcomes: list[Outcome]) -> str:
    """Markdown: counts by folder, and the survivors with their diffs."""
    lines = ["| mutations | killed | survived |", "|---|---:|---:|"]
    parts = {"named": [o for o in outcomes if not o.mutation.drawn]}
    for outcome in outcomes:
        if outcome.mutation.drawn:
            parts.setdefault(f"drawn from {Path(outcome.mutation.file).parent}", []).append(outcome)
    parts["drawn, all"] = [o for o in outcomes if o.mutation.drawn]
    for part, those in parts.items():
        if those:
            survived = sum(o.state == SURVIVED for o in those)
            lines.append(f"| {part} | {len(those) - survived} | {survived} |")
    survivors = [o.mutation for o in outcomes if o.state == SURVIVED]
    return "\n".join([*lines, *(f"\n{_where(m)}: {m.name}\n{m.diff()}" for m in survivors)])


if __name__ == "__main__":
    main()
