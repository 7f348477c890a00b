// mmq.cuh: tiles as load_tiles leaves them in shared memory, and whole products with upstream's kernels around it: those for int8 tensor
// cores where TURING_MMA_AVAILABLE is defined, else those of dp4a

#include "mmq.cuh"
#include "quantize.cuh"

#include "kernels.h"

static constexpr int J = 16; // columns of a tile

// ------------------------------------------------------------ a tile

// what the tile should say of a weight, before the offset: the code less the whole part of the zero-point
static int integer(const matrix & m, const uint8_t * block, int i, int & z, int & whole) {
    const int nbits = m.type.nbits;
    const int steps = 1 << (7 - nbits);
    uint8_t q[QK_TSQ];
    tsq_unpack(block + TSQ_CODES, nbits, q);
    z     = block[1] - 64;
    whole = (int) floor((double) z/steps + 0.5);
    return q[i] - whole;
}

template <ggml_type type, bool fallback>
static void load_tiles_kernel(const char * x, int * tile, int kbx0, int i_max, int stride) {
    ggml_cuda_mmq_get_load_tiles<type, J, fallback>()(x, tile, kbx0, i_max, stride);
}

template <ggml_type type, bool fallback>
static void check_tile(const tsq_type & t, bool any_scale, random_t & random) {
    const ggml_cuda_mmq_config config = ggml_cuda_mmq_get_config(type, J, fallback, __CUDA_ARCH__);
    const int nrows = fallback ? config.I - 28 : config.I;
    const int kbx0  = 4; // the second tile of three
    const matrix m(t, nrows, 12*QK_TSQ, random, any_scale);
    std::vector<int> tile(ggml_cuda_mmq_get_nbytes_shared_x(config, __CUDA_ARCH__)/sizeof(int), -1);

    emulator::launch(EMULATED(load_tiles_kernel<type, fallback>), 1, dim3(32, config.nthreads/32), 0)(
        (const char *) m.data.data(), tile.data(), kbx0, nrows - 1, (int) m.blocks());

#if defined(TURING_MMA_AVAILABLE)
    const int     stride_qs = ggml_cuda_mmq_get_sram_stride(config.sram_layout);
    const half2 * dm        = (const half2 *) (tile.data() + 2*MMQ_TILE_NE_K);
    const auto    dm_of     = [=](int i, int k) { return dm[i*stride_qs + k]; };
#else
    const int     stride_qs = 2*MMQ_TILE_NE_K + 1;
    const half2 * dm        = (const half2 *) (tile.data() + mmq_get_dp4a_tile_x_sizes(GGML_TYPE_Q5_1, config.I).qs);
    const auto    dm_of     = [=](int i, int k) { return dm[i*(MMQ_TILE_NE_K/QI5_1) + i/QI5_1 + k]; };
#endif // defined(TURING_MMA_AVAILABLE)

    for (int i = 0; i < nrows; ++i) {
        for (int k = 0; k < MMQ_ITER_K; ++k) {
            const uint8_t * block = m.data.data() + (i*m.blocks() + kbx0 + k/QK_TSQ)*TSQ_BLOCK_SIZE(t.nbits);
            int z;
            int whole;
            const int expected = integer(m, block, k%QK_TSQ, z, whole);
            const int found    = ((const int8_t *) (tile.data() + i*stride_qs))[k];
            const std::string where = std::string(t.name) + " tile: row " + std::to_string(i) + ", weight " + std::to_string(k);
            if (found != expected) {
                fail(where + " is " + std::to_string(found) + ", not " + std::to_string(expected));
            }
            // exact for scales that half has with four bits
            const float d      = tsq_decode_d(block[0]);
            const float offset = d*(whole - tsq_decode_z(block[1], t.nbits));
            const half2 pair   = dm_of(i, k/QK8_1);
            const bool  exact  = d >= 0x1p-16f;
            if (exact ? (float) pair.x != d || (float) pair.y != offset
                      : std::abs(pair.x - d) > 0x1p-25f || std::abs(pair.y - offset) > 0x1p-25f) {
                fail(where + " has scale " + std::to_string((float) pair.x) + " and offset " + std::to_string((float) pair.y) +
                    ", not " + std::to_string(d) + " and " + std::to_string(offset));
            }
        }
    }
}

