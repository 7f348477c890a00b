"""Mutations drawn from what the code says: operators, constants, calls and statements that are a little different.

What is drawn depends on a seed and on each line's own text, not on where it stands: code that moves keeps its
mutations.
"""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from check.mutate.equivalent import EQUIVALENT
from check.mutate.mutation import Mutation

PLACES = ("tesseraq_gguf/methods", "tesseraq_gguf/types", "tesseraq_gguf/learning/distillation.py",
          "tesseraq_gguf/learning/reconstruction.py")  # fmt: skip
"""Folders and files that mutations are drawn from."""

_TESTS = {
    "tesseraq_gguf/methods/gptq.py": ("tests/methods/test_tesseraq.py",),
    "tesseraq_gguf/methods/flexround.py": ("tests/methods/test_scaled_rounding.py",),
    "tesseraq_gguf/methods/lrq.py": ("tests/methods/test_scaled_rounding.py",),
    "tesseraq_gguf/types/ptq161/grid.py": ("tests/types", "tests/methods/test_ptq161.py"),
    "tesseraq_gguf/types/bcq/grid.py": ("tests/types", "tests/methods/test_lobcq.py"),
    "tesseraq_gguf/types/kquants/grid.py": ("tests/types", "tests/methods/test_scaled_rounding.py"),
    "tesseraq_gguf/types": ("tests/types", "tests/gguf_files/test_column_orders.py"),
    "tesseraq_gguf/methods": ("tests/methods",),
}
"""Tests that should notice mutations of a file, or of the files of a folder, unless the file has tests of its name."""

_BINARY = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "//", ast.Pow: "*",
    ast.LShift: ">>", ast.RShift: "<<", ast.BitAnd: "|", ast.BitOr: "&", ast.BitXor: "&",
}  # fmt: skip
_COMPARISONS = {
    ast.Lt: ("<=", ">"), ast.LtE: ("<", ">="), ast.Gt: (">=", "<"), ast.GtE: (">", "<="), ast.Eq: ("!=",),
    ast.NotEq: ("==",), ast.Is: ("is not",), ast.IsNot: ("is",), ast.In: ("not in",), ast.NotIn: ("in",),
}  # fmt: skip
_NAMES = {
    "min": "max", "max": "min", "amin": "amax", "amax": "amin", "argmin": "argmax", "argmax": "argmin",
    "minimum": "maximum", "maximum": "minimum", "clamp_min": "clamp_max", "clamp_max": "clamp_min",
    "sum": "mean", "mean": "sum", "floor": "ceil", "ceil": "floor", "any": "all", "all": "any",
    "ones_like": "zeros_like", "zeros_like": "ones_like",
}  # fmt: skip
_DROPPED = {
    "abs", "round", "clamp", "clamp_", "clip", "square", "sqrt", "exp", "log", "detach", "clone", "flip", "sort",
}  # fmt: skip
_SHAPING = {
    "flatten", "unflatten", "view", "reshape", "repeat", "repeat_interleave", "swapaxes", "transpose", "unsqueeze",
    "split", "gather", "cat", "stack", "concatenate", "sum", "mean", "amax", "amin", "argmin", "argmax", "cumsum",
    "sort", "norm", "diff", "take_along_axis", "expand", "moveaxis", "permute", "zeros", "ones", "empty",
}  # fmt: skip
"""Calls whose numbers are axes and shapes: changed, they raise, and say nothing of the tests."""
_SYMMETRIC = {"min", "max", "minimum", "maximum"}
_SAYS_NOTHING = {"axis", "dim", "keepdim", "keepdims", "strict", "fused", "type", "frozen"}
"""Arguments whose values change no result here."""


def candidates(file: str, source: str) -> Iterator[tuple[str, int, int, str]]:
    """Yield all mutations of a file as (name, first and last offset in its text, what stands there instead)."""
    tree = ast.parse(source)
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    lines = source.splitlines()

    def offset(line: int, column: int) -> int:  # columns of `ast` count bytes
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    def span(node: ast.AST) -> tuple[int, int]:
        return offset(node.lineno, node.col_offset), offset(node.end_lineno, node.end_col_offset)  # type: ignore

    def text(node: ast.AST) -> str:
        first, last = span(node)
        return source[first:last]

    for node in _told(tree):
        if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            first, last = span(node.left)[1], span(node.right)[0]
            yield _operator(source, first, last, _BINARY[type(node.op)], "operator")
        elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARISONS:
            first, last = span(node.left)[1], span(node.comparators[0])[0]
            for other in _COMPARISONS[type(node.ops[0])]:
                yield _operator(source, first, last, other, "comparison")
        elif isinstance(node, ast.BoolOp):
            other = "or" if isinstance(node.op, ast.And) else "and"
            yield _operator(source, span(node.values[0])[1], span(node.values[1])[0], other, "condition")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
            yield "sign", *span(node), f"({text(node.operand)})"
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, bool):
                yield "constant", *span(node), str(not node.value)
            elif isinstance(node.value, int):
                for number in (node.value + 1, node.value - 1):
                    yield "constant", *span(node), str(number) if number >= 0 else f"({number})"
            elif isinstance(node.value, float):
                yield "constant", *span(node), repr(node.value * 2 if node.value else 1.0)
        elif isinstance(node, ast.Call):
            arguments = [a for a in node.args if not isinstance(a, ast.Starred)]
            if (
                _called(node) not in _SYMMETRIC
                and len(arguments) >= 2
                and len(arguments) == len(node.args)
                and text(node.args[0]) != text(node.args[1])
            ):
                (first, end), (begin, last) = span(node.args[0]), span(node.args[1])
                swapped = source[begin:last] + source[end:begin] + source[first:end]
                yield "arguments", first, last, swapped
            if isinstance(node.func, ast.Attribute) and node.func.attr in _DROPPED and not _module(node.func.value):
                yield "call", *span(node), text(node.func.value)
        elif isinstance(node, ast.If | ast.IfExp):
            yield "condition", *span(node.test), f"not ({text(node.test)})"
        elif isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
            yield "statement", *span(node), "pass"
        if isinstance(node, ast.Attribute) and node.attr in _NAMES:
            last = span(node)[1]
            yield "name", last - len(node.attr), last, _NAMES[node.attr]
        elif isinstance(node, ast.Name) and node.id in _NAMES:
            yield "name", *span(node), _NAMES[node.id]


