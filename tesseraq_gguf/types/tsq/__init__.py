"""TSQ2, TSQ3 and TSQ4: a scale and a zero-point for every 64 weights."""
