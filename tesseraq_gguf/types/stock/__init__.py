"""Types of llama.cpp with one group to a scale."""