// ------------------------------------------------------------ a product

// The sums that stand beside the activations are from before their rounding, so this is close to the product with the activations as
// they were, and not exactly anything simpler.
template <ggml_type type, bool fallback>
static void check_product(const tsq_type & t, int64_t nrows, int64_t ncols_x, int64_t ncols_dst, random_t & random) {
    const ggml_cuda_mmq_config config = ggml_cuda_mmq_get_config(type, J, fallback, __CUDA_ARCH__);
    const matrix m(t, nrows, ncols_x, random);
    const int64_t padded = GGML_PAD(ncols_x, MATRIX_ROW_PADDING);

    // as upstream allocates rows: up to a multiple of MATRIX_ROW_PADDING, with zeros
    std::vector<uint8_t> x = m.data;
    x.resize(x.size() + (padded - ncols_x)/QK_TSQ*TSQ_BLOCK_SIZE(t.nbits));

    std::normal_distribution<float> distribution(0.25f);
    std::vector<float> y(ncols_x*ncols_dst);
    for (float & value : y) {
        value = distribution(random);
    }
    std::vector<block_q8_1_mmq> q(ncols_dst*padded/QK8_1_MMQ + J);
    quantize_mmq_q8_1_cuda(y.data(), nullptr, q.data(), type, ncols_x, ncols_x, ncols_x*ncols_dst, ncols_x*ncols_dst,
        padded, ncols_dst, 1, 1, nullptr);

    std::vector<float> dst(nrows*ncols_dst, NAN);
    const int  nty = (int) (nrows     + config.I - 1)/config.I;
    const int  ntx = (int) (ncols_dst +        J - 1)/J;
    const uint3 one = init_fastdiv_values(1);
    emulator::launch(EMULATED(mul_mat_q<type, J, fallback>), config.stream_k ? dim3(nty*ntx) : dim3(nty, ntx),
        dim3(32, config.nthreads/32), mmq_get_nbytes_shared(config, __CUDA_ARCH__))(
        (const char *) x.data(), (const int *) q.data(), nullptr, nullptr, dst.data(), nullptr, nullptr,
        init_fastdiv_values(m.blocks()), (int) nrows, (int) ncols_dst, (int) m.blocks(), (int) ncols_dst, (int) nrows,
        one, one, 0, 0, 0, one, one, 0, 0, 0, init_fastdiv_values(ntx));

    double error = 0.0;
    double power = 0.0;
    for (int64_t j = 0; j < ncols_dst; ++j) {
        for (int64_t i = 0; i < nrows; ++i) {
            double expected = 0.0;
            for (int64_t k = 0; k < ncols_x; ++k) {
                expected += (double) m.weights[i*ncols_x + k] * y[j*ncols_x + k];
            }
            error += (dst[j*nrows + i] - expected)*(dst[j*nrows + i] - expected);
            power += expected*expected;
        }
    }
    if (!(error < 1e-4*power)) {
        fail(std::string(t.name) + ": " + std::to_string(nrows) + " rows, " + std::to_string(ncols_x) + " weights, " +
            std::to_string(ncols_dst) + " columns: relative squared error " + std::to_string(error/power));
    }
    printf("%s: %d rows, %d weights, %d columns: relative squared error %.2e\n", t.name, (int) nrows, (int) ncols_x, (int) ncols_dst, error/power);
}

template <ggml_type type>
static void check_type(const tsq_type & t, random_t & random) {
    check_tile<type, false>(t, false, random);
    check_tile<type, true >(t, true,  random);
    check_product<type, false>(t, 128, 4*QK_TSQ, J, random);
    check_product<type, true >(t, 100, 9*QK_TSQ, 9, random); // neither rows nor columns nor weights fill their tiles
}

void check_mmq(random_t & random) {
    check_type<GGML_TYPE_TSQ2>(tsq_types[0], random);
    check_type<GGML_TYPE_TSQ3>(tsq_types[1], random);
    check_type<GGML_TYPE_TSQ4>(tsq_types[2], random);
}
