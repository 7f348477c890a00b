"""Packers: integer codes and parameters to the bytes of a tensor type and back, in numpy, exactly.

A packer is a module with `pack(arrays) -> bytes as uint8 [rows, row_bytes]`, `unpack(bytes) -> arrays` and
`dequantize(arrays) -> float32 [rows, row_length]`. It derives nothing from floats: `unpack(pack(x)) == x`.
"""
