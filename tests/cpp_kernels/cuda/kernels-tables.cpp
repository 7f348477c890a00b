// bcq-tables.cu: codebooks for all units

#include "tesseraq/bcq/cuda/tables.cu"
