// The buffer type of repacked tensors: claims matrix multiplications with weights that the kernels can take, repacks the
// weights when they are set, and runs the multiplications.

#include "ggml-backend-impl.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "traits.h"

#include "tesseraq/bcq/repack.h"
#include "tesseraq/common/buffer.h"
#include "tesseraq/ptq/repack.h"
#include "tesseraq/tsq/repack.h"

#include <algorithm>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#if TESSERAQ_NROWS == 0

ggml_backend_buffer_type_t ggml_backend_cpu_tesseraq_buffer_type(void) {
    return nullptr;
}

#else

namespace ggml::cpu::tesseraq {

// activations that are multiplied with a chunk of rows before the next ones come: they should stay in the second-level cache
static const size_t L2_BYTES = 1 << 20;

// How the tensors of a type are repacked and multiplied. A block of a panel of w columns is so many words for each column, w of one kind
// after w of another, and then the numbers.
struct kernels {
    int block; // weights
    int words; // that a panel has of a column beside its numbers

    size_t column() const { return 4*words + block; } // bytes of a block of a column

    void (*repack)  (int nrows, int64_t nb, const void * x, void * y);
    void (*quantize)(const float * x, void * y, int64_t nb, int w, int c);
    void (*gemm)    (int n, float * const * s, const void * x, const void * y, int w);
};

static_assert(Q8_TSQ_BLOCK_SIZE == 4*2 + QK8_TSQ && Q8_PTQ_BLOCK_SIZE == 4*4 + QK_PTQ, "wrong words of a panel");

// bytes of a block of activations
#define BYTES(TYPE, type, id, numbers, bytes) static const int bytes_##type = bytes;
TESSERAQ_ACTIVATIONS(BYTES)
#undef BYTES

// NULL for types without kernels
static const kernels * kernels_of(ggml_type type) {
#define KERNELS(TYPE, type, LAYOUT, layout, id, weights, bytes, ACTS, acts, rows, ...)                                                  \
    case GGML_TYPE_##TYPE: {                                                                                                            \
        static const kernels k = { weights, (bytes_##acts - weights)/4, layout##_repack, quantize_panel_##acts, ggml_gemm_##layout };   \
        return LAYOUT##_NROWS > 0 ? &k : nullptr;                                                                                       \
    }
    switch (type) {
        TESSERAQ_TYPES(KERNELS)
        default: return nullptr;
    }
#undef KERNELS
}

static bool is_repackable(const ggml_tensor * t) {
    return kernels_of(t->type) && t->ne[1] % TESSERAQ_NROWS == 0 && t->ne[3] == 1 && ggml_is_contiguous(t);
}

// n columns in panels of nearly equal widths
struct panels {
    int64_t n, count;

    explicit panels(int64_t n) : n(n), count((n + TESSERAQ_NCOLS - 1)/TESSERAQ_NCOLS) {}

    int64_t start(int64_t i) const { return i*(n/count) + std::min(i, n % count); }
    int     width(int64_t i) const { return (int) (start(i + 1) - start(i)); }
};

// the rows of the activations, whatever their dimensions
static const float * activations(const ggml_tensor * src1, int64_t i) {
    const int64_t i11 = i % src1->ne[1];
    const int64_t i12 = i / src1->ne[1] % src1->ne[2];
    const int64_t i13 = i / src1->ne[1] / src1->ne[2];
    return (const float *) ((const char *) src1->data + i11*src1->nb[1] + i12*src1->nb[2] + i13*src1->nb[3]);
}

static float * results(const ggml_tensor * dst, int64_t i) {
    const int64_t i1 = i % dst->ne[1];
    const int64_t i2 = i / dst->ne[1] % dst->ne[2];
    const int64_t i3 = i / dst->ne[1] / dst->ne[2];
    return (float *) ((char *) dst->data + i1*dst->nb[1] + i2*dst->nb[2] + i3*dst->nb[3]);
}

static void mul_mat(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];

    const kernels * k    = kernels_of(src0->type);
    const int     n      = (int) src0->ne[0];
    const int64_t nb     = n/k->block;
    const size_t  bytes  = k->column();
    const int64_t ngroup = src0->ne[1]/TESSERAQ_NROWS;
    const size_t  group  = src0->nb[1]*TESSERAQ_NROWS;
    const panels  cols(ggml_nrows(src1));
    uint8_t     * wdata  = (uint8_t *) params->wdata;

    GGML_ASSERT(src1->type == GGML_TYPE_F32 && src1->nb[0] == sizeof(float) && dst->nb[0] == sizeof(float));
    GGML_ASSERT(params->wsize >= cols.n*nb*bytes);

    // every thread quantizes its share of all blocks
    const int64_t first = cols.n*nb*params->ith/params->nth;
    const int64_t last  = cols.n*nb*(params->ith + 1)/params->nth;
    for (int64_t p = 0; p < cols.count; p++) {
        const int w = cols.width(p);
        for (int c = 0; c < w; c++) {
            const int64_t col = cols.start(p) + c;
            const int64_t b0  = std::max(first - col*nb, (int64_t) 0);
            const int64_t b1  = std::min(last  - col*nb, nb);
            if (b0 < b1) {
                uint8_t * panel = wdata + (cols.start(p)*nb + b0*w)*bytes;
                k->quantize(activations(src1, col) + b0*k->block, panel, b1 - b0, w, c);
            }
        }
    }

    // several chunks of rows per thread, for threads that are not equally fast
    const int64_t chunk  = std::max((int64_t) 1, ngroup/(8*params->nth));
    const int64_t nchunk = (ngroup + chunk - 1)/chunk;
    const int64_t stay   = std::max((size_t) 1, L2_BYTES/(TESSERAQ_NCOLS*nb*bytes));

    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    for (int64_t i = params->ith; i < nchunk; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        for (int64_t p0 = 0; p0 < cols.count; p0 += stay) {
            for (int64_t g = i*chunk; g < std::min((i + 1)*chunk, ngroup); g++) {
                for (int64_t p = p0; p < std::min(p0 + stay, cols.count); p++) {
                    const int w = cols.width(p);
                    float * s[TESSERAQ_NCOLS];
                    for (int c = 0; c < w; c++) {
                        s[c] = results(dst, cols.start(p) + c) + g*TESSERAQ_NROWS;
                    }
                    k->gemm(n, s, (const char *) src0->data + g*group, wdata + cols.start(p)*nb*bytes, w);
                }
            }
        }
    }
}

// a row of activations that an expert works on: the slot of the expert, and the token
struct expert_row {
    int32_t slot, token;
};

// parts of the work buffer of mul_mat_id
struct mul_mat_id_work {
    size_t quantized, starts, rows, panel, size;

