# Our C sources, by the library that takes them. Paths are relative to ggml/src, where the build puts this folder as `tesseraq`.

set(TESSERAQ_BASE_SOURCES
    tesseraq/bcq/bcq.c
    tesseraq/common/get-cols-op.c
    tesseraq/ptq/ptq.c
    tesseraq/tsq/tsq.c)

set(TESSERAQ_CPU_SOURCES
    tesseraq/bcq/cpu.c
    tesseraq/bcq/repack.cpp
    tesseraq/common/buffer.cpp
    tesseraq/common/cpu.c
    tesseraq/common/get-cols.c
    tesseraq/ptq/cpu.c
    tesseraq/ptq/repack.cpp
    tesseraq/tsq/cpu.c
    tesseraq/tsq/repack.cpp)

set(TESSERAQ_X86_SOURCES
    tesseraq/bcq/x86.c
    tesseraq/bcq/x86-repack.cpp
    tesseraq/common/x86-get-cols.c
    tesseraq/common/x86-q2_0.c
    tesseraq/ptq/x86.c
    tesseraq/ptq/x86-repack.cpp
    tesseraq/tsq/x86.c
    tesseraq/tsq/x86-repack.cpp)

set(TESSERAQ_ARM_SOURCES
    tesseraq/bcq/arm.c
    tesseraq/bcq/arm-repack.cpp
    tesseraq/ptq/arm.c
    tesseraq/ptq/arm-repack.cpp
    tesseraq/tsq/arm.c
    tesseraq/tsq/arm-repack.cpp)

# by their whole path: the CUDA backend is made in another folder
file(GLOB TESSERAQ_CUDA_SOURCES ${CMAKE_CURRENT_LIST_DIR}/*/cuda/*.cu)
