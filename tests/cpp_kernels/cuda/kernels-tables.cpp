// bcq-tables.cu: codebooks for all units

#include "tesseraq/cuda/bcq-tables.cu"