    mul_mat_id_work(const ggml_tensor * dst, int n_threads) {
        const ggml_tensor * src1 = dst->src[1];
        const ggml_tensor * ids  = dst->src[2];

        const kernels * k = kernels_of(dst->src[0]->type);
        const size_t column = src1->ne[0]/k->block*k->column();

        quantized = 0;
        starts    = GGML_PAD(quantized + ggml_nrows(src1)*column, 64);
        rows      = starts + (dst->src[0]->ne[2] + 1)*sizeof(int64_t);
        panel     = GGML_PAD(rows + ggml_nelements(ids)*sizeof(expert_row), 64);
        size      = panel + n_threads*TESSERAQ_NCOLS*column;
    }
};

static void mul_mat_id(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    const ggml_tensor * ids  = dst->src[2];

    const kernels * k     = kernels_of(src0->type);
    const int     n       = (int) src0->ne[0];
    const int64_t nb      = n/k->block;
    const int64_t nexpert = src0->ne[2];
    const int64_t ngroup  = src0->ne[1]/TESSERAQ_NROWS;
    const size_t  group   = src0->nb[1]*TESSERAQ_NROWS;
    const size_t  column  = nb*k->column();

    GGML_ASSERT(src1->type == GGML_TYPE_F32 && src1->nb[0] == sizeof(float) && dst->nb[0] == sizeof(float));
    GGML_ASSERT(src1->ne[3] == 1);

    const mul_mat_id_work work(dst, params->nth);
    GGML_ASSERT(params->wsize >= work.size);

    uint8_t    * quantized = (uint8_t *)    params->wdata + work.quantized;
    int64_t    * starts    = (int64_t *)    ((char *) params->wdata + work.starts);
    expert_row * rows      = (expert_row *) ((char *) params->wdata + work.rows);
    uint8_t    * panel     = (uint8_t *)    params->wdata + work.panel + params->ith*TESSERAQ_NCOLS*column;

    for (int64_t i = params->ith; i < ggml_nrows(src1); i += params->nth) {
        k->quantize(activations(src1, i), quantized + i*column, nb, 1, 0);
    }

    if (params->ith == 0) {
        // rows by expert: count, add up, fill in from the ends
        auto expert = [&](int64_t slot, int64_t token) {
            const int32_t id = *(const int32_t *) ((const char *) ids->data + token*ids->nb[1] + slot*ids->nb[0]);
            GGML_ASSERT(id >= 0 && id < nexpert);
            return id;
        };
        std::fill(starts, starts + nexpert + 1, 0);
        for (int64_t token = 0; token < ids->ne[1]; token++) {
            for (int64_t slot = 0; slot < ids->ne[0]; slot++) {
                starts[expert(slot, token)]++;
            }
        }
        for (int64_t e = 1; e <= nexpert; e++) {
            starts[e] += starts[e - 1];
        }
        for (int64_t token = ids->ne[1] - 1; token >= 0; token--) {
            for (int64_t slot = ids->ne[0] - 1; slot >= 0; slot--) {
                rows[--starts[expert(slot, token)]] = { (int32_t) slot, (int32_t) token };
            }
        }
    }
    ggml_barrier(params->threadpool);

    const int64_t g0 = ngroup*params->ith/params->nth;
    const int64_t g1 = ngroup*(params->ith + 1)/params->nth;
    if (g0 == g1) {
        return;
    }

    for (int64_t e = 0; e < nexpert; e++) {
        const panels cols(starts[e + 1] - starts[e]);

        for (int64_t p = 0; p < cols.count; p++) {
            const int w = cols.width(p);
            const uint8_t * a = panel;
            float * s[TESSERAQ_NCOLS];

            for (int c = 0; c < w; c++) {
                const expert_row row = rows[starts[e] + cols.start(p) + c];
                const uint8_t  * q   = quantized + (row.slot % src1->ne[1] + row.token*src1->ne[1])*column;

                s[c] = (float *) ((char *) dst->data + row.slot*dst->nb[1] + row.token*dst->nb[2]) + g0*TESSERAQ_NROWS;
                if (w == 1) {
                    a = q;
                    continue;
                }
                // the column takes its place in a panel
                const int words = k->words;
                for (int64_t i = 0; i < nb; i++, q += k->column()) {
                    uint8_t * out = panel + i*w*k->column();
                    for (int v = 0; v < words; v++) {
                        memcpy(out + 4*(v*w + c), q + 4*v, 4);
                    }
                    for (int g = 0; g < k->block/TESSERAQ_DEPTH; g++) {
                        memcpy(out + 4*words*w + TESSERAQ_DEPTH*(g*w + c), q + 4*words + TESSERAQ_DEPTH*g, TESSERAQ_DEPTH);
                    }
                }
            }
            for (int64_t g = g0; g < g1; g++) {
                k->gemm(n, s, (const char *) src0->data + e*src0->nb[2] + g*group, a, w);
                for (int c = 0; c < w; c++) {
                    s[c] += TESSERAQ_NROWS;
                }
            }
        }
    }
}

class tensor_traits : public ggml::cpu::tensor_traits {
    bool work_size(int n_threads, const ggml_tensor * op, size_t & size) override {
        switch (op->op) {
            case GGML_OP_MUL_MAT:
                size = ggml_nelements(op->src[1])/kernels_of(op->src[0]->type)->block*kernels_of(op->src[0]->type)->column();
                return true;
            case GGML_OP_MUL_MAT_ID:
                size = mul_mat_id_work(op, n_threads).size;
                return true;
            default:
                return false;
        }
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        switch (op->op) {
            case GGML_OP_MUL_MAT:
                mul_mat(params, op);
                return true;
            case GGML_OP_MUL_MAT_ID:
                mul_mat_id(params, op);
                return true;
            default:
                return false;
        }
    }
};

static ggml_status buffer_init_tensor(ggml_backend_buffer_t buffer, ggml_tensor * tensor) {
    static tensor_traits traits;
    tensor->extra = is_repackable(tensor) ? &traits : nullptr;

    GGML_UNUSED(buffer);
    return GGML_STATUS_SUCCESS;
}

static void buffer_set_tensor(ggml_backend_buffer_t buffer, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    GGML_ASSERT(tensor->extra != nullptr);
    GGML_ASSERT(offset == 0);
    GGML_ASSERT(size == ggml_nbytes(tensor));

    const kernels * k = kernels_of(tensor->type);
    const size_t group = tensor->nb[1]*TESSERAQ_NROWS;
    for (int64_t i = 0; i < ggml_nrows(tensor)/TESSERAQ_NROWS; i++) {
        k->repack(TESSERAQ_NROWS, tensor->ne[0]/k->block, (const char *) data + i*group, (char *) tensor->data + i*group);
    }

    GGML_UNUSED(buffer);
}

static void buffer_get_tensor(ggml_backend_buffer_t buffer, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    GGML_ABORT("'%s' is repacked and cannot be read back: load the model with use_extra_bufts = false (--no-repack)", tensor->name);

    GGML_UNUSED(buffer);
    GGML_UNUSED(data);
    GGML_UNUSED(offset);
    GGML_UNUSED(size);
}

static const char * buffer_type_get_name(ggml_backend_buffer_type_t buft) {
    return "CPU_TESSERAQ";

    GGML_UNUSED(buft);
}

// Decoding reads all weights for every token, page after page: large pages are worth a sixth of the bandwidth of a core. The
// kernel may give them to memory that was not touched yet; what it answers does not matter.
static void advise_large_pages(void * data, size_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page  = sysconf(_SC_PAGESIZE);
    const uintptr_t first = GGML_PAD((uintptr_t) data, page);
    const uintptr_t end   = (uintptr_t) data + size;
    if (first < end) {
        madvise((void *) first, end - first, MADV_HUGEPAGE);
    }
#else
    GGML_UNUSED(data);
    GGML_UNUSED(size);
#endif
}

static ggml_backend_buffer_t buffer_type_alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);

    if (buffer == nullptr) {
        return nullptr;
    }

    advise_large_pages(ggml_backend_buffer_get_base(buffer), size);

    buffer->buft              = buft;
    buffer->iface.init_tensor = buffer_init_tensor;
    buffer->iface.set_tensor  = buffer_set_tensor;
    buffer->iface.get_tensor  = buffer_get_tensor;
    buffer->iface.cpy_tensor  = nullptr;
    return buffer;
}

