#pragma once

// Codebooks in use are those of the models that are loaded: for each layout the universal ones, or others that all of them share.

#include "ggml.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum bcq_layout {
#define BCQ_LAYOUT(LAYOUT, layout, ...) BCQ_LAYOUT_##LAYOUT,
    TESSERAQ_CODEBOOKS(BCQ_LAYOUT)
#undef BCQ_LAYOUT
    BCQ_LAYOUTS,
};

// Takes codebooks of a layout (codewords, or NULL for the universal ones) into use until as many calls of bcq_release; false, and nothing
// done, while a model with other ones is loaded, or if these are none: codewords ascend, and |c| <= 31.
GGML_API bool bcq_acquire(enum bcq_layout layout, const int8_t * codebooks);
GGML_API void bcq_release(enum bcq_layout layout);

// the codebooks in use
GGML_API const int8_t * bcq_codebooks(enum bcq_layout layout);

#ifdef __cplusplus
}

#include "gguf.h"

#include <stdexcept>
#include <string>

// what a model holds as long as it is loaded
class bcq_lease {
  public:
    bcq_lease() = default;
    bcq_lease(const bcq_lease &) = delete;
    bcq_lease & operator=(const bcq_lease &) = delete;

    ~bcq_lease() {
        for (int i = 0; i < BCQ_LAYOUTS; i++) {
            if (held[i]) {
                bcq_release((bcq_layout) i);
            }
        }
    }

    // Takes the codebooks of a model into use, if it has any tensor that needs some; throws if that is not possible. Its metadata are those
    // of its first file, and its weights, by name with a `tensor`, those of all of them.
    template <typename weights> void take(const struct gguf_context * file, const weights & model) {
        bool needed[BCQ_LAYOUTS] = {};
        for (const auto & [name, weight] : model) {
            switch (weight.tensor->type) {
#define BCQ_NEEDED(TYPE, type, LAYOUT, ...) case GGML_TYPE_##TYPE: needed[BCQ_LAYOUT_##LAYOUT] = true; break;
                TESSERAQ_BCQ_TYPES(BCQ_NEEDED)
#undef BCQ_NEEDED
                default: break;
            }
        }
        for (int i = 0; i < BCQ_LAYOUTS; i++) {
            take(file, (bcq_layout) i, needed[i]);
        }
    }

    // codebooks that are not the universal ones, into the metadata of a copy
    void save(struct gguf_context * file) const {
        for (int i = 0; i < BCQ_LAYOUTS; i++) {
            if (own[i]) {
                gguf_set_arr_data(file, codebooks[i].key, GGUF_TYPE_INT8, bcq_codebooks((bcq_layout) i), codebooks[i].size);
            }
        }
    }

  private:
    // in a file
    struct entry {
        const char * key;
        size_t       size;
    };

#define BCQ_ENTRY(LAYOUT, layout, count, levels, key) { key, count*levels },
    static constexpr entry codebooks[BCQ_LAYOUTS] = { TESSERAQ_CODEBOOKS(BCQ_ENTRY) };
#undef BCQ_ENTRY

    bool held[BCQ_LAYOUTS] = {};
    bool own [BCQ_LAYOUTS] = {}; // codebooks are the model's

    void take(const struct gguf_context * file, bcq_layout layout, bool needed) {
        const entry & e   = codebooks[layout];
        const int64_t key = gguf_find_key(file, e.key);

        if ((!needed && key < 0) || held[layout]) {
            return;
        }
        if (key >= 0 && (gguf_get_kv_type(file, key) != GGUF_TYPE_ARRAY || gguf_get_arr_type(file, key) != GGUF_TYPE_INT8 || gguf_get_arr_n(file, key) != e.size)) {
            throw std::runtime_error(std::string(e.key) + " is no array of " + std::to_string(e.size) + " int8");
        }
        if (!bcq_acquire(layout, key >= 0 ? (const int8_t *) gguf_get_arr_data(file, key) : nullptr)) {
            throw std::runtime_error("the BCQ codebooks of this model are damaged, or a model with other ones is loaded: one process can use one set at a time");
        }
        held[layout] = true;
        own [layout] = key >= 0;
    }
};
#endif
