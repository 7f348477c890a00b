"""Commands of a chat: what each does to the conversation, and what is said where it cannot be meant."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from fake_llama import FakeLlama, lines

from tesseraq_gguf.errors import ChatTemplateError
from tesseraq_gguf.serving.commands import COMMANDS, Talk
from tesseraq_gguf.serving.conversation import Conversation
from tesseraq_gguf.serving.counting import Count
from tesseraq_gguf.serving.talk import talk


def converse(model: Any, *said: Any, templated: bool = True) -> Conversation:
    conversation = Conversation(model, templated, 7, 0)
    talk(Talk(conversation), lines(*said))
    return conversation


def test_help_lists_every_command(capsys):
    converse(FakeLlama(), "/help")
    err = capsys.readouterr().err
    assert [name for name in COMMANDS if name not in err] == ["/image"]  # which takes a projector
    assert "//" in err


def test_a_system_text_goes_before_everything_and_can_be_taken_away(capsys):
    model = FakeLlama(*[(["Yes."], "stop")] * 3)
    converse(model, "/system Speak like a pirate.", "hi", "/reset", "hi", "/system", "hi")
    assert [messages[0]["role"] for messages in model.heard] == ["system", "system", "user"]
    assert model.heard[1] == [
        {"role": "system", "content": "Speak like a pirate."},
        {"role": "user", "content": "hi"},
    ]


def test_a_template_that_refuses_a_system_text_ends_no_chat(capsys):
    model = FakeLlama(([ChatTemplateError("no system")], None), (["Yes."], "stop"))
    converse(model, "/system Be brief.", "hi", "/system", "hi")
    out, err = capsys.readouterr()
    assert out == "Yes.\n"
    assert "/system alone takes its text away" in err


def test_regenerating_replaces_the_last_answer_with_another_seed(capsys):
    model = FakeLlama((["One."], "stop"), (["Two."], "stop"), (["Three."], "stop"))
    conversation = converse(model, "hi", "/regenerate", "and?")
    assert model.heard[1] == [{"role": "user", "content": "hi"}]
    assert [said["content"] for said in conversation.messages] == ["hi", "Two.", "and?", "Three."]
    assert model.seeds == [0, 1, 2]


def test_a_base_model_goes_on_again_from_where_it_was():
    model = FakeLlama(([" dog."], "stop"), ([" fox."], "stop"), ([" end."], "stop"))
    converse(model, "The quick", "/regenerate", "A lazy", templated=False)
    assert model.heard == ["The quick", "The quick", "The quick fox.\nA lazy"]


@pytest.mark.parametrize("second", [([KeyboardInterrupt()], "stop"), ([ValueError("odd")], "stop")])
def test_an_answer_that_is_not_replaced_stays(second):
    model = FakeLlama((["One."], "stop"), second)
    conversation = Conversation(model, True, 7, 0)
    list(conversation.answer("hi"))
    with pytest.raises((KeyboardInterrupt, ValueError)):
        list(conversation.again())
    assert [said["content"] for said in conversation.messages] == ["hi", "One."]


def test_a_conversation_is_saved_and_taken_up(tmp_path, capsys):
    file = tmp_path / "said.json"
    converse(FakeLlama((["Aye 🦜."], "stop")), "/system Pirate.", "hi", f"/save {file}")
    assert json.loads(file.read_text(encoding="utf-8"))["messages"] == [
        {"role": "system", "content": "Pirate."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Aye 🦜."},
    ]
    model = FakeLlama((["Sure."], "stop"), (["No."], "stop"))
    conversation = converse(model, "forget me", f"/load {file}", "and?", f"/save {file}")
    assert [said["content"] for said in model.heard[1]] == ["Pirate.", "hi", "Aye 🦜.", "and?"]
    assert json.loads(file.read_text(encoding="utf-8"))["messages"] == conversation.messages
    assert [path.name for path in tmp_path.iterdir()] == ["said.json"]
    assert "1 question with answers taken up" in capsys.readouterr().err


def test_a_text_of_a_base_model_is_taken_up_as_well(tmp_path):
    file = tmp_path / "said.json"
    converse(FakeLlama(([" dog."], "stop")), "The quick", f"/save {file}", templated=False)
    model = FakeLlama(([" cat."], "stop"))
    converse(model, f"/load {file}", "A lazy", templated=False)
    assert model.heard == ["The quick dog.\nA lazy"]


def image_at(url):
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}


ASKED, SAID = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."}
SEEN = image_at("data:image;base64,AA==")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("no json", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ("7", 'it has no list of "messages"'),
        ('{"messages": [7]}', 'it has no list of "messages"'),
        ([ASKED], "user and assistant do not speak by turns"),
        ([SAID, ASKED], "user and assistant do not speak by turns"),
        ([ASKED, SAID, {"role": "system", "content": "x"}, SAID], "user and assistant do not speak by turns"),
        ([ASKED, {"role": "assistant", "content": None}], "a message has no text"),
        ([{"role": "user"}, SAID], "a message has no text"),
        ([{"role": "user", "content": "\ud800"}, SAID], "a message is not UTF-8 text"),
        ([SEEN, SAID], "which this chat does not see"),
        ([image_at("http://a/b"), SAID], "neither"),
        ([image_at("data:image;base64,???"), SAID], "neither"),
        ([image_at("data:image,AA=="), SAID], "neither"),
        ([{"role": "user", "content": [{"type": "audio"}]}, SAID], "neither text nor images"),
        ([{"role": "user", "content": ["hi"]}, SAID], "neither text nor images"),
    ],
)
def test_what_is_no_conversation_is_refused_and_changes_nothing(content, said, tmp_path, capsys):
    file = tmp_path / "odd.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    model = FakeLlama((["One."], "stop"), (["Two."], "stop"))
    converse(model, "first", f"/load {file}", "second")
    assert said in capsys.readouterr().err
    assert [each["content"] for each in model.heard[1]] == ["first", "One.", "second"]


def test_images_are_taken_up_by_a_chat_that_sees(tmp_path):
    file = tmp_path / "said.json"
    file.write_text(json.dumps([SEEN, SAID]))
    model = FakeLlama((["Red."], "stop"))
    conversation = Conversation(model, True, 7, 0)
    conversation.sees = True
    talk(Talk(conversation), lines(f"/load {file}", "and?"))
    assert model.heard == [[SEEN, SAID, {"role": "user", "content": "and?"}]]


def test_a_base_model_takes_no_system_text(tmp_path, capsys):
    file = tmp_path / "said.json"
    file.write_text(json.dumps({"messages": [{"role": "system", "content": "x"}, ASKED, SAID]}))
    converse(FakeLlama(), "/system x", f"/load {file}", templated=False)
    assert capsys.readouterr().err.count("chat template") == 2


def test_a_file_that_is_no_conversation_is_not_replaced(tmp_path, capsys):
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF\xff")
    converse(FakeLlama((["One."], "stop")), "hi", f"/save {model}", f"/save {tmp_path}", f"/save {tmp_path}/no/such")
    assert model.read_bytes() == b"GGUF\xff"
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith("is there and is no conversation: it stays as it is")
    assert said[1].endswith("is there and is no conversation: it stays as it is")
    assert "cannot be written: No such file or directory" in said[2]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/save", "/save wants FILE after it"),
        ("/load none.json", "none.json cannot be read: No such file or directory"),
        ("/load", "/load wants FILE after it"),
        ("/save x.json", "nothing was said yet"),
        ("/regenerate", "nothing was asked yet"),
        ("/reset now", "/reset takes nothing after it"),
        ("/stats", "nothing was answered yet"),
        ("/thought", "nothing was thought before the last answer"),
        ("/image x.png", "begin it with --mmproj"),
        ("/\x1b[2J", r"unknown command /\x1b[2J; /help lists"),
    ],
)
def test_what_cannot_be_meant_is_one_line(line, said, capsys):
    converse(FakeLlama(), line)
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1


def test_an_image_that_is_none_does_not_come_back(tmp_path, capsys):
    from tesseraq_gguf.errors import UsageError

    model = FakeLlama(([UsageError("llama.cpp cannot read the image")], None), (["Yes."], "stop"))
    conversation = Conversation(model, True, 7, 0)
    conversation.sees = True
    image = tmp_path / "text.png"
    image.write_text("no image")
    talk(Talk(conversation), lines(f"/image {image}", "what?", "and?"))
    assert "cannot read the image" in capsys.readouterr().err
    assert model.heard[1] == [{"role": "user", "content": "and?"}]


def test_stats_tell_tokens_and_speed(capsys):
    last = Count(10, 0.5, 30, 2.0)
    counter: Any = SimpleNamespace(last=last, all=last + Count(90, 0.5, 0, 0.0), answers=2)
    talk(Talk(Conversation(FakeLlama(), True, 7, 0), counter=counter), lines("/stats"))
    assert capsys.readouterr().err.splitlines() == [
        "last answer  10 tokens of prompt at 20.0 a second, 30 of answer at 15.0 a second",
        "all 2        100 tokens of prompt at 100.0 a second, 30 of answer at 15.0 a second",
        "context      10 of 100 tokens",
    ]
