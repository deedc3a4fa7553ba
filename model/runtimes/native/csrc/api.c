/* What Python calls. Paths are numbered by preference: 0 is the best that may be there. */
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "paths.h"

#define EXPORT __attribute__((visibility("default")))

enum { PATHS = 3 };

/* The path of a number, or NULL where this processor cannot run it. */
static const Path *path_of(int64_t number) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (number == 0 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return &avx512vnni;
    if (number == 1 && __builtin_cpu_supports("avx2")) return &avx2;
#endif
    return number == PATHS - 1 ? &plain : 0;
}

EXPORT int64_t story_paths(void) { return PATHS; }

/* A path's name, or NULL where this processor cannot run it. */
EXPORT const char *story_path_name(int64_t number) {
    const Path *path = path_of(number);
    return path ? path->name : 0;
}

EXPORT int64_t story_scratch(int64_t number, const Network *net) { return path_of(number)->scratch_bytes(net); }

/* Numbers below 1e-38 that a fading memory reaches are counted as zero: x86 takes a hundred cycles for each. */
#if defined(__x86_64__)
#define WITHOUT_DENORMALS(call)            \
    do {                                   \
        const unsigned before = _mm_getcsr(); \
        _mm_setcsr(before | 0x8040);       \
        call;                              \
        _mm_setcsr(before);                \
    } while (0)
#else
#define WITHOUT_DENORMALS(call) call
#endif

/* Take in `work`: 0, or -1 and nothing done if a token is none of the vocabulary. */
EXPORT int64_t story_forward(int64_t number, const Network *net, const Work *work) {
    for (int64_t row = 0; row < work->rows; row++)
        if (work->token[row] < 0 || work->token[row] >= net->vocab) return -1;
    WITHOUT_DENORMALS(path_of(number)->forward(net, work));
    return 0;
}

EXPORT void story_product(int64_t number, const Network *net, const Matrix *matrix, const float *x, int64_t rows,
                          float *scratch, float *out) {
    WITHOUT_DENORMALS(path_of(number)->product(net, matrix, x, rows, scratch, out));
}

EXPORT void story_sample(int64_t number, const Draw *draw) {
    WITHOUT_DENORMALS(path_of(number)->sample(draw));
}
