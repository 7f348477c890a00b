"""Tasks: likelihoods as transformers has them, what prefixes share, the small task of this repository, and errors."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import make_model  # noqa: F401  (a fixture)

from tesseraq_gguf.converter.writer import write_plain
from tesseraq_gguf.evaluation import tasks

FOLDER = Path(__file__).parents[2] / "scripts" / "tasks"
EVERYDAY = FOLDER / "everyday.yaml"
KINDS = ["llama", "gemma3"]  # the latter with a sliding window of 64

LONG = "the quick brown fox jumps over the lazy dog while seven wizards box with a jolly gnome. " * 6
PAIRS = [
    ("the quick brown", " fox jumps over"),
    ("the quick brown", " fox"),
    ("the quick brown", " dog"),
    ("the quick brown", " wizards"),
    ("the quick brown ", "lazy gnome"),  # the space goes to the continuation
    ("", "seven wizards"),
    (LONG, " box with a jolly gnome."),
    (LONG, " a lazy dog."),
]


def requests(pairs):
    """What the harness hands to a model."""
    return [SimpleNamespace(args=pair, task_name="test") for pair in pairs]


@pytest.fixture(scope="module")
def pair(make_model, tmp_path_factory):  # noqa: F811
    """Return a function: our model and the harness's own of transformers, for a kind of tiny model, in 32 bits."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tesseraq_gguf.evaluation.harness import RuntimeLM

    made = {}

    def make(kind):
        if kind not in made:
            source = make_model(kind)
            file = tmp_path_factory.mktemp("tasks") / f"{kind}.gguf"
            write_plain(source, file, "f32")
            model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
            # what the converter writes into the file: for SentencePiece a BOS, and for Gemma no space before a text
            tokenizer = AutoTokenizer.from_pretrained(
                source.folder, add_bos_token=True, add_prefix_space=kind != "gemma3"
            )
            theirs = HFLM(pretrained=model, tokenizer=tokenizer, max_length=512, batch_size=1)
            made[kind] = RuntimeLM(file), theirs
        return made[kind]

    return make


@pytest.mark.runtime
@pytest.mark.parametrize("kind", KINDS)
def test_likelihoods_are_those_of_transformers(kind, pair):
    ours, theirs = pair(kind)
    wanted = theirs.loglikelihood(requests(PAIRS), disable_tqdm=True)
    found = ours.loglikelihood(requests(PAIRS), disable_tqdm=True)
    for (context, continuation), (a, a_greedy), (b, b_greedy) in zip(PAIRS, found, wanted, strict=True):
        assert ours._encode_pair(context or "x", continuation) == theirs._encode_pair(context or "x", continuation)
        assert a == pytest.approx(b, rel=1e-4), (context[-20:], continuation)
        assert a_greedy == b_greedy


@pytest.mark.runtime
def test_what_is_longer_than_the_context_loses_its_beginning(pair):
    ours, theirs = pair("llama")
    pairs = [(LONG * 4, " fox jumps"), ("the", " fox")]
    before = ours.truncated
    found = ours.loglikelihood(requests(pairs), disable_tqdm=True)
    assert ours.truncated == before + 1
    wanted = theirs.loglikelihood(requests(pairs), disable_tqdm=True)
    assert [a for a, _ in found] == pytest.approx([b for b, _ in wanted], rel=1e-4)


@pytest.mark.runtime
@pytest.mark.parametrize("kind", KINDS)
def test_whole_texts_are_as_likely_as_in_transformers(kind, pair, monkeypatch):
    ours, theirs = pair(kind)
    texts = [(LONG * 4,), ("the quick brown fox",), (LONG,)]  # the first takes several windows
    monkeypatch.setattr(theirs, "add_bos_token", False)  # BOS is given, not predicted
    wanted = theirs.loglikelihood_rolling(requests(texts), disable_tqdm=True)
    assert ours.loglikelihood_rolling(requests(texts)) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.runtime
