"""BCQ2, BCQ4 and BCQ4_A4: a scale for every 64 weights, a codebook for every 16 or 8."""
