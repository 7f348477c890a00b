"""The command line: help that answers at once, one clear line for whatever a user can do wrong, nothing left behind."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from tesseraq_gguf.cli import app as cli
from tesseraq_gguf.cli.runtime import with_runtime
from tesseraq_gguf.conversion.report import ConversionReport
from tesseraq_gguf.errors import ConversionError, RuntimeMissingError
from tesseraq_gguf.recipe.options import CALIBRATION, EXPERIMENTS, LEARN, MACHINE, MAKE, OPTIONS
from tesseraq_gguf.recipe.presets import PRESETS
from tesseraq_gguf.recipe.recipe import Recipe

ROOT = Path(__file__).parents[2]
COMMANDS = [
    [],
    ["convert"],
    ["eval"],
    ["compare"],
    ["inspect"],
    ["recipe"],
    ["publish"],
    ["write-text"],
    ["chat"],
    ["serve"],
    ["doctor"],
    ["runtime"],
    ["runtime", "build"],
    ["runtime", "page"],
    ["runtime", "path"],
    ["runtime", "info"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(command, run):
    answer = run(*command, "--help")
    assert answer.code == 0
    assert "Usage:" in answer.out
    if command != ["runtime"]:
        assert "tesseraq-gguf" in answer.out.split("Usage:")[1].split("\n", 1)[1]  # an example


def test_every_command_has_its_help_tested():
    def walk(command, path):
        yield path
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(child, [*path, name])

    assert sorted(walk(typer.main.get_command(cli.app), [])) == sorted(COMMANDS)


def test_convert_has_the_options_that_are_declared_with_the_defaults_of_the_recipe():
    group: Any = typer.main.get_command(cli.app)
    parameters = {p.name: p for p in group.commands["convert"].params}
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    assert {name for name, option in OPTIONS.items() if option.help} == parameters.keys() & OPTIONS.keys()
    for name in parameters.keys() & OPTIONS.keys():
        parameter, option, default = parameters[name], OPTIONS[name], defaults[name]
        assert (parameter.rich_help_panel or "") == option.group
        assert parameter.required == (default is dataclasses.MISSING)
        if parameter.default is not None:
            assert option.read(name, parameter.default) == default


def test_help_lists_options_under_headings(run):
    lines = run("convert", "--help").out.splitlines()
    headings = [found[1] for line in lines if (found := re.match(r"╭─ (.*?) ─", line))]
    assert headings == ["Arguments", "Options", MAKE, LEARN, CALIBRATION, MACHINE, EXPERIMENTS]


def test_version(run):
    answer = run("--version")
    assert answer.code == 0
    assert re.fullmatch(r"tesseraq-gguf \d+\.\d+\.\d+(\.dev\d+)?(\+[\w.]+)?\n", answer.out)


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["runtime", "info"], ["inspect", "GGUF"]])
def test_light_commands_do_not_import_torch(arguments, tiny_gguf):
    arguments = [str(tiny_gguf) if a == "GGUF" else a for a in arguments]
    code = f"""
import sys
from tesseraq_gguf.cli.app import main
try:
    main({arguments!r})
except SystemExit as end:
    assert end.code == 0
assert not {{"torch", "transformers", "datasets"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_importing_the_package_is_cheap():
    code = "import tesseraq_gguf, sys; assert not {'torch', 'numpy', 'rich'} & set(sys.modules); tesseraq_gguf.Recipe"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_openmp_threads_do_not_spin(run, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    import os

    run("--version")
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


# --- what a user can do wrong ---------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, tiny_model, tiny_gguf):
    """A folder with good and bad files."""
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "no-config").mkdir()
    (tmp_path / "broken-config").mkdir()
    (tmp_path / "broken-config" / "config.json").write_text("{")
    (tmp_path / "no-weights").mkdir()
    shutil.copy(tiny_model / "config.json", tmp_path / "no-weights")
    shutil.copytree(tiny_model, tmp_path / "truncated")
    weights = tmp_path / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    shutil.copytree(tiny_model, tmp_path / "encoder")
    config = json.loads((tiny_model / "config.json").read_text())
    config |= {"architectures": ["BertForMaskedLM"], "model_type": "bert"}
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(config))
    whole = tiny_gguf.read_bytes()
    (tmp_path / "good.gguf").write_bytes(whole)
    (tmp_path / "base.gguf").write_bytes(whole)
    (tmp_path / "cut.gguf").write_bytes(whole[:-1000])
    (tmp_path / "cut-early.gguf").write_bytes(whole[:1000])
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "other.gguf").write_bytes(b"something else entirely, " * 10)
    (tmp_path / "foreign.gguf").write_bytes(_with_type(whole, 999))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n\n ")
    (tmp_path / "short.txt").write_text("too short.")
    (tmp_path / "a-folder").mkdir()
    (tmp_path / "precious.txt").write_text("not to be overwritten")
    return tmp_path


