/* The same functions, compiled for different processors. */
#ifndef PATHS_H
#define PATHS_H

#include "story.h"

typedef struct {
    const char *name;
    int64_t (*scratch_bytes)(const Network *);
    void (*forward)(const Network *, const Work *);
    void (*product)(const Network *, const Matrix *, const float *x, int64_t rows, float *scratch, float *out);
    void (*sample)(const Draw *);
} Path;

extern const Path plain, avx2, avx512vnni;

#endif