def draw(root: Path, count: int, seed: int, only: str = "") -> list[Mutation]:
    """Draw so many mutations that are not known to be equivalent, each of a line of its own.

    Args:
        root: of the tree.
        count: how many, at most.
        seed: another one gives others.
        only: what the path of a file must contain.
    """
    found = []
    for place in PLACES:
        files = [root / place] if place.endswith(".py") else sorted((root / place).rglob("*.py"))
        for path in files:
            file = str(path.relative_to(root))
            if only in file:
                found += list(_ranked(file, path.read_text(encoding="utf-8"), _tests(root, file), seed))
    lines: dict[tuple[str, int], Mutation] = {}
    for _, mutation in sorted(found, key=lambda pair: pair[0]):
        lines.setdefault((mutation.file, mutation.line), mutation)
    chosen = list(lines.values())[:count]
    for mutation in chosen:
        ast.parse(mutation.after)
    return chosen


def _tests(root: Path, file: str) -> tuple[str, ...]:
    if file in _TESTS:
        return _TESTS[file]
    path = Path(file)
    own = Path("tests", *path.parts[1:-1], f"test_{path.name}")
    if "types" not in path.parts and (root / own).is_file():
        return (str(own),)
    return next(_TESTS[str(folder)] for folder in path.parents if str(folder) in _TESTS)


def _ranked(file: str, source: str, tests: tuple[str, ...], seed: int) -> Iterator[tuple[str, Mutation]]:
    """Yield mutations of a file with what orders them."""
    seen: Counter[str] = Counter()
    for name, first, last, instead in candidates(file, source):
        after = source[:first] + instead + source[last:]
        mutation = Mutation(name, file, source, after, tests, drawn=True)
        change = mutation.diff()
        seen[change] += 1
        if not change or equivalent(file, change):
            continue
        yield hashlib.sha256(f"{seed} {file} {change} {seen[change]}".encode()).hexdigest(), mutation


def equivalent(file: str, change: str) -> str | None:
    """Return why a change of a file makes nothing wrong that a test could see, or None."""
    new = "\n".join(line[1:].strip() for line in change.splitlines() if line.startswith("+"))
    return EQUIVALENT.get((file, new))


def _operator(source: str, first: int, last: int, other: str, name: str) -> tuple[str, int, int, str]:
    """Change the operator between two operands, whatever parentheses stand around it."""
    between = source[first:last]
    begin = len(between) - len(between.lstrip(") \n\\"))
    end = len(between.rstrip("( \n\\"))
    return name, first + begin, first + end, other


def _module(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("torch", "np", "math")


def _told(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk over what decides results: no annotations, docstrings, decorators or words of errors."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns", "decorator_list", "bases", "keywords") and not isinstance(tree, ast.Call):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.Assert | ast.JoinedStr):
                continue
            if isinstance(child, ast.keyword) and child.arg in _SAYS_NOTHING:
                continue
            if isinstance(tree, ast.Call) and _called(tree) in _SHAPING and _is_number(child):
                continue
            if isinstance(tree, ast.Call) and _called(tree).endswith("_like") and isinstance(child, ast.Subscript):
                continue  # only its shape is taken
            if isinstance(child, ast.ClassDef) and any(getattr(b, "id", "") == "Protocol" for b in child.bases):
                continue
            if isinstance(child, ast.Subscript) and _is_alias(tree, child):
                continue
            yield child
            yield from _told(child)


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _is_number(node: ast.AST) -> bool:
    if isinstance(node, ast.Tuple):
        return all(map(_is_number, node.elts))
    return isinstance(node.operand if isinstance(node, ast.UnaryOp) else node, ast.Constant)


def _is_alias(parent: ast.AST, value: ast.Subscript) -> bool:
    """Whether this is the name of a type: `Finished = Callable[[int], "BlockResult | None"]`."""
    return isinstance(parent, ast.Assign) and isinstance(value.value, ast.Name) and value.value.id[:1].isupper()