def _with_type(gguf: bytes, type_id: int) -> bytes:
    """Give the first block matrix of a file another type."""
    name = b"blk.0.ffn_down.weight"
    at = gguf.index(name) + len(name) + 4 + 2 * 8
    return gguf[:at] + type_id.to_bytes(4, "little") + gguf[at + 4 :]


BAD = [
    ("convert nowhere/model/at-all out.gguf", "no model at"),
    ("convert missing.gguf out.gguf", "no model at missing.gguf"),
    ("convert precious.txt out.gguf", "neither a model folder nor a .gguf file"),
    ("convert no-config out.gguf", "config.json"),
    ("convert broken-config out.gguf", "config.json"),
    ("convert no-weights out.gguf", "safetensors"),
    ("convert truncated out.gguf", "model.safetensors cannot be read"),
    ("convert encoder out.gguf", "not a decoder-only language model"),
    ("convert other.gguf out.gguf", "not a GGUF"),
    ("convert cut.gguf out.gguf", "cut.gguf"),
    ("convert model out.gguf --type q9_x", "unknown tensor type 'q9_x'"),
    ("convert model out.gguf --method magic", "unknown method 'magic'"),
    ("convert model out.gguf --preset slow", "unknown preset 'slow'"),
    ("convert model out.gguf --embedding-type q9_x", "unknown tensor type 'q9_x'"),
    ("convert model out.gguf --embedding-type tsq2 --output-type tsq9", "unknown tensor type 'tsq9'"),
    ("convert model out.gguf --init luck", "unknown initialisation 'luck'"),
    ("convert model out.gguf --finish polish", "unknown finish 'polish'"),
    ("convert model out.gguf --method gptq --init awq", "--init has no meaning"),
    ("convert model out.gguf --method gptq --init awq", "--init has no meaning"),
    ("convert model out.gguf --granularity row", "unknown granularity 'row'"),
    ("convert model out.gguf --granularity channel --type q2_k", "--granularity channel is not possible in q2_k"),
    ("convert model out.gguf --granularity channel --finish distill", "not possible with --granularity channel"),
    ("convert model out.gguf --activations a7", "unknown rounding of activations 'a7'"),
    ("convert model out.gguf --kv-bits 5", "--kv-bits 5 is not possible"),
    ("convert model out.gguf --activations a4 --finish distill", "not possible with rounded ones"),
    ("convert model out.gguf --type f16 --activations a8", "--activations has no meaning"),
    ("convert model out.gguf --method rtn --activations a8-static --preset best", "--preset has no meaning"),
    ("convert model out.gguf --rank 64", "--rank has no meaning"),
    ("convert model out.gguf --parts mask", "--parts has no meaning"),
    ("convert model out.gguf --method ptq161 --type ptq1_61 --parts all", "unknown part of PTQ1.61 'all'"),
    ("convert model out.gguf --preprocess-steps 5", "go with --preprocess TEXT"),
    ("convert model out.gguf --finish-steps 5", "go with --finish distill"),
    ("convert model out.gguf --finish distill --finish-steps 0", "--finish-steps must be at least 1"),
    ("convert model out.gguf --type f16 --preprocess text.txt", "--preprocess has no meaning"),
    ("convert model out.gguf --method ptq161", "ptq161 learns the scales of ptq1_61"),
    ("convert model out.gguf --embedding-type ptq1_61", "columns of the embedding have no order"),
    ("convert model out.gguf --type ptq1_61 --granularity channel", "its scales belong to super-blocks"),
    ("convert model out.gguf --method flexround --rank 64", "--rank has no meaning"),
    ("convert model out.gguf --method lrq --rank 0", "--rank must be at least 1"),
    ("convert model out.gguf --method rtn --finish distill", "--finish has no meaning"),
    ("convert model out.gguf --type f16 --output-type tsq2", "--output-type: 'tsq2' can only be learned"),
    ("convert model out.gguf --type f16 --tensor-type down=tsq2", "--tensor-type down: 'tsq2' can only be learned"),
    ("convert model out.gguf --type f16 --tensor-type norm=q8_0", "norm=q8_0 matches no matrix"),
    ("convert model out.gguf --type f16 --seed 3", "--seed has no meaning"),
    ("convert model out.gguf --target-bpw inf", "--target-bpw must be a number above 0, not inf"),
    ("convert model out.gguf --target-bpw nan", "--target-bpw must be a number above 0, not nan"),
    ("convert model out.gguf --target-bpw=-2", "--target-bpw must be a number above 0, not -2"),
    ("convert model out.gguf --target-size much", "'much' is no size"),
    ("convert model out.gguf --memory-budget 0", "'0' is no size"),
    ("convert model out.gguf --target-bpw 3 --target-size 1G", "two budgets: give one"),
    ("convert model out.gguf --target-bpw 3 --type tsq2", "give one of them"),
    ("convert model out.gguf --target-bpw 3 --candidates f16,bf16", "one of which at least can be learned"),
    ("convert model out.gguf --candidates tsq2,tsq3,tsq4", "no target to choose types for: --candidates"),
    ("convert model out.gguf --target-bpw 3 --candidates bcq4,tsq2 --method lrq", "lrq is not possible in bcq4"),
    ("convert model out.gguf --method rtn --tensor-type down=tsq9", "unknown tensor type 'tsq9'"),
    ("convert model out.gguf --method rtn --tensor-type down=q4_k_m", "q4_k_m is a mix of types, which --type alone"),
    ("convert model out.gguf --init good.gguf", "a file to begin at is file:good.gguf"),
    ("convert model out.gguf --init file:nowhere.gguf", "--init: no file at nowhere.gguf"),
    ("convert model out.gguf --method rtn --imatrix nowhere.dat", "--imatrix: no file at nowhere.dat"),
    ("convert model out.gguf --method rtn --imatrix good.gguf", "--imatrix: good.gguf is a GGUF file of another kind"),
    ("convert model out.gguf --method rtn --imatrix short.txt", "--imatrix: short.txt is no importance matrix"),
    ("convert model out.gguf --method rtn --tensor-type nowhere=f16", "matches no matrix of the model, such as"),
    ("convert model out.gguf --method rtn --tensor-type embed=ptq1_61", "columns of the embedding have no order"),
    ("convert model out.gguf --method rtn --tensor-type layers=f16", "nothing to learn"),
    ("convert model out.gguf --method lrq --tensor-type down=bcq4", "lrq is not possible in bcq4"),
    ("convert model out.gguf --method rtn --tensor-type lm_head=f16 --output-type q8_0", "give one of them"),
    ("convert model out.gguf --codebooks universal", "have codebooks, not tsq2"),
    ("convert model out.gguf --samples 0", "--samples"),
    ("convert model out.gguf --seqlen 1", "--seqlen"),
    ("convert model out.gguf --samples many", "--samples"),
    ("convert model out.gguf --device abacus", "--device abacus"),
    ("convert model out.gguf --calibration empty.txt", "empty.txt is empty"),
    ("convert model out.gguf --calibration blank.txt", "blank.txt is empty"),
    ("convert model out.gguf --calibration short.txt", "too short"),
    ("convert model out.gguf --calibration nowhere.txt", "no calibration text at nowhere.txt"),
    ("convert model out.gguf --calibration a-folder", "a-folder"),
    ("convert model a-folder", "a folder"),
    ("convert model nowhere/out.gguf", "does not exist"),
    ("convert model precious.txt", "not a GGUF file"),
    ("convert good.gguf good.gguf", "the model itself"),
    ("convert model out.gguf --method rtn --samples 4", "--samples has no meaning"),
    ("convert model out.gguf --method rtn --preset best", "--preset has no meaning"),
    ("convert model out.gguf --type f16 --method gptq", "--method has no meaning"),
    ("convert model out.gguf --type f16 --calibration short.txt", "--calibration has no meaning"),
    ("convert model out.gguf --frobnicate", "No such option"),
    ("convert model", "Missing argument"),
    ("convert model out.gguf third", "unexpected extra argument"),
    ("frobnicate", "No such command"),
    ("inspect missing.gguf", "no file at missing.gguf"),
    ("recipe missing.gguf", "no file at missing.gguf"),
    ("recipe good.gguf", "good.gguf does not say how it was made"),
    ("inspect a-folder", "is a folder"),
    ("inspect empty.gguf", "is empty"),
    ("inspect other.gguf", "is not a GGUF file"),
    ("inspect cut.gguf", "truncated"),
    ("inspect cut-early.gguf", "truncated"),
    ("inspect foreign.gguf", "999"),
    ("eval missing.gguf --text short.txt", "no file at missing.gguf"),
    ("compare good.gguf missing.gguf --text short.txt", "no file at missing.gguf"),
    ("compare cut.gguf good.gguf --text short.txt", "truncated"),
    ("compare good.gguf foreign.gguf --text short.txt", "999"),
    ("compare good.gguf --text short.txt", "Missing argument"),
    ("compare good.gguf good.gguf --text short.txt", "good.gguf is given twice"),
    ("compare good.gguf base.gguf", "Missing option '--text'"),
    ("compare good.gguf base.gguf --text nowhere.txt", "no text at nowhere.txt"),
    ("compare good.gguf base.gguf --text short.txt --ctx 1", "--ctx"),
    ("compare good.gguf base.gguf --text short.txt --chunks 0", "--chunks"),
    ("compare good.gguf base.gguf --text short.txt --memory-at 0", "--memory-at must be at least 1 token"),
    ("compare good.gguf base.gguf --text short.txt --generate 0", "--generate must be between 1 and 24, not 0"),
    ("compare good.gguf base.gguf --text short.txt --csv -", "--csv wants the name of a file"),
    (
        "compare good.gguf base.gguf --text short.txt --csv a.html --report a.html",
        "--report a.html is a.html, which is",
    ),
    ("compare good.gguf base.gguf --text short.txt --shots 3", "--shots has no meaning without --tasks"),
    ("compare good.gguf base.gguf --text short.txt --csv a-folder", "--csv a-folder is a folder"),
    ("compare good.gguf base.gguf --text short.txt --csv nowhere/t.csv", "does not exist"),
    ("compare good.gguf base.gguf --text short.txt --csv short.txt", "--csv short.txt is short.txt, which is used"),
    ("compare good.gguf base.gguf --text short.txt --report page.pdf", "--report page.pdf: its name must end in .html"),
    ("compare good.gguf base.gguf --text short.txt --plot plot.pdf", "its name must end in .svg or .png"),
    ("eval cut.gguf --text short.txt", "truncated"),
    ("eval foreign.gguf --text short.txt", "999"),
    ("eval good.gguf --text nowhere.txt", "no text at nowhere.txt"),
    ("eval good.gguf --text a-folder", "is a folder"),
    ("eval good.gguf --text empty.txt", "is empty"),
    ("eval good.gguf --text short.txt --reference cut.gguf", "truncated"),
    ("eval good.gguf --text short.txt --chunks 0", "--chunks"),
    ("eval good.gguf --text short.txt --ctx 1", "--ctx"),
    ("eval good.gguf", "give --text, --tasks, or both"),
    ("eval good.gguf --limit 3", "give --text, --tasks, or both"),
    ("eval good.gguf --tasks arc_easy --ctx 64", "--ctx has no meaning without --text"),
    ("eval good.gguf --tasks arc_easy --chunks 2", "--chunks has no meaning without --text"),
    ("eval good.gguf --tasks arc_easy --reference good.gguf", "--reference has no meaning without --text"),
    ("eval good.gguf --text short.txt --limit 3", "--limit has no meaning without --tasks"),
    ("eval good.gguf --text short.txt --shots 3", "--shots has no meaning without --tasks"),
    ("eval missing.gguf --tasks arc_easy", "no file at missing.gguf"),
    ("eval cut.gguf --tasks arc_easy", "truncated"),
    ("eval foreign.gguf --tasks arc_easy", "999"),
    ("eval good.gguf --text short.txt --activations a8", "--activations has a meaning with --simulate only"),
    ("eval good.gguf --text short.txt --simulate --kv-bits 8", "give --activations as well"),
    ("eval good.gguf --text short.txt --simulate --activations a9", "unknown rounding of activations 'a9'"),
    ("eval good.gguf --text short.txt --simulate --activations a8-static", "has no ranges for a8-static"),
    ("eval good.gguf --text short.txt --simulate --chunks 0", "--chunks"),
    ("eval cut.gguf --text short.txt --simulate", "truncated"),
    ("eval good.gguf --tasks arc_easy --simulate", "--simulate has no meaning without --text"),
    ("eval good.gguf --tasks arc_easy --text short.txt --simulate", "--simulate is for a text alone"),
    ("chat missing.gguf", "no file at missing.gguf"),
    ("chat cut.gguf -p hello", "truncated"),
    ("chat other.gguf -p hello", "is not a GGUF file"),
    ("chat foreign.gguf -p hello", "999"),
    ("chat good.gguf -p hello --max-tokens 0", "--max-tokens"),
    ("chat good.gguf -p hello --temperature -1", "--temperature"),
    ("runtime build --backend abacus", "unknown backend 'abacus'"),
    ("runtime build --llama-cpp a-folder", "not a llama.cpp checkout"),
    ("runtime build --target vax", "unknown target 'vax'. Known targets: aarch64-linux-gnu"),
    ("runtime path --backend abacus", "abacus"),
    ("runtime path --portable --backend abacus", "run: tesseraq-gguf runtime build --portable"),
    ("runtime path --target vax", "unknown target 'vax'"),
    ("runtime info --target vax", "unknown target 'vax'"),
]


