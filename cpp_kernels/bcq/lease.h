#pragma once

// Codebooks in use are those of the models that are loaded: the universal ones, or others that all of them share.

#include "ggml.h"

#include <stdbool.h>
#include <stdint.h>

// GGUF key of a file's own codebooks: an array of 128 int8, codebook after codebook
#define BCQ_CODEBOOKS_KEY "tesseraq.bcq.codebooks"

#ifdef __cplusplus
extern "C" {
#endif

// Takes codebooks (128 codewords, or NULL for the universal ones) into use until as many calls of bcq_release; false, and nothing
// done, while a model with other ones is loaded, or if these are none: codewords ascend, and |c| <= 31.
GGML_API bool bcq_acquire(const int8_t * codebooks);
GGML_API void bcq_release(void);

// the codebooks in use: 128 codewords
GGML_API const int8_t * bcq_codebooks(void);

#ifdef __cplusplus
}

#include "gguf.h"
#include "../common/is-type.h"

#include <stdexcept>

// what a model holds as long as it is loaded
class bcq_lease {
  public:
    bcq_lease() = default;
    bcq_lease(const bcq_lease &) = delete;
    bcq_lease & operator=(const bcq_lease &) = delete;

    ~bcq_lease() {
        if (held) {
            bcq_release();
        }
    }

    // Takes the codebooks of a model into use, if it has any tensor that needs some; throws if that is not possible. Its metadata are those
    // of its first file, and its weights, by name with a `tensor`, those of all of them.
    template <typename weights> void take(const struct gguf_context * file, const weights & model) {
        const int64_t key = gguf_find_key(file, BCQ_CODEBOOKS_KEY);

        bool needed = key >= 0;
        for (const auto & [name, weight] : model) {
            needed = needed || tesseraq_has_codebooks(weight.tensor->type);
        }
        if (!needed || held) {
            return;
        }
        if (key >= 0 && (gguf_get_kv_type(file, key) != GGUF_TYPE_ARRAY || gguf_get_arr_type(file, key) != GGUF_TYPE_INT8 || gguf_get_arr_n(file, key) != 128)) {
            throw std::runtime_error(BCQ_CODEBOOKS_KEY " is no array of 128 int8");
        }
        if (!bcq_acquire(key >= 0 ? (const int8_t *) gguf_get_arr_data(file, key) : nullptr)) {
            throw std::runtime_error("the BCQ codebooks of this model are damaged, or a model with other ones is loaded: one process can use one set at a time");
        }
        held = true;
        own  = key >= 0;
    }

    // codebooks that are not the universal ones, into the metadata of a copy
    void save(struct gguf_context * file) const {
        if (own) {
            gguf_set_arr_data(file, BCQ_CODEBOOKS_KEY, GGUF_TYPE_INT8, bcq_codebooks(), 128);
        }
    }

  private:
    bool held = false;
    bool own  = false; // codebooks are the model's
};
#endif
