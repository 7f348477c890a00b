"""Chat: what the model is told, what the user sees, and what Ctrl-C does."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fake_llama import FakeLlama, lines

from tesseraq_gguf.errors import ChatTemplateError, UsageError
from tesseraq_gguf.gguf_files.inspection import open_gguf
from tesseraq_gguf.serving import chat
from tesseraq_gguf.serving import talk as talking
from tesseraq_gguf.serving.commands import Talk
from tesseraq_gguf.serving.conversation import ContextFullError, Conversation


def talk(conversation, read):
    talking.talk(Talk(conversation), read)


FULL = ValueError("Requested tokens (120) exceed context window of 100")


def test_the_template_gets_the_whole_history():
    model = FakeLlama((["Hel", "lo."], "stop"), (["Fine."], "stop"))
    conversation = Conversation(model, templated=True, max_tokens=7, temperature=0.5)
    assert list(conversation.answer("hi")) == ["Hel", "lo."]
    assert list(conversation.answer("how are you?")) == ["Fine."]
    assert model.heard[1] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "how are you?"},
    ]
    assert model.options == {"max_tokens": 7, "temperature": 0.5, "stream": True, "seed": 1}


def test_a_base_model_goes_on_with_one_text():
    model = FakeLlama(([" dog."], "stop"), ([" cat."], "stop"))
    conversation = Conversation(model, templated=False, max_tokens=7, temperature=0)
    list(conversation.answer("The quick"))
    list(conversation.answer("A lazy"))
    assert model.heard == ["The quick", "The quick dog.\nA lazy"]


def test_reset_forgets():
    model = FakeLlama((["Hello."], "stop"), (["Who?"], "stop"))
    conversation = Conversation(model, True, 7, 0)
    talk(conversation, lines("hi", "/reset", "me again", "/exit", "never read"))
    assert model.heard[1] == [{"role": "user", "content": "me again"}]


def test_commands_empty_lines_and_the_end_of_input(capsys):
    model = FakeLlama((["Hello."], "stop"))
    talk(Conversation(model, True, 7, 0), lines("", "  ", "/halp", "hi"))
    out, err = capsys.readouterr()
    assert out == "Hello.\n"
    assert "unknown command /halp; /help lists those there are" in err
    assert len(model.heard) == 1


def test_ctrl_c_stops_the_answer_and_not_the_program(capsys):
    model = FakeLlama((["Once ", "upon ", KeyboardInterrupt()], "stop"), (["Yes."], "stop"))
    conversation = Conversation(model, True, 7, 0)
    talk(conversation, lines("a story", "go on", KeyboardInterrupt()))
    out, err = capsys.readouterr()
    assert out == "Once upon \nYes.\n"
    assert "(stopped)" in err
    assert "/exit leaves" in err
    assert model.heard[1][1] == {"role": "assistant", "content": "Once upon "}


def test_an_answer_that_never_came_takes_its_question_with_it():
    model = FakeLlama(([KeyboardInterrupt()], "stop"), (["Yes."], "stop"))
    talk(Conversation(model, True, 7, 0), lines("a story", "go on"))
    assert [m["content"] for m in model.heard[1]] == ["go on"]


@pytest.mark.parametrize("templated", [True, False])
def test_a_full_context_is_said_and_loses_nothing(templated, capsys):
    model = FakeLlama((["Hello."], "stop"), ([FULL], None), (["Yes."], "stop"))
    conversation = Conversation(model, templated, 7, 0)
    talk(conversation, lines("hi", "a very long text", "short"))
    assert "the context of 100 tokens is full; /reset starts a new conversation" in capsys.readouterr().err
    assert "a very long text" not in str(model.heard[2])
    assert "Hello." in str(model.heard[2])


def test_other_errors_of_the_bindings_are_bugs():
    conversation = Conversation(FakeLlama(([ValueError("odd")], None)), True, 7, 0)
    with pytest.raises(ValueError, match="odd"):
        list(conversation.answer("hi"))


@pytest.mark.parametrize(
    ("tokens", "note"), [(50, "ended at --max-tokens 7"), (99, "the context of 100 tokens is full")]
)
def test_why_an_answer_ends_early(tokens, note, capsys):
    model = FakeLlama((["Hello."], "length"))
    model.n_tokens = tokens
    talk(Conversation(model, True, 7, 0), lines("hi"))
    assert note in capsys.readouterr().err


def test_one_shot_prints_the_answer_and_nothing_else(tiny_gguf, monkeypatch, capsys):
    monkeypatch.setattr(chat, "load", lambda *_: FakeLlama((["Hello."], "stop")))
    chat.chat(tiny_gguf, prompt="hi", temperature=0)
    assert capsys.readouterr() == ("Hello.\n", "")


def test_one_shot_with_a_prompt_that_does_not_fit(tiny_gguf, monkeypatch):
    monkeypatch.setattr(chat, "load", lambda *_: FakeLlama(([FULL], None)))
    with pytest.raises(ContextFullError):
        chat.chat(tiny_gguf, prompt="hi")


def test_a_base_model_is_announced_once(base_gguf, monkeypatch, capsys):
    monkeypatch.setattr(chat, "load", lambda *_: FakeLlama(([" a"], "stop"), ([" b"], "stop")))
    monkeypatch.setattr("builtins.input", lines("one", "two"))
    chat.chat(base_gguf)
    out, err = capsys.readouterr()
    assert out == " a\n b\n"
    assert err.count("no chat template") == 1


def test_no_question_has_the_same_answer_twice(capsys):
    model = FakeLlama(*[(["Hello."], "stop")] * 3)
    talk(Conversation(model, True, 7, 0.7, seed=2**32 - 3), lines("hi", "/reset", "hi", "hi"))
    assert model.seeds == [2**32 - 3, 2**32 - 2, 0]  # the last one means none


def test_a_seed_is_drawn_and_said(tiny_gguf, monkeypatch, capsys):
    seeds = []
    for _ in range(3):
        model = FakeLlama((["Hello."], "stop"))
        monkeypatch.setattr(chat, "load", lambda *_, model=model: model)
        chat.chat(tiny_gguf, prompt="hi")
        out, err = capsys.readouterr()
        assert (out, err) == ("Hello.\n", f"seed {model.seeds[0]}\n")
        seeds += model.seeds
    assert len(set(seeds)) == 3
    model = FakeLlama((["Hello."], "stop"))
    monkeypatch.setattr(chat, "load", lambda *_: model)
    chat.chat(tiny_gguf, prompt="hi", seed=5)
    assert (model.seeds, capsys.readouterr().err) == ([5], "")


def test_two_slashes_begin_a_text_with_one():
    model = FakeLlama((["Yes."], "stop"), (["No."], "stop"))
    talk(Conversation(model, True, 7, 0), lines("//etc/passwd", "//"))
    assert [messages[-1]["content"] for messages in model.heard] == ["/etc/passwd", "/"]


def test_what_is_no_text_is_refused(tiny_gguf, monkeypatch, capsys):
    monkeypatch.setattr(chat, "load", lambda *_: FakeLlama())
    with pytest.raises(UsageError, match="the prompt is not UTF-8 text"):
        chat.chat(tiny_gguf, prompt="caf\udce9")
    conversation = Conversation(FakeLlama((["Yes."], "stop")), True, 7, 0)
    with pytest.raises(UsageError, match="the input is not UTF-8 text"):
        talk(conversation, lines("good", "caf\udce9"))
    assert capsys.readouterr().out == "Yes.\n"
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    talk(Conversation(FakeLlama((["Yes."], "stop")), True, 7, 0), lines("caf\udce9", "good"))
    assert capsys.readouterr() == ("Yes.\n", "the input is not UTF-8 text\n")


def test_utf_8_is_understood_whatever_the_terminal_says():
    """Bytes of UTF-8 that came as lone surrogates, where the encoding of stdin is ASCII."""
    model = FakeLlama((["Yes."], "stop"))
    talk(Conversation(model, True, 7, 0), lines("caf\udcc3\udca9"))
    assert model.heard[0][-1]["content"] == "café"


def test_a_template_that_fails_ends_what_never_began_and_not_a_conversation(capsys):
    broken = ChatTemplateError("the chat template cannot be used: roles")
    with pytest.raises(ChatTemplateError, match=r"roles\. Another one can be given: --template FILE"):
        talk(Conversation(FakeLlama(([broken], None)), True, 7, 0), lines("hi"))
    model = FakeLlama((["Yes."], "stop"), ([broken], None), (["Fine."], "stop"))
    talk(Conversation(model, True, 7, 0), lines("hi", "odd", "again"))
    out, err = capsys.readouterr()
    assert out == "Yes.\nFine.\n"
    assert "roles" in err


def test_a_model_cannot_command_the_terminal(monkeypatch, capsys):
    answer = (["a\x1b[2J\tb\n", "\u202ec"], "stop")
    talk(Conversation(FakeLlama(answer), True, 7, 0), lines("hi"))
    assert capsys.readouterr().out == "a\x1b[2J\tb\n\u202ec\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    talk(Conversation(FakeLlama(answer), True, 7, 0), lines("hi"))
    assert capsys.readouterr().out == "a\\x1b[2J\tb\n\\u202ec\n"


def test_ctrl_c_ends_a_single_answer(run, tiny_gguf, monkeypatch):
    monkeypatch.setattr(chat, "load", lambda *_: FakeLlama((["Once ", KeyboardInterrupt()], "stop")))
    answer = run("chat", tiny_gguf, "-p", "hi", "--seed", 1)
    assert (answer.code, answer.out) == (130, "Once \n")
    assert "Traceback" not in answer.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--seed", -1), "--seed must be a number from 0 to 4294967294, not -1"),
        (("--seed", 2**32 - 1), "--seed must be a number from 0 to 4294967294"),
        (("--temperature", "nan"), "--temperature must be a number"),
        (("--temperature", "inf"), "--temperature must be a number"),
        (("--template", "none.jinja"), "the template none.jinja cannot be read: No such file or directory"),
        (("--template", "latin.jinja"), "the template latin.jinja is not UTF-8 text"),
        (("--template", "."), "the template . cannot be read: Is a directory"),
    ],
)
def test_what_cannot_be_meant(options, said, run, tiny_gguf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.jinja").write_bytes(b"caf\xe9")
    answer = run("chat", tiny_gguf, "-p", "hi", *options)
    assert answer.code == 2
    assert said in answer.error


def entry(kind, layout, *values):
    return struct.pack("<I", kind) + struct.pack(layout, *values)


@pytest.mark.parametrize(
    ("value", "tokens"),
    [
        (None, 4096),
        (entry(4, "<I", 300), 300),
        (entry(4, "<I", 100_000), 4096),
        (entry(4, "<I", 0), 4096),
        (entry(5, "<i", -5), 4096),
        (entry(10, "<Q", 2**63), 4096),
        (entry(6, "<f", 300.0), 4096),
        (entry(9, "<IQ3I", 4, 3, 1, 2, 3), 4096),
        (entry(8, "<Q4s", 4, b"many"), 4096),
    ],
)
def test_the_context_is_the_models_if_that_is_a_number_of_tokens(value, tokens, tiny_gguf, tmp_path):
    file = with_entry(tiny_gguf, tmp_path / "odd.gguf", "llama.context_length", value)
    assert chat._context(open_gguf(file)) == tokens


def with_entry(source: Path, out: Path, key: str, value: bytes | None) -> Path:
    """Copy a GGUF file with an entry of its metadata set to a value, its type before it; None takes it away."""
    file = open_gguf(source)
    entries = {name: entry.raw for name, entry in file.entries.items() if name != key}
    if value is not None:
        entries[key] = value
    begin = min(tensor.offset for tensor in file.tensors)
    content = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(file.tensors), len(entries)))
    for name, raw in entries.items():
        content += struct.pack("<Q", len(name.encode())) + name.encode() + raw
    for tensor in file.tensors:
        content += struct.pack("<Q", len(tensor.name)) + tensor.name.encode()
        content += struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        content += struct.pack("<IQ", tensor.type_id, tensor.offset - begin)
    out.write_bytes(bytes(content) + bytes(-len(content) % 32) + source.read_bytes()[begin:])
    return out


def with_template(source: Path, out: Path, template: str) -> Path:
    data = template.encode()
    return with_entry(source, out, "tokenizer.chat_template", struct.pack("<IQ", 8, len(data)) + data)


@pytest.mark.runtime
@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% if %}x", "Expected an expression, got 'end of statement block'"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.foo.bar }}", "'str object' has no attribute 'foo'"),
        ("{{ messages[0].content | no_such_filter }}", "No filter named 'no_such_filter'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a' + 1 }}", "can only concatenate str"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{# nothing #}", "it makes nothing of these messages"),
        ("{{ raise_exception('\x1b[2J') }}", r"\x1b[2J"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(template, said, run, tiny_gguf, tmp_path):
    file = with_template(tiny_gguf, tmp_path / "t.gguf", template)
    answer = run("chat", file, "-p", "hi", "--max-tokens", 3)
    assert answer.code == 1
    assert f"the chat template cannot be used: {said}" in answer.error


@pytest.mark.runtime
def test_another_template_can_be_given(run, tiny_gguf, tmp_path):
    broken = "{{ raise_exception('broken') }}"
    file = with_template(tiny_gguf, tmp_path / "t.gguf", broken)
    good = tmp_path / "good.jinja"
    good.write_text("{% for m in messages %}{{ m.content }}{% endfor %}", encoding="utf-8")
    assert run("chat", file, "-p", "hi", "--max-tokens", 3, "--template", good).code == 0
    bad = tmp_path / "bad.jinja"
    bad.write_text(broken, encoding="utf-8")
    assert "cannot be used: broken" in run("chat", tiny_gguf, "-p", "hi", "--template", bad).error


@pytest.mark.runtime
def test_a_template_that_is_no_text_counts_as_none(run, tiny_gguf, tmp_path):
    file = with_entry(tiny_gguf, tmp_path / "t.gguf", "tokenizer.chat_template", entry(4, "<I", 7))
    assert run("chat", file, "-p", "hi", "--max-tokens", 3).code == 0


@pytest.mark.runtime
@pytest.mark.parametrize("prompt", ["", " ", "\n"])
def test_an_empty_prompt(prompt, run, tiny_gguf, base_gguf, tmp_path):
    for file in (tiny_gguf, base_gguf):
        assert run("chat", file, "-p", prompt, "--max-tokens", 3).code == 0
    no_begin = with_entry(base_gguf, tmp_path / "n.gguf", "tokenizer.ggml.add_bos_token", entry(7, "<?", False))
    answer = run("chat", no_begin, "-p", "", "--max-tokens", 3)
    assert answer.code == 1
    assert "there is nothing to go on from" in answer.error


@pytest.mark.runtime
def test_attention_and_threads_are_those_of_llama_cpps_programs(tiny_gguf, monkeypatch):
    model: Any = chat.load(tiny_gguf)  # the class of the bindings says more than our protocol
    import llama_cpp

    assert model.context_params.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO
    assert model.n_threads == model.n_threads_batch == chat.usable_cores()


@pytest.mark.runtime
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_bytes_in_and_out_of_a_terminal_of_any_encoding(encoding, tiny_gguf, tmp_path):
    """What the encoding does not have is replaced; what goes in is UTF-8, or refused."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "tesseraq_gguf", "chat", str(tiny_gguf), "--max-tokens", "20", "--seed", "1"]
    done = subprocess.run(command, input="caf\u00e9 🦙\n".encode(), capture_output=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert done.stdout
    done = subprocess.run(command, input=b"caf\xff\n", capture_output=True, env=environment, timeout=60)
    if encoding != "latin-1":  # where every byte is a character
        assert (done.returncode, done.stderr.splitlines()[-1]) == (2, b"error: the input is not UTF-8 text")
    done = subprocess.run([*command, b"-p", b"caf\xff"], capture_output=True, env=environment, timeout=60)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, b"error: the prompt is not UTF-8 text")


@pytest.mark.runtime
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_while_a_model_speaks(tiny_gguf):
    """For real: the process is interrupted in the middle of an answer, and again at the prompt."""
    command = [sys.executable, "-u", "-m", "tesseraq_gguf", "chat", str(tiny_gguf), "--max-tokens", "480"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin and process.stdout
    try:
        process.stdin.write(b"hi\n")
        process.stdin.flush()
        os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert b"Traceback" not in err


@pytest.mark.runtime
@pytest.mark.parametrize("kind", ["tiny_gguf", "base_gguf"])
def test_a_tiny_model_speaks(kind, run, request):
    file = request.getfixturevalue(kind)
    answer = run("chat", file, "-p", "the quick brown", "--max-tokens", 8, "--temperature", 0)
    assert answer.code == 0, answer.err
    assert answer.out.strip()
    assert "llama" not in answer.err


@pytest.mark.runtime
def test_a_prompt_longer_than_the_context(run, tiny_gguf):
    answer = run("chat", tiny_gguf, "-p", "the quick brown fox " * 500)
    assert answer.code == 1
    assert "is full" in answer.error