@pytest.mark.parametrize(("command", "message"), BAD, ids=[command for command, _ in BAD])
def test_bad_input_is_one_clear_line_and_leaves_nothing(command, message, run, place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = _contents(place)
    answer = run(*shlex.split(command))
    assert answer.code != 0
    assert message in answer.error
    assert answer.out == ""
    assert _contents(place) == before


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() if f.is_file() else b"" for f in folder.rglob("*")}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write to")
def test_an_output_that_cannot_be_written(run, tiny_model):
    assert "cannot be written" in run("convert", tiny_model, "/proc/out.gguf").error


@pytest.mark.parametrize(
    "command", ["eval FILE --text TEXT", "eval FILE --tasks arc_easy", "chat FILE -p hello", "runtime path"]
)
def test_without_a_runtime_the_error_says_how_to_get_it(command, run, tiny_gguf, long_text, tmp_path, monkeypatch):
    monkeypatch.setenv("TESSERAQ_GGUF_CACHE", str(tmp_path))
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    answer = run(*command.replace("FILE", str(tiny_gguf)).replace("TEXT", str(long_text)).split())
    assert answer.code == 1
    assert "no runtime is installed" in answer.error
    assert "tesseraq-gguf runtime build" in answer.error


def test_a_runtime_for_other_patches_is_named(run, tiny_gguf, long_text, tmp_path, monkeypatch):
    from tesseraq_gguf.runtime.locate import Runtime

    monkeypatch.setenv("TESSERAQ_GGUF_CACHE", str(tmp_path))
    root = tmp_path / "0.0.1-abc" / "cpu"
    library = Runtime(root, {}).library("llama")
    library.parent.mkdir(parents=True)
    library.touch()
    (root / "manifest.json").write_text(json.dumps({"kernels_hash": "abc", "version": "0.0.1"}))
    error = run("eval", tiny_gguf, "--text", long_text).error
    assert "built for other patches" in error
    assert "tesseraq-gguf runtime build" in error


