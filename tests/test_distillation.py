"""The last pass: its gradients against the whole model's, its memory of a block, and that it learns or is undone."""

from __future__ import annotations

from functools import cache
from unittest.mock import Mock

import pytest
import torch
from tiny_models import make_model  # noqa: F401  (a fixture)

from tesseraq_gguf.distillation import Distillation, _Kept, _Student
from tesseraq_gguf.grids import grid_of
from tesseraq_gguf.models import Decoder

CPU = torch.device("cpu")


@pytest.fixture
def decoder(make_model):  # noqa: F811
    return Decoder(make_model("llama"), CPU)


@pytest.fixture
def tokens():
    return torch.randint(4, 300, (24, 20), generator=torch.Generator().manual_seed(1))


def rounded(decoder, type="tsq2"):
    """Return blocks rounded to nearest."""

    @cache
    def block(index):
        loaded = decoder.load_block(index)
        return {
            f"{loaded.prefix}{name}.weight": grid_of(type).quantize(m.weight.detach())
            for name, m in loaded.matrices().items()
        }

    return block


def misscaled(decoder, type="tsq2"):
    """Return blocks rounded to nearest whose scales are then disturbed."""
    right, grid = rounded(decoder, type), grid_of(type)

    @cache
    def block(index):
        wrong = {}
        for name, tensor in right(index).items():
            arrays = {k: a for k, a in tensor.arrays.items() if k != "q"}
            noise = torch.randn(grid.scale(arrays).shape, generator=torch.Generator().manual_seed(index))
            scale = grid.scale(arrays) * (0.5 * noise).exp()
            arrays = grid.settle_scale(scale) | grid.settle_zero(grid.zero(arrays), scale)
            wrong[name] = grid.assemble(tensor.arrays["q"], arrays)
        return wrong

    return block


