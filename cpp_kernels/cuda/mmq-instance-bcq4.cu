#include "ggml-cuda/mmq.cuh"
#include "tesseraq/cuda/bcq-load-tiles.cuh"

DECL_MMQ_CASE(GGML_TYPE_BCQ4);