def test_on_a_terminal_a_missing_runtime_is_built_if_the_user_agrees(monkeypatch):
    built: list[bool] = []

    def action():
        if not built:
            raise RuntimeMissingError("no runtime is installed")
        return "done"

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("tesseraq_gguf.runtime.builder.build", lambda: built.append(True))
    monkeypatch.setattr(typer, "confirm", lambda *_, **__: False)
    with pytest.raises(RuntimeMissingError):
        with_runtime(action)
    monkeypatch.setattr(typer, "confirm", lambda *_, **__: True)
    assert with_runtime(action) == "done"


def test_a_bug_shows_its_traceback(run, tiny_gguf, monkeypatch):
    def broken(_path):
        raise ZeroDivisionError

    monkeypatch.setattr("tesseraq_gguf.gguf_files.inspection.inspect", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["inspect", str(tiny_gguf)])


def test_the_end_of_the_converters_log_comes_before_the_error(run, tiny_model, tmp_path, monkeypatch):
    def refuse(*_):
        raise ConversionError("the converter refuses the model", "a line\nthe reason")

    monkeypatch.setattr("tesseraq_gguf.conversion.pipeline.convert", refuse)
    answer = run("convert", tiny_model, tmp_path / "out.gguf")
    assert answer.error == "error: the converter refuses the model"
    assert "the reason" in answer.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_in_one_line(number, run, tiny_model, tiny_gguf, tmp_path, monkeypatch):
    code = 128 + number

    def interrupted(*_):
        if number == signal.SIGINT:  # which a shell's background processes ignore
            raise KeyboardInterrupt
        signal.raise_signal(number)

    monkeypatch.setattr("tesseraq_gguf.conversion.pipeline.convert", interrupted)
    answer = run("convert", tiny_model, tmp_path / "out.gguf")
    assert answer.code == code
    assert answer.err.splitlines()[-1].startswith("stopped; what is finished is kept")
    monkeypatch.setattr("tesseraq_gguf.gguf_files.inspection.inspect", interrupted)
    answer = run("inspect", tiny_gguf)
    assert (answer.code, answer.err.strip()) == (code, "stopped")


