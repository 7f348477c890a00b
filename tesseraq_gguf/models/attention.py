"""Attention of the blocks that are learned, registered with transformers.

It is `scaled_dot_product_attention`, but for what that lacks: the soft cap of Gemma 2's scores, and speed where
processors multiply short sequences in bfloat16. torch's kernel is made for long ones there and takes more than twice as
long as two products and a softmax, which makes a tenth of a learning step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

NAME = "tesseraq"
"""What a config calls it: `attn_implementation`."""

SHORT = 256
"""Tokens up to which plain products are faster on processors, in bfloat16: at 512 they are not."""


def register() -> None:
    """Make it known to transformers, under `NAME`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def built(build: Callable[[str | None], Any]) -> Any:
    """Return a model with this attention, or with transformers' choice where it can have no other.

    Args:
        build: makes the model with an attention of a name; None leaves the choice to transformers.
    """
    try:
        model = build(NAME)
    except KeyError as error:
        if error.args != (NAME,):
            raise
        return build(None)  # it has a table of attentions of its own, as Falcon
    return model if model._supports_sdpa else build(None)  # masks are made for its own attention, as Bloom's


def attend(  # noqa: PLR0913  (transformers calls it so)
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return softmax(softcap·tanh(scaling·q·kᵀ / softcap) + mask)·v, [batch, queries, heads, channels].

    Args:
        module: the attention; its `is_causal` counts where the argument is None.
        query: [batch, heads, queries, channels].
        key: [batch, heads of keys, keys, channels]; each serves as many query heads as there are more of those.
        value: like `key`.
        attention_mask: bool, True where a query sees a key, or what is added to scores;
            [batch or 1, heads or 1, queries, keys].
        scaling: of scores; None means 1/√channels.
        is_causal: whether queries see no later keys, where there is no mask.
        softcap: bound of scores; None leaves them.
        others: what models hand to attention besides.
    """
    if softcap is None and (others.get("position_bias") is not None or not _short(query, key)):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        given = {"scaling": scaling, "is_causal": is_causal, **others}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)  # type: ignore[no-any-return]
    batch, heads, queries, channels = query.shape
    groups = key.shape[1]
    # query heads of one key head stand one below the other: nothing is copied to serve them
    stacked = (query * (channels**-0.5 if scaling is None else scaling)).reshape(batch, groups, -1, channels)
    scores = (stacked @ key.transpose(2, 3)).view(batch, heads, queries, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal and queries > 1:
        attention_mask = torch.ones(queries, key.shape[2], dtype=torch.bool, device=query.device).tril()
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            hidden = torch.full((), -torch.inf, dtype=scores.dtype, device=query.device)
            attention_mask = torch.zeros_like(hidden).where(attention_mask, hidden)
        scores = scores + attention_mask.to(scores.dtype)
    shares = torch.softmax(scores, -1, dtype=torch.float32).to(scores.dtype)
    mixed = shares.view(batch, groups, -1, shares.shape[-1]) @ value
    return mixed.view(batch, heads, queries, -1).transpose(1, 2).contiguous(), None


def _short(query: Tensor, key: Tensor) -> bool:
    """Whether plain products are faster than torch's own kernel."""
    kind = query.device.type
    if kind != "cpu" or key.shape[2] > SHORT or key.shape[2] != query.shape[2]:
        return False
    return (torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype) == torch.bfloat16
