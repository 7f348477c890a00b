"""The pure parts of `scripts/run bench quality`, and that padding keeps a model's answers."""

from __future__ import annotations

import dataclasses
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import make_model  # noqa: F401  (a fixture)

from tesseraq_gguf.converter.writer import write_plain
from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.gguf_files.gguf_file import open_gguf
from tesseraq_gguf.models import ModelSource, resolve_model

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    """Let `bench` be imported, as running a script does."""
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


def a_row(name: str = "llama-q2_k", **different: Any):
    from bench.quality.rows import all_rows

    return dataclasses.replace(next(row for row in all_rows() if row.name == name), **different)


def a_result(**different: object):
    from bench.quality.results import Result

    values: dict[str, Any] = {
        "key": "k", "bits": 2.625, "types": {"q2_k": 126}, "embedding": "q8_0", "perplexity": 20.126,
        "perplexity_error": 0.5, "kld": 0.4321, "top1": 0.655, "seconds": 30.0, "cpu_seconds": 300.0, "figures": {},
    }  # fmt: skip
    return Result(**(values | different))


def test_rows_have_names_of_their_own_and_commands_that_fill() -> None:
    from bench.quality.__main__ import SHOWN
    from bench.quality.rows import FAMILIES
    from bench.quality.subjects import SUBJECTS

    for subject in SUBJECTS.values():
        assert len({row.name for row in subject.all_rows()}) == len(subject.all_rows())
    rows = [row for subject in SUBJECTS.values() for row in subject.all_rows()]
    names = SHOWN | {"out": "o", "calibration": "c", "preset": "p", "iters": "1", "threads": "2"}
    for row in rows:
        assert row.family in FAMILIES
        words = [word for command in row.filled(names) for word in command]
        assert "o" in words, row
        assert not any("{" in word for word in words)


def test_k_and_i_quants_are_made_from_the_padded_model() -> None:
    from bench.quality.rows import all_rows

    for row in all_rows():
        if row.type and (row.type.endswith("_k") or row.type.startswith("iq")):
            assert row.padded, row


def test_learned_rows_name_what_they_begin_at() -> None:
    from bench.quality.rows import all_rows

    for row in all_rows():
        for command in row.commands:
            if {"tesseraq", "lrq", "flexround"} & set(command):
                assert "--init" in command, row
                assert ("AWQ" in row.method) == (command[command.index("--init") + 1].startswith("awq")), row


def test_results_survive_and_go_stale(tmp_path: Path) -> None:
    from bench.quality.results import Results, result_key

    row, setting = a_row(), {"chunks": 24, "text": "a"}
    key = result_key(row, setting)
    results = Results(tmp_path / "results.json")
    assert results.get(row, key) is None
    results.put(row, a_result(key=key))
    again = Results(tmp_path / "results.json")
    assert again.get(row, key) == a_result(key=key)
    assert again.get(row, result_key(row, setting | {"chunks": 25})) is None
    assert again.get(row, result_key(dataclasses.replace(row, commands=(("other",),)), setting)) is None
    assert result_key(row, dict(reversed(setting.items()))) == key


def test_rows_stand_under_their_size_the_least_divergence_first() -> None:
    from bench.quality.pages import bands
    from bench.quality.report import table

    measured = [
        (a_row("llama-q3_k"), a_result(bits=3.4375)),
        (a_row("autoround-w2g64"), a_result(perplexity=812345.6, bits=2.28, kld=8.0)),
        (a_row("llama-q2_k"), a_result()),
        (a_row("ours-tsq2-rtn"), a_result(bits=2.25, kld=9.0)),
        (a_row("ours-tsq2-gptq"), a_result(bits=2.25, kld=0.5)),
        (a_row("reference"), a_result(bits=16.0)),
    ]
    found = {heading: table(rows, {}).splitlines() for heading, rows in bands(measured)}
    assert {heading: [line.split(" | ")[:3] for line in lines[2:]] for heading, lines in found.items()} == {
        "## 2 to 2.5 bits": [
            ["| ours", "GPTQ", "TSQ2"],
            ["| AutoRound", "W2, groups of 64, asymmetric", "W2 g64"],
            ["| ours", "RTN", "TSQ2"],
        ],
        "## 2.5 to 3 bits": [["| llama-quantize (padded)", "imatrix", "Q2_K"]],
        "## 3 to 4 bits": [["| llama-quantize (padded)", "imatrix", "Q3_K"]],
        "## 8 and 16 bits": [["| 16 bits", "none", "F16"]],
    }
    assert "| 2.62 | 20.13 ± 0.50 | 0.4321 | 65.5 % | 30 s (5 min) |" in found["## 2.5 to 3 bits"][2]
    assert "| 812346 |" in found["## 2 to 2.5 bits"][3]
    assert {line.count("|") for lines in found.values() for line in lines} == {10}