def test_the_divergence_and_its_gradient_are_autograds(decoder):
    random = torch.Generator().manual_seed(0)
    student = torch.randn(300, decoder.hidden_size, generator=random, requires_grad=True)
    teacher = torch.randn(300, decoder.hidden_size, generator=random)
    _, norm = decoder.final_norm()
    head = decoder.output_weight()
    got, slope, to_norm = decoder.divergence(
        student.detach(), teacher, dict(norm.named_parameters()), (norm, head, head)
    )
    norm.requires_grad_()
    p = (norm(teacher) @ head.T).log_softmax(-1).detach()
    p_student = (norm(student) @ head.T).log_softmax(-1)
    expected = torch.nn.functional.kl_div(p_student, p, log_target=True, reduction="batchmean")
    expected.backward()
    assert got == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(slope, student.grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(to_norm["weight"], norm.weight.grad, rtol=1e-3, atol=1e-5)


def test_a_step_follows_the_gradient_of_the_whole_model(decoder, tokens, tmp_path):
    """The walk down, block by block, against one backward pass through everything."""
    blocks = rounded(decoder)
    student = _Student(decoder, blocks, torch.float32, _Kept(tmp_path, {}), {})
    teacher, recorded = student.teach(tokens[:2])
    start, _ = decoder.stem(tokens[:2])
    _, first = student._load(0)
    weights, vectors = first.realise()
    hidden = start
    for index in range(len(decoder)):
        block, variables = student._load(index)
        mine = (weights, vectors) if index == 0 else variables.realise()
        hidden = student._run(block, hidden, recorded, *mine)
    _, norm = decoder.final_norm()
    head = decoder.output_weight()
    p = (norm(teacher) @ head.T).log_softmax(-1)
    loss = torch.nn.functional.kl_div((norm(hidden) @ head.T).log_softmax(-1).flatten(0, 1), p.flatten(0, 1),
                                      log_target=True, reduction="batchmean")  # fmt: skip
    keys = list(first._variables)
    expected = torch.autograd.grad(loss, [first._variables[k] for k in keys])
    student.step(start, teacher, recorded, {"scale": 1e-3, "zero": 1e-3, "norm": 1e-3})
    _, after = student._load(0)
    for key, gradient in zip(keys, expected, strict=True):
        moved = after._variables[key].detach()
        clear = gradient.abs() > 1e-2 * gradient.abs().max()
        # Adam's first step is the rate against the sign of the gradient
        assert torch.equal(moved[clear].sign(), -gradient[clear].sign())
        torch.testing.assert_close(moved[clear].abs(), torch.full_like(moved[clear], 1e-3), rtol=0.1, atol=1e-6)


@pytest.mark.parametrize("type", ["tsq2", "q2_0", "q4_1"])
def test_it_lowers_the_divergence_with_frozen_codes(type, decoder, tokens, tmp_path):
    blocks = misscaled(decoder, type)
    pass_ = Distillation(steps=20, batch=8, scale_rate=3e-2, zero_rate=1e-2)
    done = pass_.run(decoder, blocks, tokens[:18], tokens[18:], 0, torch.float32, tmp_path)
    assert done.after < 0.8 * done.before
    for index in range(len(decoder)):
        old, new = blocks(index), done.blocks(index)
        for name, tensor in old.items():
            assert torch.equal(new[name].arrays["q"], tensor.arrays["q"])
            assert {k: a.dtype for k, a in new[name].arrays.items()} == {k: a.dtype for k, a in tensor.arrays.items()}
        norms = {n for n, t in new.items() if t.plain}
        assert norms == {f"{decoder.block_prefix(index)}{n}" for n in decoder.load_block(index).norms()}
    assert list(done.final) == ["model.norm.weight"]


def test_what_leaves_is_what_was_measured(decoder, tokens, tmp_path):
    """The stored blocks, run anew, have the divergence that the pass reports."""
    pass_ = Distillation(steps=6, batch=8, scale_rate=3e-2, zero_rate=1e-2)
    (tmp_path / "a").mkdir()
    done = pass_.run(decoder, misscaled(decoder), tokens[:18], tokens[18:], 0, torch.float32, tmp_path / "a")
    teacher, recorded = _Student(decoder, done.blocks, torch.float32, _Kept(tmp_path, {}), {}).teach(tokens)
    hidden, _ = decoder.stem(tokens)
    with torch.no_grad():
        for index in range(len(decoder)):
            block = decoder.load_block(index)
            weights = block.adopt(done.blocks(index))
            hidden = torch.cat([block.run(h, recorded.arguments[index], weights) for h in hidden.split(1)])
    held = range(18, 24)
    _, norm = decoder.final_norm()
    weights = {"weight": done.final["model.norm.weight"].arrays["values"]}
    head = (norm, decoder.output_weight(), decoder.output_weight())
    got = [decoder.divergence(hidden[i], teacher[i], weights, head)[0] for i in held]
    assert sum(got) / len(got) == pytest.approx(done.after, rel=1e-3)


class _StoppedError(Exception):
    pass


def _stop_after(steps):
    def report(done, _):
        if done == steps:
            raise _StoppedError

    return report


def _same(decoder, one, other):
    return one.before == other.before and one.after == other.after and all(
        torch.equal(array, other.blocks(index)[name].arrays[key])
        for index in range(len(decoder))
        for name, tensor in one.blocks(index).items()
        for key, array in tensor.arrays.items()
    )  # fmt: skip


@pytest.fixture
def run_in(decoder, tokens, tmp_path):
    """Run a pass of five steps, in a folder of that name."""

    def run(name, report=lambda *_: None):
        (tmp_path / name).mkdir(exist_ok=True)
        pass_ = Distillation(steps=5, batch=8, scale_rate=3e-2, zero_rate=1e-2)
        blocks = misscaled(decoder)
        return pass_.run(decoder, blocks, tokens[:18], tokens[18:], 0, torch.float32, tmp_path / name, report)

    return run


@pytest.mark.parametrize("whole", [0, 1, 4])
def test_a_stopped_pass_goes_on_to_the_same_end(whole, run_in, decoder):
    with pytest.raises(_StoppedError):
        run_in("twice", _stop_after(whole))
    reported = []
    twice = run_in("twice", lambda done, _: reported.append(done))
    assert reported == list(range(whole, 6))
    assert _same(decoder, run_in("once"), twice)


def test_a_step_cut_short_leaves_no_trace(run_in, decoder, monkeypatch):
    """Killed when every block has moved and the step is not counted yet."""
    with monkeypatch.context() as patch:
        patch.setattr(_Kept, "step_done", Mock(side_effect=_StoppedError))
        with pytest.raises(_StoppedError):
            run_in("twice")
    assert _same(decoder, run_in("once"), run_in("twice"))


def test_another_schedule_begins_anew(decoder, tokens, tmp_path):
    given = decoder, misscaled(decoder), tokens[:18], tokens[18:], 0, torch.float32
    with pytest.raises(_StoppedError):
        Distillation(steps=5, batch=8).run(*given, tmp_path, _stop_after(2))
    reported = []
    Distillation(steps=3, batch=8).run(*given, tmp_path, lambda done, _: reported.append(done))
    assert reported == [0, 1, 2, 3]


def test_a_pass_that_does_not_help_is_undone(decoder, tokens, tmp_path):
    blocks = rounded(decoder)
    wild = Distillation(steps=2, batch=8, scale_rate=3.0, zero_rate=3.0, norm_rate=3.0)
    done = wild.run(decoder, blocks, tokens[:18], tokens[18:], 0, torch.float32, tmp_path)
    assert done.after >= done.before
    assert done.blocks is blocks
    assert done.final == {}
