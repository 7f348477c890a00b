"""Element-wise arithmetic over whole matrices in one pass over memory, where torch can compile it.

A step of learning touches every weight of a block some twenty times in operations that do next to nothing with it. As
separate operations they take as long as the block's own matrix products; compiled into one loop, a tenth of that.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")

WORTH = 1 << 18
"""Elements of the first argument from which compiling is worth its seconds."""


def fused(function: Callable[..., _T]) -> Callable[..., _T]:
    """Compile a pure function of tensors when it is first given large ones.

    Where that fails, as without a C++ compiler, it is run as it is, and one line of the log says so.

    Args:
        function: element-wise operations and sums over a dimension; its first argument is one of the large ones.
    """
    compiled: list[Callable[..., _T]] = []

    @functools.wraps(function)
    def call(first: Tensor, *rest: object) -> _T:
        if first.numel() < WORTH:
            return function(first, *rest)
        if not compiled:
            compiled.append(torch.compile(function, dynamic=True))
        if compiled[0] is function:
            return function(first, *rest)
        try:
            return compiled[0](first, *rest)
        except Exception as error:  # the compiler behind it raises many unrelated kinds
            compiled[0] = function
            reason = (str(error) or type(error).__name__).strip().split("\n")[0]
            logging.getLogger(__name__).warning("learning takes longer here, torch.compile does not work: %s", reason)
            return function(first, *rest)

    return call
