// mmq.cuh: tiles as load_tiles leaves them in shared memory, and whole products with upstream's kernels around it: those for int8 tensor
// cores where TURING_MMA_AVAILABLE is defined, else those of dp4a

#include "mmq.cuh"
#include "quantize.cuh"
#include "tesseraq/bcq/cuda/load-tiles.cuh"

#include "kernels.h"

static constexpr int QK = 64; // weights of a block, for all types with tiles
static_assert(QK == QK_TSQ && QK == QK_BCQ, "types have blocks of several sizes");

static constexpr int J = 16; // columns of a tile

// ------------------------------------------------------------ a tile

// what the tile should say of a weight: an integer, a scale and an offset
struct expected_weight {
    int   integer;
    float d;
    float offset;
};

// TSQ: the code less the whole part of the zero-point, and for the offset what is left of it
static expected_weight expected_tsq(const uint8_t * block, int nbits, int i) {
    const int steps = 1 << (7 - nbits);
    uint8_t q[QK];
    tsq_unpack(block + TSQ_CODES, nbits, q);
    const int   whole = (int) floor((double) (block[1] - 64)/steps + 0.5);
    const float d     = e5m3_decode(block[0]);
    return { q[i] - whole, d, d*(whole - tsq_decode_z(block[1], nbits)) };
}

static expected_weight expected_in_tile(ggml_type type, const uint8_t * block, int i) {
    if (tesseraq_has_codebooks(type)) {
        int8_t c[QK];
        if (type == GGML_TYPE_BCQ2) {
            bcq2_decode((const block_bcq2 *) block, c);
        } else {
            bcq4_decode((const block_bcq4 *) block, c);
        }
        return { c[i], e5m3_decode(block[0]), 0.0f };
    }
    return expected_tsq(block, 2 + type - GGML_TYPE_TSQ2, i);
}

template <ggml_type type, bool fallback>
static void load_tiles_kernel(const char * x, int * tile, int kbx0, int i_max, int stride) {
    ggml_cuda_mmq_get_load_tiles<type, J, fallback>()(x, tile, kbx0, i_max, stride);
}

template <ggml_type type, bool fallback>
static void check_tile(const tested_type & t, bool any_scale, random_t & random) {
    const ggml_cuda_mmq_config config = ggml_cuda_mmq_get_config(type, J, fallback, __CUDA_ARCH__);
    const int nrows = fallback ? config.I - 28 : config.I;
    const int kbx0  = 4; // the second tile of three
    const matrix m(t, nrows, 12*QK, random, any_scale);
    std::vector<int> tile(ggml_cuda_mmq_get_nbytes_shared_x(config, __CUDA_ARCH__)/sizeof(int), -1);

    emulator::launch(EMULATED(load_tiles_kernel<type, fallback>), 1, dim3(32, config.nthreads/32), 0)(
        (const char *) m.data.data(), tile.data(), kbx0, nrows - 1, (int) m.blocks());

    // Q8_0's tiles have a float for every 32 weights, Q5_1's a scale and an offset
    const bool q8_0 = tesseraq_mmq_like(type) == GGML_TYPE_Q8_0;
#if defined(TURING_MMA_AVAILABLE)
    const int   stride_qs = ggml_cuda_mmq_get_sram_stride(config.sram_layout);
    const int * scales    = tile.data() + 2*MMQ_TILE_NE_K;
    const auto  scale_at  = [=](int i, int k) { return scales + i*stride_qs + k; };
#else
    const int   stride_qs = 2*MMQ_TILE_NE_K + 1;
    const int * scales    = tile.data() + mmq_get_dp4a_tile_x_sizes(type, config.I).qs;
    const auto  scale_at  = [=](int i, int k) { return scales + i*(MMQ_ITER_K/QK8_1) + i/(q8_0 ? QI8_0/2 : QI5_1) + k; };
#endif // defined(TURING_MMA_AVAILABLE)

    for (int i = 0; i < nrows; ++i) {
        for (int k = 0; k < MMQ_ITER_K; ++k) {
            const expected_weight expected =
                expected_in_tile(type, m.data.data() + (i*m.blocks() + kbx0 + k/QK)*t.block_size, k%QK);
            const int found = ((const int8_t *) (tile.data() + i*stride_qs))[k];
            const std::string where = std::string(t.name) + " tile: row " + std::to_string(i) + ", weight " + std::to_string(k);
            if (found != expected.integer) {
                fail(where + " is " + std::to_string(found) + ", not " + std::to_string(expected.integer));
            }

            float d;
            float offset = 0.0f;
            half2 pair;
            if (q8_0) {
                memcpy(&d, scale_at(i, k/QK8_1), sizeof(d));
            } else {
                memcpy(&pair, scale_at(i, k/QK8_1), sizeof(pair));
                d      = pair.x;
                offset = pair.y;
            }
            // exact, but for scales that half does not have with four bits
            const float error = q8_0 || expected.d >= 0x1p-16f ? 0.0f : 0x1p-25f;
            if (!(std::abs(d - expected.d) <= error && std::abs(offset - expected.offset) <= error)) {
                fail(where + " has scale " + std::to_string(d) + " and offset " + std::to_string(offset) +
                    ", not " + std::to_string(expected.d) + " and " + std::to_string(expected.offset));
            }
        }
    }
}

