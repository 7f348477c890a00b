#pragma once

// As much of the CUDA runtime and its built-ins as upstream's headers need to compile on the host, and its kernels to run.

#include "emulator.h"

#define CUDART_VERSION 11070

#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static // a block runs alone
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __builtin_align__(n) alignas(n)
#define __restrict__ __restrict

// ------------------------------------------------------------ built-in variables and vectors

#define threadIdx (emulator::self().thread)
#define blockIdx  (emulator::running->index)
#define blockDim  (emulator::running->dim)
#define gridDim   (emulator::running->grid)

struct uint2 { unsigned x, y; };
struct int2 { int x, y; };
struct int4 { int x, y, z, w; };
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct float3 { float x, y, z; };
struct float4 { float x, y, z, w; };
struct char2 { signed char x, y; };
struct char4 { signed char x, y, z, w; };
struct double2 { double x, y; };

inline uint2  make_uint2(unsigned x, unsigned y) { return { x, y }; }
inline uint3  make_uint3(unsigned x, unsigned y, unsigned z) { return { x, y, z }; }
inline int2   make_int2(int x, int y) { return { x, y }; }
inline int4   make_int4(int x, int y, int z, int w) { return { x, y, z, w }; }
inline float2 make_float2(float x, float y) { return { x, y }; }
inline float4 make_float4(float x, float y, float z, float w) { return { x, y, z, w }; }
inline char4  make_char4(signed char x, signed char y, signed char z, signed char w) { return { x, y, z, w }; }

// ------------------------------------------------------------ intrinsics

using std::max;
using std::min;

inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i) {
        c += emulator::byte_of(a, i) * emulator::byte_of(b, i);
    }
    return c;
}

// the instruction has selectors of four bits, this one of three
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selectors) { return emulator::prmt(a, b, selectors & 0x7777); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) { return (unsigned) (((uint64_t) high << 32 | low) >> shift%32); }

template <typename op_t> inline unsigned emulator_bytes(unsigned a, unsigned b, op_t op) {
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        result |= (unsigned) (uint8_t) op(emulator::byte_of(a, i), emulator::byte_of(b, i)) << 8*i;
    }
    return result;
}
inline unsigned __vsub4  (unsigned a, unsigned b) { return emulator_bytes(a, b, [](int x, int y) { return x - y; }); }
inline unsigned __vsubss4(unsigned a, unsigned b) { return emulator_bytes(a, b, [](int x, int y) { return std::clamp(x - y, -128, 127); }); }
inline unsigned __vcmpne4(unsigned a, unsigned b) { return emulator_bytes(a, b, [](int x, int y) { return x != y ? 0xFF : 0; }); }

template <typename to, typename from> inline to emulator_bits(from x) {
    static_assert(sizeof(to) == sizeof(from), "sizes differ");
    to y;
    memcpy(&y, &x, sizeof(y));
    return y;
}
inline float    __uint_as_float(unsigned x) { return emulator_bits<float>(x); }
inline float    __int_as_float(int x)       { return emulator_bits<float>(x); }
inline unsigned __float_as_uint(float x)    { return emulator_bits<unsigned>(x); }
inline int      __float_as_int(float x)     { return emulator_bits<int>(x); }

inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned) ((uint64_t) a*b >> 32); }
inline int      __popc(unsigned x) { return __builtin_popcount(x); }
inline int      __float2int_rn(float x) { return (int) nearbyintf(x); }
inline float    __frcp_rn(float x) { return 1.0f/x; }
inline float    __fdiv_rn(float x, float y) { return x/y; }
inline float    __expf(float x) { return expf(x); }
inline float    __logf(float x) { return logf(x); }

template <typename T> inline T __ldg(const T * p) { return *p; }

inline void __syncthreads() { emulator::barrier(); }
inline void __syncwarp(unsigned = ~0u) { emulator::exchange(0, [](int, auto) { return 0; }); }

template <typename T> inline T __shfl_xor_sync(unsigned, T value, int mask, int width = 32) {
    return emulator::exchange(value, [=](int lane, auto of) {
        const int from = lane ^ mask;
        return from / width == lane / width ? of(from) : of(lane);
    });
}

template <typename T> inline T __shfl_sync(unsigned, T value, int from, int width = 32) {
    return emulator::exchange(value, [=](int lane, auto of) { return of(lane / width*width + from % width); });
}

template <typename T> inline T __shfl_up_sync(unsigned, T value, int delta, int width = 32) {
    return emulator::exchange(value, [=](int lane, auto of) { return of(lane % width < delta ? lane : lane - delta); });
}

inline unsigned __ballot_sync(unsigned, int predicate) {
    return emulator::exchange(predicate, [](int, auto of) {
        unsigned result = 0;
        for (int i = 0; i < emulator::warp; ++i) {
            result |= (of(i) != 0 ? 1u : 0u) << i;
        }
        return result;
    });
}
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == ~0u; }
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

// ------------------------------------------------------------ the runtime

typedef int                 cudaError_t;
typedef struct emulated_s * cudaStream_t;
typedef struct emulated_e * cudaEvent_t;
typedef struct emulated_g * cudaGraph_t;
typedef struct emulated_x * cudaGraphExec_t;
typedef struct emulated_n * cudaGraphNode_t;
enum { cudaSuccess = 0 };
enum cudaDataType_t { CUDA_R_16F, CUDA_R_32F };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum { cudaStreamNonBlocking };
struct cudaKernelNodeParams {};

inline const char * cudaGetErrorString(cudaError_t) { return "none"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *, unsigned) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void *, int, size_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }
inline cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
template <typename T> inline cudaError_t cudaFuncSetAttribute(T, cudaFuncAttribute, int) { return cudaSuccess; }
enum { cudaEventDisableTiming };
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *, unsigned) { return cudaSuccess; }
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
inline void __trap() { abort(); }

// one device, whose memory is that of the host: a variable's address is what its name stands for
enum cudaMemcpyKind { cudaMemcpyHostToDevice };
inline cudaError_t cudaGetDevice(int * device) { *device = 0; return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaMemcpyToSymbolAsync(const void * symbol, const void * from, size_t size, size_t offset, cudaMemcpyKind, cudaStream_t) {
    memcpy((char *) const_cast<void *>(symbol) + offset, from, size);
    return cudaSuccess;
}
