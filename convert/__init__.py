"""From learned codes to a GGUF file: the writer on llama.cpp's converter, and the comparison that ends it."""
