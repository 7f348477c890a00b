"""How well a GGUF file does on tasks of lm-evaluation-harness: questions with choices, texts to go on with, and so on.

The harness (`lm-eval`, an extra of this project) brings thousands of tasks by name, whose data it fetches from the
Hugging Face hub, and reads others from YAML files. Its figures come from the model as our runtime runs it
(`harness.py`). It fails in many ways, with exceptions of many libraries: here each becomes one line.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import math
import numbers
import random
import re
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tesseraq_gguf.errors import EvaluationError, TesseraqError, UsageError

if TYPE_CHECKING:
    from tesseraq_gguf.evaluation.perplexity import Watch

_INSTALL = "run: pip install 'tesseraq-gguf[tasks]'"
_LONGEST_REASON = 300  # characters of a message that is not ours

# lm-evaluation-harness's own seeds: some tasks shuffle choices, and examples are drawn
_SEED, _EXAMPLES_SEED = 0, 1234


@dataclass(frozen=True)
class TaskResult:
    """One figure; `to_json` of `TaskEvaluation` has the same keys.

    Attributes:
        task: name of the task or group.
        metric: `acc`, `acc_norm`, `exact_match`, …, as the task names it.
        filter: what the task did to answers before it counted them; `none` for most.
        value: the figure.
        stderr: its standard error; None if the task has none.
        items: how many items were asked.
        shots: examples before each item; None where the tasks of a group differ.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    items: int
    shots: int | None

    @property
    def name(self) -> str:
        """Task and metric, with the filter where there is one: `arc_easy acc`."""
        return " ".join((self.task, self.metric, *([] if self.filter == "none" else [self.filter])))


@dataclass(frozen=True)
class TaskEvaluation:
    """What tasks found.

    Attributes:
        results: a figure each.
        truncated: requests that were longer than the model's context and lost their beginning.
        harness: version of lm-evaluation-harness.
    """

    results: tuple[TaskResult, ...]
    truncated: int
    harness: str

    def to_json(self) -> dict[str, Any]:
        """Return everything by name."""
        return {
            "tasks": [asdict(result) for result in self.results],
            "truncated": self.truncated,
            "lm_eval": self.harness,
        }


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data, ready to be asked.

    Attributes:
        parts: what the harness's `TaskManager.load` returns: its `tasks` and `groups` by name.
    """

    parts: dict[str, dict[str, Any]]


def load_tasks(wanted: Sequence[str], shots: int | None = None) -> LoadedTasks:
    """Load tasks and fetch their data.

    Args:
        wanted: names (`arc_easy`), patterns (`mmlu_*`), task files (`my.yaml`), and folders of these (`./mine`).
        shots: examples before each item; None leaves it to the task.

    Raises:
        UsageError: `lm-eval` is not installed, or there is no such task or file.
        EvaluationError: a task cannot be read, or its data cannot be fetched.
    """
    if shots is not None and shots < 0:
        raise UsageError(f"--shots must not be negative, not {shots}")
    wanted = [name for name in (part.strip() for part in wanted) if name]
    if not wanted:
        raise UsageError("--tasks names no task")
    files = [file for name in wanted if _is_path(name) for file in _task_files(Path(name))]
    names = [name for name in wanted if not _is_path(name)]
    with _quiet():
        manager = _manager(files, bool(names))
        specs = [_spec(file) for file in files]
        specs += [match for name in names for match in _match(manager, name)]
        random.seed(_SEED)
        np.random.seed(_EXAMPLES_SEED)
        parts: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
        for spec in specs:
            with _one_line(f"the task {spec} cannot be loaded"):
                loaded = manager.load([spec])
                for kind, found in parts.items():
                    found |= loaded.get(kind, {})
        for name, task in parts["tasks"].items():
            _set_examples(name, task, shots)
    return LoadedTasks(parts)


def evaluate_tasks(
    file: Path | str, tasks: LoadedTasks, limit: int | None = None, watch: Watch = lambda *_: None
) -> TaskEvaluation:
    """Ask a GGUF file the items of tasks.

    Args:
        file: the GGUF file.
        tasks: what `load_tasks` returned; good for one evaluation.
        limit: ask so many items of each task; None asks all.
        watch: told how far it is.

    Raises:
        UsageError: the limit cannot be meant.
        FileFormatError: the file is missing or damaged.
        RuntimeMissingError: the runtime is not built.
        EvaluationError: a task failed.
    """
    check_limit(limit)
    import lm_eval

    from tesseraq_gguf.evaluation.harness import RuntimeLM

    model = RuntimeLM(file, watch)
    with _quiet(), _one_line(f"the tasks {', '.join(tasks.parts['tasks'])} failed"):
        found = lm_eval.evaluate(lm=model, task_dict=tasks.parts, limit=limit, log_samples=False)
    return TaskEvaluation(tuple(_results(found)), model.truncated, lm_eval.__version__)


def check_limit(limit: int | None) -> None:
    """Refuse a number of items that cannot be meant.

    Raises:
        UsageError: it is below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be at least 1, not {limit}")


