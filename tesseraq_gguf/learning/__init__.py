"""Learning a model: calibration, the walk over its blocks, and the passes before and after it."""
