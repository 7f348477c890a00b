"""A decoder-only transformers model of which at most one decoder block has weights in memory.

The model is built on the meta device (no memory). `stem` runs everything before the first block (embedding,
positions, masks) and keeps what the model hands to each block; `load_block` gives one block its weights from the
checkpoint; `head` has final norm and output.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tesseraq_gguf.compute.activations import ActivationRounding, RoundedCache
from tesseraq_gguf.errors import ModelError
from tesseraq_gguf.models.experts import FEW, Experts, Forms, aliases, expert_of, stack_of, unroll
from tesseraq_gguf.models.handed import Arguments, BlockInputs, Empty, run
from tesseraq_gguf.models.head import Head, check, output_of
from tesseraq_gguf.models.linear import as_linear, matrices_of
from tesseraq_gguf.models.pieces import Piece
from tesseraq_gguf.models.skeleton import skeleton
from tesseraq_gguf.models.source import ModelSource
from tesseraq_gguf.models.stand_ins import placeholders
from tesseraq_gguf.models.stored_experts import Place, StoredExperts
from tesseraq_gguf.models.streamed import Made, Read, StreamedLinear
from tesseraq_gguf.models.streamed import given as streaming
from tesseraq_gguf.models.walk import find
from tesseraq_gguf.models.weights import check_weights, open_checkpoint
from tesseraq_gguf.types.grids import grid_of
from tesseraq_gguf.types.quantized import ORDER, QuantizedTensor

_T = TypeVar("_T")

_LARGE = 1 << 27
"""Numbers of an embedding from which on only rows are read of it."""


@dataclass
class LoadedBlock:
    """One decoder block with its weights.

    Attributes:
        index: position in the model.
        prefix: what stands before the block's parameter names in the checkpoint, such as `model.layers.3.`.
        module: the transformers block, float32, parameters frozen.
        replaced: parameters that `replace` changed, by name within the block.
        orders: for matrices whose columns have an order of their own, the input channel of each column, int64 [in], by
            module name. The block gathers what it feeds them.
    """

    index: int
    prefix: str
    module: nn.Module
    replaced: dict[str, Tensor] = field(default_factory=dict)
    orders: dict[str, Tensor] = field(default_factory=dict)

    def matrices(self) -> dict[str, nn.Linear]:
        """Return the linear layers of the block by module name: the matrices that methods learn."""
        return matrices_of(self.module)

    def by_module(self, named: Mapping[str, _T]) -> dict[str, _T]:
        """Return what is known of matrices of this block by checkpoint name, by module name."""
        ours = {name: v for name, v in named.items() if name.startswith(self.prefix)}
        return {name.removeprefix(self.prefix).removesuffix(".weight"): v for name, v in ours.items()}

    def replace(self, name: str, value: Tensor) -> None:
        """Give a parameter, by its name within the block, a new value of the same shape, for good."""
        self.module.get_parameter(name).data = value
        self.replaced[name] = value

    def reorder(self, names: Iterable[str], order: Tensor) -> None:
        """Give matrices that read the same input an order of columns; their weights are moved along.

        Args:
            names: module names.
            order: the input channel of each column, a permutation, int64 [in].
        """
        for name in names:
            self.replace(f"{name}.weight", self.module.get_parameter(f"{name}.weight").data[:, order])
        self._gather(names, order)

    def _gather(self, names: Iterable[str], order: Tensor) -> None:
        gather = _Gather(order)
        for name in names:
            assert name not in self.orders
            self.orders[name] = order
            # the first of all hooks, so that all others see what the matrix multiplies
            self.module.get_submodule(name).register_forward_pre_hook(gather, prepend=True)

    def adopt(self, tensors: Mapping[str, QuantizedTensor]) -> Mapping[str, Tensor]:
        """Take over what was learned for this block, by checkpoint name.

        Returns:
            The learned matrices dequantised, float32 [out, in] by module name, to run the block with. Vectors are
            replaced in the block itself.
        """
        device = next(self.module.parameters()).device
        self.take_over(tensors)
        learned = {
            full_name.removeprefix(self.prefix).removesuffix(".weight"): partial(_dequantized, tensor, device)
            for full_name, tensor in tensors.items()
            if tensor.is_matrix
        }
        return self.held(learned)

    def held(self, made: Mapping[str, Read]) -> Mapping[str, Tensor]:
        """Return matrices, by module name, of what makes them: at once, and of experts that are streamed when used."""
        streamed = {name for name, m in self.matrices().items() if isinstance(m, StreamedLinear)}
        return Made(
            {name: make() for name, make in made.items() if name not in streamed},
            {name: make for name, make in made.items() if name in streamed},
        )

    @property
    def mixtures(self) -> dict[str, Experts]:
        """Modules of experts whose matrices are streamed, by module name."""
        found = {name: m for name, m in self.module.named_modules() if isinstance(m, Experts)}
        return {name: m for name, m in found.items() if m.form.count > FEW}

    def take_over(self, tensors: Mapping[str, QuantizedTensor]) -> None:
        """Take over what was learned for this block beside the matrices: vectors, and orders of columns."""
        device = next(self.module.parameters()).device
        same: dict[bytes, tuple[list[str], Tensor]] = {}
        for full_name, tensor in tensors.items():
            name = full_name.removeprefix(self.prefix)
            if tensor.plain:
                self.replace(name, tensor.arrays["values"].to(device))
            elif tensor.is_order:
                order = tensor.arrays["values"]
                names = same.setdefault(order.numpy().tobytes(), ([], order.to(device, torch.int64)))[0]
                names.append(name.removesuffix(ORDER))
        for names, order in same.values():
            self._gather(names, order)

    def norms(self) -> dict[str, Tensor]:
        """Return the parameters of the block's norms, vectors, by name within the block.

        Norms are modules whose parameters are a weight, and perhaps a bias, for each channel. Vectors of others stay:
        those of a state space, say, or a convolution's bias.
        """
        return {
            f"{name}.{kind}": p.detach()
            for name, module in self.module.named_modules()
            if name and all(p.dim() == 1 for p in module.parameters())
            for kind, p in module.named_parameters(recurse=False)
            if kind in ("weight", "bias") and expert_of(f"{name}.{kind}") is None
        }

    def run(
        self,
        hidden: Tensor,
        arguments: Arguments,
        weights: Mapping[str, Tensor] | None = None,
        vectors: Mapping[str, Tensor] | None = None,
        rounding: ActivationRounding | None = None,
    ) -> Tensor:
        """Run the block.

        Args:
            hidden: what travels from block to block, [batch, length, width]; in most models hidden states alone.
            arguments: what the model hands to this block besides.
            weights: matrices [out, in] by module name to use in place of the block's own.
            vectors: other parameters to use in place of the block's own, by name within the block.
            rounding: rounds what the block's matrices are fed, and keys and values.

        Raises:
            ModelError: keys and values are to be rounded, and this architecture's attention takes no cache.
        """
        weights = weights or {}
        with streaming(self.module, weights) as streamed, self._rounded(rounding, arguments) as given:
            replaced = {f"{name}.weight": weights[name] for name in weights if name not in streamed}
            replaced |= vectors or {}

            def block(*args: Any, **kwargs: Any) -> Any:
                return functional_call(self.module, replaced, args, kwargs)

            return run(block, hidden, given)

    @contextmanager
    def _rounded(self, rounding: ActivationRounding | None, arguments: Arguments) -> Iterator[Arguments]:
        """Give arguments with which a block rounds its activations; inside, what its matrices are fed is rounded."""
        if rounding is None:
            yield arguments
            return

        def hook(name: str) -> Callable[..., tuple[Tensor]]:
            return lambda _module, args: (rounding.feed(name, args[0]),)

        cache = RoundedCache(rounding) if rounding.scheme.key_value_bits else None
        place = next((name for name in ("cache", "past_key_values", "past_key_value") if name in arguments), None)
        handles = [module.register_forward_pre_hook(hook(name)) for name, module in self.matrices().items()]
        try:
            yield arguments | {place: cache} if place and cache else arguments
        finally:
            for handle in handles:
                handle.remove()
        if cache and not cache.used:
            raise ModelError(
                f"keys and values of {type(self.module).__name__} cannot be rounded: its attention takes no cache"
            )


def _dequantized(tensor: QuantizedTensor, device: torch.device) -> Tensor:
    return grid_of(tensor.type).dequantize(tensor).to(device)


class _Gather:
    """A hook that gives matrices with the same input their columns' channels, gathered once."""

    def __init__(self, order: Tensor) -> None:
        self._order = order
        self._seen: tuple[Callable[[], Tensor | None], Callable[[], Tensor | None]] = (lambda: None, lambda: None)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        seen, gathered = (reference() for reference in self._seen)
        if seen is not x or gathered is None:
            gathered = x[..., self._order]
            self._seen = weakref.ref(x), weakref.ref(gathered)
        return (gathered, *args[1:])