def written(subject: str, measured: list[Any], docs: Path) -> None:
    """Write the pages of a model."""
    from bench.quality.__main__ import _shown, write_report
    from bench.quality.pages import Setting
    from bench.quality.places import Options
    from bench.quality.subjects import SUBJECTS

    options = Options(
        model="model.gguf", embedding="f16", calibration=Path("calibration.txt"), text=Path("valid.txt"), work=docs,
        ctx=512, chunks=24, preset="fast", imatrix_chunks=64, samples=128, seqlen=256, iters=200, threads=2,
        torch="torch",
    )  # fmt: skip
    write_report(measured, Setting(SUBJECTS[subject], options, {}, _shown(options)), docs)


def test_files_of_another_model_stand_by_their_size(tmp_path: Path) -> None:
    from bench.quality.rows import file_rows

    rows = {row.name: row for row in file_rows()}
    mixed = {"q2_k": 100, "q4_0": 26}
    measured = [
        (rows["llama-q2_k"], a_result(bytes=88_200_000, types=mixed)),
        (rows["ours-tsq2-tesseraq-awq"], a_result(bytes=61_900_000, types={"tsq2": 126})),
    ]
    written("qwen15b", measured, tmp_path)
    page = (tmp_path / "results/quality-qwen15b.md").read_text()
    files = [line for line in page.splitlines() if line.startswith(("| ours", "| llama"))]
    assert [line.split(" | ")[:4] for line in files] == [
        ["| ours", "TesseraQ from AWQ", "TSQ2", "61.9"],
        ["| llama-quantize", "imatrix", "Q2_K", "88.2"],
    ]
    assert "Q2_K: matrices of the blocks: 100 × q2_k, 26 × q4_0." in page
    assert "scripts/run bench quality --model qwen15b=FILE" in page
    assert "    tesseraq-gguf convert model.gguf ours-tsq2-tesseraq-awq.gguf --type tsq2" in page
    assert list(tmp_path.rglob("*.md")) == [tmp_path / "results/quality-qwen15b.md"]


def test_every_table_has_a_page(tmp_path: Path) -> None:
    """The pages are written where they are missing, keep what stands around the markers, and lines stay short."""
    rows = ("ours-tsq2-gptq", "rounding-tsq3-rtn", "ptq161-mask", "a4-awq", "llama-q2_k")
    kept = (20.0, 1.0, 0.5, 0.9)
    measured = [(a_row(name), a_result(kept=kept, recorded="89abcde")) for name in rows]
    docs = tmp_path / "docs"
    (docs / "results").mkdir(parents=True)
    (docs / "results/ptq161.md").write_text("# PTQ1.61\n")
    written("demo", measured, docs)
    pages = {str(page.relative_to(docs)): page.read_text() for page in docs.rglob("*.md")}
    assert pages.keys() == {
        "results/quality.md", "results/commands.md", "results/rounding.md", "results/ptq161.md",
        "results/activations.md", "notes/starts.md",
    }  # fmt: skip
    assert pages["results/ptq161.md"].startswith("# PTQ1.61\n")
    assert "| ours | mask | PTQ1_61 |" in pages["results/ptq161.md"]
    assert "| ours | AWQ | TSQ4 |" in pages["results/activations.md"]
    assert "## TSQ3\n\n| method |" in pages["results/rounding.md"] and "\n| RTN |" in pages["results/rounding.md"]
    assert "| TSQ2 |" in pages["notes/starts.md"]
    assert "| ours | GPTQ | TSQ2 |" in pages["results/quality.md"]
    assert "--pure --imatrix padded-imatrix.gguf" in pages["results/commands.md"]
    assert (docs / "results/quality.svg").is_file()
    lines = [line for page in pages.values() for line in page.splitlines() if not line.startswith(("|", "    "))]
    assert max(map(len, lines)) <= 100


TODAY = {"fast": {"samples": 128, "steps": 6}, "balanced": {"samples": 512, "steps": 50}}