// ------------------------------------------------------------ a product

template <ggml_type type, bool fallback>
static std::vector<float> product(const tested_type & t, const matrix & m, const std::vector<float> & y, int64_t nrows, int64_t ncols_dst) {
    const ggml_cuda_mmq_config config = ggml_cuda_mmq_get_config(type, J, fallback, __CUDA_ARCH__);
    const int64_t ncols_x = m.ncols;
    const int64_t padded  = GGML_PAD(ncols_x, MATRIX_ROW_PADDING);

    // as upstream allocates rows: up to a multiple of MATRIX_ROW_PADDING, with zeros
    std::vector<uint8_t> x = m.data;
    x.resize(x.size() + (padded - ncols_x)/QK*t.block_size);

    std::vector<block_q8_1_mmq> q(ncols_dst*padded/QK8_1_MMQ + J);
    quantize_mmq_q8_1_cuda(y.data(), nullptr, q.data(), t.type, ncols_x, ncols_x, ncols_x*ncols_dst, ncols_x*ncols_dst,
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
    return dst;
}

// The sums that stand beside the activations are from before their rounding, so this is close to the product with the activations as
// they were, and not exactly anything simpler.
template <ggml_type type, bool fallback>
static void check_product(const tested_type & t, int64_t nrows, int64_t ncols_x, int64_t ncols_dst, random_t & random) {
    const matrix m(t, nrows, ncols_x, random);
    std::normal_distribution<float> distribution(0.25f);
    std::vector<float> y(ncols_x*ncols_dst);
    for (float & value : y) {
        value = distribution(random);
    }
    const std::vector<float> a   = as_multiplied(t, y);
    const std::vector<float> dst = product<type, fallback>(t, m, y, nrows, ncols_dst);

    double error = 0.0;
    double power = 0.0;
    for (int64_t j = 0; j < ncols_dst; ++j) {
        for (int64_t i = 0; i < nrows; ++i) {
            double expected = 0.0;
            for (int64_t k = 0; k < ncols_x; ++k) {
                expected += (double) m.weights[i*ncols_x + k] * a[j*ncols_x + k];
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

    // one activation that is not finite makes the products of its column NaN, and no others
    const size_t at = random() % y.size();
    y[at] = random() % 2 ? NAN : INFINITY;
    const std::vector<float> broken = product<type, fallback>(t, m, y, nrows, ncols_dst);
    for (size_t i = 0; i < dst.size(); ++i) {
        if (i/nrows == at/ncols_x ? !std::isnan(broken[i]) : broken[i] != dst[i]) {
            fail(std::string(t.name) + ": activation " + std::to_string(at) + " is " + std::to_string(y[at]) + ", product " +
                std::to_string(i) + " is " + std::to_string(broken[i]) + ", without it " + std::to_string(dst[i]));
        }
    }
}

template <ggml_type type>
static void check_type(const tested_type & t, random_t & random) {
    check_tile<type, false>(t, false, random);
    check_tile<type, true >(t, true,  random);
    check_product<type, false>(t, 128, 4*QK, J, random);
    check_product<type, true >(t, 100, 9*QK, 9, random); // neither rows nor columns nor weights fill their tiles
}

void check_mmq(const types_t & types, random_t & random) {
    for (const tested_type * t : types) {
        if (!tesseraq_has_tiles(t->type)) {
            continue;
        }
        switch (t->type) {
            // a type with the layout of another one has other activations, and its kernels
#define CHECK_TYPE(TYPE, name, LAYOUT, ...)                                               \
            case GGML_TYPE_##TYPE:                                                        \
                if (GGML_TYPE_##TYPE == GGML_TYPE_##LAYOUT) {                             \
                    check_type<GGML_TYPE_##LAYOUT>(*t, random);                           \
                } else {                                                                  \
                    check_product<GGML_TYPE_##LAYOUT, true>(*t, 100, 9*QK, 9, random);    \
                }                                                                         \
                break;
            TESSERAQ_MMQ_TYPES(CHECK_TYPE)
            default: fail(std::string(t->name) + " is not tested");
        }
    }
}