# --- what it prints -------------------------------------------------------------------------------------------------


def test_convert_prints_nothing_but_json(run, tmp_path, monkeypatch):
    seen = []

    def fake(recipe, progress):
        progress.stage("learning")
        progress.note("a note")
        seen.append(recipe)
        return ConversionReport(
            out=recipe.out,
            bytes=1000,
            bits_per_weight=4.5,
            block_bits_per_weight=2.25,
            blocks=2,
            resumed=1,
            seconds=3.0,
            fallbacks={"model.layers.0.x": "odd"},
            runs_on="tesseraq-gguf runtime only",
        )

    monkeypatch.setattr("tesseraq_gguf.conversion.pipeline.convert", fake)
    out = tmp_path / "out.gguf"
    answer = run("convert", "demo", out, "--preset", "fast", "--samples", 4, "--seed", 7, "--json")
    assert answer.code == 0
    report = json.loads(answer.out)
    assert report["out"] == str(out)
    assert report["block_bits_per_weight"] == 2.25
    assert report["fallbacks"] == {"model.layers.0.x": "odd"}
    assert "a note" in answer.err
    (recipe,) = seen
    assert (recipe.preset, recipe.samples, recipe.seed, recipe.embedding_type) == ("fast", 4, 7, "q8_0")
    assert report["divergence"] is None
    said = run("convert", "demo", out).out
    assert "2.25 in the learned matrices" in said
    assert "Divergence" not in said
    assert "undone" not in said