def _is_path(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) or "/" in name or "\\" in name or name in (".", "..")


def _task_files(path: Path) -> list[Path]:
    """The task files that a path means: itself, or those in the folder that it is."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"no task file at {path}")
    files = [file for file in sorted(path.glob("*.yaml")) if _declares(file, "task|group|class")]
    if not files:
        raise UsageError(f"the folder {path} has no task in it: no .yaml file with a 'task' or 'group'")
    return files


def _declares(file: Path, keys: str) -> bool:
    """Whether a YAML file has one of these keys, `a|b`; tasks that others include have no name of their own."""
    try:
        text = file.read_text("utf-8", "replace")
    except OSError as error:
        raise UsageError(f"the task file {file} cannot be read: {error.strerror}") from error
    return re.search(rf"^(?:{keys})\s*:", text, re.MULTILINE) is not None


def _spec(file: Path) -> str:
    """What to call a task file for the harness: by its path, but a group, which it misreads there, by its name."""
    group = re.search(r"""^group\s*:\s*['"]?([^'"#\s]+)""", file.read_text("utf-8", "replace"), re.MULTILINE)
    return group[1] if group else str(file.absolute())


def _manager(files: Sequence[Path], names: bool) -> Any:
    """lm-evaluation-harness's index of tasks. Its own thousands are read, for seconds, only where they are needed."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError(f"--tasks needs lm-evaluation-harness ({error}); {_INSTALL}") from None
    # a group names its tasks: those beside it, or the harness's own
    beside = sorted({str(file.parent) for file in files if _declares(file, "group")})
    return TaskManager(include_path=beside, include_defaults=names or bool(beside))


def _match(manager: Any, name: str) -> list[str]:
    """The names that a name or pattern means."""
    matches: list[str] = manager.match_tasks([name])
    if matches:
        return matches
    hint = ""
    if Path(name).exists():
        hint = f"; if you mean the folder, write ./{name}"
    elif near := difflib.get_close_matches(name, manager.all_tasks, 3):
        hint = f"; similar ones: {', '.join(near)}"
    raise UsageError(f"unknown task '{name}'{hint}. All names: lm-eval ls tasks")


def _set_examples(name: str, task: Any, shots: int | None) -> None:
    """Say how many examples stand before each item, as `lm_eval.simple_evaluate` does."""
    own = task.get_config("num_fewshot")
    if shots and own == 0:
        raise UsageError(f"the task {name} is made for no examples: --shots has no meaning there")
    if shots is not None or own is None:
        task.set_config("num_fewshot", shots or 0)
    task.set_fewshot_seed(_EXAMPLES_SEED)


def _results(found: dict[str, Any]) -> Iterator[TaskResult]:
    """The figures in what the harness returns, whose keys are `metric,filter` and `metric_stderr,filter`."""
    for task, figures in found["results"].items():
        for key, value in figures.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, numbers.Real):
                continue
            error = figures.get(f"{metric}_stderr,{kind}")
            yield TaskResult(
                task=task,
                metric=metric,
                filter=kind,
                value=float(value),
                stderr=float(error) if isinstance(error, numbers.Real) and math.isfinite(error) else None,
                items=int(figures.get("sample_len", 0)),
                shots=found["n-shot"].get(task),
            )
        _check_metrics(task, figures, found["configs"].get(task, {}))


def _check_metrics(task: str, figures: dict[str, Any], config: dict[str, Any]) -> None:
    """Refuse a task that names a metric without a figure: the harness leaves out what it does not know."""
    if config.get("process_results"):
        return  # it decides itself
    for metric in config.get("metric_list") or []:
        name = metric["metric"]
        if isinstance(name, str) and not any(key.startswith(f"{name},") for key in figures):
            raise EvaluationError(
                f"the task {task} names the metric '{name}', which lm-evaluation-harness does not have"
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Swallow the logs, warnings and bars of the libraries that the harness uses; what matters is raised."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn whatever the harness or a task raises into one line. What our own part of it raises is a bug, and stays."""
    try:
        yield
    except TesseraqError:
        raise
    except Exception as error:
        ours = str(Path(__file__).with_name("harness.py"))
        if any(frame.f_code.co_filename == ours for frame, _ in traceback.walk_tb(error.__traceback__)):
            raise
        reason = " ".join(str(error).split()) or "no reason is given"
        if len(reason) > _LONGEST_REASON:
            reason = reason[:_LONGEST_REASON] + " …"
        network = " (a task from the hub needs a network once)" if isinstance(error, ConnectionError) else ""
        raise EvaluationError(f"{what}: {type(error).__name__}: {reason}{network}") from error
