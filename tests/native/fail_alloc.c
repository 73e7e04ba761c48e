// Preloaded library that makes one buffer allocation of ggml fail: the one after `fail_at` more of them; never when negative.
// Small blocks are left alone, as ggml aborts when it cannot have those; no setter can do anything about that.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>

int fail_at = -1;

int posix_memalign(void ** result, size_t alignment, size_t size) {
    static int (*real)(void **, size_t, size_t);
    if (!real) {
        real = (int (*)(void **, size_t, size_t)) dlsym(RTLD_NEXT, "posix_memalign");
    }
    if (size >= 4096 && fail_at >= 0 && fail_at-- == 0) {
        return ENOMEM;
    }
    return real(result, alignment, size);
}