def test_programs_and_figures_of_other_times_are_marked() -> None:
    from bench.quality.report import figure_notes, notes, table

    row, other = a_row("ours-tsq2-tesseraq-awq"), a_row("ours-tsq2-tesseraq-gptq")
    then = {"fast": {"samples": 128, "steps": 12}}
    measured = [
        (row, a_result(kld=0.1, commit="1234567", figures={"fast": TODAY["fast"]})),
        (other, a_result(kld=0.2, commit="1234567-dirty", figures=then)),
        (row, a_result(kld=0.3, recorded="89abcde", figures=then)),
        (other, a_result(kld=0.4, recorded="89abcde", figures=None)),
        (row, a_result(kld=0.5)),
    ]
    cells = [line.rsplit(" | ", 1)[1] for line in table(measured, TODAY).splitlines()[2:]]
    assert cells == ["1234567 |", "1234567-dirty † |", "≤ 89abcde † |", "≤ 89abcde (figures ?) |", "? |"]
    expected = "- † `fast` had steps 12: ours TesseraQ from GPTQ TSQ2; ours TesseraQ from AWQ TSQ2."
    assert figure_notes(measured, TODAY) == expected
    assert notes(measured, TODAY).splitlines()[-1] == expected
    assert figure_notes(measured[:1], TODAY) == ""


def test_results_know_the_program_and_what_its_presets_stand_for(tmp_path: Path) -> None:
    from bench.quality.results import Results, figures_of, program

    from tesseraq_gguf.recipe.presets import PRESETS

    fast, balanced = (dataclasses.asdict(PRESETS[name]) for name in ("fast", "balanced"))
    del fast["finish_steps"]  # that row has no last pass
    assert figures_of(a_row("ours-tsq2-tesseraq-awq"), {"preset": "fast"}) == {"fast": fast}
    assert figures_of(a_row("ours-tsq2-balanced-awq-distill"), {"preset": "fast"}) == {"balanced": balanced}
    assert figures_of(a_row("llama-q2_k"), {"preset": "fast"}) == {}
    assert program(tmp_path) is None

    def git(*words: str) -> None:
        person = ["-c", "user.name=x", "-c", "user.email=x@x"]
        subprocess.run(["git", "-C", str(tmp_path), *person, *words], check=True, capture_output=True)

    git("init")
    (tmp_path / "docs").mkdir()
    for name in ("file", "docs/file"):
        (tmp_path / name).write_text("1")
        git("add", name)
    git("commit", "-m", "x")
    clean = program(tmp_path)
    assert clean
    (tmp_path / "docs" / "file").write_text("2")
    assert program(tmp_path) == clean
    (tmp_path / "file").write_text("2")
    assert program(tmp_path) == f"{clean}-dirty"
    result = a_result(commit=clean, date="2026-01-02", figures={"fast": fast})
    Results(tmp_path / "results.json").put(a_row(), result)
    assert Results(tmp_path / "results.json").get(a_row(), "k") == result


def test_no_result_on_the_page_is_without_its_program() -> None:
    from bench.quality.results import Results
    from bench.quality.rows import all_rows

    rows = {row.name for row in all_rows()}
    stored = Results(SCRIPTS.parent / "docs/results/quality.json")._read()
    for name in rows & stored.keys():
        assert stored[name].commit or stored[name].recorded, name
        assert stored[name].figures is not None and stored[name].date, name


def test_starts_stand_beside_what_is_learned_from_them() -> None:
    from bench.quality.report import starts_table

    measured = [
        (a_row("ours-tsq2-rtn"), a_result(kld=10.34)),
        (a_row("ours-tsq2-gptq"), a_result(kld=1.7757)),
        (a_row("ours-tsq2-tesseraq-gptq"), a_result(kld=1.1501)),
        (a_row("ours-tsq2-tesseraq-awq"), a_result(kld=1.0354)),
        (a_row("ours-tsq2-balanced-awq-distill"), a_result(kld=0.6)),
        (a_row("ours-bcq4-rtn"), a_result(kld=0.0801)),
        (a_row("ours-bcq4-gptq"), a_result(kld=0.0339)),
        (a_row("ours-q4_1-rtn"), a_result(kld=0.126)),
        (a_row("llama-q2_k"), a_result()),
    ]
    assert starts_table(measured).splitlines() == [
        "| type | rounding alone | GPTQ | QEP+GPTQ | AWQ | OmniQuant | AWQ+GPTQ |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| TSQ2 | 10.340 → … | 1.776 → 1.150 |  | … → 1.035 |  |  |",
        "| BCQ4 | 0.0801 → … | 0.0339 → … |  |  |  |  |",
    ]


def test_notes_tell_of_mixtures() -> None:
    from bench.quality.report import notes

    mixed = a_result(types={"q2_k": 100, "q4_k": 26}, embedding="q6_k")
    said = notes([(a_row("llama-q3_k"), a_result()), (a_row("autoround-q2_k_s"), mixed)], {})
    assert len(said.splitlines()) == 1
    assert "100 × q2_k, 26 × q4_k; embedding in q6_k" in said


