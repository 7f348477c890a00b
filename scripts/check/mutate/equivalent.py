"""Drawn mutations that make nothing wrong that a test on a CPU could see, each with the reason."""

_COMPARED = "sums over as many terms each are only compared with each other"
_IMPORTANCE = "only the ratios of importances count"

EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "tesseraq_gguf/types/grid.py",
        "return 2.0 / factor.diagonal().square()",
    ): _IMPORTANCE,
    (
        "tesseraq_gguf/types/kquants/grid.py",
        "error = (flat_h * (scale[:, None] * (q - zero[:, None]) - flat_w) ** 2).mean(1)",
    ): _COMPARED,
    (
        "tesseraq_gguf/types/ptq161/grid.py",
        "code = (nearest + step).clamp((-1), 255).to(torch.uint8)",
    ): "-1 becomes 255, a scale of 240, which serves no group whose nearest code is 0 better",
    (
        "tesseraq_gguf/types/search.py",
        "scale = torch.where((energy > 0) & (fit * sign >= SMALLEST), fit, scale)",
    ): "a fit of the smallest scale itself is as good as any beside it",
    (
        "tesseraq_gguf/types/bcq/grid.py",
        "errors = [each.unflatten(1, (-1, group)).mean(2) for each in weighted]",
    ): _COMPARED,
    (
        "tesseraq_gguf/types/bcq/grid.py",
        "gap = rows.gather(-1, above[..., None] + 1)[..., (-1)] - lower",
    ): "the dimension has one element",
    (
        "tesseraq_gguf/types/tsq/grid.py",
        "code = code.to(torch.uint8)",
    ): "wrapped around, the code next to an end is the other end, which serves no group better",
    (
        "tesseraq_gguf/methods/gptq.py",
        "arrays = {key: a[(-1)] if key in grid.shared else torch.cat(a, 1) for key, a in found.items()}",
    ): "all spans have the same codebooks",
}
"""By file and the changed line as it is then, without indentation."""