@pytest.mark.parametrize("kind", KINDS)
def test_shared_prefixes_change_nothing_but_the_work(kind, pair):
    ours, _ = pair(kind)

    def work(batches):
        before = ours.decoder.computed
        found = []
        for batch in batches:
            ours.decoder.forget()
            found += ours.loglikelihood(requests(batch), disable_tqdm=True)
        return found, ours.decoder.computed - before

    questions = [
        (LONG + word, end) for word in ("fox", "dog") for end in (" over", " a lazy", " the", " seven wizards")
    ]
    alone, much = work([question] for question in questions)
    together, little = work([questions])
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], rel=1e-5)
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]
    assert little < much / 4


@pytest.mark.runtime
@pytest.mark.parametrize("rows", [1, 3])
def test_logits_come_in_pieces(rows, pair, monkeypatch):
    ours, _ = pair("llama")
    whole = ours.loglikelihood(requests(PAIRS), disable_tqdm=True)
    monkeypatch.setattr("tesseraq_gguf.evaluation.logits._ROWS", rows)
    monkeypatch.setattr(ours.decoder, "_size", 7)
    ours.decoder.forget()
    pieces = ours.loglikelihood(requests(PAIRS), disable_tqdm=True)
    assert [value for value, _ in pieces] == pytest.approx([value for value, _ in whole], rel=1e-5)


@pytest.mark.runtime
def test_a_memory_that_cannot_be_cut_is_filled_anew(pair, monkeypatch):
    """A recurrent model refuses to forget the end of a sequence."""
    ours, _ = pair("llama")
    whole = ours.loglikelihood(requests(PAIRS), disable_tqdm=True)
    api = ours.decoder._api
    stubborn = {name: getattr(api, name) for name in dir(api) if name.startswith("llama_")}
    stubborn["llama_memory_seq_rm"] = lambda *_: False
    monkeypatch.setattr(ours.decoder, "_api", SimpleNamespace(**stubborn))
    again = ours.loglikelihood(requests(PAIRS), disable_tqdm=True)
    assert [value for value, _ in again] == pytest.approx([value for value, _ in whole], rel=1e-5)


@pytest.mark.runtime
def test_answers_are_those_of_transformers(pair):
    ours, theirs = pair("llama")
    prompts = ["the quick brown fox", "seven wizards", "the quick lazy"]
    asked = requests([(prompt, {"until": ["\n\n"], "max_gen_toks": 12}) for prompt in prompts])
    for prompt, answer in zip(prompts, ours.generate_until(asked), strict=True):
        tokens = torch.tensor([ours.tok_encode(prompt)])
        with torch.no_grad():
            for _ in range(12):
                tokens = torch.cat([tokens, theirs.model(tokens).logits[:, -1].argmax(-1, keepdim=True)], 1)
        assert answer == ours._llama.detokenize(tokens[0, -12:].tolist()).decode("utf-8", "ignore")


@pytest.mark.runtime
def test_answers_end_at_a_stop_sequence_and_leave_likelihoods_alone(pair):
    ours, _ = pair("llama")
    likelihoods = ours.loglikelihood(requests(PAIRS), disable_tqdm=True)
    (whole,) = ours.generate_until(requests([("the quick brown fox", {"until": [], "max_gen_toks": 20})]))
    stop = whole[len(whole) // 2 :][:3]
    (cut,) = ours.generate_until(requests([("the quick brown fox", {"until": [stop], "max_gen_toks": 20})]))
    assert cut == whole[: whole.index(stop)]
    again = ours.loglikelihood(requests(PAIRS), disable_tqdm=True)
    assert [value for value, _ in again] == pytest.approx([value for value, _ in likelihoods], rel=1e-5)


@pytest.mark.runtime
def test_repetitions_of_a_sampled_answer_differ_and_a_second_run_does_not(pair):
    ours, _ = pair("llama")
    asked = requests([("the", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 16})] * 3)
    first = ours.generate_until(asked)
    assert len(set(first)) == 3
    assert ours.generate_until(asked) == first


