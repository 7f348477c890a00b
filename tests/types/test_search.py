"""What searches of parameters leave of a matrix, held to the value: a step less, and they leave more."""

from __future__ import annotations

import pytest
import torch

from tesseraq_gguf.types.grids import GRIDS, grid_of
from tesseraq_gguf.types.packers import packer_of

# relative squared error of each kind of matrix below
LEFT = {
    "tsq2": (0.10239, 0.082177, 0.13407, 0.009363, 0.10151, 0.72975),
    "tsq3": (0.027279, 0.020445, 0.043073, 0.0025223, 0.027225, 0.47491),
    "tsq4": (0.0070213, 0.0053747, 0.013064, 0.0006559, 0.0076448, 0.1801),
    "bcq2": (0.083515, 0.060979, 0.12486, 0.054793, 0.75309, 0.082546),
    "bcq4": (0.0039332, 0.002606, 0.0037391, 0.0023762, 0.012484, 0.0039079),
    "bcq4_a4": (0.0039332, 0.002606, 0.0037391, 0.0023762, 0.012484, 0.0039079),
    "ptq1_61": (0.29533, 0.28483, 0.68937, 0.083534, 0.29463, 0.70019),
    "q2_0": (0.12346, 0.10388, 0.13957, 0.035623, 0.12622, 0.12113),
    "q4_0": (0.0066156, 0.0051424, 0.01166, 0.003488, 0.01016, 0.006584),
    "q4_1": (0.0050226, 0.0032864, 0.0071352, 0.0004412, 0.0094418, 0.0049723),
    "q5_0": (0.0016434, 0.0013196, 0.0035948, 0.00087982, 0.0073708, 0.001637),
    "q8_0": (2.4548e-05, 2.1434e-05, 7.3563e-05, 1.3165e-05, 0.0073708, 2.4715e-05),
    "q2_k": (0.068446, 0.040874, 0.064487, 0.022286, 0.081515, 0.067282),
    "q3_k": (0.020674, 0.014681, 0.022498, 0.010706, 0.034567, 0.020825),
    "q4_k": (0.0050971, 0.0034048, 0.0077681, 0.0011122, 0.011769, 0.0050497),
    "q1_0": (0.36113, 0.36159, 0.82576, 0.10081, 0.37008, 0.36275),
    "q5_1": (0.0011098, 0.00078742, 0.001856, 9.6542e-05, 0.0073708, 0.0010936),
    "iq4_nl": (0.0054313, 0.0040854, 0.0079111, 0.0040204, 0.70494, 0.005485),
    "mxfp4": (0.012448, 0.012336, 0.017694, 0.010262, 0.013472, 0.012309),
    "nvfp4": (0.0082241, 0.0064769, 0.0057827, 0.0077645, 1, 0.071703),
    "q5_k": (0.0012463, 0.00093786, 0.0023124, 0.00025096, 0.0074543, 0.0012382),
    "q6_k": (0.0002851, 0.0002104, 0.00058867, 0.00015842, 0.0073708, 0.00028434),
    "iq4_xs": (0.0055114, 0.0041814, 0.0081667, 0.0040703, 0.70494, 0.0055627),
    "iq1_s": (0.19743, 0.14331, 0.27205, 0.09934, 0.20763, 0.19658),
    "iq1_m": (0.16957, 0.10146, 0.17597, 0.090314, 0.17859, 0.16897),
    "iq2_xxs": (0.10882, 0.053056, 0.28469, 0.089386, 0.12782, 0.10602),
    "iq2_xs": (0.081681, 0.038094, 0.20389, 0.063517, 0.10903, 0.080849),
    "iq2_s": (0.057243, 0.033741, 0.20232, 0.056959, 0.083327, 0.056478),
    "iq3_xxs": (0.031798, 0.011892, 0.0724, 0.020183, 0.05933, 0.031074),
    "iq3_s": (0.016736, 0.008217, 0.055204, 0.013528, 0.042811, 0.016623),
}
KINDS = ("normal", "weighted", "heavy tails", "one sign", "minute", "huge")


def matrix(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [32, 768] and the weights of their squared errors."""
    random = torch.Generator().manual_seed(KINDS.index(kind))
    weight = 0.02 * torch.randn(32, 768, generator=random)
    importance = torch.ones(768)
    if kind == "weighted":
        importance = torch.rand(768, generator=random) ** 4 + 0.001
    elif kind == "heavy tails":
        weight = 1e3 * weight**3
    elif kind == "one sign":
        weight = weight.abs() + 0.02
    elif kind == "minute":  # scales next to the smallest that types hold
        weight = 1e-5 * weight
    elif kind == "huge":  # scales beyond the largest of an 8-bit float
        weight = 1e5 * weight
    return weight, importance


@pytest.mark.parametrize("tensor_type", GRIDS)
def test_a_search_leaves_no_more_than_it_did(tensor_type):
    grid = grid_of(tensor_type)
    left = []
    for kind in KINDS:
        weight, importance = matrix(kind)
        tensor = grid.quantize(weight, importance)
        error = importance * (grid.dequantize(tensor) - weight).double() ** 2
        arrays = {key: array.numpy() for key, array in tensor.arrays.items()}
        stored = packer_of(tensor_type).unpack(packer_of(tensor_type).pack(arrays))
        assert all((stored[key] == arrays[key]).all() for key in arrays), kind
        left.append(float(error.sum() / (importance * weight.double() ** 2).sum()))
    for kind, now, before in zip(KINDS, left, LEFT[tensor_type], strict=True):
        assert now < 1.0005 * before, kind


@pytest.mark.parametrize("tensor_type", GRIDS)
def test_outliers_that_hardly_matter_leave_integers_in_their_range(tensor_type):
    """What everything else asks for, a group of large weights cannot have, and no integer may overflow over it."""
    grid = grid_of(tensor_type)
    weight, importance = matrix("normal")[0], torch.ones(768)
    for start in (0, 272, 640):
        weight[:, start : start + 16] *= 60
        importance[start : start + 16] = 1e-6
    tensor = grid.quantize(weight, importance)
    arrays = {key: array.numpy() for key, array in tensor.arrays.items()}
    stored = packer_of(tensor_type).unpack(packer_of(tensor_type).pack(arrays))  # raises for what is out of range
    assert all((stored[key] == arrays[key]).all() for key in arrays)
