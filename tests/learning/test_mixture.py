"""Blocks with many experts, learned in parts: the same model in the end, in memory that does not grow with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tesseraq_gguf.learning import mixture
from tesseraq_gguf.learning.reconstruction import BlockResult, Reconstruction
from tesseraq_gguf.learning.rounding import round_blocks
from tesseraq_gguf.methods.awq import AWQ
from tesseraq_gguf.methods.gptq import GPTQ
from tesseraq_gguf.methods.rare_experts import RARE
from tesseraq_gguf.methods.start import AsItStarts
from tesseraq_gguf.methods.tesseraq import TesseraQ
from tesseraq_gguf.models import Decoder, ModelSource, experts
from tesseraq_gguf.models.experts import stack_of
from tesseraq_gguf.models.streamed import StreamedLinear
from tesseraq_gguf.types.grids import grid_of

CPU = torch.device("cpu")
TOKENS = torch.randint(4, 300, (8, 64), generator=torch.Generator().manual_seed(0))


def save(folder: Path, count: int, layers: int = 1, each: int = 4, kind: str = "Qwen3Moe", **more: Any) -> Any:
    """Save a tiny mixture, and return it in float32."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=320, hidden_size=64, moe_intermediate_size=64, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=count, num_local_experts=count,
        num_experts_per_tok=each, max_position_embeddings=512, initializer_range=0.2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}ForCausalLM")
    made(config).to(torch.bfloat16).save_pretrained(folder)
    return made.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> ModelSource:
    folder = tmp_path_factory.mktemp("many")
    save(folder, 20)
    return ModelSource("many", folder)


def learn(source: ModelSource, method: Any, type: str = "tsq3", tokens: torch.Tensor = TOKENS) -> list[BlockResult]:
    decoder = Decoder(source, CPU)
    engine = Reconstruction(decoder, method, dict.fromkeys(decoder.matrix_shapes(), type), 0, torch.float32)
    return list(engine.run(tokens, [torch.ones(2, decoder.hidden_size)] * len(decoder), lambda _: None))


@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
def test_a_streamed_block_computes_what_transformers_does(kind, tmp_path):
    """With gradients, in spite of weights that are read anew on the way down."""
    model = save(tmp_path, 20, kind=kind)
    decoder = Decoder(ModelSource("x", tmp_path), CPU)
    hidden, recorded = decoder.stem(TOKENS[:1])
    block = decoder.load_block(0)
    assert all(isinstance(m, StreamedLinear) for name, m in block.matrices().items() if stack_of(name))
    assert not any(stack_of(name) for name, p in block.module.named_parameters() if p.dim() > 1)
    expected = model(TOKENS[:1], output_hidden_states=True).hidden_states[1]  # behind the final norm
    fed = hidden.clone().requires_grad_()
    got = block.run(fed, recorded.arguments[0])
    torch.testing.assert_close(decoder.final_norm()[1](got), expected, rtol=1e-4, atol=1e-4)
    again = hidden.clone().requires_grad_()
    states = model(inputs_embeds=again, output_hidden_states=True).hidden_states
    wanted = torch.autograd.grad(states[1].square().sum(), again)[0]
    back = torch.autograd.grad(decoder.final_norm()[1](got).square().sum(), fed)[0]
    torch.testing.assert_close(back, wanted, rtol=1e-3, atol=1e-3)


METHODS: dict[str, Any] = {
    "gptq": AsItStarts(GPTQ()),
    "awq": AWQ(AsItStarts(GPTQ()), points=4),
    "tesseraq": TesseraQ(steps=2, batch=4, soft_shares=(0.5, 0.2, 0.05), settle_scales=1, settle_zeros=2),
}


@pytest.mark.parametrize("name", METHODS)
def test_parts_are_learned_as_well_as_the_block_at_once(name, many, monkeypatch):
    (parts,) = learn(many, METHODS[name])
    for module in (experts, sys.modules["tesseraq_gguf.models.decoder"]):
        monkeypatch.setattr(module, "FEW", 100)
    (whole,) = learn(many, METHODS[name])
    assert parts.tensors.keys() == whole.tensors.keys()
    assert parts.loss_after is not None
    assert whole.loss_after is not None
    assert whole.loss_before is not None
    assert parts.loss_after < 1.1 * whole.loss_after
    assert parts.loss_after < 0.95 * whole.loss_before