@pytest.mark.runtime
@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_beams": 4}, "num_beams=4"), ({"max_gen_toks": 512}, "answers of up to 512 tokens, the context has 512")],
)
def test_answers_that_cannot_be_given(options, message, pair):
    from tesseraq_gguf.errors import EvaluationError

    ours, _ = pair("llama")
    with pytest.raises(EvaluationError, match=message):
        ours.generate_until(requests([("the", options)]))


# --- the small task of this repository, and the command line --------------------------------------------------------


def test_every_question_has_four_answers_and_one_is_right():
    rows = [json.loads(line) for line in (FOLDER / "everyday.jsonl").read_text().splitlines()]
    assert len({row["question"] for row in rows}) == 80
    assert all(len(set(row["choices"])) == 4 for row in rows)
    assert [[row["answer"] for row in rows].count(place) for place in range(4)] == [20] * 4


@pytest.mark.runtime
def test_a_task_file_from_any_folder(run, tiny_gguf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = run("eval", tiny_gguf, "--tasks", EVERYDAY, "--limit", 8, "--shots", 2)
    assert answer.code == 0, answer.err
    assert answer.err == ""
    lines = answer.out.replace("┃", "│").splitlines()
    header, first, second = (line.split("│")[1:-1] for line in lines if "│" in line)
    assert [cell.strip() for cell in header] == ["task", "metric", "value", "stderr", "items", "shots"]
    assert [cell.strip() for cell in first[:2]] == ["everyday", "acc"]
    assert [cell.strip() for cell in second[4:]] == ["8", "2"]
    assert not list(tmp_path.iterdir())


@pytest.mark.runtime
def test_a_folder_and_a_text_as_json(run, tiny_gguf, long_text):
    both = ("--tasks", f"{FOLDER}/", "--limit", 8, "--text", long_text, "--ctx", 64, "--chunks", 2, "--json")
    answer = run("eval", tiny_gguf, *both)
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found["perplexity"] > 1
    assert found["bytes"] == tiny_gguf.stat().st_size
    assert found["truncated"] == 0
    acc, acc_norm = found["tasks"]
    assert (acc["task"], acc["metric"], acc["filter"], acc["items"], acc["shots"]) == ("everyday", "acc", "none", 8, 0)
    assert acc_norm["metric"] == "acc_norm"
    assert 0 <= acc["value"] <= 1
    assert acc["stderr"] is not None


@pytest.mark.runtime
def test_a_group_finds_the_tasks_beside_it(run, tiny_gguf, tmp_path):
    from lm_eval.tasks import TaskManager

    shutil.copytree(FOLDER, tmp_path / "mine")
    group = "group: mine\ntask:\n  - everyday\naggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n"
    (tmp_path / "mine" / "mine.yaml").write_text(group)
    plain = TaskManager.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskManager, "__init__", lambda self, **given: plain(self, **given | {"include_defaults": False}))
        answer = run("eval", tiny_gguf, "--tasks", tmp_path / "mine" / "mine.yaml", "--limit", 4, "--json")
    assert answer.code == 0, answer.err
    assert {row["task"] for row in json.loads(answer.out)["tasks"]} == {"mine", "everyday"}


