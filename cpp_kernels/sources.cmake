# Our C sources, by the library that takes them. Paths are relative to ggml/src, where the build puts this folder as `tesseraq`.

set(TESSERAQ_BASE_SOURCES
    tesseraq/bcq.c
    tesseraq/bcq-codebooks.h
    tesseraq/bcq-lease.h
    tesseraq/bcq.h
    tesseraq/column-order.h
    tesseraq/ptq.c
    tesseraq/ptq.h
    tesseraq/tsq.c
    tesseraq/tsq.h)

set(TESSERAQ_CPU_SOURCES
    tesseraq/bcq-cpu.c
    tesseraq/bcq-cpu.h
    tesseraq/bcq-panel.h
    tesseraq/bcq-repack.cpp
    tesseraq/bcq-repack.h
    tesseraq/get-cols.c
    tesseraq/get-cols.h
    tesseraq/ptq-cpu.c
    tesseraq/ptq-cpu.h
    tesseraq/ptq-repack.cpp
    tesseraq/ptq-repack.h
    tesseraq/ptq-tile.h
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
    tesseraq/x86/get-cols.c
    tesseraq/x86/ptq.c
    tesseraq/x86/ptq-repack.cpp
    tesseraq/x86/ptq-round.h
    tesseraq/x86/q2_0.c
    tesseraq/x86/tsq.c
    tesseraq/x86/tsq-repack.cpp
    tesseraq/x86/tsq-round.h
    tesseraq/x86/vector.h)

set(TESSERAQ_ARM_SOURCES
    tesseraq/arm/bcq.c
    tesseraq/arm/bcq-encode.h
    tesseraq/arm/bcq-repack.cpp
    tesseraq/arm/ptq.c
    tesseraq/arm/ptq-repack.cpp
    tesseraq/arm/ptq-round.h
    tesseraq/arm/tsq.c
    tesseraq/arm/tsq-repack.cpp
    tesseraq/arm/tsq-round.h)

# by their whole path: the CUDA backend is made in another folder
set(TESSERAQ_CUDA_SOURCES
    ${CMAKE_CURRENT_LIST_DIR}/cuda/bcq-tables.cu
    ${CMAKE_CURRENT_LIST_DIR}/cuda/get-cols.cu
    ${CMAKE_CURRENT_LIST_DIR}/cuda/mmq-instance-bcq4.cu
    ${CMAKE_CURRENT_LIST_DIR}/cuda/mmq-instance-tsq2.cu
    ${CMAKE_CURRENT_LIST_DIR}/cuda/mmq-instance-tsq3.cu
    ${CMAKE_CURRENT_LIST_DIR}/cuda/mmq-instance-tsq4.cu)
