"""The page of a published model, README.md: what it is, what was measured, how it runs, how it was made, its limits.

Its figures are those of the files and of a comparison. Where nothing was measured it says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tesseraq_gguf.gguf_files.gguf_file import PROJECTOR
from tesseraq_gguf.gguf_files.inspection import Inspection
from tesseraq_gguf.printing import printable
from tesseraq_gguf.publishing.measured import Measured

PLOT = "divergence.png"
"""Name of the drawing beside the card."""

ANYWHERE = "any llama.cpp"
"""What an inspection says of files that run everywhere."""


@dataclass(frozen=True)
class CardFile:
    """A published model, for its card.

    Attributes:
        names: its file, or its parts.
        tag: what programs find it by.
        bytes: of all parts.
        facts: what is in it.
        imatrix: text and chunks of the importance matrix that it was rounded with, "" if it names none.
        row: what was measured of it; None if nothing was.
    """

    names: Sequence[str]
    tag: str
    bytes: int
    facts: Inspection
    imatrix: str
    row: Mapping[str, Any] | None

    @property
    def custom(self) -> bool:
        """Whether only our runtime reads it."""
        return self.facts.needs_runtime

    @property
    def projector(self) -> bool:
        """Whether it is what images go through."""
        return self.facts.architecture == PROJECTOR


@dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
        title: of the page.
        files: what is published.
        base: the original model on the hub, OWNER/NAME; None if it is not known.
        license: the original's, as the hub names it; None if it is not known.
        repo: where the files will be on the hub, OWNER/NAME; None if that is not known.
        measured: a comparison; None if there is none.
        beside: other files of the folder, with what they are.
    """

    title: str
    files: Sequence[CardFile]
    base: str | None
    license: str | None
    repo: str | None
    measured: Measured | None
    beside: Mapping[str, str]

    def render(self) -> str:
        """Return the page, Markdown with the header that the hub reads."""
        parts = [self._header(), f"# {self.title}, GGUF\n", self._what(), self._files(), self._figures(), self._run()]
        return "\n".join([*parts, self._made(), self._limits()]).rstrip() + "\n"

    def _header(self) -> str:
        from huggingface_hub import ModelCardData

        known: dict[str, Any] = {"license": self.license, "base_model": self.base}
        known |= {"base_model_relation": "quantized"} if self.base else {}
        data = ModelCardData(tags=["gguf"], **{key: value for key, value in known.items() if value})
        return f"---\n{data.to_yaml()}\n---\n"

    def _what(self) -> str:
        of = f"[{self.base}](https://huggingface.co/{self.base})" if self.base else _cell(self.title)
        ours = any("method" in file.facts.tesseraq for file in self.files)
        learned = " Some were made with tesseraq-gguf." if ours else ""
        return f"GGUF files of {of}.{learned} The answers of quantised ones differ from the original's.\n"

    def _files(self) -> str:
        rows = []
        for file in self.files:
            name = f"`{file.names[0]}`" + (f" and {len(file.names) - 1} more" if len(file.names) > 1 else "")
            types = ", ".join(f"{t.type} {t.tensors}" for t in file.facts.types)
            bits = f"{file.facts.bpw:.3f}"
            rows.append((name, f"`{file.tag}`", f"{file.bytes / 1e6:,.1f}", bits, types, _where(file)))
        head = ("file", "tag", "MB", "bits per weight", "types of tensors", "runs on")
        beside = [f"- `{name}`: {what}" for name, what in self.beside.items()]
        after = ["", *beside] if beside else []
        said = ["", "A name that ends in `-00001-of-…` is the first part: give it to a program, and keep all in one "
                "folder."] if any(len(file.names) > 1 for file in self.files) else []  # fmt: skip
        return "\n".join(["## Files\n", _table(head, rows, {2, 3}), *said, *after, ""])

    def _figures(self) -> str:
        if self.measured is None:
            return "## Measured\n\nNothing was measured of these files. Their sizes say nothing of their answers.\n"
        found = self.measured
        tags = {id(file.row): file for file in self.files}
        rows = [_figures_of(row, tags.get(id(row)), reference=row is found.reference) for row in found.all]
        timed = any(row.get("answer_speed") for row in found.all)
        head = (
            "file",
            "MB",
            "bits per weight",
            "perplexity",
            "KLD",
            "KLD, 99 %",
            "same top token",
            *_costs_head(found, timed),
        )
        rows = [(*row, *_costs(figures, timed)) for row, figures in zip(rows, found.all, strict=True)]
        said = (
            f"On {found.reference['tokens']:,} tokens of {_cell(found.text)} that count, in chunks of {found.ctx}. KLD "
            "is the mean divergence of a file's answers from the reference's, in nats per token; 0 is best. ± is one "
            "standard error. The same top token is the share of positions with the same most likely token."
        ) + (" Speeds are of one machine." if timed else "")
        plot = [f"\n![divergence against bits per weight]({PLOT})"] if found.plotted else []
        return "\n".join(
            [
                "## Measured\n",
                said,
                "",
                _table(head, rows, set(range(1, len(head)))),
                *plot,
                *self._tasks(),
                *self._wrote(),
                "",
            ]
        )

    def _wrote(self) -> list[str]:
        rows = [
            (
                self._called(row),
                str(row["generated_answers"]),
                *(f"{100 * row[f'generated_{key}']:.1f} %" for key in ("unended", "repeated")),
            )
            for row in (self.measured.all if self.measured else ())
            if row.get("generated_answers")
        ]
        if not rows:
            return []
        said = "Repeated: four words in a row that an answer had before. Both grow first where a file is broken."
        return ["", _table(("file", "answers", "without an end", "repeated"), rows, {1, 2, 3}), "", said]

    def _tasks(self) -> list[str]:
        """What tasks found, a column for each figure."""
        every = self.measured.all if self.measured else ()
        keys = [key for key in dict.fromkeys(key for row in every for key in row) if key.startswith("task_")]
        keys = [key for key in keys if not key.endswith("_error")]
        if not keys:
            return []
        rows = [(self._called(row), *(_task(row, key) for key in keys)) for row in every]
        head = ("file", *(_cell(key.removeprefix("task_")) for key in keys))
        said = "Tasks of lm-evaluation-harness; ± is one standard error."
        return ["", _table(head, rows, set(range(1, len(head)))), "", said]

    def _called(self, row: Mapping[str, Any]) -> str:
        file = next((file for file in self.files if file.row is row), None)
        return f"`{file.tag}`" if file else _cell(Path(row["file"]).stem)

    def _run(self) -> str:
        lines = ["## Run\n"]
        models = [file for file in self.files if not file.projector]
        stock, custom = ([file for file in models if file.custom == wanted] for wanted in (False, True))
        if stock:
            lines += ["With llama.cpp" + self._recent(stock) + ":\n", *map(self._llama, stock), ""]
            everywhere = [file for file in stock if file.facts.runs_on == ANYWHERE and len(file.names) == 1]
            if everywhere:
                lines += ["With Ollama:\n", *map(self._ollama, everywhere), ""]
        if custom:
            lines += [
                f"{_listed(f'`{file.tag}`' for file in custom)} {_have(custom)} types that llama.cpp does not have. It "
                "refuses them with a line about an invalid type. This builds a llama.cpp that has them:\n",
                "    pip install 'tesseraq-gguf[build]'",
                "    tesseraq-gguf runtime build",
                *(f"    tesseraq-gguf chat {file.names[0]}" for file in custom),
                "",
            ]
        return "\n".join(lines)

    @staticmethod
    def _recent(stock: Sequence[CardFile]) -> str:
        recent = [file.tag for file in stock if file.facts.runs_on not in (ANYWHERE,)]
        return f" (a recent one for {_listed(f'`{tag}`' for tag in recent)})" if recent else ""

    def _llama(self, file: CardFile) -> str:
        if self.repo:
            return f"    llama-server -hf {self.repo}:{file.tag}"
        projector = next((f" --mmproj {other.names[0]}" for other in self.files if other.projector), "")
        return f"    llama-server -m {file.names[0]}{projector}"

    def _ollama(self, file: CardFile) -> str:
        if self.repo:
            return f"    ollama run hf.co/{self.repo}:{file.tag}"
        modelfile = next((name for name, what in self.beside.items() if what.endswith(f"of `{file.tag}`")), "Modelfile")
        return f"    ollama create {file.names[0].removesuffix('.gguf').lower()} -f {modelfile}"

    def _made(self) -> str:
        lines = ["## How they were made\n"]
        for file in self.files:
            said = file.facts.tesseraq
            lines.append(f"`{file.tag}`" + (f", {_cell(said['method'])}:\n" if "method" in said else ":\n"))
            if "command" in said:
                lines.append(f"    {_line(said['command'])}\n")
            facts = [f"{name} {_cell(said[key])}" for key, name in _MADE.items() if key in said]
            facts += [f"importance matrix: {_cell(file.imatrix)}"] if file.imatrix else []
            facts += [] if facts or "command" in said else ["the file does not say how it was made"]
            lines.append(f"{'; '.join(facts)}.\n")
        if any("command" in file.facts.tesseraq for file in self.files):
            lines.append(
                "The same command, version and machine give the same tensors, bit for bit; names stand in place of "
                "paths, and publishing added some metadata. `tesseraq-gguf recipe FILE` prints the command.\n"
            )
        return "\n".join(lines)

    def _limits(self) -> str:
        license = f"The original's licence ({self.license}) holds" if self.license else "The original's licence holds"
        lines = ["## Limits\n", f"- {license}: a quantised file is a derived work."]
        if self.measured:
            lines.append(
                f"- The figures are of one text, in chunks of {self.measured.ctx} tokens. Other languages, tasks and "
                "longer contexts were not measured."
            )
            unmeasured = [f"`{file.tag}`" for file in self.files if file.row is None and not file.projector]
            if unmeasured:
                lines.append(f"- Nothing was measured of {_listed(unmeasured)}.")
        custom = [file for file in self.files if file.custom]
        if custom:
            lines.append(
                f"- {_listed(f'`{file.tag}`' for file in custom)} {_runs(custom)} in tesseraq-gguf's runtime alone."
            )
        return "\n".join([*lines, "- `sha256sum -c SHA256SUMS` checks what was downloaded."])


