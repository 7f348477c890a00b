"""The models that files are measured on, each with rows, results and a page of its own."""

from __future__ import annotations

from dataclasses import dataclass

from bench.quality.rows import Row, all_rows, file_rows


@dataclass(frozen=True)
class Subject:
    """A model.

    Attributes:
        name: in `--model`, and in the names of its results and its page.
        title: in running text.
        model: as `tesseraq-gguf convert` takes it; empty where the user must say which file it is.
        embedding: type of the embedding in the file that divergence is measured from.
        came_as: what its weights were rounded to before, which “16 bits” cannot undo.
        samples: calibration sequences, for everything; None takes the preset's.
        sizes: of files whose types are chosen for a size.
    """

    name: str
    title: str
    model: str
    embedding: str
    came_as: str
    samples: int | None = None
    sizes: tuple[str, ...] = ()

    def all_rows(self) -> list[Row]:
        """Return the files that are made of it."""
        return all_rows() if self.name == DEMO else file_rows(self.samples, self.sizes, self.came_as.lower())

    @property
    def results(self) -> str:
        """Name of the file of its results, beside the pages."""
        return "quality.json" if self.name == DEMO else f"quality-{self.name}.json"

    @property
    def page(self) -> str:
        """Path of its page in the folder of documents; the demo model has several."""
        return "results/quality.md" if self.name == DEMO else f"results/quality-{self.name}.md"


DEMO = "demo"

_SUBJECTS = (
    Subject(DEMO, "Gemma-3-270M", "demo", "q8_0", "Q4_K_M"),
    Subject("smollm2", "SmolLM2-135M-Instruct", "demo:smollm2", "f16", "Q4_1", sizes=("83.8M", "93.5M", "105.4M")),
    Subject("qwen15b", "Qwen2.5-Coder-1.5B-Instruct", "", "f16", "Q4_K_M", 40),
)

SUBJECTS = {subject.name: subject for subject in _SUBJECTS}
