"""A model whose answers are given, and a user whose lines are."""

from __future__ import annotations


class FakeLlama:
    """Answers with given pieces; a piece may be an exception."""

    def __init__(self, *answers, context=100):
        self.answers = list(answers)
        self.context = context
        self.n_tokens = 10
        self.heard = []
        self.options = {}
        self.seeds = []

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
        self.seeds.append(options["seed"])
        yield {"choices": [{"delta": {"role": "assistant"}, "finish_reason": None}]}
        for piece, reason in self._pieces():
            yield {"choices": [{"delta": {"content": piece} if piece else {}, "finish_reason": reason}]}

    def create_completion(self, prompt, **options):
        self.heard.append(prompt)
        self.options = options
        for piece, reason in self._pieces():
            yield {"choices": [{"text": piece, "finish_reason": reason}]}


def lines(*said):
    """What a user types, as a function like `input`; at its end the terminal closes."""
    remaining = iter(said)

    def read(_sign):
        line = next(remaining, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    return read
