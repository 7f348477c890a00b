"""Thoughts: how templates mark them, and that no cut of a stream changes what is thought and what is answered."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from fake_llama import FakeLlama

from tesseraq_gguf.errors import ChatTemplateError
from tesseraq_gguf.serving.chat import Beside
from tesseraq_gguf.serving.conversation import Conversation
from tesseraq_gguf.serving.display import Folding, Plain
from tesseraq_gguf.serving.thinking import Marks, Splitter, marks, set_thinking

TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
CUTS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}{% endfor %}<|assistant|>"
KEEPS = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content %}<|channel>thought\n{{ m.reasoning_content }}\n<channel|>{% endif %}"
    "{{ m.content }}{% endfor %}<|assistant|>"
)
TOOLS = KEEPS.replace("if m.reasoning_content", "if m.reasoning_content and m.tool_calls")


def render(template: str) -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    return lambda messages: made.render(messages=messages)


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (TURNS, None),
        (CUTS, Marks("<think>", "</think>")),
        (CUTS + "<think>\n", Marks("<think>", "</think>", begun=True)),
        (CUTS.replace("think", "seed:think"), Marks("<seed:think>", "</seed:think>")),
        (CUTS.replace("</think>", "[/THINK]"), Marks("[THINK]", "[/THINK]")),
        (KEEPS, Marks("<|channel>thought", "<channel|>")),
        (TOOLS, Marks("<|channel>thought", "<channel|>")),
        (TURNS + "{# <|reasoning_effort|> #}", None),
    ],
)
def test_a_template_is_asked_how_it_marks_thoughts(template: str, found: Marks | None):
    assert marks(template, render(template)) == found


def test_a_template_that_fails_marks_nothing():
    def fail(_: Any) -> str:
        raise ChatTemplateError("broken")

    assert marks("</think>", fail) is None


def split(marked: Marks | None, pieces: list[str]) -> tuple[str, str]:
    splitter = Splitter(marked)
    found = [each for piece in pieces for each in splitter.feed(piece)] + list(splitter.finish())
    return "".join(t for thinks, t in found if thinks), "".join(t for thinks, t in found if not thinks)


@pytest.mark.parametrize(
    ("text", "begun", "thought", "answer"),
    [
        ("<think>Hm.</think>Yes.", False, "Hm.", "Yes."),
        ("\n<think></think>Yes.", False, "", "Yes."),
        ("Hm. <b></think> Yes.", True, "Hm. <b>", " Yes."),
        ("Hm", True, "Hm", ""),
        ("<think>Hm</thi", False, "Hm</thi", ""),
        ("<thick>", False, "", "<thick>"),
        ("<thi", False, "", "<thi"),
        ("Use <think>a</think>.", False, "", "Use <think>a</think>."),
        ("<think>a</think>b<think>c</think>", False, "a", "b<think>c</think>"),
    ],
)
def test_thought_and_answer_are_told_apart_in_any_pieces(text, begun, thought, answer):
    marked = Marks("<think>", "</think>", begun)
    for first, second in itertools.combinations(range(len(text) + 1), 2):
        pieces = [text[:first], text[first:second], text[second:]]
        assert split(marked, pieces) == (thought, answer), pieces
    assert split(marked, list(text)) == (thought, answer)
    assert split(None, list(text)) == ("", text)


def test_an_answer_is_not_held_back():
    splitter = Splitter(Marks("<think>", "</think>"))
    assert list(splitter.feed("Well, ")) == [(False, "Well, ")]
    assert list(splitter.feed("<")) == [(False, "<")]


def test_a_thought_is_folded_to_a_line_and_kept(capsys):
    display = Folding(Marks("<think>", "</think>"))
    display.show(iter(["<think>\nLet me see.", "</think>\n\n", "Yes."]))
    assert capsys.readouterr().out == "thought for 0 s\nYes.\n"
    assert display.thought.strip() == "Let me see."
    display.show(iter(["No."]))
    assert (capsys.readouterr().out, display.thought) == ("No.\n", "")


def test_a_thought_is_shown_on_demand(capsys):
    Folding(Marks("<think>", "</think>"), open_=True).show(iter(["<think>Let ", "me see.\x1b[2J</think>\nYes."]))
    assert capsys.readouterr().out == "Let me see.\\x1b[2J\nthought for 0 s\nYes.\n"


def test_what_is_stopped_within_a_thought_ends_its_line(capsys):
    def pieces():
        yield "<think>Hm"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Folding(Marks("<think>", "</think>")).show(pieces())
    assert capsys.readouterr().out == "thought for 0 s, and gave no answer\n"


def test_elsewhere_thoughts_come_as_they_are(capsys):
    Plain().show(iter(["<think>Hm", "</think>Yes."]))
    assert capsys.readouterr().out == "<think>Hm</think>Yes.\n"


def test_a_folded_thought_stays_in_the_conversation():
    """Templates cut it off, or want it."""
    conversation = Conversation(FakeLlama((["<think>Hm</think>", "Yes."], "stop")), True, 7, 0)
    Folding(Marks("<think>", "</think>")).show(conversation.answer("hi"))
    assert conversation.messages[1]["content"] == "<think>Hm</think>Yes."


@pytest.mark.runtime
def test_marks_that_answers_leave_out_are_none(tiny_gguf):
    """A thought would never end on the screen."""
    from tesseraq_gguf.serving import chat

    model = chat.load(tiny_gguf)
    assert chat._marks(model, CUTS + "<think>") == Marks("<think>", "</think>", begun=True)
    template = KEEPS.replace("<|channel>thought\n", "<s>").replace("\n<channel|>", "</s>")
    assert marks(template, render(template)) == Marks("<s>", "</s>")
    assert chat._marks(model, template) is None
    assert chat._marks(model, "{{ raise_exception('broken') }}") is None


SWITCHED = TURNS + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"


def test_thinking_is_switched_where_the_template_has_a_switch():
    hi = [{"role": "user", "content": "hi"}]
    assert render(set_thinking(SWITCHED, False))(hi) == "<|user|>hi<|assistant|><think></think>"
    assert render(set_thinking(SWITCHED, True))(hi) == "<|user|>hi<|assistant|>"
    with pytest.raises(ChatTemplateError, match="no enable_thinking: leave --reasoning out"):
        set_thinking(TURNS, False)


def test_a_model_hears_that_it_shall_not_think(run, tiny_gguf, tmp_path, monkeypatch):
    from tesseraq_gguf.serving import chat

    template = tmp_path / "t.jinja"
    template.write_text(SWITCHED)
    heard = []
    monkeypatch.setattr(chat, "load", lambda _, given: heard.append(given) or FakeLlama((["Yes."], "stop")))
    assert run("chat", tiny_gguf, "-p", "hi", "--template", template, "--reasoning", "off").code == 0
    assert heard[0] == set_thinking(SWITCHED, False)
    answer = run("chat", tiny_gguf, "-p", "hi", "--reasoning", "on")
    assert answer.code == 1
    assert "leave --reasoning out" in answer.error
    assert Beside().thinking is None


def test_a_base_model_cannot_be_told_to_think(run, base_gguf):
    answer = run("chat", base_gguf, "-p", "hi", "--reasoning", "off")
    assert answer.code == 2
    assert "no chat template that thinking could be turned on or off in" in answer.error
