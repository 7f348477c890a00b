"""The work directory: finished blocks of a run, so that a killed run goes on at the next block.

`run.json` says which run the blocks belong to. Whatever changes what would be learned (model, calibration, method,
types, settings, seed, precision) changes the identity, and blocks of another identity are refused, never mixed. What
another run left without having finished a block is replaced.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, astuple
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from tesseraq_gguf.compute.parallel import Team
from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.learning.reconstruction import BlockResult
from tesseraq_gguf.methods.held_out import Verdict
from tesseraq_gguf.methods.problem import Mark
from tesseraq_gguf.paths import temporary_sibling
from tesseraq_gguf.recipe.recipe import Recipe
from tesseraq_gguf.types.quantized import QuantizedTensor, load_tensors, save_tensors

EMBEDDINGS = "embeddings"
"""Name of the quantised embedding and output matrix."""

HEAD = "head"
"""Name of the quantised matrices of a head for speculation."""

CODEBOOKS = "codebooks"
"""Name of the codebooks that were designed for the model."""

CARRIED = "carried"
"""Name of the vectors that changed before preprocessing and that the second quantisation left as they were."""

STATE = "run.json"
"""Name of the file that says what a work directory is for; one without it is none."""

FINAL = "final"
"""Name of the vectors outside the blocks that the last pass learned; the pass is over when they are there."""

TYPES = "types"
"""Name of the note that keeps the types chosen within a budget."""

TRIED = "tried"
"""Name of the note that keeps what divergence these leave before anything is learned."""

CHECKED = "checked"
"""Name of the note that says that the model's weights were looked at."""

ROTATED = "rotated"
"""Name of the rotated copy of the model."""

BEFORE = "before"
"""Name of the work directory of the quantisation before the preprocessing."""

PREPROCESSED = "preprocessed"
"""Name of the model that the preprocessing made."""

_BEGUN = (
    *(f"{name}.safetensors" for name in (EMBEDDINGS, HEAD, CODEBOOKS)),
    *(f"{name}.txt" for name in (TYPES, TRIED, CHECKED)),
    *(ROTATED, f"{ROTATED}.lock", BEFORE, f"{BEFORE}.lock"),
)
"""What a run has left when it stops before its first block is finished; the rest of a user's folder is not its own."""

_LEARNED = ("block-*", f"{BEFORE}/block-*", PREPROCESSED, "finish-*", "last-pass-*", f"{FINAL}.*", f"{CARRIED}.*")
"""Patterns of what took learning."""

_WORDS = {"program": "the program that learned them", "torch": "the version of torch"}
"""What parts of an identity are called, where their key does not say it."""

_T = TypeVar("_T")

Identity = Mapping[str, object]
"""What a run is, JSON-ready."""