static size_t buffer_type_get_alignment(ggml_backend_buffer_type_t buft) {
    return 64; // a vector of 16 rows

    GGML_UNUSED(buft);
}

class extra_buffer_type : ggml::cpu::extra_buffer_type {
    bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) override {
        if (op->op != GGML_OP_MUL_MAT && op->op != GGML_OP_MUL_MAT_ID) {
            return false;
        }
        const ggml_tensor * src0 = op->src[0];
        const ggml_tensor * src1 = op->src[1];
        return src0->buffer && src0->buffer->buft == ggml_backend_cpu_tesseraq_buffer_type() && is_repackable(src0) &&
               (op->op == GGML_OP_MUL_MAT_ID || src0->ne[2] == 1) &&
               (!src1->buffer || ggml_backend_buft_is_host(src1->buffer->buft)) &&
               src1->type == GGML_TYPE_F32 && src1->nb[0] == sizeof(float);
    }

    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        if (op->op == GGML_OP_MUL_MAT || op->op == GGML_OP_MUL_MAT_ID) {
            if (op->src[0]->buffer && op->src[0]->buffer->buft == ggml_backend_cpu_tesseraq_buffer_type()) {
                return (ggml::cpu::tensor_traits *) op->src[0]->extra;
            }
        }
        return nullptr;
    }
};

}  // namespace ggml::cpu::tesseraq

ggml_backend_buffer_type_t ggml_backend_cpu_tesseraq_buffer_type(void) {
    static struct ggml_backend_buffer_type buft = {
        /* .iface    = */ {
                           /* .get_name         = */ ggml::cpu::tesseraq::buffer_type_get_name,
                           /* .alloc_buffer     = */ ggml::cpu::tesseraq::buffer_type_alloc_buffer,
                           /* .get_alignment    = */ ggml::cpu::tesseraq::buffer_type_get_alignment,
                           /* .get_max_size     = */ nullptr,  // defaults to SIZE_MAX
                           /* .get_alloc_size   = */ nullptr,  // defaults to ggml_nbytes
                           /* .is_host          = */ nullptr,
                           },
        /* .device  = */ ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0),
        /* .context = */ new ggml::cpu::tesseraq::extra_buffer_type(),
    };

    return &buft;
}

#endif
