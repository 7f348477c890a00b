"""A GGUF file as a language model of lm-evaluation-harness, on our runtime. Importing this needs `lm-eval`.

    from lm_eval import simple_evaluate
    simple_evaluate(model=RuntimeLM("out.gguf"), tasks=["arc_easy"])

is what `tasks.evaluate_tasks` does, with fewer side effects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from numpy.typing import NDArray

from tesseraq_gguf.errors import EvaluationError
from tesseraq_gguf.evaluation.logits import PrefixDecoder, Tokens
from tesseraq_gguf.runtime import load_llama_cpp
from tesseraq_gguf.serving.chat import load

Watch = Callable[[str, int, int], None]
"""Receives what is being computed, requests done, and requests in all."""

_ANSWER_TOKENS = 256
"""Most tokens of an answer whose task does not say; lm-evaluation-harness's own default."""

# an option of a task's generation_kwargs → the parameter of the bindings, and its value where the task says nothing:
# nothing cut off and nothing penalised
_SAMPLING = {
    "top_k": ("top_k", 0),
    "top_p": ("top_p", 1.0),
    "min_p": ("min_p", 0.0),
    "repetition_penalty": ("repeat_penalty", 1.0),
}


class RuntimeLM(TemplateLM):  # type: ignore[misc]
    """lm-evaluation-harness's interface to a GGUF file.

    A context and its continuation are encoded as one text and split where the context's own tokens end, as the
    harness does it for transformers. The file's metadata says whether texts begin with a BOS token. Requests are
    sorted by their tokens, so that continuations of one context, and questions after the same examples, share what
    they begin with.

    Args:
        file: the GGUF file.
        watch: told how far it is.

    Attributes:
        truncated: requests so far that were longer than the context and lost their beginning.

    Raises:
        FileFormatError: the file is missing, damaged, or refused by llama.cpp.
        RuntimeMissingError: the runtime is not built.
    """

    def __init__(self, file: Path | str, watch: Watch = lambda *_: None) -> None:
        super().__init__()
        # without flash attention, which rounds more: figures shall not depend on which requests come together
        self._llama = cast(Any, load(Path(file), flash_attention=False))
        api = load_llama_cpp()
        self._adds_bos = bool(api.llama_vocab_get_add_bos(api.llama_model_get_vocab(self._llama.model)))
        self.decoder = PrefixDecoder(api, self._llama)
        self._watch = watch
        self.truncated = 0

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self._llama.token_eos())

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: BOS, or EOS in a vocabulary without one."""
        bos = int(self._llama.token_bos())
        return bos if bos >= 0 else self.eot_token_id

    @property
    def max_length(self) -> int:
        """Tokens of the context."""
        return int(self._llama.n_ctx())

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text; those that look like special tokens are.

        Args:
            string: the text.
            add_special_tokens: whether BOS comes first; by default as the file says, and never twice.
        """
        tokens: list[int] = self._llama.tokenize(string.encode("utf-8", "replace"), add_bos=False, special=True)
        bos = self.prefix_token_id
        wanted = self._adds_bos and tokens[:1] != [bos] if add_special_tokens is None else add_special_tokens
        return [bos, *tokens] if wanted else tokens

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood in nats of each whole text after one BOS, in windows of the context's length."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, (likelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += likelihood
        return sums

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Return log-likelihood in nats, and whether every token is the likeliest, of continuations.

        Args:
            requests: (texts, tokens of the context, tokens of the continuation) of each.

        Raises:
            EvaluationError: a continuation is empty, or longer than the context.
        """
        # the last token predicts nothing; several continuations of one token have the same input
        inputs: dict[Tokens, list[int]] = {}
        for index, (texts, context, continuation) in enumerate(requests):
            if not continuation:
                raise EvaluationError(f"a task asks for the likelihood of nothing: {texts!r}")
            if len(continuation) > self.max_length:
                raise EvaluationError(
                    f"a task asks for the likelihood of {len(continuation)} tokens, the context has {self.max_length}"
                )
            whole = (*context, *continuation)
            self.truncated += len(whole) > self.max_length + 1
            inputs.setdefault(whole[-self.max_length - 1 : -1], []).append(index)
        answers = [(0.0, True)] * len(requests)
        done = 0
        for tokens in sorted(inputs):
            members = inputs[tokens]
            starts = {index: len(tokens) - len(requests[index][2]) for index in members}
            for position, row in self.decoder.rows(tokens, min(starts.values())):
                normaliser, likeliest = _log_sum_exp(row), int(row.argmax())
                if math.isnan(normaliser):
                    raise EvaluationError("the model's answers are not numbers (NaN): its file is broken")
                for index, start in starts.items():
                    if position >= start:
                        token = requests[index][2][position - start]
                        likelihood, greedy = answers[index]
                        answers[index] = (likelihood + float(row[token]) - normaliser, greedy and token == likeliest)
            done += len(members)
            self._watch("scoring", done, len(requests))
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the answer to each prompt, up to the first of its stop sequences.

        Raises:
            EvaluationError: a task wants more tokens than the context has, or options that we do not have.
        """
        self._llama.reset()
        answers = [""] * len(requests)
        options = [self._options(request.args[1]) for request in requests]
        prompts = [
            self._prompt(request.args[0], wanted["max_tokens"])
            for request, wanted in zip(requests, options, strict=True)
        ]
        for done, index in enumerate(sorted(range(len(requests)), key=prompts.__getitem__), 1):
            # the place is the seed: repetitions of a request differ, and a second run does not
            answer = self._llama.create_completion(prompts[index], seed=index, **options[index])
            answers[index] = answer["choices"][0]["text"]
            self._watch("answering", done, len(requests))
        self.decoder.forget()
        return answers

    def _prompt(self, text: str, answer: int) -> list[int]:
        """The end of a prompt that leaves room for an answer."""
        room = self.max_length - answer
        if room < 1:
            raise EvaluationError(
                f"a task wants answers of up to {answer} tokens, the context has {self.max_length} for both"
            )
        tokens = self.tok_encode(text) or [self.prefix_token_id]
        self.truncated += len(tokens) > room
        return tokens[-room:]

    def _options(self, generation: dict[str, Any]) -> dict[str, Any]:
        """The bindings' parameters for a task's `generation_kwargs`."""
        given = dict(normalize_gen_kwargs(generation, _ANSWER_TOKENS))
        sample = given.pop("do_sample")
        temperature = given.pop("temperature", 1.0)
        options = {
            "stop": [stop for stop in given.pop("until") if stop],
            "max_tokens": given.pop("max_gen_toks"),
            "temperature": temperature if sample else 0.0,
        }
        for name, (parameter, default) in _SAMPLING.items():
            options[parameter] = given.pop(name, default)
        if unknown := [f"{name}={value}" for name, value in given.items() if (name, value) != ("num_beams", 1)]:
            raise EvaluationError(f"a task asks for what this runtime does not do: {', '.join(unknown)}")
        return options


def _log_sum_exp(row: NDArray[np.float32]) -> float:
    """The logarithm of the sum of exponentials, computed in 64 bits."""
    highest = float(row.max())
    return highest + float(np.log(np.exp(row.astype(np.float64) - highest).sum()))
