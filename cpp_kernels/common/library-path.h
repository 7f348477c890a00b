#pragma once

// Included by ggml-backend-reg.cpp, in its middle.

// the folder of this library: backends of another llama.cpp, in the folder of the executable or the current one, would know
// other types
static fs::path get_library_path() {
#ifdef _WIN32
    HMODULE module = NULL;
    std::vector<wchar_t> path(32768);
    if (!GetModuleHandleExW(GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT,
                            (LPCWSTR) &get_library_path, &module)) {
        return {};
    }
    return fs::path(std::wstring(path.data(), GetModuleFileNameW(module, path.data(), path.size()))).parent_path();
#else
    Dl_info info;
    return dladdr((const void *) &get_library_path, &info) ? fs::path(info.dli_fname).parent_path() : fs::path();
#endif
}
