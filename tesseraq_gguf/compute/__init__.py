"""Where and how numbers are computed: devices, processes, caches, and what kernels do to activations."""
