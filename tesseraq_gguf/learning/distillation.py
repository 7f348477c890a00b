"""The last pass: scales, zero-points and norms learn against the answers of the full-precision model, end to end.

Block reconstruction looks at one block at a time. Here the codes are frozen and everything else moves at once: the
parameters that each grid can relax, and the weights of the norms. The loss is the Kullback-Leibler divergence
KL(p || p̂) of the answers on the calibration text, p those of the full-precision model. The forward pass uses values
that the type can store; gradients pass straight through that rounding. (Not part of TesseraQ; end-to-end training of
scales is what EfficientQAT, arXiv 2407.11062, ends with.)

Memory does not grow with depth. A step goes up block by block, leaving the inputs of each on disk, and comes down
block by block, running each again for its gradient; the variables and Adam's state of a block are in memory only then.
What is on disk after a step is whole: a pass that was killed goes on at the next one.

Some sequences are held out; block reconstruction learned nothing on them either, but was judged by them. If the
divergence on them has not fallen in the end, the pass is undone.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tesseraq_gguf.compute.affine import Affine
from tesseraq_gguf.errors import NotFiniteError
from tesseraq_gguf.learning.calibration import Calibration
from tesseraq_gguf.models.decoder import LoadedBlock
from tesseraq_gguf.models.finite import check_finite, finite
from tesseraq_gguf.models.handed import BlockInputs
from tesseraq_gguf.models.quantised import Quantised
from tesseraq_gguf.paths import temporary_sibling
from tesseraq_gguf.types.grids import Arrays, own_grid
from tesseraq_gguf.types.quantized import QuantizedTensor, plain_vector

LearnedBlock = dict[str, QuantizedTensor]
"""What was learned for a block, by checkpoint name."""

_FINAL = "final"

_LEAVE_OUT = "Leave --finish out, or give more bits to the blocks (--type, --tensor-type)"
"""What to do about a model that the pass cannot learn."""


@dataclass(frozen=True)
class Distilled:
    """What the pass gives.

    Attributes:
        blocks: the blocks again, with the parameters that they have now.
        final: the final norm's vectors by checkpoint name.
        before: divergence on the held-out sequences before the pass, in nats per token.
        after: the same after it; if it is not smaller, `blocks` are those that came in.
    """

    blocks: Callable[[int], LearnedBlock]
    final: LearnedBlock
    before: float
    after: float


@dataclass(frozen=True)
class Distillation:
    """The schedule.

    Attributes:
        steps: Adam steps.
        batch: sequences of a step.
        scale_rate: peak learning rate of scales, in log space.
        zero_rate: peak learning rate of zero-points, in codes.
        norm_rate: peak learning rate of norms, relative to the root mean square of their weights.
        warm_up: share of the steps over which the rates rise; then they fall as a cosine to 0.
    """

    steps: int = 200
    batch: int = 4
    scale_rate: float = 2e-3
    zero_rate: float = 2e-3
    norm_rate: float = 2e-3
    warm_up: float = 0.1

    def run(
        self,
        model: Quantised,
        calibration: Calibration,
        seed: int,
        folder: Path,
        report: Callable[[int, int], None] = lambda *_: None,
    ) -> Distilled:
        """Learn.

        Args:
            model: what was quantised; its decoder is the full-precision model.
            calibration: tokens to learn on, and those that nothing was learned on.
            seed: of the order of sequences.
            folder: takes the variables of the blocks; must exist. What a pass of the same schedule left there after
                it was stopped is gone on with: it must be of the same blocks, tokens and seed.
            report: called with (steps done, steps in all).

        Raises:
            NotFiniteError: the model's answers, or gradients on the way down, are not finite.
        """
        kept = _Kept(folder, asdict(self))
        student = _Student(model, kept)
        tokens = calibration.tokens
        everything = torch.cat([tokens, calibration.held_out])
        teacher, recorded = student.teach(everything)
        start, _ = model.decoder.stem(everything, model.embeddings, inputs=recorded)
        held = slice(len(tokens), None)
        generator = torch.Generator().manual_seed(seed)
        before = kept.before
        if before is None:
            before = student.divergence(start[held], teacher[held], recorded)
            if not math.isfinite(before):
                raise NotFiniteError(f"the quantised model's divergence from its original is {before}. {_LEAVE_OUT}")
            kept.begin(before)
        report(kept.steps, self.steps)
        queue = torch.empty(0, dtype=torch.int64)
        for step in range(self.steps):
            if len(queue) < min(self.batch, len(tokens)):
                queue = torch.randperm(len(tokens), generator=generator)
            chosen, queue = queue[: self.batch], queue[self.batch :]
            if step < kept.steps:  # taken before the pass was stopped
                continue
            rate = self._share(step)
            rates = {
                "scale": rate * self.scale_rate,
                "zero": rate * self.zero_rate,
                "norm": rate * self.norm_rate,
            }
            student.step(start[chosen], teacher[chosen], recorded, rates)
            report(step + 1, self.steps)
        after = student.divergence(start[held], teacher[held], recorded)
        if not after < before:
            return Distilled(model.blocks, {}, before, after)
        return Distilled(student.finished, student.final(), before, after)

    def _share(self, step: int) -> float:
        """Share of the peak rate in a step."""
        rising = max(1, round(self.steps * self.warm_up))
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, self.steps - rising)))


class _Student:
    """The quantised model, of which one block is in memory at a time."""

    def __init__(self, model: Quantised, kept: _Kept) -> None:
        self._decoder, self._blocks, self._autocast, self._kept = model.decoder, model.blocks, model.autocast, kept
        self._head = self._decoder.head
        self._teachers = self._decoder.output_weight().to(self._autocast)
        given = model.embeddings.get(self._decoder.output_name())
        self._students = self._teachers if given is None else given.to(self._decoder.device, self._autocast)

    @torch.no_grad()
    def teach(self, tokens: Tensor) -> tuple[Tensor, BlockInputs]:
        """Final hidden states of the full-precision model."""
        hidden, recorded = self._decoder.stem(tokens)
        for index in range(len(self._decoder)):
            block = self._decoder.load_block(index)
            for sample in range(len(hidden)):
                hidden[sample : sample + 1] = self._run(block, hidden[sample : sample + 1], recorded, {}, {}).cpu()
        return hidden, recorded

    @torch.no_grad()
    def divergence(self, start: Tensor, teacher: Tensor, recorded: BlockInputs) -> float:
        """Mean divergence on whole sequences."""
        if not len(start):
            return math.inf
        hidden = start.clone()
        for index in range(len(self._decoder)):
            block, variables = self._load(index)
            weights, vectors = variables.realise()
            for sample in range(len(hidden)):
                hidden[sample] = self._run(block, hidden[sample : sample + 1], recorded, weights, vectors)[0].cpu()
        weights = self._load_final().realise()[1]
        total = 0.0
        for h, t in zip(hidden, teacher, strict=True):
            total += self._slope(h, t, weights)[0]
        return total / len(hidden)

    def step(self, start: Tensor, teacher: Tensor, recorded: BlockInputs, rates: Mapping[str, float]) -> None:
        """One step on sequences [batch, length, hidden]."""
        device = self._decoder.device
        hidden = start.to(device)
        for index in range(len(self._decoder)):
            torch.save(hidden.cpu(), self._kept.inputs(index))
            block, variables = self._load(index)
            with torch.no_grad():
                hidden = self._run(block, hidden, recorded, *variables.realise())
        final = self._load_final()
        if not finite(hidden):
            raise NotFiniteError(f"the quantised model's final hidden states are not finite. {_LEAVE_OUT}")
        _, slope, to_norm = self._slope(hidden.flatten(0, 1), teacher.flatten(0, 1), final.realise()[1])
        final.descend_vectors(to_norm, rates)
        final.save(self._kept.next(_FINAL))
        gradient = slope.view_as(hidden)
        for index in reversed(range(len(self._decoder))):
            block, variables = self._load(index)
            below = torch.load(self._kept.inputs(index), weights_only=True).to(device).requires_grad_()
            out = self._run(block, below, recorded, *variables.realise())
            out.backward(gradient)
            assert below.grad is not None
            gradient = below.grad
            check_finite(variables.gradients(block.prefix), "the gradients of the last pass", _LEAVE_OUT)
            variables.descend(rates)
            variables.save(self._kept.next(str(index)))
        self._kept.step_done()

    def finished(self, index: int) -> LearnedBlock:
        """What a block is now, by checkpoint name."""
        block, variables = self._load(index)
        return variables.tighten(block.prefix)

    def final(self) -> LearnedBlock:
        """The final norm now, by checkpoint name."""
        return self._load_final().tighten(self._head.prefix)

    def _slope(
        self, student: Tensor, teacher: Tensor, norm: Mapping[str, Tensor]
    ) -> tuple[float, Tensor, dict[str, Tensor]]:
        """The divergence of final hidden states [positions, hidden], and its gradient (`Head.divergence`)."""
        device = self._decoder.device
        return self._head.divergence(student.to(device), teacher.to(device), norm, self._students, self._teachers)

    def _run(
        self,
        block: LoadedBlock,
        hidden: Tensor,
        recorded: BlockInputs,
        weights: Mapping[str, Tensor],
        vectors: Mapping[str, Tensor],
    ) -> Tensor:
        device = self._decoder.device
        with torch.autocast(device.type, self._autocast, enabled=self._autocast != torch.float32):
            return block.run(hidden.to(device), recorded.arguments[block.index], weights, vectors).float()

    def _load(self, index: int) -> tuple[LoadedBlock, _Variables]:
        tensors = self._blocks(index)
        block = self._decoder.load_block(index, hollow=tensors.keys())
        matrices = {n.removeprefix(block.prefix): t for n, t in tensors.items() if t.is_matrix}
        block.take_over(tensors)
        # what does not move here leaves as it came: orders of columns, and biases that moved along with rows
        kept = {name.removeprefix(block.prefix): t for name, t in tensors.items() if not t.is_matrix}
        variables = _Variables(matrices, block.norms(), self._decoder.device, kept)
        variables.restore(self._kept.now(str(index)))
        return block, variables

    def _load_final(self) -> _Variables:
        variables = _Variables({}, {n: p.detach() for n, p in self._head.vectors.items()}, self._decoder.device)
        variables.restore(self._kept.now(_FINAL))
        return variables


class _Kept:
    """Variables on disk: those of the last whole step, and those of the step that is being taken.

    A step reads one folder and writes the other; a file that appears in one move says how many steps are whole, and so
    which folder is.

    Args:
        folder: to keep them in; what another schedule left there is removed.
        schedule: JSON-ready.
    """

    def __init__(self, folder: Path, schedule: Mapping[str, object]) -> None:
        self._folder, self._schedule = folder, json.loads(json.dumps(schedule))
        self._state = folder / "steps.json"
        found = json.loads(self._state.read_text(encoding="utf-8")) if self._state.is_file() else {}
        self.steps: int = 0
        self.before: float | None = None
        if found.get("schedule") == self._schedule:
            self.steps, self.before = found["steps"], found["before"]
        else:
            self._state.unlink(missing_ok=True)
            for parity in (0, 1):
                shutil.rmtree(self._side(parity), ignore_errors=True)
                self._side(parity).mkdir(exist_ok=True)

    def begin(self, before: float) -> None:
        """Keep the divergence before the first step."""
        self.before = before
        self._write()

    def step_done(self) -> None:
        """Let what the step wrote be what the next one reads."""
        self.steps += 1
        self._write()

    def now(self, name: str) -> Path:
        """Variables after the last whole step; before the first one there is no file."""
        return self._side(self.steps) / f"{name}.variables.pt"

    def next(self, name: str) -> Path:
        """Variables of the step that is being taken."""
        return self._side(self.steps + 1) / f"{name}.variables.pt"

    def inputs(self, index: int) -> Path:
        """What a block is fed in the step that is being taken."""
        return self._folder / f"{index}.inputs.pt"

    def _side(self, steps: int) -> Path:
        return self._folder / ("even" if steps % 2 == 0 else "odd")

    def _write(self) -> None:
        with temporary_sibling(self._state) as partial:
            state = {"schedule": self._schedule, "steps": self.steps, "before": self.before}
            partial.write_text(json.dumps(state), encoding="utf-8")


class _Variables:
    """What moves in one block: relaxed parameters of its matrices, and its norms; all begin at 0 and add to what is.

    Args:
        matrices: by parameter name within the block.
        vectors: norms, by parameter name within the block.
        device: where to compute.
        kept: what leaves as it came, by parameter name within the block; norms among it move.
    """

    def __init__(
        self,
        matrices: Mapping[str, QuantizedTensor],
        vectors: Mapping[str, Tensor],
        device: torch.device,
        kept: LearnedBlock | None = None,
    ) -> None:
        self._kept = kept or {}
        self._matrices = {n: _moved(t, device) for n, t in matrices.items()}
        self._vectors = dict(vectors)
        self._size = {n: float(v.square().mean().sqrt().clamp_min(0.02)) for n, v in vectors.items()}
        relaxed = {
            (n, key): variable
            for n, t in self._matrices.items()
            for key, variable in own_grid(t).relax(_parameters(t)).items()
        }
        relaxed |= {(n, "norm"): torch.zeros_like(v) for n, v in vectors.items()}
        self._variables = {key: v.requires_grad_() for key, v in relaxed.items()}
        self._state: dict[str, Any] | None = None

    def realise(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Matrices float32 [out, in] by module name and vectors by parameter name, differentiable."""
        weights = {}
        for name, tensor in self._matrices.items():
            grid, arrays = own_grid(tensor), _parameters(tensor)
            scale, zero = grid.realise(self._of(name), arrays)
            q = grid.levels(tensor)
            weights[name.removesuffix(".weight")] = Affine.apply(q, scale, zero).flatten(-2)
        return weights, {n: v + self._size[n] * self._variables[n, "norm"] for n, v in self._vectors.items()}

    def gradients(self, prefix: str) -> dict[str, Tensor]:
        """Gradients of what moves, by checkpoint name of the parameter that it belongs to."""
        of = ((n, v.grad) for (n, _), v in self._variables.items())
        found: dict[str, list[Tensor]] = {}
        for name, gradient in of:
            if gradient is not None:
                found.setdefault(prefix + name, []).append(gradient.flatten())
        return {name: torch.cat(parts) for name, parts in found.items()}

    def descend_vectors(self, gradients: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
        """Take a step along gradients of the vectors."""
        for name, gradient in gradients.items():
            self._variables[name, "norm"].grad = gradient * self._size[name]
        self.descend(rates)

    def descend(self, rates: Mapping[str, float]) -> None:
        """Take a step of Adam along the gradients that are there."""
        kinds = {"zero": "zero", "dmin": "scale", "norm": "norm"}
        groups = [{"params": [v], "lr": rates[kinds.get(key, "scale")]} for (_, key), v in self._variables.items()]
        if not groups:  # a norm without weights
            return
        adam = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-10)
        if self._state is not None:
            state = adam.state_dict()
            state["state"] = self._state
            adam.load_state_dict(state)
        adam.step()
        self._state = adam.state_dict()["state"]

    def save(self, file: Path) -> None:
        """Keep variables and Adam's state."""
        variables = {"|".join(key): v.detach().cpu() for key, v in self._variables.items()}
        torch.save({"variables": variables, "state": self._state}, file)

    def restore(self, file: Path) -> None:
        """Take back what was kept, if anything was."""
        if not file.is_file():
            return
        kept = torch.load(file, weights_only=True)
        self._state = kept["state"]
        for key, variable in self._variables.items():
            variable.data.copy_(kept["variables"]["|".join(key)])

    @torch.no_grad()
    def tighten(self, prefix: str) -> LearnedBlock:
        """Matrices and vectors as they leave, by checkpoint name."""
        learned = {prefix + name: tensor for name, tensor in self._kept.items()}
        for name, tensor in self._matrices.items():
            grid = own_grid(tensor)
            arrays = grid.tighten(self._of(name), _parameters(tensor))
            learned[prefix + name] = grid.assemble(tensor.arrays["q"], arrays)
        return learned | {prefix + n: plain_vector(v) for n, v in self.realise()[1].items()}

    def _of(self, name: str) -> Arrays:
        return {key: v for (n, key), v in self._variables.items() if n == name}


def _parameters(tensor: QuantizedTensor) -> Arrays:
    return {key: array for key, array in tensor.arrays.items() if key != "q"}


def _moved(tensor: QuantizedTensor, device: torch.device) -> QuantizedTensor:
    return QuantizedTensor(tensor.type, {key: array.to(device) for key, array in tensor.arrays.items()})