def test_convert_ends_with_what_was_held_out(run, monkeypatch, tmp_path):
    def fake(recipe, progress):
        return ConversionReport(
            recipe.out,
            1000,
            4.5,
            2.25,
            18,
            0,
            3.0,
            {},
            "any llama.cpp",
            divergence=0.12345,
            held_out=2048,
            kept_start=3,
        )

    monkeypatch.setattr("tesseraq_gguf.conversion.pipeline.convert", fake)
    lines = run("convert", "demo", tmp_path / "out.gguf").out.splitlines()
    assert lines[1] == "Divergence from the original, on 2,048 tokens held out: 0.1235 nats per token"
    assert lines[2].startswith("Learning was undone in 3 of 18 blocks: it ended worse than it began")
    report = json.loads(run("convert", "demo", tmp_path / "out.gguf", "--json").out)
    assert (report["divergence"], report["held_out"], report["kept_start"]) == (0.12345, 2048, 3)


def test_a_reference_is_all_of_one_type(run, tiny_model, tmp_path):
    out = tmp_path / "f16.gguf"
    assert run("convert", tiny_model, out, "--type", "f16").code == 0
    assert set(json.loads(run("inspect", out, "--json").out)["types"]) == {"f16", "f32"}


@pytest.mark.slow
def test_convert_learns_a_tiny_model(run, tiny_model, long_text, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "fast", dataclasses.replace(PRESETS["fast"], steps=1))
    out = tmp_path / "out.gguf"
    options = ["--preset", "fast", "--samples", 4, "--seqlen", 32, "--calibration", long_text]
    answer = run("convert", tiny_model, out, *options, "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["block_bits_per_weight"] == 2.25
    assert "block 1/2" in answer.err
    assert "block 2/2" in answer.err
    assert [f.name for f in tmp_path.iterdir()] == ["out.gguf"]


@pytest.mark.slow
def test_the_command_that_a_file_names_makes_it_again(run, tiny_model, long_text, tmp_path, monkeypatch):
    (tmp_path / "first").mkdir()
    out, text = tmp_path / "first" / "mine.gguf", tmp_path / "text.txt"
    shutil.copy(long_text, text)
    options = ("--method", "gptq", "--type", "q4_0", "--tensor-type", "down|up=tsq3", "--samples", 4, "--seqlen", 32)
    assert run("convert", tiny_model, out, *options, "--calibration", text, "--seed", 5).code == 0
    program, *words = shlex.split(run("recipe", out).out)
    assert program == "tesseraq-gguf"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, tmp_path / tiny_model.name)
    assert run(*words).code == 0
    assert (tmp_path / "out.gguf").read_bytes() == out.read_bytes()
    told = run("recipe", out)
    assert "calibration text: text.txt" in told.err and "tesseraq-gguf: " in told.err
    assert json.loads(run("recipe", out, "--json").out)["command"] == shlex.join(["tesseraq-gguf", *words])


