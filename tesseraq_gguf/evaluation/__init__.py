"""How good a file is: perplexity, divergence, tasks, and the kernels simulated in torch."""
