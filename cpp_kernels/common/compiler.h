#pragma once

// What compilers are told, and which instructions kernels are compiled for.

#if defined(_MSC_VER)
#define TESSERAQ_INLINE __forceinline
#define TESSERAQ_LAMBDA
#define TESSERAQ_UNROLL
#else
#define TESSERAQ_INLINE inline __attribute__((always_inline))
#define TESSERAQ_LAMBDA __attribute__((always_inline))
#define TESSERAQ_UNROLL _Pragma("GCC unroll 16")
#endif

// Keeps an array in memory: a number that is loaded into all lanes of a vector costs nothing, out of a register it is a shuffle,
// of which a kernel has better uses.
#if defined(__GNUC__)
#define TESSERAQ_IN_MEMORY(x) __asm__("" : "+m" (x))
#else
#define TESSERAQ_IN_MEMORY(x)
#endif

// keeps loads where they are written: compilers make the loads of a whole block first, and run out of registers
#define TESSERAQ_FENCE() __asm__ volatile("" ::: "memory")

// bytes that a single column asks for ahead of their use
#define TESSERAQ_AHEAD 4096

// The instructions that kernels of rows have versions for. Where there are none, the generic ones take the plain names.
#if !defined(GGML_CPU_GENERIC)
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define TESSERAQ_AVX512
#endif
#if defined(__AVX2__)
#define TESSERAQ_AVX2
#endif
#if defined(__ARM_NEON) && defined(__aarch64__)
#define TESSERAQ_NEON
#endif
#endif

#if defined(TESSERAQ_AVX2) || defined(TESSERAQ_NEON)
#define TESSERAQ_SIMD
#endif
