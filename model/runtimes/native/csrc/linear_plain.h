/* int8 products in plain C: the meaning of the others, and what serves where neither AVX2 nor VNNI is.
 *
 * For each row and output: the sum over blocks, in their order, of (whole-number sum) * (weight scale * input scale).
 * The whole-number sum is exact in any order; the rest is done in the same order on every path.
 */
#ifndef LINEAR_H
#define LINEAR_H

#include "lanes.h"
#include "story.h"

typedef int16_t level_t;
#define LEVEL_OFFSET 0
#define TILE_ROWS 4

/* One group of outputs for up to TILE_ROWS rows: out[row * out_stride + output]. */
INLINE void multiply_group(const Matrix *matrix, int64_t group, const level_t *x, const float *x_scale,
                           int64_t rows, float *out, int64_t out_stride) {
    const int64_t stride = matrix->blocks * BLOCK;
    for (int64_t row = 0; row < rows; row++) {
        const int8_t *levels = matrix->levels + group * stride * GROUP;
        const float *scale = matrix->scale + group * matrix->blocks * GROUP;
        float sum[GROUP] = {0};
        for (int64_t block = 0; block < matrix->blocks; block++, scale += GROUP) {
            const level_t *input = x + row * stride + block * BLOCK;
            int32_t whole[GROUP] = {0};
            for (int quad = 0; quad < BLOCK / QUAD; quad++, levels += GROUP * QUAD)
                for (int output = 0; output < GROUP; output++)
                    for (int i = 0; i < QUAD; i++)
                        whole[output] += levels[output * QUAD + i] * input[quad * QUAD + i];
            const float input_scale = x_scale[row * matrix->blocks + block];
            for (int output = 0; output < GROUP; output++)
                sum[output] += (float)whole[output] * (scale[output] * input_scale);
        }
        for (int output = 0; output < GROUP; output++) out[row * out_stride + output] = sum[output];
    }
}

#endif
