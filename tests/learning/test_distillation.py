"""The last pass: its gradients against the whole model's, its memory of a block, and that it learns or is undone."""

from __future__ import annotations

import math
from functools import cache
from unittest.mock import Mock

import pytest
import torch
from tiny_models import make_model  # noqa: F401  (a fixture)

from tesseraq_gguf.learning.calibration import Calibration
from tesseraq_gguf.learning.distillation import Distillation, _Kept, _Student
from tesseraq_gguf.models import Decoder
from tesseraq_gguf.models.quantised import Quantised
from tesseraq_gguf.types.grids import grid_of

CPU = torch.device("cpu")


@pytest.fixture
def decoder(make_model):  # noqa: F811
    return Decoder(make_model("llama"), CPU)


@pytest.fixture
def tokens():
    return torch.randint(4, 300, (24, 20), generator=torch.Generator().manual_seed(1))


def text(tokens, learned_on):
    """The first sequences to learn on, the others held out."""
    return Calibration("text", tokens[:learned_on], tokens[learned_on:])


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


def test_a_step_follows_the_gradient_of_the_whole_model(decoder, tokens, tmp_path):
    """The walk down, block by block, against one backward pass through everything."""
    blocks = rounded(decoder)
    student = _Student(Quantised(decoder, blocks), _Kept(tmp_path, {}))
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


@pytest.mark.parametrize("type", ["tsq2", "q2_k"])
def test_steps_are_adams_on_the_whole_model(type, make_model, tokens, tmp_path):  # noqa: F811
    """Three steps, each at rates of its own, against torch's Adam on all variables at once."""
    decoder = Decoder(make_model("llama-256" if type == "q2_k" else "llama"), CPU)
    student = _Student(Quantised(decoder, rounded(decoder, type)), _Kept(tmp_path, {}))
    teacher, recorded = student.teach(tokens)
    start, _ = decoder.stem(tokens)
    blocks, final = [student._load(index) for index in range(len(decoder))], student._load_final()
    _, norm = decoder.final_norm()
    kinds = {"zero": "zero", "dmin": "scale", "norm": "norm"}
    moving = [*(variables for _, variables in blocks), final]
    everything = {(where, *key): v for where, own in enumerate(moving) for key, v in own._variables.items()}
    assert {kinds.get(key[-1], "scale") for key in everything} >= {"scale", "norm"}
    adam = torch.optim.Adam([{"params": [v]} for v in everything.values()], betas=(0.9, 0.99), eps=1e-10)
    for step, chosen in enumerate(torch.arange(12).split(4)):
        rates = {"scale": 1e-3 * (step + 1), "zero": 2e-3 / (step + 1), "norm": 3e-3 - 1e-3 * step}
        student.step(start[chosen], teacher[chosen], recorded, rates)
        hidden = start[chosen]
        for block, variables in blocks:
            hidden = student._run(block, hidden, recorded, *variables.realise())
        weight = final.realise()[1]["weight"]
        answers = torch.func.functional_call(norm, {"weight": weight}, (hidden,)) @ decoder.output_weight().T
        p = (norm(teacher[chosen]) @ decoder.output_weight().T).log_softmax(-1)
        loss = torch.nn.functional.kl_div(answers.log_softmax(-1).flatten(0, 1), p.flatten(0, 1),
                                          log_target=True, reduction="batchmean")  # fmt: skip
        for (*_, key), group in zip(everything, adam.param_groups, strict=True):
            group["lr"] = rates[kinds.get(key, "scale")]
        adam.zero_grad()
        loss.backward()
        adam.step()
        ours = [*(student._load(index)[1] for index in range(len(decoder))), student._load_final()]
        for (where, name, key), expected in everything.items():
            got, wanted = ours[where]._variables[name, key].detach(), expected.detach()
            assert float(wanted.abs().max()) > 1e-4
            off = (got - wanted).abs() / max(rates.values())
            # Adam makes much of gradients that are next to nothing: of those, sums in another order may differ
            assert float(off.flatten().quantile(0.98)) < 1e-2, (step, where, key)


