# needs: extras=test
"""Build runtimes for elsewhere, move them, and run them on processors old and new, in qemu too.

Processors that this machine is not are those of qemu-user (Debian: apt install qemu-user). The model is a Llama of two
blocks with random weights, rounded to each of our types; its perplexity must be the same everywhere but for what
kernels round differently.

    scripts/run check builds              both; half an hour on two cores
    scripts/run check builds portable     one of them
    scripts/run check builds cuda         the runtime for NVIDIA's GPUs: all kernels, for all architectures, linked;
                                          hours on two cores
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tesseraq_gguf import Recipe, convert
from tesseraq_gguf.runtime import Runtime, build
from tesseraq_gguf.runtime.cuda import EVERYWHERE
from tesseraq_gguf.runtime.locate import read_runtime
from tesseraq_gguf.runtime.target import Target
from tesseraq_gguf.runtime.toolchain import find_emulator
from tesseraq_gguf.types.facts import names

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from tiny_llama import WORDS, make_tiny_model

TARGETS: Mapping[str, Target] = {"portable": Target(portable=True), "aarch64": Target(triple="aarch64-linux-gnu")}

X86 = {
    "Conroe": "x64",
    "Nehalem": "sse42",
    "SandyBridge": "sandybridge",
    "IvyBridge": "ivybridge",
    "Opteron_G5": "piledriver",
    "Haswell": "haswell",
}
"""Processors of qemu-x86_64, and the variants that ggml must choose on them. Its newest has no AVX-512."""

ARM = {"cortex-a57": "armv8.0_1", "cortex-a76": "armv8.2_2", "max,sve-max-vq=2": "armv8.6_2"}
"""Processors of qemu-aarch64, and the variants that ggml must choose on them."""

THOROUGH = ("Haswell", "max,sve-max-vq=2")

TYPES = names(lambda t: t.family == "tsq")
_TYPE = "(" + "|".join(TYPES) + ")"

OPERATORS = {
    "MUL_MAT": rf"type_a={_TYPE},type_b=f32,m=16,n=(1|2|8|9),k=256,bs=\[1,1\]",
    "MUL_MAT_ID": rf"type_a={_TYPE},.*n_mats=4,n_used=2,b=0,m=512,n=(1|4|5),",
    "GET_ROWS": rf"type={_TYPE},",
    "CPY": rf"type_(src|dst)={_TYPE},",
}
"""What test-backend-ops is asked for, by operator: all cases with our types would take hours in qemu."""

ANSWERS = {
    "llama-perplexity": (["--version"], "version"),
    "llama-bench": (["--help"], "usage"),
    "llama-quantize": (["--help"], "TSQ2"),
    "llama-imatrix": (["--version"], "version"),
    "llama-completion": (["--version"], "version"),
    "ggml-rpc-server": (["--help"], "--port"),
    "test-backend-ops": (["--help"], "Usage"),
    "test-quantize-perf": (["--type", "tsq2", "--op", "vec_dot_q", "-i", "1"], "tsq2"),
}
"""What every program but test-quantize-fns is asked first, and a word of its answer."""

PERPLEXITY = re.compile(r"Final estimate: PPL = ([\d.]+)")
CHOSEN = re.compile(r"loaded CPU backend from (.*)/(?:lib)?ggml-cpu-(\S+?)\.(?:so|dll)")
_failures: list[str] = []


@dataclass(frozen=True)
class Machine:
    """A processor that programs run on.

    Attributes:
        name: what it is called.
        head: the head of every command.
        expected: the variant that ggml must choose; None if that depends on the machine.
        thorough: whether all is asked there; else only which variant is chosen, and whether it computes.
    """

    name: str
    head: tuple[str, ...]
    expected: str | None
    thorough: bool


def main() -> int:
    """Build and check; 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="scripts/run check builds", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, "cuda", []], help="by default all but cuda")
    parser.add_argument("--force", action="store_true", help="build even what is there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models, text = make_models(folder)
        for name in options.targets or TARGETS:
            if name == "cuda":
                check_cuda(models, text, options.force)
                continue
            target = TARGETS[name]
            begin = time.monotonic()
            runtime = build(target, force=options.force)
            print(f"\n{target.name}: {runtime.root}, after {time.monotonic() - begin:.0f} s")
            for key in ("compiler", "variants", "variants_left_out", "proven", "chosen"):
                value = runtime.manifest[key]
                print(f"  {key:<18} {', '.join(value) if isinstance(value, list) else value}")
            check_runtime(copied(runtime, folder / "somewhere else" / name), target, models, text)
    print(f"\n{len(_failures)} failures" + "".join(f"\n  {line}" for line in _failures))
    return bool(_failures)


def check_cuda(models: Mapping[str, Path], text: Path, force: bool) -> None:
    """Build for every GPU that upstream builds for, and start what was linked; on the CPU, if there is no GPU."""
    runtime = build(Target("cuda"), cuda_architectures=EVERYWHERE, force=force)
    print(f"\ncuda: {runtime.root}")
    machine = Machine("this machine", (), None, False)
    code, said = run(machine, runtime, "llama-bench", ["--help"])
    report(code == 0, "llama-bench starts with the CUDA backend linked", said[-100:] if code else "exit code 0")
    for model in models.values():
        perplexity(machine, runtime, model, text)


def make_models(folder: Path) -> tuple[dict[str, Path], Path]:
    """A tiny model in each of our types, and a text."""
    tiny = make_tiny_model(folder / "tiny")
    models = {name: folder / f"{name}.gguf" for name in TYPES}
    for name, out in models.items():
        convert(Recipe(str(tiny), out, type=name, method="rtn", embedding_type=name))
    text = folder / "text.txt"
    text.write_text(WORDS * 20)
    return models, text


def copied(runtime: Runtime, folder: Path) -> Runtime:
    """The runtime in another folder, as `cp -a` makes it."""
    shutil.copytree(runtime.root, folder, symlinks=True)
    copy = read_runtime(folder)
    assert copy
    return copy


def check_runtime(runtime: Runtime, target: Target, models: Mapping[str, Path], text: Path) -> None:
    """Run everything on every processor, and compare the perplexities."""
    perplexities: dict[str, dict[str, float]] = {}
    for machine in machines(target):
        print(f"\n  {machine.name}")
        for tool, (arguments, word) in ANSWERS.items():
            code, said = run(machine, runtime, tool, arguments)
            report(word in said and code >= 0, f"{tool} {' '.join(arguments)}", f"exit code {code}")
            if tool == "test-quantize-perf":
                chosen = CHOSEN.search(said)
        variant = chosen[2] if chosen else None
        right = variant == machine.expected if machine.expected else variant in runtime.manifest["proven"]
        report(right, "the variant for this processor", f"{variant}")
        beside = bool(chosen) and Path(str(chosen and chosen[1])).resolve() == runtime.lib.resolve()
        report(beside, "the variant is the copy's own", chosen[1] if chosen else "none")
        asked = OPERATORS if machine.thorough else {"MUL_MAT": OPERATORS["MUL_MAT"]}
        for operator, cases in asked.items():
            code, said = run(machine, runtime, "test-backend-ops", ["test", "-b", "CPU", "-o", operator, "-p", cases])
            passed = re.search(r"(\d+)/(\d+) tests passed", said)
            some = passed is not None and passed[1] != "0"
            report(code == 0 and some, operator, passed[0] if passed else f"exit code {code}")
        perplexities[machine.name] = {name: perplexity(machine, runtime, model, text) for name, model in models.items()}
        if not machine.thorough:
            continue
        code, said = run(machine, runtime, "test-quantize-fns", [])
        report(code == 0, "test-quantize-fns", f"exit code {code}")
        code, said = run(
            machine, runtime, "llama-completion",
            ["-m", str(models["tsq2"]), "-p", "the quick", "-n", "8", "--temp", "0", "-no-cnv", "-t", "1"],
        )  # fmt: skip
        # random weights may have nothing to say, and its log thread may lose the last lines; a failure has an exit code
        report(code == 0 and "sampler chain" in said, "llama-completion", f"exit code {code}")
        code, said = run(
            machine, runtime, "llama-bench", ["-m", str(models["tsq2"]), "-p", "16", "-n", "8", "-r", "1", "-t", "1"]
        )
        report(code == 0 and "tg8" in said, "llama-bench", f"exit code {code}")
        if not machine.head:
            check_bindings(runtime, models["tsq2"])
    print()
    for name in models:
        values = {machine: found[name] for machine, found in perplexities.items()}
        close = max(values.values()) < 1.01 * min(values.values())
        listed = ", ".join(f"{machine} {value:.4f}" for machine, value in values.items())
        report(close, f"perplexity of {name}", listed)


def machines(target: Target) -> list[Machine]:
    """This processor, if the target is its kind, and those of qemu."""
    if target.cross:
        emulator = find_emulator(target)
        if emulator is None:
            sys.exit(f"error: {target.cross.emulator} not found; on Debian and Ubuntu: apt install qemu-user")
        return [_emulated(emulator, name, variant) for name, variant in ARM.items()]
    qemu = shutil.which("qemu-x86_64")
    if qemu is None:
        sys.exit("error: qemu-x86_64 not found; on Debian and Ubuntu: apt install qemu-user")
    old = [_emulated([qemu], name, variant) for name, variant in X86.items()]
    return [Machine("this machine", (), None, True), *old]


def _emulated(emulator: Sequence[str], name: str, variant: str) -> Machine:
    """A processor of qemu. The newest of each kind is asked everything; that takes minutes there."""
    return Machine(f"qemu {name}", (*emulator, "-cpu", name), variant, name in THOROUGH)


def run(machine: Machine, runtime: Runtime, tool: str, arguments: Sequence[str]) -> tuple[int, str]:
    """Run a program; returns its exit code and all that it said."""
    command = [*machine.head, str(runtime.tool(tool)), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    return result.returncode, result.stdout + result.stderr


def perplexity(machine: Machine, runtime: Runtime, model: Path, text: Path) -> float:
    """Perplexity of a model on a text; infinite if the program failed."""
    arguments = ["-m", str(model), "-f", str(text), "-c", "64", "-b", "64", "--chunks", "2", "-t", "1"]
    code, said = run(machine, runtime, "llama-perplexity", arguments)
    found = PERPLEXITY.search(said)
    report(code == 0 and bool(found), f"llama-perplexity, {model.stem}", found[1] if found else f"exit code {code}")
    return float(found[1]) if found else float("inf")


def check_bindings(runtime: Runtime, model: Path) -> None:
    """Let the copy's Python bindings speak, in a process that knows nothing of this package."""
    code = f"""
import sys
sys.path.insert(0, {str(runtime.python)!r})
from llama_cpp import Llama
llama = Llama({str(model)!r}, verbose=False, n_ctx=64)
llama("the quick", max_tokens=8, temperature=0)
print(llama.n_tokens > 0)  # random weights may have nothing to say
paths = (line.split(maxsplit=5)[-1].strip() for line in open("/proc/self/maps"))
mapped = {{path for path in paths if "libggml" in path or "libllama" in path}}
print(*sorted(mapped), sep="\\n")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    spoken, *libraries = result.stdout.splitlines() or [""]
    own = bool(libraries) and all(path.startswith(str(runtime.lib.resolve())) for path in libraries)
    names = ", ".join(Path(path).name for path in libraries)
    report(result.returncode == 0 and spoken == "True" and own, "llama_cpp", names or result.stderr[-300:])


def report(good: bool, what: str, detail: str) -> None:
    """Print a line, and remember what went wrong."""
    print(f"    {'ok    ' if good else 'FAILED'} {what}: {detail}", flush=True)
    if not good:
        _failures.append(f"{what}: {detail}")


if __name__ == "__main__":
    sys.exit(main())
