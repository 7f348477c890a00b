"""GGUF files as they lie on disk: header, tensors, orders of columns, and what they tell. No torch."""