def test_inspect(run, tiny_gguf):
    assert json.loads(run("inspect", tiny_gguf, "--json").out)["types"]["f16"]["tensors"] > 0
    text = run("inspect", tiny_gguf).out
    assert "blk.0.ffn_down.weight" in text
    assert "any llama.cpp" in text


def test_runtime_info(run):
    data = json.loads(run("runtime", "info", "--json").out)
    assert {"installed", "kernels_hash", "cache"} <= set(data)
    assert "kernels_hash" in run("runtime", "info").out


@pytest.mark.runtime
def test_runtime_path(run):
    answer = run("runtime", "path")
    assert answer.code == 0, f"{answer.err}\nscripts/test builds the runtime first"
    assert (Path(answer.out.strip()) / "bin" / "llama-perplexity").is_file()


# --- the documents --------------------------------------------------------------------------------------------------


def _documented_commands():
    """Every command of ours on every page: in code, or at the beginning of a line, or inside `$(…)`."""
    names = "|".join(command[0] for command in COMMANDS if command)
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "cpp_kernels/README.md"]
    seen = set()
    # but for the page that scripts/docs makes of the program itself
    made = ROOT / "docs/reference/command-line.md"
    for page in (*pages, *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page != made)):
        name = str(page.relative_to(ROOT))
        for command in re.findall(rf"tesseraq-gguf (?:{names})\b[^`|)#\n]*", page.read_text(encoding="utf-8")):
            command = command.strip().rstrip(".")
            if (name, command) not in seen:
                yield pytest.param(command, id=f"{name}: {command}")
            seen.add((name, command))


def test_documented_commands_are_found():
    found = {str(each.values[0]).split()[1] for each in _documented_commands()}
    assert found == {command[0] for command in COMMANDS if command}


@pytest.mark.parametrize("command", list(_documented_commands()))
def test_commands_in_the_documents_exist(command):
    arguments = shlex.split(re.split(r" (?:>|2>|&&|;) ", command)[0])[1:]
    node = typer.main.get_command(cli.app)
    context = node.context_class(node, info_name="tesseraq-gguf")
    while hasattr(node, "commands") and arguments:
        node = node.commands[arguments.pop(0)]
    if not arguments:
        return
    context = node.make_context(node.name, arguments, parent=context)  # refuses unknown options and bad values
    assert context.params


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_of_presets_is_true(name):
    preset = PRESETS[name]
    row = f"| `{name}` | {preset.samples} × {preset.length} tokens | 20 × {preset.steps} |"
    assert row in (ROOT / "docs/guides/methods.md").read_text()


def test_python_in_the_guide_runs(tiny_model, long_text, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/guides/python.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "python.md", "exec")
        for line in block.splitlines():
            if re.match(r"(from|import) ", line):
                if "runtime import" in line:
                    continue  # needs the built runtime; tests/runtime holds it
                exec(line, {})
