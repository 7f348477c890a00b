#pragma once

// What the parts of the test of kernels share. Each part is a file of upstream's, with our hooks in it, compiled for the host.

#include "common.cuh"

#include <random>
#include <string>

typedef std::mt19937 random_t;

struct tested_type {
    ggml_type    type;
    int          qk;         // weights of a block
    size_t       block_size; // bytes
    size_t       scales;     // the first so many of them
    const char * name;
    void (*dequantize)(const void * x, float * y, int64_t k); // the C reference
};

extern const std::vector<tested_type> tested_types;

typedef std::vector<const tested_type *> types_t;

// Rows of a matrix, in memory that ends with the word in which they end: sanitizers see whoever reads on. Scales are those of weights in models, or any.
struct matrix {
    const tested_type &  type;
    int64_t              nrows;
    int64_t              ncols;
    std::vector<uint8_t> data;
    std::vector<float>   weights;

    matrix(const tested_type & type, int64_t nrows, int64_t ncols, random_t & random, bool any_scale = false);

    int64_t blocks() const { return ncols / type.qk; }
};

// 64 activations as the CPU encodes them for BCQ4_A4: their codewords, and the scale
extern "C" int bcq_encode_generic(const float * x, int8_t * q, float * d);

// activations as they are multiplied, but for 8 bits: those of BCQ4_A4 are encoded, others stay
std::vector<float> as_multiplied(const tested_type & type, const std::vector<float> & x);

// stop with a message
[[noreturn]] void fail(const std::string & what);

// types: all of them, or those with codebooks, which differ from one time to the next
void check_dequantize(const types_t & types, random_t & random); // kernels-convert.cpp
void check_get_rows  (const types_t & types, random_t & random); // kernels-getrows.cpp
void check_get_cols  (const types_t & types, random_t & random); // kernels-getcols.cpp
void check_quantize  (const types_t & types, random_t & random); // kernels-quantize.cpp
void check_mmvq      (const types_t & types, random_t & random); // kernels-mmvq.cpp
void check_mmq       (const types_t & types, random_t & random); // kernels-mmq.cpp
