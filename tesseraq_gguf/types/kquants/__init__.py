"""Types of llama.cpp with super-blocks of 256 weights."""
