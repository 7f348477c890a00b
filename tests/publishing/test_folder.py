"""A folder from three files: names, keys, the card's figures, sums; and what cannot be published, in one line."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import gguf
import pytest
from hub_server import TOKEN, store  # noqa: F401  (a fixture)
from small_gguf import small_gguf
from split_files import split

from tesseraq_gguf.gguf_files.gguf_file import open_gguf
from tesseraq_gguf.gguf_files.imatrix import Imatrix, Squares, write_imatrix
from tesseraq_gguf.paths import sha256
from tesseraq_gguf.publishing import folder

SAID = {"general__basename": "Tiny", "general__size_label": "1M", "general__license": "apache-2.0"}
COMMAND = "tesseraq-gguf convert tiny out.gguf --type tsq2 --preset fast"


def _row(path: Path, **figures) -> dict:
    row = {"file": str(path), "bytes": path.stat().st_size, "sha256": sha256(path), "bpw": 2.7517, "block_bpw": 2.5}
    row |= {"perplexity": 12.3456}
    row |= {"perplexity_error": 0.4567, "kld": 0.1234, "kld_error": 0.0045, "kld_99": 1.9876, "same_top": 0.8765}
    return row | {"tokens": 4321, "memory_model": 7_100_000, "prompt_speed": None, "answer_speed": None} | figures


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    """Three files of one model, of which one is a rival's, and what belongs to them."""
    home = tmp_path / "inputs"
    home.mkdir()
    made = {
        "ours": small_gguf(
            home / "ours.gguf", "tsq2", 900, 1, **SAID, tesseraq__command=COMMAND, tesseraq__method="tesseraq"
        ),
        "stock": small_gguf(home / "stock.gguf", "q2_k", 900, 2, **SAID),
        "theirs": small_gguf(home / "theirs.gguf", "q2_k", 1000, 3, general__quantized_by="They"),
        "reference": small_gguf(home / "f16.gguf", "f16", 900, 4, **SAID),
    }
    rows = [_row(made["ours"]), _row(made["stock"], kld=0.2345, bpw=2.9), _row(made["theirs"], kld=0.3456, bpw=3.1)]
    data = {"text": "/secret/folder/valid.txt", "ctx": 512, "memory_at": 4096, "files": rows}
    data["reference"] = _row(made["reference"], kld=0, kld_99=0, same_top=1, bpw=16.01)
    (home / "compare.json").write_text(json.dumps(data))
    import numpy as np

    write_imatrix(
        home / "imatrix.gguf", Imatrix({"blk.0.ffn_up.weight": Squares(np.ones((1, 256), "f4"), np.ones(1, "f4"))})
    )
    (home / "ours.gguf.types").write_text("blk=tsq2\n")
    return made | {name: home / name for name in ("compare.json", "imatrix.gguf", "ours.gguf.types")}


def _publish(run, files, *more):
    return run("publish", files["ours"], files["stock"], files["theirs"], *more, "--tag", "theirs.gguf=Q2_K_THEIRS")


def _digests(home: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in home.iterdir() if path.is_file()}


def test_a_folder_of_three_files(run, files, tmp_path):
    out, before = tmp_path / "Tiny-GGUF", _digests(files["ours"].parent)
    beside = ["--imatrix", files["imatrix.gguf"], "--types", files["ours.gguf.types"]]
    options = [
        "--base",
        "owner/Tiny-1M",
        "--by",
        "me",
        "--comparison",
        files["compare.json"],
        *beside,
        "--split",
        "200K",
    ]
    answer = _publish(run, files, out, *options)
    assert answer.code == 0, answer.err
    names = {path.name for path in out.iterdir()}
    assert names == {
        "Tiny-1M-TSQ2.gguf", "Tiny-1M-Q2_K_S.gguf", "Tiny-1M-Q2_K_THEIRS.gguf", "Tiny-1M-imatrix.gguf", "README.md",
        "Tiny-1M-TSQ2.types", "Modelfile-Q2_K_S", "Modelfile-Q2_K_THEIRS", "SHA256SUMS", "divergence.png",
    }  # fmt: skip
    assert _digests(files["ours"].parent) == before
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=out, check=True)
    assert len((out / "SHA256SUMS").read_text().splitlines()) == len(names) - 1
    assert (out / "Modelfile-Q2_K_S").read_text() == "FROM ./Tiny-1M-Q2_K_S.gguf\n"
    read = gguf.GGUFReader(out / "Tiny-1M-Q2_K_S.gguf").fields
    said: dict[str, Any] = {
        key: read[f"general.{key}"].contents() for key in ("quantized_by", "license", "base_model.count", "file_type")
    }
    assert said == {"quantized_by": "me", "license": "apache-2.0", "base_model.count": 1, "file_type": 21}
    assert read["general.base_model.0.repo_url"].contents() == "https://huggingface.co/owner/Tiny-1M"
    assert open_gguf(out / "Tiny-1M-TSQ2.gguf").get("tesseraq.command") == COMMAND