_MADE = {"version": "tesseraq-gguf", "calibration": "calibration text"}


def _where(file: CardFile) -> str:
    return "tesseraq-gguf's runtime" if file.custom else _cell(file.facts.runs_on)


def _figures_of(row: Mapping[str, Any], file: CardFile | None, *, reference: bool) -> tuple[str, ...]:
    name = f"`{file.tag}`" if file else _cell(Path(row["file"]).stem)
    answers = ("0", "0", "100 %") if reference else (
        f"{row['kld']:.4f} ± {row['kld_error']:.4f}", f"{row['kld_99']:.3f}", f"{100 * row['same_top']:.2f} %",
    )  # fmt: skip
    perplexity = f"{row['perplexity']:,.3f} ± {row['perplexity_error']:,.3f}"
    return (
        name + (" (reference)" if reference else ""),
        f"{row['bytes'] / 1e6:,.1f}",
        f"{row['bpw']:.3f}",
        perplexity,
        *answers,
    )


def _task(row: Mapping[str, Any], key: str) -> str:
    value, error = row.get(key), row.get(f"{key}_error")
    return "" if value is None else f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _costs_head(found: Measured, timed: bool) -> tuple[str, ...]:
    return (f"memory at {found.memory_at:,}, MB", *(("prompt, t/s", "answer, t/s") if timed else ()))


