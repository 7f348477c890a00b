// quantize.cu: activations, for MMVQ and MMQ

#include "quantize.cu"
