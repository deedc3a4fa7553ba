/* Activations to whole numbers: each block of 64 of each row gets a scale of its own, so no row feels another.
 *
 * A value v becomes round(v / scale), halves to even, with scale = (largest |v| of the block) / 127; where inputs are
 * never negative (squared ReLU) / 255. A block that holds a NaN or an infinity gets the scale NaN: its row turns into
 * NaN and is seen, where a whole number would hide it.
 */
#ifndef QUANTIZE_H
#define QUANTIZE_H

#include <math.h>
#include <string.h>

#include "lanes.h"
#include "story.h"

/* x (inputs) to levels and scales (blocks). `level_t` and `LEVEL_OFFSET` are the path's. */
INLINE void quantize(const Matrix *matrix, const float *x, level_t *levels, float *scales) {
    const float most = matrix->positive_inputs ? 255.0f : 127.0f;
    const int32_t offset = matrix->positive_inputs ? 0 : LEVEL_OFFSET;
    for (int64_t block = 0; block < matrix->blocks; block++, levels += BLOCK) {
        float values[BLOCK];
        const int64_t first = block * BLOCK, left = matrix->inputs - first;
        const int64_t count = left < BLOCK ? left : BLOCK;
        memcpy(values, x + first, (size_t)count * sizeof(float));
        memset(values + count, 0, (size_t)(BLOCK - count) * sizeof(float));
        /* Without their sign, floats are ordered as their bits are; NaN and infinity come above all others. */
        int32_t bits[BLOCK], largest = 0;
        memcpy(bits, values, sizeof bits);
        for (int i = 0; i < BLOCK; i++) {
            const int32_t size = bits[i] & 0x7fffffff;
            largest = size > largest ? size : largest;
        }
        float top;
        memcpy(&top, &largest, sizeof top);
        const float inverse = top > 1e-30f && largest < 0x7f800000 ? most / top : 0.0f;
        scales[block] = largest < 0x7f800000 ? top / most : NAN;
        for (int i = 0; i < BLOCK; i++) {
            /* Adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits. */
            const float shifted = (inverse == 0.0f ? 0.0f : values[i] * inverse) + 12582912.0f;
            int32_t level;
            memcpy(&level, &shifted, sizeof level);
            levels[i] = (level_t)(level - 0x4b400000 + offset);
        }
    }
}

#endif