class WorkDirectory:
    """Finished blocks on disk. Use as a context manager: one process at a time.

    Args:
        folder: made if it is not there.
        identity: of the present run.
        fresh: remove what an earlier run left.

    Raises:
        UsageError: the folder cannot be used, another process uses it, or it holds another run's blocks.
    """

    def __init__(self, folder: Path, identity: Identity, fresh: bool) -> None:
        self.folder = folder
        self._identity: dict[str, object] = json.loads(json.dumps(identity))
        self._fresh = fresh
        self._lock = FileLock(f"{folder}.lock")

    def __enter__(self) -> WorkDirectory:
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(
                f"another run is using the work directory {self.folder}. Wait for it, or give --work-dir"
            ) from None
        except OSError as error:
            raise UsageError(f"the work directory {self.folder} cannot be used: {error.strerror}") from error
        try:
            self._open()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def _release(self) -> None:
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)

    def _open(self) -> None:
        state = self.folder / STATE
        if self.folder.exists() and not state.is_file() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UsageError(f"{self.folder} is not a work directory of this program. Give another --work-dir")
        if self._fresh:
            shutil.rmtree(self.folder, ignore_errors=True)
        if state.is_file():
            earlier = _parse(state)
            changed = sorted(
                k for k in earlier.keys() | self._identity.keys() if earlier.get(k) != self._identity.get(k)
            )
            if not changed:
                return
            if earlier.keys() != self._identity.keys() or self._has_learned():
                differences = ", ".join(_said(key, earlier.get(key), self._identity.get(key)) for key in changed)
                raise UsageError(
                    f"{self.folder} belongs to a run that differs in {differences}. "
                    "Use --fresh to start over, or another --work-dir"
                )
            self._forget_begun()
        self.folder.mkdir(exist_ok=True)
        with temporary_sibling(state) as partial:
            partial.write_text(json.dumps(self._identity, indent=2), encoding="utf-8")

    def _has_learned(self) -> bool:
        """Whether there is what another run would lose: types, codebooks and looking at weights take no learning."""
        return any(any(self.folder.glob(pattern)) for pattern in _LEARNED)

    def _forget_begun(self) -> None:
        for path in map(self.folder.joinpath, _BEGUN):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    @property
    def writes(self) -> bool:
        """Whether this process writes; what others are given to keep is kept by the first one."""
        return True

    def part(self, name: str, without: str) -> WorkDirectory:
        """Return a directory within, of a run that is this one but for a part of its identity."""
        identity = {key: value for key, value in self._identity.items() if key != without}
        return WorkDirectory(self.folder / name, identity, fresh=False)

    def alone(self) -> WorkDirectory:
        """Return the directory for the process that goes on alone."""
        return self

    def keep(self, result: BlockResult) -> None:
        """Write a finished block; it appears whole or not at all."""
        told = ("loss_before", "loss_after", "seconds")
        notes = {name: json.dumps(getattr(result, name)) for name in told}
        if result.ranges:
            notes["ranges"] = json.dumps(result.ranges)
        if result.verdict:
            notes["verdict"] = json.dumps(asdict(result.verdict))
        if result.curve:
            notes["curve"] = json.dumps([astuple(mark) for mark in result.curve])
        save_tensors(self._file(_block(result.index)), result.tensors, notes)

    def finished(self, index: int) -> BlockResult | None:
        """Return what an earlier run learned for a block, or None."""
        file = self._file(_block(index))
        if not file.is_file():
            return None
        tensors, notes = load_tensors(file)
        ranges = {name: (low, high) for name, (low, high) in json.loads(notes.get("ranges", "{}")).items()}
        verdict = Verdict(**json.loads(notes["verdict"])) if "verdict" in notes else None
        before, after, seconds = (json.loads(notes[name]) for name in ("loss_before", "loss_after", "seconds"))
        curve = tuple(Mark(*mark) for mark in json.loads(notes.get("curve", "[]")))
        return BlockResult(
            index, tensors, before, after, seconds, resumed=True, ranges=ranges, verdict=verdict, curve=curve
        )

    def block(self, index: int, finish: bool = False) -> dict[str, QuantizedTensor]:
        """Return what was learned for a finished block, or what a last pass over it left."""
        return load_tensors(self._file(finished_block(index) if finish else _block(index)))[0]

    def keep_tensors(self, name: str, tensors: dict[str, QuantizedTensor], notes: dict[str, str] | None = None) -> None:
        """Write tensors that belong to no block, or to a later pass, under a name."""
        save_tensors(self._file(name), tensors, notes)

    def tensors(self, name: str) -> tuple[dict[str, QuantizedTensor], dict[str, str]] | None:
        """Return tensors and notes kept under a name, or None."""
        file = self._file(name)
        return load_tensors(file) if file.is_file() else None

    def scratch(self, name: str) -> Path:
        """Return (and make) a folder for what a pass needs until it is over, and goes on with after it was stopped."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return folder

    def forget(self, name: str) -> None:
        """Remove tensors kept under a name, if there are any."""
        self._file(name).unlink(missing_ok=True)

    def keep_note(self, name: str, text: str) -> None:
        """Write a text under a name."""
        with temporary_sibling(self.folder / f"{name}.txt") as partial:
            partial.write_text(text, encoding="utf-8")

    def note(self, name: str) -> str | None:
        """Return the text kept under a name, or None."""
        file = self.folder / f"{name}.txt"
        return file.read_text(encoding="utf-8") if file.is_file() else None

    def files(self, blocks: int, finish: bool) -> list[Path]:
        """Return the files that hold the result.

        Args:
            blocks: how many blocks there are.
            finish: whether a last pass ran over them.
        """
        names = [finished_block(i) if finish else _block(i) for i in range(blocks)]
        more = [EMBEDDINGS, HEAD, CARRIED, *([FINAL] if finish else [])]
        return [self._file(n) for n in names] + [f for n in more if (f := self._file(n)).is_file()]

    def remove(self) -> None:
        """Delete the directory."""
        shutil.rmtree(self.folder, ignore_errors=True)


class _Shared(WorkDirectory):
    """The work directory of a team: the first process' own, of which the others are told.

    Args:
        team: the processes.
        own: the directory in the first process, None in the others.
    """

    def __init__(self, team: Team, own: WorkDirectory | None) -> None:
        self._team, self._own = team, own

    @property
    def writes(self) -> bool:
        return self._own is not None

    def alone(self) -> WorkDirectory:
        assert self._own, "only the first process goes on after the walk"
        return self._own

    def keep(self, result: BlockResult) -> None:
        if self._own:
            self._own.keep(result)

    def finished(self, index: int) -> BlockResult | None:
        return self._told(lambda own: own.finished(index))

    def keep_tensors(self, name: str, tensors: dict[str, QuantizedTensor], notes: dict[str, str] | None = None) -> None:
        if self._own:
            self._own.keep_tensors(name, tensors, notes)

    def tensors(self, name: str) -> tuple[dict[str, QuantizedTensor], dict[str, str]] | None:
        return self._told(lambda own: own.tensors(name))

    def forget(self, name: str) -> None:
        if self._own:
            self._own.forget(name)

    def keep_note(self, name: str, text: str) -> None:
        if self._own:
            self._own.keep_note(name, text)

    def note(self, name: str) -> str | None:
        return self._told(lambda own: own.note(name))

    def _told(self, ask: Callable[[WorkDirectory], _T]) -> _T:
        own = self._own
        return self._team.from_first(lambda: ask(own))  # type: ignore[arg-type]


@contextmanager
def shared_work(team: Team, open_own: Callable[[], WorkDirectory]) -> Iterator[WorkDirectory]:
    """Give a work directory to all processes of a team; the first one alone opens it."""
    if team.size == 1:
        with open_own() as work:
            yield work
    elif team.first:
        with open_own() as work:
            yield _Shared(team, work)
    else:
        yield _Shared(team, None)


def work_folder(recipe: Recipe) -> Path:
    """Return the folder of a recipe's work directory."""
    return recipe.work_dir or recipe.out.with_name(f"{recipe.out.name}.tesseraq-work")


def finished_block(index: int) -> str:
    """Return the name of a block as the last pass left it."""
    return f"finish-{index:04d}"


def _block(index: int) -> str:
    return f"block-{index:04d}"


def _said(key: str, earlier: object, now: object) -> str:
    """Say in words what part of an identity differs."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        names = [name for name in now | earlier if earlier.get(name) != now.get(name)]
        was, becomes = (types.get(names[0]) or "not there" for types in (earlier, now))
        more = f", and {len(names) - 1} more" if len(names) > 1 else ""
        return f"{key} ({names[0]} was {was}, and is {becomes} now{more})"
    return _WORDS.get(key, key)


def _parse(state: Path) -> dict[str, object]:
    try:
        parsed = json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return parsed if isinstance(parsed, dict) else {}