def test_rates_rise_and_fall_and_what_is_held_out_is_not_learned_on(decoder, tokens, tmp_path, monkeypatch):
    learned_on, rates, measured = [], [], []

    def note(_self, start, teacher, recorded, given):
        learned_on.append(start)
        rates.append(given)

    def measure(_self, start, teacher, recorded):
        measured.append(start)
        return 1.0 / len(measured)

    monkeypatch.setattr(_Student, "step", note)
    monkeypatch.setattr(_Student, "divergence", measure)
    pass_ = Distillation(steps=10, batch=4, scale_rate=2e-3, zero_rate=3e-3, norm_rate=5e-3, warm_up=0.2)
    done = pass_.run(Quantised(decoder, rounded(decoder)), text(tokens, 9), 3, tmp_path)
    shares = [0.5, 1.0, *((1 + math.cos(math.pi * step / 8)) / 2 for step in range(8))]
    assert [r["scale"] for r in rates] == pytest.approx([2e-3 * s for s in shares])
    assert [r["zero"] for r in rates] == pytest.approx([3e-3 * s for s in shares])
    assert [r["norm"] for r in rates] == pytest.approx([5e-3 * s for s in shares])
    known, _ = decoder.stem(tokens)
    held = known[9:]
    assert [torch.equal(start, held) for start in measured] == [True, True]
    assert (done.before, done.after) == (1.0, 0.5)
    places = [[i for i, one in enumerate(known) if torch.equal(s, one)] for start in learned_on for s in start]
    drawn = [place for (place,) in places]
    assert len(drawn) == 40
    assert set(drawn) == set(range(9))
    for first in range(0, 40, 8):  # of nine, eight are taken before the order is drawn anew
        assert len(set(drawn[first : first + 8])) == 8
    assert drawn[:8] != drawn[8:16]


def test_the_schedule_unless_told_otherwise():
    assert Distillation() == Distillation(200, 4, 2e-3, 2e-3, 2e-3, 0.1)


@pytest.mark.parametrize(("steps", "warm_up", "rising"), [(20, 0.1, 2), (5, 0.1, 1), (3, 0.0, 1), (4, 1.0, 4)])
def test_the_warm_up_is_a_share_of_the_steps(steps, warm_up, rising):
    pass_ = Distillation(steps=steps, warm_up=warm_up)
    shares = [pass_._share(step) for step in range(steps)]
    assert shares[:rising] == pytest.approx([(step + 1) / rising for step in range(rising)])
    falling = [(1 + math.cos(math.pi * n / (steps - rising))) / 2 for n in range(steps - rising)]
    assert shares[rising:] == pytest.approx(falling)


@pytest.mark.parametrize("type", ["tsq2", "q2_0", "q4_1", "iq4_nl"])
def test_it_lowers_the_divergence_with_frozen_codes(type, decoder, tokens, tmp_path):
    blocks = misscaled(decoder, type)
    pass_ = Distillation(steps=20, batch=8, scale_rate=3e-2, zero_rate=1e-2)
    done = pass_.run(Quantised(decoder, blocks), text(tokens, 18), 0, tmp_path)
    assert done.after < {"tsq2": 0.74, "q2_0": 0.78, "q4_1": 0.64, "iq4_nl": 0.65}[type] * done.before
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
    done = pass_.run(Quantised(decoder, misscaled(decoder)), text(tokens, 18), 0, tmp_path / "a")
    teacher, recorded = _Student(Quantised(decoder, done.blocks), _Kept(tmp_path, {})).teach(tokens)
    hidden, _ = decoder.stem(tokens)
    with torch.no_grad():
        for index in range(len(decoder)):
            block = decoder.load_block(index)
            weights = block.adopt(done.blocks(index))
            hidden = torch.cat([block.run(h, recorded.arguments[index], weights) for h in hidden.split(1)])
    held = range(18, 24)
    weights, head = {"weight": done.final["model.norm.weight"].arrays["values"]}, decoder.output_weight()
    got = [decoder.head.divergence(hidden[i], teacher[i], weights, head, head)[0] for i in held]
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
        return pass_.run(Quantised(decoder, blocks), text(tokens, 18), 0, tmp_path / name, report)

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
    given = Quantised(decoder, misscaled(decoder)), text(tokens, 18), 0
    with pytest.raises(_StoppedError):
        Distillation(steps=5, batch=8).run(*given, tmp_path, _stop_after(2))
    reported = []
    Distillation(steps=3, batch=8).run(*given, tmp_path, lambda done, _: reported.append(done))
    assert reported == [0, 1, 2, 3]


def test_a_pass_that_does_not_help_is_undone(decoder, tokens, tmp_path):
    blocks = rounded(decoder)
    wild = Distillation(steps=2, batch=8, scale_rate=3.0, zero_rate=3.0, norm_rate=3.0)
    done = wild.run(Quantised(decoder, blocks), text(tokens, 18), 0, tmp_path)
    assert done.after >= done.before
    assert done.blocks is blocks
    assert done.final == {}
