"""MXFP4 and NVFP4: levels of 4-bit floats, a scale of 8 bits for every 32 or 16 weights."""