def _costs(row: Mapping[str, Any], timed: bool) -> tuple[str, ...]:
    memory = [size for key, size in row.items() if key.startswith("memory_") and isinstance(size, int)]
    speeds = tuple(f"{row[key]:.1f}" if row.get(key) else "" for key in ("prompt_speed", "answer_speed"))
    return (f"{sum(memory) / 1e6:,.0f}" if memory else "", *(speeds if timed else ()))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], right: set[int]) -> str:
    rule = ["---:" if index in right else "---" for index in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def _cell(text: Any) -> str:
    """What a file or a stranger wrote, as plain text of one line, which Markdown makes nothing of."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", _line(text))


def _line(text: Any) -> str:
    return " ".join(printable(str(text)).split())


def _listed(names: Iterable[str]) -> str:
    *some, last = list(names)
    return f"{', '.join(some)} and {last}" if some else last


def _have(files: Sequence[CardFile]) -> str:
    return "has" if len(files) == 1 else "have"


def _runs(files: Sequence[CardFile]) -> str:
    return "runs" if len(files) == 1 else "run"


def draw(axes: Any, points: Iterable[tuple[str, float, float, float]]) -> None:
    """Draw divergence against bits per weight.

    Args:
        axes: of matplotlib.
        points: name, bits per weight, divergence and its standard error of each file.
    """
    every = list(points)
    for name, bits, kld, error in every:
        axes.errorbar(bits, kld, yerr=error, fmt="o", color="#c2410c")
        axes.annotate(name, (bits, kld), xytext=(6, 5), textcoords="offset points", fontsize=8)
    if min(kld for _, _, kld, _ in every) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.margins(x=0.2, y=0.15)
    axes.set_xlabel("bits per weight, the whole file")
    axes.set_ylabel("KLD, nats per token")


def points(card_files: Sequence[CardFile], found: Measured) -> Iterator[tuple[str, float, float, float]]:
    """Yield what is drawn of a comparison: published files by their tags, others by their names."""
    tags = {id(file.row): file.tag for file in card_files}
    for row in found.rows:
        yield tags.get(id(row), Path(row["file"]).stem), row["bpw"], row["kld"], row["kld_error"]
