"""Mutations with a name: faults that a learner could have for long before anybody sees it in a perplexity."""

from __future__ import annotations

from pathlib import Path

from check.mutate.mutation import Mutation, replaced

_TESSERAQ = "tesseraq_gguf/methods/tesseraq.py"
_SCALED = "tesseraq_gguf/methods/scaled_rounding.py"
_DISTILLATION = "tesseraq_gguf/learning/distillation.py"
_PROBLEM = "tesseraq_gguf/methods/problem.py"
_RECONSTRUCTION = "tesseraq_gguf/learning/reconstruction.py"

NAMED = (
    (
        "the schedule of progressive rounding is shifted by a stage",
        _TESSERAQ,
        "enumerate(self.soft_shares)",
        "enumerate((*self.soft_shares[1:], 0.0))",
        "tests/methods/test_tesseraq.py",
    ),
    (
        "a share of the schedule is another",
        _TESSERAQ,
        "0.18, 0.15, 0.12,",
        "0.18, 0.16, 0.12,",
        "tests/methods/test_tesseraq.py",
    ),
    (
        "v has no weight decay",
        _TESSERAQ,
        '"weight_decay": self.scale_decay,',
        '"weight_decay": 0.0,',
        "tests/methods/test_tesseraq.py",
    ),
    (
        "the first stage does not learn",
        _TESSERAQ,
        "            self._stage(problem, soft, stage)",
        "            self._stage(problem, soft, stage) if stage else None",
        "tests/methods/test_tesseraq.py",
    ),
    (
        "the loss is blind to sensitivity",
        _PROBLEM,
        "error[:, 0] @ self.sensitivity[0], error[:, 1:] @ self.sensitivity[1]",
        "error[:, 0].sum(-1), error[:, 1:].sum(-1)",
        "tests/learning/test_reconstruction.py",
    ),
    (
        "the loss takes the sensitivity of the first position for all",
        _PROBLEM,
        "error[:, 1:] @ self.sensitivity[1]",
        "error[:, 1:] @ self.sensitivity[0]",
        "tests/learning/test_reconstruction.py",
    ),
    (
        "the loss has no rounded activations",
        _PROBLEM,
        "return self.block.run(hidden, self.arguments, weights, vectors, self.rounding)",
        "return self.block.run(hidden, self.arguments, weights, vectors)",
        "tests/learning/test_reconstruction.py",
    ),
    (
        "the walk over the blocks rounds no activations",
        _RECONSTRUCTION,
        "if self.activations.rounds:",
        "if not self.activations.rounds:",
        "tests/learning/test_reconstruction.py",
    ),
    (
        "rates of LRQ and FlexRound do not fall",
        _SCALED,
        "            slower.step()\n",
        "",
        "tests/methods/test_scaled_rounding.py",
    ),
    (
        "rates of the last pass do not fall",
        _DISTILLATION,
        "return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, self.steps - rising)))",
        "return 1.0",
        "tests/learning/test_distillation.py",
    ),
    (
        "rates of the last pass do not rise first",
        _DISTILLATION,
        "rising = max(1, round(self.steps * self.warm_up))",
        "rising = 0",
        "tests/learning/test_distillation.py",
    ),
    (
        "the last pass loses Adam's state",
        _DISTILLATION,
        'self._state = kept["state"]',
        "self._state = None",
        "tests/learning/test_distillation.py",
    ),
    (
        "the last pass does not learn norms",
        _DISTILLATION,
        '"norm": rate * self.norm_rate,',
        '"norm": 0.0,',
        "tests/learning/test_distillation.py",
    ),
    (
        "the last pass does not learn the final norm",
        _DISTILLATION,
        "        final.descend_vectors(to_norm, rates)\n",
        "",
        "tests/learning/test_distillation.py",
    ),
    (
        "the last pass is judged on what it learned on",
        _DISTILLATION,
        "held = slice(len(tokens), None)",
        "held = slice(0, len(tokens))",
        "tests/learning/test_distillation.py",
    ),
    (
        "the last pass learns on what is held out",
        _DISTILLATION,
        "queue = torch.randperm(len(tokens), generator=generator)",
        "queue = torch.randperm(len(everything), generator=generator)",
        "tests/learning/test_distillation.py",
    ),
)
"""Name, file, text that stands there once, what stands there instead, and the tests that should notice."""


def named(root: Path) -> list[Mutation]:
    """Return the mutations of the list.

    Raises:
        StaleError: the code has changed, and one of them fits no more.
    """
    return [replaced(root, name, file, old, new, (tests,)) for name, file, old, new, tests in NAMED]