def test_experts_that_few_tokens_come_to_are_rounded_and_named(many):
    (result,) = learn(many, AsItStarts(GPTQ()), tokens=TOKENS[:2])  # 512 visits of 20 experts, not evenly
    decoder = Decoder(many, CPU)
    hidden, recorded = decoder.stem(TOKENS[:2])
    block, counts = decoder.load_block(0), torch.zeros(20, dtype=torch.int64)
    (module,) = block.mixtures.values()

    def count(_hidden: torch.Tensor, chosen: torch.Tensor, _weights: torch.Tensor) -> None:
        counts.add_(torch.bincount(chosen.flatten(), minlength=20))

    module.watch(count)
    block.run(hidden, recorded.arguments[0])
    rare = {int(name.split(".")[5]) for name in result.rare}
    assert {e for e in range(20) if counts[e] < RARE // 2} <= rare <= {e for e in range(20) if counts[e] < 2 * RARE}
    assert 0 < len(rare) < 20
    grid = grid_of("tsq3")
    for name in result.rare:
        weight = decoder.matrix(name)
        got, nearest = grid.dequantize(result.tensors[name]), grid.dequantize(grid.quantize(weight))
        assert not torch.equal(got, nearest)  # squares of what experts are fed were weights
        assert float((got - weight).norm()) < 1.3 * float((nearest - weight).norm())


def test_a_finished_block_is_taken_over(many):
    learned = learn(many, METHODS["gptq"])
    decoder = Decoder(many, CPU)
    engine = Reconstruction(decoder, METHODS["gptq"], dict.fromkeys(decoder.matrix_shapes(), "tsq3"), 0, torch.float32)
    (again,) = engine.run(TOKENS, [torch.ones(2, decoder.hidden_size)], lambda _: learned[0])
    assert again is learned[0]


def test_all_experts_are_rounded_one_by_one(many):
    decoder = Decoder(many, CPU)
    types = dict.fromkeys(decoder.matrix_shapes(), "tsq2")
    (result,) = round_blocks(decoder, types, lambda _: None)
    assert result.tensors.keys() == types.keys()
    name = "model.layers.0.mlp.experts.19.down_proj.weight"
    grid = grid_of("tsq2")
    assert torch.equal(grid.dequantize(result.tensors[name]), grid.dequantize(grid.quantize(decoder.matrix(name))))


def test_samples_are_dealt_out_evenly():
    fed = torch.arange(50.0)[:, None].expand(50, 3)
    assert mixture._samples(fed, 8).shape == (8, 6, 3)
    assert mixture._samples(fed, 64).shape == (50, 1, 3)


RUN = """
import json, re, sys
import torch
from tesseraq_gguf.compute.parallel import joined
from tesseraq_gguf.learning.reconstruction import Reconstruction
from tesseraq_gguf.methods.tesseraq import TesseraQ
from tesseraq_gguf.models import Decoder, ModelSource
from pathlib import Path

torch.set_num_threads(1)
with joined() as team:
    decoder = Decoder(ModelSource("x", Path(sys.argv[1])), torch.device("cpu"))
    tokens = torch.randint(4, 300, (int(sys.argv[2]), 64), generator=torch.Generator().manual_seed(0))
    method = TesseraQ(steps=1, batch=4, soft_shares=(0.5, 0.1), settle_scales=1, settle_zeros=1)
    types = dict.fromkeys(decoder.matrix_shapes(), "tsq3")
    engine = Reconstruction(decoder, method, types, 0, torch.float32, team=team)
    losses, rare = [], 0
    for result in engine.run(tokens, [torch.ones(2, decoder.hidden_size)] * len(decoder), lambda _: None):
        losses.append(result.loss_after)
        rare += len(result.rare)
        del result
    # not what getrusage says, which begins at the memory of the process that started this one
    peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
    if team.first:
        print(json.dumps({"peak": peak, "losses": losses, "rare": rare}))
"""


def run(folder: Path, processes: int = 1, samples: int = 16) -> dict[str, Any]:
    script = folder / "run.py"
    script.write_text(RUN)
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    done = subprocess.run(
        [*start, str(script), str(folder), str(samples)], capture_output=True, text=True, timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak of a process")
def test_memory_does_not_grow_with_experts_beyond_their_bytes_on_disk(tmp_path):
    """Eight of them for each token."""
    peaks = {}
    for count in (64, 256):
        folder = tmp_path / str(count)
        save(folder, count, layers=2, each=8)
        found = run(folder, samples=64)
        peaks[count] = found["peak"]
        assert found["rare"] < 0.25 * 2 * count * 3  # most are learned, not rounded
    on_disk = 2 * (256 - 64) * 3 * 64 * 64 * 2  # layers, experts, matrices of 64 x 64 in 16 bits
    assert peaks[256] - peaks[64] < on_disk


@pytest.mark.slow
@pytest.mark.parametrize("count", [6, 20])
def test_two_processes_learn_what_one_learns(count, tmp_path):
    """Of experts that are learned together, and of those that are learned one by one."""
    save(tmp_path, count, layers=2)
    alone, together = run(tmp_path), run(tmp_path, 2)
    assert together["losses"] == pytest.approx(alone["losses"], rel=0.02)
    assert together["rare"] == alone["rare"]
