"""Chat: what the model is told, what the user sees, and what Ctrl-C does."""

from __future__ import annotations

import pytest

from tesseraq_gguf import chat
from tesseraq_gguf.chat import ContextFullError, Conversation, talk


class FakeLlama:
    """Answers with given pieces; a piece may be an exception."""

    def __init__(self, *answers, context=100):
        self.answers = list(answers)
        self.context = context
        self.n_tokens = 10
        self.heard = []
        self.options = {}

    def n_ctx(self):
        return self.context

    def _pieces(self):
        pieces, reason = self.answers.pop(0)
        for piece in pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield piece, None
        yield "", reason

    def create_chat_completion(self, messages, **options):
        self.heard.append(messages)
        self.options = options
        yield {"choices": [{"delta": {"role": "assistant"}, "finish_reason": None}]}
        for piece, reason in self._pieces():
            yield {"choices": [{"delta": {"content": piece} if piece else {}, "finish_reason": reason}]}

    def create_completion(self, prompt, **options):
        self.heard.append(prompt)
        self.options = options
        for piece, reason in self._pieces():
            yield {"choices": [{"text": piece, "finish_reason": reason}]}


FULL = ValueError("Requested tokens (120) exceed context window of 100")


def lines(*said):
    """What a user types, as a function like `input`; at its end the terminal closes."""
    remaining = iter(said)

    def read(_sign):
        line = next(remaining, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    return read


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
    assert model.options == {"max_tokens": 7, "temperature": 0.5, "stream": True}


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
    talk(Conversation(model, True, 7, 0), lines("", "  ", "/help", "hi"))
    out, err = capsys.readouterr()
    assert out == "Hello.\n"
    assert "unknown command /help" in err
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
    monkeypatch.setattr(chat, "load", lambda _file: FakeLlama((["Hello."], "stop")))
    chat.chat(tiny_gguf, prompt="hi")
    assert capsys.readouterr() == ("Hello.\n", "")


def test_one_shot_with_a_prompt_that_does_not_fit(tiny_gguf, monkeypatch):
    monkeypatch.setattr(chat, "load", lambda _file: FakeLlama(([FULL], None)))
    with pytest.raises(ContextFullError):
        chat.chat(tiny_gguf, prompt="hi")


def test_a_base_model_is_announced_once(base_gguf, monkeypatch, capsys):
    monkeypatch.setattr(chat, "load", lambda _file: FakeLlama(([" a"], "stop"), ([" b"], "stop")))
    monkeypatch.setattr("builtins.input", lines("one", "two"))
    chat.chat(base_gguf)
    out, err = capsys.readouterr()
    assert out == " a\n b\n"
    assert err.count("no chat template") == 1


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
