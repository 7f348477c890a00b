"""What stands behind the blocks: the final norm, the output matrix, and what a model makes of their product.

    logits = finish(W·enter(norm(h)))

No architecture is known by name. The norm is what runs after the last block, W is what transformers calls the output
embeddings, and the rest (biases, scales, caps) is done by the model's own `forward`, in which the base model and the
output matrix are stand-ins. `check` compares the whole with that `forward` left as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tesseraq_gguf.errors import ModelError
from tesseraq_gguf.models.stand_ins import placeholders, put, replaced, stand_in, watching
from tesseraq_gguf.models.walk import Walk

ANSWERS = 256
"""Positions whose answers, a number for every word of the vocabulary, are in memory at a time."""

_ROWS = 64
"""Rows of the output matrix that a head is checked with."""

_LEAST = 1e-30
"""Probabilities below it are taken to be 0: products with the least numbers of float32 take a hundred times as long."""

_TOLERANCE = 1e-6
"""Normalised squared error of logits that float32 arithmetic may make."""

Parts = Callable[[], Iterator[Tensor]]
"""Gives a matrix from its first row to its last, some rows at a time, and again when it is called again."""

Multiply = Callable[[Tensor], Tensor]
"""What an output matrix does: from [..., hidden] to [..., vocabulary]."""


class Head:
    """A model's final norm and what it does to the products of its output matrix, which is not held here.

    Args:
        model: the transformers model; its parameters may be on the meta device.
        walk: its blocks.
        norm: what runs behind them, with its weights.
        prefix: checkpoint prefix of the norm's parameters, with its final dot.
        bias: of the output matrix, float32 [vocabulary] on the device.
        device: of all of it, and of what it is given.

    """

    def __init__(
        self, model: Any, walk: Walk, norm: nn.Module, prefix: str, bias: Tensor | None, device: torch.device
    ) -> None:
        self.norm, self.prefix, self.bias, self.device = norm, prefix, bias, device
        self._walk, self._name = walk, type(model).__name__
        self._states: Tensor | None = None
        self._multiply: Multiply | None = None
        with replaced(model, {model.base_model_prefix: nn.Identity()}):
            self._shell = copy.deepcopy(model)
        put(self._shell, model.base_model_prefix, self._given(model))
        name, matrix = output_of(model)
        self._width = matrix.in_features
        put(self._shell, name, stand_in(self._shell.get_submodule(name), lambda x: self._multiplied(x)))

    @property
    def vectors(self) -> dict[str, nn.Parameter]:
        """The final norm's parameters, vectors, by name within it."""
        return {name: p for name, p in self.norm.named_parameters() if p.dim() == 1}

    def fed(self, hidden: Tensor, vectors: Mapping[str, Tensor] | None = None) -> Tensor:
        """What the output matrix multiplies, float32 [positions, hidden].

        Args:
            hidden: what leaves the last block, float32 [positions, width] on the device.
            vectors: parameters of the final norm to use in place of its own, by name within it.
        """
        seen: list[Tensor] = []

        def see(x: Tensor) -> Tensor:
            seen.append(x[0])
            return x

        self._forward(self._normed(hidden, vectors), see)
        return seen[0].float()

    def finish(self, products: Tensor) -> Tensor:
        """Logits of products of the output matrix, both float32 [positions, vocabulary], element by element."""
        states = products.new_zeros(len(products), 1)
        return self._forward(states, lambda _: self._biased(products)[None])

    def logits(
        self, hidden: Tensor, weight: Tensor, vectors: Mapping[str, Tensor] | None = None, first: int = 0
    ) -> Tensor:
        """Logits float32 [positions, words], differentiable.

        Args:
            hidden: final hidden states, float32 [positions, hidden] on the device.
            weight: an output matrix [words, hidden], or some of its rows; products are made in its dtype.
            vectors: parameters of the final norm to use in place of its own, by name within it.
            first: the word of the first row.
        """
        return self._forward(
            self._normed(hidden, vectors), lambda x: self._biased((x.to(weight.dtype) @ weight.T).float(), first)
        )

    def mean_loss(self, hidden: Tensor, tokens: Tensor, weight: Tensor) -> float:
        """Return the mean cross-entropy in nats per token.

        Args:
            hidden: final hidden states, float32 [samples, length, hidden].
            tokens: int64 [samples, length].
            weight: the output matrix [vocabulary, hidden] on the device.
        """
        total = 0.0
        for h, t in zip(hidden, tokens, strict=True):
            logits = self.logits(h.to(self.device), weight)
            total += float(nn.functional.cross_entropy(logits[:-1], t[1:].to(self.device), reduction="sum"))
        return total / (tokens.shape[0] * (tokens.shape[1] - 1))

    def answer_gradient(self, hidden: Tensor, parts: Parts, generator: torch.Generator) -> Tensor:
        """Gradient of the log-probability of answers drawn from the model itself.

        The output matrix is seen twice, some rows at a time: for the sums of probabilities first, then for the words
        that are drawn and for ∂(z_y - log Σ exp z)/∂h.

        Args:
            hidden: final hidden states, float32 [samples, length, hidden].
            parts: gives the output matrix from its first row to its last, [some words, hidden] at a time.
            generator: draws one answer per position.

        Returns:
            The gradient with respect to `hidden`, of the same shape, on the CPU.
        """
        states = hidden.flatten(0, 1).to(self.device)
        uniform = torch.cat([torch.rand(len(h), 1, generator=generator) for h in hidden]).to(self.device)
        total = torch.full((len(states), 1), -torch.inf, dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for logits in self._logits(states, parts):
                total = torch.logaddexp(total, logits.logsumexp(-1, keepdim=True).double())
        below, gradient = torch.zeros_like(total), torch.zeros_like(states)
        states.requires_grad_()
        with torch.enable_grad():
            for logits in self._logits(states, parts):
                p = (logits.detach() - total).exp()
                reached = below + p.cumsum(-1)
                drawn = (reached > uniform) & (reached - p <= uniform)
                below = reached[:, -1:]
                slope = drawn.float() - torch.where(p < _LEAST, 0.0, p).float()
                gradient += torch.autograd.grad(logits, states, slope)[0]
        return gradient.view(hidden.shape).cpu()

    def _logits(self, states: Tensor, parts: Parts) -> Iterator[Tensor]:
        """Yield logits [positions, some words] of states [positions, hidden]."""
        first = 0
        for part in parts():
            yield self.logits(states, part, first=first)
            first += len(part)

    @torch.no_grad()
    def moment(self, hidden: Tensor) -> Tensor:
        """Mean x·xᵀ, float32 [hidden, hidden], of what the output matrix is fed.

        Args:
            hidden: final hidden states, float32 [samples, length, hidden].
        """
        moment = torch.zeros(self._width, self._width, device=self.device)
        for h in hidden:
            x = self.fed(h.to(self.device))
            moment.addmm_(x.T, x)
        return moment / (hidden.shape[0] * hidden.shape[1])

    def divergence(
        self, student: Tensor, teacher: Tensor, vectors: Mapping[str, Tensor], students: Tensor, teachers: Tensor
    ) -> tuple[float, Tensor, dict[str, Tensor]]:
        """Kullback-Leibler divergence of answers, KL(teacher || student), with its gradient.

        Args:
            student: final hidden states [positions, hidden].
            teacher: those of the teacher, of the same shape.
            vectors: the student's parameters of the final norm, by name within it.
            students: the student's output matrix [vocabulary, hidden].
            teachers: the teacher's.

        Returns:
            The mean over positions in nats, its gradient with respect to `student`, and with respect to the norm.
        """
        total, gradients = 0.0, []
        weights = {name: w.detach().requires_grad_() for name, w in vectors.items()}
        to_norm = {name: torch.zeros_like(w) for name, w in weights.items()}
        for s, t in zip(student.split(ANSWERS), teacher.split(ANSWERS), strict=True):
            s = s.detach().requires_grad_()
            with torch.enable_grad():
                logits = self.logits(s, students, weights)
            with torch.no_grad():
                # the slope at the logits is made by hand: as few numbers per word of the vocabulary as possible
                wanted = self.logits(t, teachers).log_softmax(-1)
                got = logits.log_softmax(-1)
                probability = wanted.exp()
                total += float((probability * (wanted - got)).sum())
                slope = got.exp_().sub_(probability).div_(len(student))
                del wanted, probability
            found = torch.autograd.grad(logits, [s, *weights.values()], slope)
            gradients.append(found[0])
            for name, g in zip(weights, found[1:], strict=True):
                to_norm[name] += g
        return total / len(student), torch.cat(gradients), to_norm

    def move(self, products: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and by how much they change with the products, to first order; all [positions, vocabulary]."""
        with torch.enable_grad():
            products = products.detach().requires_grad_()
            logits = self.finish(products)
            slope = torch.autograd.grad(logits.sum(), products)[0]
        return logits.detach(), slope.mul_(change)

    def _normed(self, state: Tensor, vectors: Mapping[str, Tensor] | None) -> Tensor:
        hidden = self._walk.fed(state)
        return functional_call(self.norm, dict(vectors), (hidden,)) if vectors else self.norm(hidden)

    def _biased(self, products: Tensor, first: int = 0) -> Tensor:
        return products if self.bias is None else products + self.bias[first : first + products.shape[-1]]

    def _forward(self, states: Tensor, multiply: Multiply) -> Tensor:
        """Logits [positions, ...] that the model makes of what its base model gives, [positions, hidden]."""
        self._states, self._multiply = states[None], multiply
        try:
            return self._shell(input_ids=states.new_zeros(1, len(states), dtype=torch.int64), use_cache=False).logits[0]
        except ModelError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).strip().split("\n")[0]
            raise ModelError(f"what {self._name} makes of its output matrix cannot be asked: {reason}") from error
        finally:
            self._states, self._multiply = None, None

    def _multiplied(self, x: Tensor) -> Tensor:
        assert self._multiply
        return self._multiply(x)

    def _given(self, model: Any) -> nn.Module:
        """The base model without anything inside; what the model runs of it gives states."""
        path = _body(model, self._walk, self.device).split(".")
        made: Any = stand_in(model.get_submodule(".".join(path)), lambda *_, **__: _Output(self._states))
        made.__dict__["_modules"] = {}
        while len(path) > 1:
            child = path.pop()
            outer: Any = copy.copy(model.get_submodule(".".join(path)))
            outer.__dict__["_modules"] = {child: made}
            made = outer
        return made  # type: ignore[no-any-return]


class _Output:
    """What a base model gives, by name or by place; whatever else it may give is None."""

    def __init__(self, states: Tensor | None) -> None:
        self.last_hidden_state = states

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, place: int | slice) -> Any:
        return (self.last_hidden_state,)[place]


def output_of(model: Any) -> tuple[str, nn.Linear]:
    """Return what transformers calls the output embeddings, with their name in the model.

    Raises:
        ModelError: it has none, or they are not a plain matrix.
    """
    matrix = model.get_output_embeddings()
    name = next((n for n, module in model.named_modules() if module is matrix), None)
    if matrix is None or name is None or type(matrix) is not nn.Linear:
        raise ModelError(f"{type(model).__name__}: the output matrix of this architecture was not found")
    return name, matrix


def check(
    head: Head, model: Any, walk: Walk, modules: Mapping[str, nn.Module], read: Callable[[Tensor], Tensor]
) -> None:
    """Compare logits of random hidden states with those that the model's own `forward` makes of them.

    Args:
        head: of the model.
        model: the transformers model; parameters may be on the meta device, buffers are on the head's device.
        walk: its blocks.
        modules: what runs behind the last of them, with weights, by name within the base model.
        read: gives rows of the output matrix, float32 [rows, hidden], by their numbers.

    Raises:
        ModelError: they differ, or a logit is not a function of the product of one row.
    """
    words = output_of(model)[1].out_features
    some = torch.linspace(0, words - 1, min(_ROWS, words)).long()
    rows = read(some).to(head.device)
    small = Head(model, walk, head.norm, "", None if head.bias is None else head.bias[some], head.device)
    random = torch.Generator().manual_seed(0)
    states = torch.randn(4, walk.state.width, generator=random).to(head.device)
    with torch.no_grad():
        got = small.logits(states, rows)
        with replaced(model.base_model, dict(modules)):
            expected = _own_logits(small, model, walk, rows, states)
    if not _same(got, expected):
        raise ModelError(f"the logits of {type(model).__name__} are not what its norm and output matrix make of states")
    products = (states[:, : rows.shape[1]] @ rows.T).requires_grad_()
    weights = torch.randn(got.shape, generator=random).to(head.device)
    with torch.enable_grad():
        slope = torch.autograd.grad((small.finish(products) * weights).sum(), products)[0]
    whole = head.finish(torch.zeros(1, words, device=head.device)).shape[1]
    if whole != words or not _same(small.move(products, weights)[1], slope):
        raise ModelError(f"the logits of {type(model).__name__} are not one for each row of its output matrix")


def _own_logits(head: Head, model: Any, walk: Walk, rows: Tensor, states: Tensor) -> Tensor:
    """Logits [positions, rows] of what leaves the last block, [positions, width], by the model's own `forward`."""
    name, own = output_of(model)
    matrix = nn.Linear(own.in_features, len(rows), device="meta")
    matrix.weight = nn.Parameter(rows)
    matrix.register_parameter("bias", None if head.bias is None else nn.Parameter(head.bias))
    tokens = torch.zeros(1, len(states), dtype=torch.int64, device=head.device)
    with (
        walk.passed(model, walk.state.hidden(states[None])),
        replaced(model, {name: matrix}),
        placeholders(walk.outside(model).values(), head.device),
    ):
        return model(input_ids=tokens, use_cache=False).logits[0]  # type: ignore[no-any-return]


def _body(model: Any, walk: Walk, device: torch.device) -> str:
    """Name of what a model with an output matrix runs to get hidden states: its base model, or a part of it."""
    path = walk.names[0].split(".")
    around = {".".join(path[:n]): model.get_submodule(".".join(path[:n])) for n in range(1, len(path) - 1)}
    ran: list[str] = []
    name, matrix = output_of(model)
    with (
        torch.no_grad(),
        watching(around, lambda name, _: ran.append(name)),
        walk.passed(model),
        replaced(model, {name: stand_in(matrix, lambda x: x)}),
        placeholders(walk.outside(model).values(), device),
    ):
        try:
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device), use_cache=False)
        except RuntimeError:  # what comes after the output matrix may not take what the stand-in makes
            if not ran:
                raise
    return ran[0]


def _same(got: Tensor, expected: Tensor) -> bool:
    off = (got - expected).square().sum() if got.shape == expected.shape else torch.tensor(torch.inf)
    return bool(off <= _TOLERANCE * expected.square().sum())
