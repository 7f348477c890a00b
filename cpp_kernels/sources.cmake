# Our C sources, by the library that takes them. Paths are relative to ggml/src, where the build puts this folder as `tesseraq`.

set(TESSERAQ_BASE_SOURCES
    tesseraq/bcq.c
    tesseraq/bcq-codebooks.h
    tesseraq/bcq-lease.h
    tesseraq/bcq.h
    tesseraq/tsq.c
    tesseraq/tsq.h)

set(TESSERAQ_CPU_SOURCES
    tesseraq/bcq-cpu.c
    tesseraq/bcq-cpu.h
    tesseraq/bcq-panel.h
    tesseraq/bcq-repack.cpp
    tesseraq/bcq-repack.h
    tesseraq/tsq-buffer.cpp
    tesseraq/tsq-cpu.c
    tesseraq/tsq-cpu.h
    tesseraq/tsq-repack.cpp
    tesseraq/tsq-repack.h
    tesseraq/tsq-tile.h)

set(TESSERAQ_X86_SOURCES
    tesseraq/x86/bcq.c
    tesseraq/x86/bcq-encode.h
    tesseraq/x86/bcq-repack.cpp
    tesseraq/x86/q2_0.c
    tesseraq/x86/tsq.c
    tesseraq/x86/tsq-repack.cpp
    tesseraq/x86/tsq-round.h)

set(TESSERAQ_ARM_SOURCES
    tesseraq/arm/bcq.c
    tesseraq/arm/bcq-encode.h
    tesseraq/arm/bcq-repack.cpp
    tesseraq/arm/tsq.c
    tesseraq/arm/tsq-repack.cpp
    tesseraq/arm/tsq-round.h)

# by their whole path: the CUDA backend is made in another folder
set(TESSERAQ_CUDA_SOURCES
    ${CMAKE_CURRENT_LIST_DIR}/cuda/bcq-tables.cu
    ${CMAKE_CURRENT_LIST_DIR}/cuda/mmq-instance-bcq4.cu
    ${CMAKE_CURRENT_LIST_DIR}/cuda/mmq-instance-tsq2.cu
    ${CMAKE_CURRENT_LIST_DIR}/cuda/mmq-instance-tsq3.cu
    ${CMAKE_CURRENT_LIST_DIR}/cuda/mmq-instance-tsq4.cu)