class Decoder:
    """A model whose decoder blocks are visited one after the other.

    Args:
        source: the model's files.
        device: where blocks, embedding and activations live.

    Attributes:
        weights: the tensors of its files by stored name.
        walk: where its blocks are, and what goes from one to the next.

    Raises:
        ModelError: not a decoder-only language model, or its blocks cannot be found.
    """

    def __init__(self, source: ModelSource, device: torch.device) -> None:
        self.source = source
        self.device = device
        self.weights = open_checkpoint(source)
        self._model = skeleton(source)
        self.config = self._model.config.get_text_config()
        self._move_buffers()
        self.walk = find(self._model, device)
        self._blocks = [self._model.get_submodule(name) for name in self.walk.names]
        self._forms = Forms(self._model)
        self._experts = StoredExperts(self._model, self._forms.by_name, self.weights)
        self._transposed: set[str] = set()
        for index, block in enumerate(self._blocks):
            found = as_linear(block)
            prefixes = (self.block_prefix(index), self._own_prefix(index)) if found else ()
            self._transposed |= {f"{prefix}{name}.weight" for prefix in prefixes for name in found}

    def __len__(self) -> int:
        """Return the number of decoder blocks."""
        return len(self._blocks)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.config.hidden_size)

    @property
    def width(self) -> int:
        """How many channels travel from block to block: the residual stream, in most models."""
        return self.walk.state.width

    @property
    def has_experts(self) -> bool:
        """Whether blocks choose among experts, each with matrices of its own."""
        return any(stack_of(name) for name in self.matrix_shapes())

    def block_prefix(self, index: int) -> str:
        """Return the checkpoint prefix of block `index`, with its final dot."""
        return self._prefixes[index]

    def _own_prefix(self, index: int) -> str:
        """What transformers has before the parameter names of a block."""
        return f"{self.walk.names[index]}."

    @cached_property
    def _prefixes(self) -> list[str]:
        own = [self._own_prefix(index) for index in range(len(self))]
        return [self._called_prefix(prefix, block) for prefix, block in zip(own, self._blocks, strict=True)]

    def _called_prefix(self, prefix: str, module: nn.Module) -> str:
        """What the weight files have before the names of a module's parameters, where transformers has `prefix`."""
        first = next((name for name, _ in module.named_parameters()), "")
        called = self._called(prefix + first)
        return called.removesuffix(first) if called.endswith(first) else prefix

    def _called(self, name: str) -> str:
        """What the weight files call a parameter, where transformers renames it; else transformers' own name."""
        return name if any(n in self.weights for n in self._usual(name)) else self._experts.renamed(name) or name

    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """Return the shape [out, in] of every matrix of every block by checkpoint name, without loading anything."""
        shapes = {}
        for i, block in enumerate(self._blocks):
            forms = self._forms.within(self._own_prefix(i))
            plain = matrices_of(block)
            for name, _ in block.named_modules():
                if m := plain.get(name):
                    shapes[f"{self.block_prefix(i)}{name}.weight"] = (m.out_features, m.in_features)
                elif name in forms:
                    inside = {f"{self.block_prefix(i)}{name}.{n}.weight": s for n, s in forms[name].matrices()}
                    shapes |= inside
        return shapes

    def _parameters(self, index: int) -> list[str]:
        """Names, within a block, of all that it keeps, experts one by one."""
        forms = self._forms.within(self._own_prefix(index))
        stacks = {f"{name}.{stack}" for name, form in forms.items() for stack in form.stacks}
        plain = [name for name in self._blocks[index].state_dict() if name not in stacks]
        return plain + [f"{name}.{inner}" for name, form in forms.items() for inner in form.parameters()]

    def load_block(self, index: int, hollow: Collection[str] = ()) -> LoadedBlock:
        """Give block `index` its weights: a new float32 module on the device, in evaluation mode, all frozen.

        Args:
            index: which block.
            hollow: matrices, by checkpoint name, that are not read: the block must be run with others in their place.
        """
        prefix, own = self.block_prefix(index), self._own_prefix(index)
        module = copy.deepcopy(self._blocks[index])
        unroll(module, self._forms.within(own), lambda name: self._read(own + name).float().to(self.device))
        self._fill(module, own, {own + name.removeprefix(prefix) for name in hollow if name.startswith(prefix)})
        return LoadedBlock(index, prefix, module.to(self.device).eval().requires_grad_(False))

    def load_alike(self, prefix: str) -> LoadedBlock:
        """Give a block as the last one is the weights that the checkpoint has under another prefix.

        Args:
            prefix: with its final dot.

        Raises:
            ModelError: it has others there than such a block has.
        """
        module = copy.deepcopy(self._blocks[-1])
        forms = self._forms.within(self._own_prefix(len(self) - 1))
        unroll(module, forms, lambda name: self._read(prefix + name).float().to(self.device))
        self._fill(module, prefix)
        return LoadedBlock(len(self), prefix, module.to(self.device).eval().requires_grad_(False))

    @torch.no_grad()
    def stem(
        self,
        tokens: Tensor,
        embeddings: Mapping[str, Tensor] | None = None,
        empty: Empty = torch.empty,
        inputs: BlockInputs | None = None,
    ) -> tuple[Tensor, BlockInputs]:
        """Run what comes before the first block.

        Args:
            tokens: int64 [samples, length].
            embeddings: matrices to use in place of the model's own, by checkpoint name.
            empty: makes the tensor that hidden states go to, of a shape and float32; by default it is on the CPU.
            inputs: what blocks are handed with other samples of this length, where these belong to them.

        Returns:
            What travels, float32 [samples, length, width], in most models hidden states; and what each block is handed
            besides.
        """
        assert len(tokens), "no tokens"
        with self._embedding(tokens, embeddings or {}):
            return self.walk.stem(self._model, tokens.to(self.device).split(1), empty, inputs)

    @cached_property
    def head(self) -> Head:
        """What stands behind the blocks; it does not hold the output matrix, which `output_weight` reads.

        Raises:
            ModelError: its logits are not the model's own, or parameters are missing.
        """
        name, matrix = output_of(self._model)
        bias = None if matrix.bias is None else self.matrix(f"{name}.bias").to(self.device)
        stored = self.stored_name(self.output_name())
        if self.weights.shape(stored) != matrix.weight.shape:
            raise ModelError(
                f"{self.source.name}: {stored} has shape {self.weights.shape(stored)}, "
                f"config.json implies {tuple(matrix.weight.shape)}"
            )
        try:
            self.walk.check(self._model, self.device)
            prefix, norm = self.final_norm()
            head = Head(self._model, self.walk, norm, prefix, bias, self.device)
            check(head, self._model, self.walk, self._behind(), lambda some: self.weights.rows(stored, some))
        except ModelError as error:
            raise ModelError(f"{self.source.name} cannot be learned: {error}") from error
        return head

    def mean_loss(self, hidden: Tensor, tokens: Tensor) -> float:
        """Return the mean cross-entropy in nats per token of final hidden states [samples, length, hidden]."""
        with torch.no_grad():
            return self.head.mean_loss(hidden, tokens, self.output_weight())

    def answers(self) -> Callable[[Tensor], Tensor]:
        """Return a function from final hidden states [positions, hidden] to the log-probabilities of all answers.

        Its results are float32 [positions, vocabulary], on the device. It holds the output matrix.
        """
        head, weight = self.head, self.output_weight()
        return torch.no_grad()(lambda hidden: head.logits(hidden.to(self.device), weight).log_softmax(-1))

    def final_norm(self) -> tuple[str, nn.Module]:
        """Return checkpoint prefix and a copy of what runs behind the last block, with its weights, frozen."""
        norm = self.walk.tail(self._model, self._behind())
        own = f"{self._base_prefix()}{self.walk.behind[0]}." if self.walk.alone else self._base_prefix()
        return self._called_prefix(own, norm), norm

    def _behind(self) -> dict[str, nn.Module]:
        """Copies of the modules that run behind the last block, with their weights, by name within the base model."""
        copies = {}
        for name in self.walk.behind:
            module = copy.deepcopy(self._model.base_model.get_submodule(name))
            self._fill(module, f"{self._base_prefix()}{name}.")
            copies[name] = module.to(self.device).requires_grad_(False)
        return copies

    def embedding_name(self) -> str:
        """Return the checkpoint name of the token embedding."""
        embedding = self._model.get_input_embeddings()
        return self._called(next(f"{n}.weight" for n, m in self._model.named_modules() if m is embedding))

    def output_name(self) -> str:
        """Return what the weight files call the output matrix: the embedding's name where they are tied.

        Raises:
            ModelError: it is neither there nor tied.
        """
        own = self.untied_output_name()
        tied = self._model.all_tied_weights_keys.get(own)
        if self._find(own) is None and tied is not None:
            return self._called(str(tied))
        return self.stored_name(own)

    def untied_output_name(self) -> str:
        """Return what transformers calls an output matrix that is not the embedding."""
        return f"{output_of(self._model)[0]}.weight"

    def stored_name(self, name: str) -> str:
        """Return what the weight files call a parameter.

        Raises:
            ModelError: they have none of that name.
        """
        stored = self._find(name)
        if stored is None:
            raise ModelError(
                f"{self.source.name}: the weight files have no tensor {name}, which config.json calls for. Download "
                "the model again, config.json with it"
            )
        return stored

    def check_weights(self, report: Callable[[int, int], None] = lambda *_: None) -> None:
        """Read all weights once, before any work is done with them.

        Args:
            report: called with (numbers read, numbers in all).

        Raises:
            ModelError: the model's files lack one, or it holds numbers that are not finite; the message names it.
        """
        tied = self._model.all_tied_weights_keys
        inside = tuple(map(self._own_prefix, range(len(self))))
        names = [
            n for n, _ in self._model.named_parameters()
            if not n.startswith(inside) and (n not in tied or self._find(n))
        ]  # fmt: skip
        for index in range(len(self)):  # with what is a buffer there and stored nevertheless
            names += [self._own_prefix(index) + name for name in self._parameters(index)]
        check_weights(self.weights, [self.stored_name(name) for name in names], report)

    def _find(self, name: str) -> str | None:
        """What the weight files call a parameter, or what it is a part of; None if they have none of that name."""
        found = next((n for n in self._usual(name) if n in self.weights), None)
        if found is None and (place := self.place(name)):
            return place.name
        return found or self._experts.renamed(name)

    def _usual(self, name: str) -> list[str]:
        base = self._base_prefix()
        return [n for alias in aliases(name) for n in (alias, alias.removeprefix(base))]

    def place(self, name: str) -> Place | None:
        """Return where the files keep a matrix of an expert, by checkpoint name; None of any other matrix."""
        if expert_of(name) is None:
            return None
        called = ((i, prefix) for i, prefix in enumerate(self._prefixes) if name.startswith(prefix))
        index, prefix = next(called, (None, ""))
        return self._experts.place(name if index is None else self._own_prefix(index) + name.removeprefix(prefix))

    def pieces(self) -> dict[str, Piece]:
        """Return where matrices of the blocks are in the weight files that are not stored as themselves."""
        found = {}
        for name, (rows, _) in self.matrix_shapes().items():
            if place := self.place(name):
                shape = tuple(self.weights.shape(place.name))
                found[name] = Piece(place.name, shape, rows, place.layer, place.first, place.step, place.transposed)
            elif name in self._transposed:
                stored = self.stored_name(name)
                found[name] = Piece(stored, tuple(self.weights.shape(stored)), rows, transposed=True)
        return found

    def check_tokens(self, tokens: Tensor) -> None:
        """Refuse tokens that the embedding has no rows for.

        Raises:
            ModelError: there are any, because the tokenizer is not this model's.
        """
        rows, top = self.weights.shape(self.stored_name(self.embedding_name()))[0], int(tokens.max())
        if top >= rows:
            raise ModelError(
                f"{self.source.name}: its tokenizer gives token {top}, but its embedding has {rows} rows: resize the "
                "embedding (resize_token_embeddings of transformers) and save again, or take the original tokenizer"
            )

    def samples(self) -> dict[str, str]:
        """Return the weights by which one can tell whether others read the same model: stored names by checkpoint name.

        They are those of the first, the middle and the last block, with two of their experts, of embedding and output.
        """
        names = [self.embedding_name(), self.output_name()]
        for index in {0, len(self) // 2, len(self) - 1}:
            inside = self._parameters(index)
            last = max((expert_of(name) or 0 for name in inside), default=0)
            names += [self.block_prefix(index) + n for n in inside if expert_of(n) in (None, 0, last)]
        return {name: self.stored_name(name) for name in names}

    def matrix(self, name: str) -> Tensor:
        """Read one matrix by its checkpoint name, float32 on the CPU."""
        return self._read(name).float()

    def output_weight(self) -> Tensor:
        """Return the output matrix, float32 [vocabulary, hidden] on the device."""
        return self.matrix(self.output_name()).to(self.device)

    def output_rows(self, rows: int) -> Iterator[Tensor]:
        """Yield the output matrix, float32 [rows, hidden] on the device, `rows` or the rest at a time."""
        stored = self.stored_name(self.output_name())
        for some in torch.arange(self.weights.shape(stored)[0]).split(rows):
            yield self.weights.rows(stored, some).to(self.device)

    def _base_prefix(self) -> str:
        return f"{self._model.base_model_prefix}."

    def _read(self, name: str) -> Tensor:
        place = self.place(name)
        stored = place.read(self.weights) if place else self.weights.read(self.stored_name(name))
        return stored.T.contiguous() if name in self._transposed else stored

    def as_stored(self, name: str, value: Tensor) -> Tensor:
        """Bring a parameter, by its checkpoint name, to what the weight files have."""
        return value.T.contiguous() if name in self._transposed else value

    def _fill(self, module: nn.Module, prefix: str, hollow: Collection[str] = ()) -> None:
        state = {}
        for name, tensor in module.state_dict(keep_vars=True).items():
            if prefix + name in hollow:
                state[name] = torch.zeros(1).expand(tensor.shape)  # one number: takes no memory
                continue
            stored = self._read(prefix + name)
            if stored.shape != tensor.shape:
                raise ModelError(
                    f"{self.source.name}: {prefix + name} has shape {tuple(stored.shape)}, "
                    f"config.json implies {tuple(tensor.shape)}"
                )
            state[name] = stored.float()
        module.load_state_dict(state, assign=True)

    @contextmanager
    def _embedding(self, tokens: Tensor, replaced: Mapping[str, Tensor]) -> Iterator[None]:
        """Give the modules that the stem needs their weights, float32, for a while; large tables, rows of the tokens.

        In the dtype of the file, a model would make its factors and rotary tables in it as well (Gemma's √width is
        25.25 in bfloat16, 25.30 in llama.cpp).
        """
        late = {name for name in self.walk.behind if name not in self.walk.before}
        outside = {name: module for name, module in self.walk.outside(self._model).items() if name not in late}
        empty = [(module, n, p) for module in outside.values() for n, p in module.named_parameters(recurse=False)]
        for name, module in outside.items():
            for n, _ in list(module.named_parameters(recurse=False)):
                full_name = self._called(f"{self._base_prefix()}{name}.{n}")
                some = tokens if name in self.walk.tables else None
                weight = replaced[full_name] if full_name in replaced else self._table(full_name, some)
                weight = weight.to(self.device, torch.float32)
                setattr(module, n, nn.Parameter(weight, requires_grad=False))
        try:
            with placeholders(self.walk.outside(self._model).values(), self.device):
                yield
        finally:
            for module, n, parameter in empty:
                setattr(module, n, parameter)

    def _table(self, name: str, tokens: Tensor | None) -> Tensor:
        """A parameter outside the blocks; of a large one that only tokens ask for, what they ask for."""
        stored = self.stored_name(name)
        shape = self.weights.shape(stored)
        if tokens is None or math.prod(shape) < _LARGE:
            return self._read(name)
        table = torch.zeros(shape)  # rows that are not written take no memory
        some = torch.cat([tokens.flatten(), torch.zeros(1, dtype=torch.int64)]).unique()  # 0 stands in for others
        some = some[some < shape[0]]
        table[some] = self.weights.rows(stored, some)
        return table

    def _move_buffers(self) -> None:
        for module in self._model.base_model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:
                    setattr(module, name, buffer.to(self.device))
