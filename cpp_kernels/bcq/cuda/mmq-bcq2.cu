#include "ggml-cuda/mmq.cuh"
#include "tesseraq/bcq/cuda/load-tiles.cuh"

DECL_MMQ_CASE(GGML_TYPE_BCQ2);