@pytest.fixture
def place(tmp_path, tiny_gguf, monkeypatch):
    """A folder with task files that have something wrong, from which commands run."""
    good = EVERYDAY.read_text()
    for name in ("everyday.py", "everyday.jsonl"):
        shutil.copy(FOLDER / name, tmp_path)
    away = good.replace("custom_dataset: !function everyday.load", "dataset_path: somebody/something")
    for name, text in {
        "good": good,
        "broken": "task: [everyday",
        "nameless": "hello: world\n",
        "function": good.replace("everyday.load", "everyday.lode"),
        "module": good.replace("everyday.load", "nowhere.load"),
        "field": good.replace("{{choices}}", "{{chioces}}"),
        "template": good.replace("{{question}}", "{{question"),
        "metric": good.replace("metric: acc_norm", "metric: luck"),
        "zero": good + "num_fewshot: 0\n",
        "away": away,
        "local": good.replace("custom_dataset: !function everyday.load", "dataset_path: json")
        + "dataset_kwargs:\n  data_files:\n    test: nowhere.jsonl\n",
        "dangerous": good + "unsafe_code: true\n",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "empty").mkdir()
    (tmp_path / "good.gguf").write_bytes(tiny_gguf.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


BAD = [
    ("nowhere.yaml", "no task file at nowhere.yaml"),
    ("./nowhere", "no task file at nowhere"),
    ("empty/", "the folder empty has no task in it"),
    (",", "names no task"),
    ("broken.yaml", "broken.yaml cannot be loaded: ParserError"),
    ("nameless.yaml", "nameless.yaml cannot be loaded: ValueError: Unknown config shape"),
    ("function.yaml", "has no function 'lode'"),
    ("module.yaml", "Cannot import module 'nowhere'"),
    ("field.yaml", "'chioces' is undefined"),
    ("template.yaml", "TemplateSyntaxError"),
    ("local.yaml", "nowhere.jsonl"),
    ("dangerous.yaml", "marked as unsafe"),
    ("zero.yaml --shots 2", "the task everyday is made for no examples: --shots has no meaning there"),
    ("good.yaml --shots 200", "Sample larger than population"),
    ("good.yaml --shots -1", "--shots must not be negative"),
    ("good.yaml --limit 0", "--limit must be at least 1"),
]


@pytest.mark.runtime
@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[arguments for arguments, _ in BAD])
def test_bad_tasks_are_one_clear_line(arguments, message, run, place):
    answer = run("eval", "good.gguf", "--tasks", *arguments.split())
    assert answer.code in (1, 2)
    assert message in answer.error
    assert answer.err.count("\n") == 1
    assert answer.out == ""


@pytest.mark.runtime
def test_data_that_cannot_be_fetched(run, place, monkeypatch):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'somebody/something' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    error = run("eval", "good.gguf", "--tasks", "away.yaml").error
    assert "Couldn't reach 'somebody/something' on the Hub (a task from the hub needs a network once)" in error


@pytest.mark.runtime
def test_a_metric_that_the_harness_would_leave_out(run, place, monkeypatch):
    import evaluate

    def unknown(_name):  # what it asks the hub for
        raise FileNotFoundError

    monkeypatch.setattr(evaluate, "load", unknown)
    answer = run("eval", "good.gguf", "--tasks", "metric.yaml", "--limit", 1)
    assert "the task everyday names the metric 'luck'" in answer.error


@pytest.mark.runtime
def test_an_unknown_name_brings_similar_ones(run, tiny_gguf):
    answer = run("eval", tiny_gguf, "--tasks", "hellaswagg")
    assert answer.code == 2
    assert "unknown task 'hellaswagg'; similar ones: hellaswag" in answer.error


@pytest.mark.runtime
def test_without_the_harness_the_error_says_how_to_get_it(run, tiny_gguf, monkeypatch):
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    answer = run("eval", tiny_gguf, "--tasks", EVERYDAY)
    assert answer.code == 2
    assert "pip install 'tesseraq-gguf[tasks]'" in answer.error


@pytest.mark.runtime
def test_a_bug_of_ours_shows_its_traceback(tiny_gguf, monkeypatch):
    def broken(_row):
        raise ZeroDivisionError

    loaded = tasks.load_tasks([str(EVERYDAY)])
    monkeypatch.setattr("tesseraq_gguf.evaluation.harness._log_sum_exp", broken)
    with pytest.raises(ZeroDivisionError):
        tasks.evaluate_tasks(tiny_gguf, loaded, limit=1)
