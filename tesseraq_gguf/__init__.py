"""Learn ultra-low-bit GGUF files block by block, and run them in llama.cpp."""
