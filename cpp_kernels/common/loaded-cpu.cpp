// Two functions of the CPU backend under their own names, from the variant that was loaded: for test programs that use them, and
// that cannot be linked with a backend which is chosen when they run.

#include "ggml-backend.h"
#include "ggml-cpu.h"

#include <cstdio>
#include <cstdlib>

static ggml_backend_reg_t loaded_cpu(void) {
    ggml_backend_load_all();
    const ggml_backend_dev_t dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (dev == nullptr) {
        fprintf(stderr, "no CPU backend that runs on this processor was found\n");
        exit(1);
    }
    return ggml_backend_dev_backend_reg(dev);
}

// loading initializes it
void ggml_cpu_init(void) {
    static const ggml_backend_reg_t reg = loaded_cpu();
    GGML_UNUSED(reg);
}

const struct ggml_type_traits_cpu * ggml_get_type_traits_cpu(enum ggml_type type) {
    typedef const struct ggml_type_traits_cpu * (*get_t)(enum ggml_type type);
    static const get_t get = (get_t) ggml_backend_reg_get_proc_address(loaded_cpu(), "ggml_get_type_traits_cpu");
    return get(type);
}