def test_only_the_part_between_the_markers_changes() -> None:
    from bench.markers import BEGIN, END, insert

    page = insert("# Quality\n\nProse.\n", "first")
    assert page == f"# Quality\n\nProse.\n\n{BEGIN}\nfirst\n{END}\n"
    assert insert(page + "\nMore prose.\n", "second") == page.replace("first", "second") + "\nMore prose.\n"
    for broken in (BEGIN, END, END + BEGIN, BEGIN + END + BEGIN, BEGIN + END + END):
        with pytest.raises(ValueError, match="bench:begin"):
            insert(broken, "x")


def test_a_plot_names_the_best_of_each_size_and_leaves_out_what_is_no_model(tmp_path: Path) -> None:
    from bench.quality.plot import plot

    measured = [
        (a_row("reference"), a_result(bits=16.0, perplexity=12.3)),
        (a_row("llama-q2_k"), a_result(bits=2.63)),
        (a_row("llama-q4_k"), a_result(bits=4.5, kld=9.0, perplexity=900.0)),
        (a_row("ours-ptq1_61-gptq"), a_result(bits=1.69, perplexity=1e6)),
        (a_row("ours-tsq2-gptq"), a_result(bits=2.25, perplexity=40.0)),
    ]
    plot(measured, tmp_path / "quality.svg")
    # text is drawn as outlines, with the words beside them as comments
    drawn = (tmp_path / "quality.svg").read_text()
    for named in ("TSQ2", "Q2_K", "16 bits: 12.30", "llama-quantize, importance matrix"):
        assert f"<!-- {named} -->" in drawn
    for absent in ("PTQ1_61", "Q4_K", "AutoRound"):
        assert f"<!-- {absent} -->" not in drawn


def test_a_front_has_what_nothing_smaller_beats() -> None:
    from bench.quality.plot import front

    assert front([(3.0, 2.0), (2.0, 5.0), (2.0, 4.0), (4.0, 2.5), (4.5, 1.0)]) == [(2.0, 4.0), (3.0, 2.0), (4.5, 1.0)]
    assert front([(2.0, 1.0), (3.0, 1.0)]) == [(2.0, 1.0)]


@pytest.fixture(scope="module")
def source(make_model: Callable[[str], ModelSource]) -> ModelSource:  # noqa: F811
    return make_model("gemma3")


@pytest.fixture(scope="module")
def gemma(source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gemma") / "gemma.gguf"
    write_plain(source, out, "f32")
    return out


def test_a_padded_model_gives_the_same_answers(gemma: Path, tmp_path: Path) -> None:
    import torch
    from bench.quality.pad_gemma import pad

    from tesseraq_gguf.models.whole import whole_model

    padded = tmp_path / "padded.gguf"
    assert pad(gemma, padded) == 768
    tokens = torch.arange(3, 67).view(2, 32)
    answers = []
    for file in (gemma, padded):
        model = whole_model(resolve_model(str(file)), torch.float64).eval()
        with torch.inference_mode():
            answers.append(model(tokens).logits)
    assert answers[0].std() > 0.01
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-5, atol=1e-6)


def test_padding_keeps_everything_else(gemma: Path, tmp_path: Path) -> None:
    from bench.quality.pad_gemma import pad

    padded = tmp_path / "padded.gguf"
    pad(gemma, padded, 1024)
    before, after = open_gguf(gemma), open_gguf(padded)
    changed = {key for key in before.entries if before.entries[key].raw != after.entries[key].raw}
    assert changed == {"gemma3.embedding_length", "gemma3.attention.layer_norm_rms_epsilon"}
    shapes = {t.name: t.shape for t in after.tensors}
    assert shapes["blk.0.ffn_up.weight"] == (1024, 192)
    assert shapes["blk.0.ffn_down.weight"] == (192, 1024)
    for old, new in zip(before.tensors, after.tensors, strict=True):
        if 640 not in old.shape:
            assert np.array_equal(before.data(old), after.data(new))


def test_padding_refuses_what_it_does_not_understand(
    source: ModelSource, gemma: Path, tiny_gguf: Path, tmp_path: Path
) -> None:
    from bench.quality.pad_gemma import pad

    out = tmp_path / "out.gguf"
    with pytest.raises(UsageError, match="not a Gemma 3 model"):
        pad(tiny_gguf, out)
    with pytest.raises(UsageError, match="less than the 640 channels"):
        pad(gemma, out, 512)
    eight = tmp_path / "q8_0.gguf"
    write_plain(source, eight, "q8_0")
    with pytest.raises(UsageError, match="no whole blocks"):
        pad(eight, out, 650)
    assert not out.exists()
    pad(eight, out)
    assert struct.pack("<I", 768) in open_gguf(out).entries["gemma3.embedding_length"].raw
