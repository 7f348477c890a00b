"""From learned codes to a GGUF file: the registry of tensor types, packers, and the writer on llama.cpp's converter."""
