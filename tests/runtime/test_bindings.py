"""The bindings raise where they crashed, hung, or said nothing."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tesseraq_gguf.errors import BindingsError, ChatTemplateError, ModelLoadError
from tesseraq_gguf.gguf_files.inspection import open_gguf

pytestmark = pytest.mark.runtime

CLOSED = "the model is closed"


@pytest.fixture
def new(tiny_gguf: Path) -> Callable[..., Any]:
    """Load the tiny Llama."""
    from tesseraq_gguf.runtime import Llama

    def load(file: Path = tiny_gguf, **options: Any) -> Any:
        return Llama(file, **{"n_ctx": 256, "n_threads": 1, "verbose": False, **options})

    return load


def text(llama: Any, prompt: Any = "the quick", **options: Any) -> str:
    return str(llama(prompt, **{"max_tokens": 3, "temperature": 0, **options})["choices"][0]["text"])


def grammar(gbnf: str) -> Any:
    from llama_cpp import LlamaGrammar

    return LlamaGrammar.from_string(gbnf, verbose=False)


@pytest.mark.parametrize(
    ("gbnf", "said"),
    [
        ("root ::= (", "expecting ')'"),
        ("root ::= [a", "unexpected end of input"),
        ("root ::= other", "Undefined rule identifier 'other'"),
        ('rot ::= "a"', "does not contain a 'root' symbol"),
        ('root ::= root "a"', "left recursion"),
        ('root ::= "a"{100000}', "number of repetitions"),
    ],
)
def test_a_grammar_that_cannot_be_used(gbnf: str, said: str, new: Callable[..., Any], capfd: Any) -> None:
    llama = new()
    with pytest.raises(BindingsError, match="the grammar cannot be used") as caught:
        text(llama, grammar=grammar(gbnf))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, RuntimeError)
    assert capfd.readouterr().err == ""
    assert text(llama, grammar=grammar('root ::= "the" " "')) == "the "


def test_a_grammar_that_allows_nothing(new: Callable[..., Any]) -> None:
    llama = new()
    forbidden = {token: -float("inf") for token in range(llama.n_vocab())}
    for temperature in (0, 0.8):
        with pytest.raises(BindingsError, match="the grammar allows none of the model's tokens"):
            text(llama, grammar=grammar('root ::= "a"'), logit_bias=forbidden, temperature=temperature)


def test_under_a_grammar_the_sampler_chooses_as_c_does(
    new: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import llama_cpp._internals

    llama = new()
    options = {"temperature": 0.8, "seed": 3, "max_tokens": 12}
    expected = text(llama, **options)
    monkeypatch.setattr(llama_cpp._internals.LlamaSampler, "_constrained", True)
    assert text(llama, **options) == expected


USES: dict[str, Callable[[Any], Any]] = {
    "complete": text,
    "chat": lambda llama: llama.create_chat_completion([{"role": "user", "content": "x"}]),
    "tokenize": lambda llama: llama.tokenize(b"abc"),
    "detokenize": lambda llama: llama.detokenize([5, 6]),
    "eval": lambda llama: llama.eval([1, 2]),
    "sample": lambda llama: llama.sample(),
    "generate": lambda llama: list(llama.generate([1, 2])),
    "state": lambda llama: llama.save_state(),
    "context": lambda llama: llama.ctx,
    "model": lambda llama: llama.model,
    "vocabulary": lambda llama: llama.n_vocab(),
    "token": lambda llama: llama.token_eos(),
}


def test_a_closed_model(new: Callable[..., Any]) -> None:
    llama = new()
    text(llama)
    streams = [llama("the quick", max_tokens=20, stream=True), llama("a lazy", max_tokens=20, stream=True)]
    next(streams[0])
    llama.close()
    llama.close()
    for name, use in USES.items():
        with pytest.raises(BindingsError, match=CLOSED):
            use(llama)
            pytest.fail(name)
    for stream in streams:
        with pytest.raises(BindingsError, match=CLOSED):
            list(stream)
    assert text(pickle.loads(pickle.dumps(llama))) == text(new())


def test_copies_are_models_of_their_own(new: Callable[..., Any]) -> None:
    llama, other = new(), new(flash_attn=None)
    expected = text(llama)
    copies = [copy.copy(llama), copy.deepcopy(llama), copy.copy(other)]
    assert copies[2].context_params.flash_attn_type == other.context_params.flash_attn_type == -1
    llama.close()
    assert [text(each) for each in copies[:2]] == [expected, expected]
    stream = other("the quick", max_tokens=5, stream=True)
    del other
    assert len(list(stream)) > 1


def in_child(use: Callable[[], str]) -> tuple[int, str]:
    """Fork, and return how the child ended and what it said."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            os.write(writing, use().encode())
        except BaseException as error:
            os.write(writing, repr(error).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    return os.waitpid(child, 0)[1], said


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_answers(new: Callable[..., Any]) -> None:
    llama = new(n_threads=2)
    expected = text(llama)  # starts OpenMP's threads, which the child does not have
    assert in_child(lambda: text(llama)) == (0, expected)
    assert in_child(lambda: text(new())) == (0, expected)
    assert in_child(lambda: str(in_child(lambda: text(llama)))) == (0, str((0, expected)))
    assert text(llama, "a lazy") == text(new(), "a lazy")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_leaves_the_gpu_to_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    from tesseraq_gguf.runtime import load_llama_cpp

    function = type(load_llama_cpp().llama_decode)(lambda: "done", True)
    assert function() == "done"
    assert "cannot use the GPU that its parent uses" in in_child(function)[1]


def test_what_llama_cpp_has_against_a_file(
    new: Callable[..., Any], tiny_gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = tiny_gguf.read_bytes()
    broken = tmp_path / "broken.gguf"
    for content, said in {
        whole.replace(
            b"blk.1.attn_norm.weight", b"blk.1.attn_morn.weight"
        ): "tensor 'blk.1.attn_norm.weight' not found",
        whole.replace(b"general.architecture", b"general.architectura"): "unknown model architecture: ''",
        whole[:5000]: "failed to read",
        b"GGUF" + bytes(100): "bad GGUF version",
        b"something else" * 100: "invalid magic characters",
    }.items():
        broken.write_bytes(content)
        with pytest.raises(ModelLoadError, match=r"llama\.cpp cannot load") as caught:
            new(broken)
        assert said in str(caught.value), caught.value
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelLoadError, match="no file at"):
        new(tmp_path / "none.gguf")
    assert capfd.readouterr().err == ""


def test_no_memory_for_a_context(new: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from tesseraq_gguf.runtime import load_llama_cpp

    monkeypatch.setattr(load_llama_cpp().llama_cpp, "llama_init_from_model", lambda *_: None)
    with pytest.raises(
        ModelLoadError, match=r"llama\.cpp cannot make a context of 256 tokens for .*: it gives no reason"
    ):
        new()


def test_threads_are_those_that_chat_takes(tiny_gguf: Path) -> None:
    from tesseraq_gguf.runtime import Llama
    from tesseraq_gguf.runtime.threads import usable_cores

    llama = Llama(str(tiny_gguf), n_ctx=256, verbose=False)
    assert llama.n_threads == llama.n_threads_batch == usable_cores()


def test_nothing_to_compute(new: Callable[..., Any]) -> None:
    llama = new()
    with pytest.raises(BindingsError, match="nothing to go on from"):
        llama([])
    with pytest.raises(BindingsError, match="nothing was computed yet"):
        llama.sample()
    with pytest.raises(BindingsError, match=r"cannot compute: llama_decode returned -1 .*invalid token"):
        llama([10**6])
    text(llama)
    fresh = new()
    fresh.load_state(llama.save_state())
    with pytest.raises(BindingsError, match="there are no answers to choose from"):
        fresh.sample()
    with pytest.raises(BindingsError, match="the prompt has no tokens"):
        llama._batch.set_batch([], 0, False)
    with pytest.raises(BindingsError, match="has no room for 1,000 more"):
        llama._batch.set_batch([1] * 1000, 0, False)


def test_answers_that_are_not_numbers(new: Callable[..., Any], tiny_gguf: Path, tmp_path: Path) -> None:
    file = with_norm(tiny_gguf, tmp_path / "nan.gguf", np.nan)
    for temperature in (0, 0.8):
        with pytest.raises(BindingsError, match="not numbers"):
            text(new(file), temperature=temperature)


def with_norm(source: Path, out: Path, value: float) -> Path:
    """Copy a GGUF file with every weight of its last norm set to a value."""
    (norm,) = (tensor for tensor in open_gguf(source).tensors if tensor.name == "output_norm.weight")
    content = bytearray(source.read_bytes())
    content[norm.offset : norm.offset + norm.bytes] = np.full(norm.weights, value, np.float32).tobytes()
    out.write_bytes(content)
    return out


def test_a_broken_template_hinders_chats_alone(new: Callable[..., Any], tiny_gguf: Path, tmp_path: Path) -> None:
    whole = tiny_gguf.read_bytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(whole.replace(b"{% for m in messages %}", b"{% for m in messages !}"))
    llama = new(broken)
    assert text(llama) == text(new())
    with pytest.raises(ChatTemplateError, match="the chat template cannot be used: "):
        llama.create_chat_completion([{"role": "user", "content": "x"}])


def test_a_context_length_that_cannot_be_takes_no_memory(
    new: Callable[..., Any], tiny_gguf: Path, tmp_path: Path
) -> None:
    """The bindings made room for as many tokens as the model was trained on, at every text."""
    whole, key = tiny_gguf.read_bytes(), b"llama.context_length"
    at = whole.index(key) + len(key) + 4
    huge = tmp_path / "huge.gguf"
    huge.write_bytes(whole[:at] + (2**31 - 1).to_bytes(4, "little") + whole[at + 4 :])
    llama = new(huge)
    assert llama.tokenize(b"the quick brown fox " * 20) == new().tokenize(b"the quick brown fox " * 20)
    assert text(llama) == text(new())


def test_the_log_is_printed_as_asked(new: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    import llama_cpp

    new()
    assert capfd.readouterr().err == ""
    log = llama_cpp._tesseraq_log  # type: ignore[attr-defined]
    for level, said in ((2, b"info\n"), (3, b"warning\n"), (4, b"bad \xff\x1b["), (5, b"luck\n")):
        log._take(level, said, None)
    assert capfd.readouterr().err == "bad \ufffd\\x1b[luck\n"
    new(verbose=True)
    assert "llama_model_loader" in capfd.readouterr().err
    new()  # and quiet again


@pytest.mark.skipif(sys.platform != "linux", reason="where affinity is")
def test_cores_are_those_that_the_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tesseraq_gguf.runtime.threads import usable_cores

    for number in range(8):
        (tmp_path / str(number)).write_text(f"{number % 4},{number % 4 + 4}\n")
    for allowed, cores in (({0, 1, 4, 5}, 2), ({0, 1, 2, 3}, 4), ({7}, 1), (set(range(8)), 4)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid, allowed=allowed: allowed)
        assert usable_cores(str(tmp_path / "{}")) == cores
        assert usable_cores(str(tmp_path / "none{}")) == len(allowed)
