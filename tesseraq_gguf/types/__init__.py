"""Tensor types: facts, grids and packers. A folder per family holds its grid and its packer, which are one format."""