def test_the_card_has_measured_figures_and_no_others(run, files, tmp_path):
    out = tmp_path / "out"
    assert _publish(run, files, out, "--base", "owner/Tiny-1M", "--comparison", files["compare.json"]).code == 0
    card = (out / "README.md").read_text()
    header = card.split("---")[1]
    assert "license: apache-2.0" in header
    assert "base_model: owner/Tiny-1M" in header
    assert "base_model_relation: quantized" in header
    measured = card.split("## Measured")[1].split("## Run")[0]
    assert "| `TSQ2` | 0.1 | 2.752 | 12.346 ± 0.457 | 0.1234 ± 0.0045 | 1.988 | 87.65 % | 7 |" in measured
    assert "| `Q2_K_THEIRS` |" in measured
    assert "(reference)" in measured
    assert "On 4,321 tokens of valid.txt" in measured
    assert "secret" not in card
    assert "t/s" not in card  # no speed was measured
    assert f"    {COMMAND}\n" in card
    assert "the file does not say how it was made" in card
    assert "tesseraq-gguf chat Tiny-1M-TSQ2.gguf" in card
    assert "    llama-server -m Tiny-1M-Q2_K_S.gguf" in card


def test_the_card_has_what_files_write_and_what_tasks_found(run, files, tmp_path):
    data = json.loads(files["compare.json"].read_text())
    for row in (data["reference"], *data["files"]):
        row |= {
            "generated_answers": 20,
            "generated_unended": 0.15,
            "generated_repeated": 0.0345,
            "prompt_speed": 912.34,
        }
        row |= {"answer_speed": 45.67, "task_arc_easy acc": 0.4321, "task_arc_easy acc_error": 0.0123}
    files["compare.json"].write_text(json.dumps(data))
    images = small_gguf(tmp_path / "mm.gguf", "f16", general__architecture="clip")
    assert (
        run(
            "publish", files["ours"], files["stock"], images, tmp_path / "out", "--comparison", files["compare.json"]
        ).code
        == 0
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| `TSQ2` | 20 | 15.0 % | 3.5 % |" in card or "| `TSQ2` | 20 | 15.0 % | 3.4 % |" in card
    assert "| `TSQ2` | 0.4321 ± 0.0123 |" in card
    assert "| 912.3 | 45.7 |" in card
    assert "Speeds are of one machine" in card
    assert "llama-server -m Tiny-1M-Q2_K_S.gguf --mmproj mmproj-Tiny-1M-F16.gguf" in card
    assert "| theirs |" in card  # compared, not published


def test_a_card_without_a_comparison_says_that_nothing_was_measured(run, files, tmp_path):
    assert _publish(run, files, tmp_path / "out").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Nothing was measured of these files" in card
    assert not re.search(r"perplexity|KLD", card)
    assert not (tmp_path / "out" / "divergence.png").exists()


def test_figures_of_another_file_of_the_same_name_and_size_are_refused(run, files, tmp_path):
    data = bytearray(files["stock"].read_bytes())
    data[-1] ^= 1
    files["stock"].write_bytes(data)
    told = run("publish", files["stock"], tmp_path / "out", "--comparison", files["compare.json"])
    assert told.code and "compare it again" in told.err


def test_folders_of_whoever_quantised_a_file_are_left_out(run, tmp_path):
    said: dict[str, Any] = {
        "quantize__imatrix__file": "/home/me/matrix.gguf",
        "quantize__imatrix__dataset": "C:\\texts\\calm.txt",
    }
    file = small_gguf(tmp_path / "a.gguf", "q2_k", general__name="Tiny", **said)
    assert run("publish", file, tmp_path / "out").code == 0
    (made,) = (tmp_path / "out").glob("*.gguf")
    assert open_gguf(made).get("quantize.imatrix.file") == "matrix.gguf"
    assert open_gguf(made).get("quantize.imatrix.dataset") == "calm.txt"


def test_what_a_stranger_wrote_stays_text(run, files, tmp_path):
    nasty = small_gguf(
        tmp_path / "n.gguf", "tsq2", tesseraq__method="<b>x</b>|`[a](b)\n# head", general__name="a|b <i>"
    )
    assert run("publish", nasty, tmp_path / "out").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "<b>" not in card.replace(r"\<b\>", "")
    assert "\n# head" not in card
    assert (tmp_path / "out" / "a-b-i-TSQ2.gguf").is_file()


def test_parts_are_named_and_read(run, files, tmp_path):
    answer = run("publish", files["ours"], tmp_path / "out", "--split", "40K", "--json")
    names = json.loads(answer.out)["files"][0]["names"]
    assert names[0] == f"Tiny-1M-TSQ2-00001-of-{len(names):05}.gguf"
    assert len(names) > 1
    assert open_gguf(tmp_path / "out" / names[0]).parts == tuple(tmp_path / "out" / name for name in names)
    assert not list((tmp_path / "out").glob("Modelfile*"))


def test_a_dry_run_writes_nothing(run, files, tmp_path):
    answer = _publish(run, files, "hub:me/Tiny-GGUF", "--dry-run")
    assert answer.code == 0, answer.err
    assert "-> Tiny-1M-TSQ2.gguf" in answer.out
    assert "sets general.quantized_by, general.url" in answer.out
    assert "--comparison would say it" in answer.out
    assert _publish(run, files, tmp_path / "out", "--dry-run").code == 0
    assert not (tmp_path / "out").exists()


def _unknown(files, out):
    data = bytearray(files["stock"].read_bytes())
    at = data.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4 + 16
    data[at : at + 4] = (4711).to_bytes(4, "little")
    (files["stock"].parent / "unknown.gguf").write_bytes(data)
    return [files["stock"].parent / "unknown.gguf", out], "of type 4711, which is known neither"


def _missing_part(files, out):
    parts = split(files["stock"], files["stock"].parent, [1])
    parts[1].unlink()
    return [parts[0], out], "part 2 of 2 is missing, part-00002-of-00002.gguf"


def _text(files, out):
    files["stock"].with_name("t.gguf").write_text("no model")
    return [files["stock"].with_name("t.gguf"), out], "is not a GGUF file"


def _there(files, out):
    out.mkdir()
    (out / "mine").touch()
    return [files["stock"], out], "is there and is not empty: name a new one"


def _twice(files, out):
    return [files["stock"], files["theirs"], out], "Q2_K_S means both: give one another tag"


def _remeasured(files, out):
    data = json.loads(files["compare.json"].read_text())
    data["files"][1]["bytes"] += 32
    files["compare.json"].write_text(json.dumps(data))
    return [files["stock"], out, "--comparison", files["compare.json"]], "compare it again"


def _no_comparison(files, out):
    return [files["stock"], out, "--comparison", files["ours"]], "is no comparison: make one with"


def _no_matrix(files, out):
    return [files["stock"], out, "--imatrix", files["ours"]], "is a GGUF file of another kind"


def _other_model(files, out):
    other = small_gguf(files["stock"].with_name("o.gguf"), "q4_0", general__architecture="qwen3")
    return [files["stock"], other, out], "publish the files of one model at a time"


@pytest.mark.parametrize(
    "case",
    [_unknown, _missing_part, _text, _there, _twice, _remeasured, _no_comparison, _no_matrix, _other_model,
     lambda files, out: ([files["stock"].with_name("none.gguf"), out], "no file at"),
     lambda files, out: ([files["imatrix.gguf"], out], "but of the kind 'imatrix': give it as --imatrix"),
     lambda files, out: ([files["stock"]], "nothing to publish"),
     lambda files, out: ([files["stock"], files["ours"]], "where to publish comes last"),
     lambda files, out: ([files["stock"], out / "deep"], "does not exist. Make it first"),
     lambda files, out: ([files["stock"], out, "--tag", "x=Q"], "no file of that name is published"),
     lambda files, out: ([files["stock"], out, "--base", "me"], "must be OWNER/NAME"),
     lambda files, out: ([files["stock"], out, "--token", "hf_x"], "has a meaning with hub:OWNER/NAME only"),
     lambda files, out: ([files["stock"], "hub:me"], "must be hub:OWNER/NAME")],
)  # fmt: skip
def test_what_cannot_be_published_is_one_line(case, run, files, tmp_path):
    arguments, message = case(files, tmp_path / "out")
    answer = run("publish", *arguments)
    assert answer.code in (1, 2)
    assert message in answer.err
    assert len(answer.err.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*.partial"))


def test_a_full_disk_leaves_nothing(run, files, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder.copying, "copy", full)
    answer = run("publish", files["stock"], tmp_path / "out")
    assert "cannot be written: No space left on device" in answer.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs"]
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: type("usage", (), {"free": 10}))
    assert "and 10 are free on the disk" in run("publish", files["stock"], tmp_path / "out").err


def test_an_interrupted_upload_goes_on_with_the_same_command(run, files, store, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("TESSERAQ_GGUF_CACHE", str(tmp_path / "cache"))
    store.breaks = [2]  # between two files; of one that was begun, what arrived is sent again
    answer = _publish(run, files, "hub:me/Tiny-GGUF", "--split", "100K")
    assert answer.code == 1
    assert "run the same command again" in answer.err
    (kept,) = (tmp_path / "cache" / "publish").glob("me--Tiny-GGUF-*")
    wanted = {path.name: path.read_bytes() for path in kept.iterdir()}
    store.breaks = [4]
    assert _publish(run, files, "hub:me/Tiny-GGUF", "--split", "100K").code == 1
    store.breaks = []
    answer = _publish(run, files, "hub:me/Tiny-GGUF", "--split", "100K")
    assert answer.code == 0, answer.err
    assert "Published: http" in answer.out
    assert store.files == wanted
    assert sum(store.received.values()) == sum(len(data) for name, data in wanted.items() if name.endswith(".gguf"))
    assert not list((tmp_path / "cache" / "publish").glob("me--*"))
    first = gguf.GGUFReader(_saved(tmp_path, store.files["Tiny-1M-Q2_K_S.gguf"])).fields
    assert first["general.quantized_by"].contents() == "me"
    assert first["general.url"].contents() == "https://huggingface.co/me/Tiny-GGUF"
    assert "llama-server -hf me/Tiny-GGUF:Q2_K_S" in store.files["README.md"].decode()
    assert "ollama run hf.co/me/Tiny-GGUF:Q2_K_S" in store.files["README.md"].decode()


def _saved(home: Path, data: bytes) -> Path:
    (home / "saved.gguf").write_bytes(data)
    return home / "saved.gguf"


def test_a_token_is_never_shown(run, files, store, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("TESSERAQ_GGUF_CACHE", str(tmp_path / "cache"))
    wrong = "hf_zyxwvutsrqponmlkjihgfedcba"
    for token in (wrong, TOKEN):
        store.breaks = [0]
        answer = run("publish", files["ours"], "hub:me/Tiny-GGUF", "--token", token)
        assert answer.code == 1
        assert token not in answer.out + answer.err
        assert len(answer.err.strip().splitlines()) == 1
    kept = (tmp_path / "cache" / "publish").rglob("*")
    assert not any(TOKEN.encode() in path.read_bytes() for path in kept if path.is_file())
