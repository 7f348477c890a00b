"""IQ types of llama.cpp whose codes name points of a lattice: several weights at a time."""
