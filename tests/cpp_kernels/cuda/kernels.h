#pragma once

// What the parts of the test of kernels share. Each part is a file of upstream's, with our hooks in it, compiled for the host.

#include "common.cuh"

#include <random>
#include <string>

typedef std::mt19937 random_t;

struct tsq_type {
    ggml_type    type;
    int          nbits;
    const char * name;
    void (*dequantize)(const void * x, float * y, int64_t k); // the C reference
};

extern const tsq_type tsq_types[3];

// Rows of a matrix, in memory that ends where they end: sanitizers see whoever reads on. Scales are those of weights in models, or any.
struct matrix {
    const tsq_type &     type;
    int64_t              nrows;
    int64_t              ncols;
    std::vector<uint8_t> data;
    std::vector<float>   weights;

    matrix(const tsq_type & type, int64_t nrows, int64_t ncols, random_t & random, bool any_scale = false);

    int64_t blocks() const { return ncols / QK_TSQ; }
};

// stop with a message
[[noreturn]] void fail(const std::string & what);

void check_dequantize(random_t & random); // kernels-convert.cpp
void check_get_rows(random_t & random);   // kernels-getrows.cpp
void check_mmvq(random_t & random);       // kernels-mmvq.cpp
void check_mmq(random_t & random);        // kernels-mmq.cpp
