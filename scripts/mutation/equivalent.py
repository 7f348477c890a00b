"""Drawn mutations that make nothing wrong that a test on a CPU could see, each with the reason."""

_COMPARED = "sums over as many terms each are only compared with each other"
_IMPORTANCE = "only the ratios of importances count"

EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "tesseraq_gguf/methods/gptq.py",
        "importance = 2.0 / upper.diagonal().square()",
    ): _IMPORTANCE,
    (
        "tesseraq_gguf/grids/superblock.py",
        "error = (flat_h * (scale[:, None] * (q - zero[:, None]) - flat_w) ** 2).mean(1)",
    ): _COMPARED,
    (
        "tesseraq_gguf/grids/superblock.py",
        "best_error = torch.full_like(flat_w[:, 1], torch.inf)",
    ): "of a column only the shape is taken",
    (
        "tesseraq_gguf/grids/ptq161.py",
        "code = (nearest + step).clamp((-1), 255).to(torch.uint8)",
    ): "-1 becomes 255, a scale of 240, which serves no group whose nearest code is 0 better",
    (
        "tesseraq_gguf/grids/search.py",
        "scale = torch.where((energy > 0) & (fit * sign >= SMALLEST), fit, scale)",
    ): "a fit of the smallest scale itself is as good as any beside it",
    (
        "tesseraq_gguf/distillation.py",
        "rising = max(round(self.steps * self.warm_up), 1)",
    ): "the larger of two is the same in either order",
}
"""By file and the changed line as it is then, without indentation."""
