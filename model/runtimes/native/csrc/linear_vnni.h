/* int8 products with AVX-512 VNNI: one instruction adds four products to each of sixteen outputs, without saturating.
 *
 * It wants one factor unsigned, so inputs are moved up by 128 and each sum starts at `Matrix.start`, which is minus
 * 128 times the sum of the block's weights.
 */
#ifndef LINEAR_H
#define LINEAR_H

#include <immintrin.h>
#include <string.h>

#include "lanes.h"
#include "story.h"

typedef uint8_t level_t;
#define LEVEL_OFFSET 128
#define TILE_ROWS 8

/* `rows` rows of one group, each by `chains` sums side by side, so that no addition waits for the last one. */
INLINE void multiply_tile(const Matrix *matrix, int64_t group, const level_t *x, const float *x_scale,
                          const int rows, const int chains, float *out, int64_t out_stride) {
    const int64_t blocks = matrix->blocks, stride = blocks * BLOCK;
    const int8_t *levels = matrix->levels + group * stride * GROUP;
    const float *scale = matrix->scale + group * blocks * GROUP;
    const int32_t *start = matrix->start + group * blocks * GROUP;
    __m512 sum[8];
    for (int row = 0; row < rows; row++) sum[row] = _mm512_setzero_ps();
    for (int64_t block = 0; block < blocks; block++, scale += GROUP, start += GROUP) {
        __m512i whole[8][4];
        for (int row = 0; row < rows; row++) {
            whole[row][0] = _mm512_loadu_si512(start);
            for (int chain = 1; chain < chains; chain++) whole[row][chain] = _mm512_setzero_si512();
        }
        for (int quad = 0; quad < BLOCK / QUAD; quad += chains)
            for (int chain = 0; chain < chains; chain++, levels += GROUP * QUAD) {
                const __m512i weight = _mm512_loadu_si512(levels);
                for (int row = 0; row < rows; row++) {
                    int32_t four;
                    memcpy(&four, x + row * stride + block * BLOCK + (quad + chain) * QUAD, sizeof four);
                    whole[row][chain] = _mm512_dpbusd_epi32(whole[row][chain], _mm512_set1_epi32(four), weight);
                }
            }
        const __m512 weight_scale = _mm512_loadu_ps(scale);
        for (int row = 0; row < rows; row++) {
            for (int chain = 1; chain < chains; chain++)
                whole[row][0] = _mm512_add_epi32(whole[row][0], whole[row][chain]);
            const __m512 both = _mm512_mul_ps(weight_scale, _mm512_set1_ps(x_scale[row * blocks + block]));
            sum[row] = _mm512_add_ps(sum[row], _mm512_mul_ps(_mm512_cvtepi32_ps(whole[row][0]), both));
        }
    }
    for (int row = 0; row < rows; row++) _mm512_storeu_ps(out + row * out_stride, sum[row]);
}

/* One group of outputs for up to TILE_ROWS rows: out[row * out_stride + output]. */
INLINE void multiply_group(const Matrix *matrix, int64_t group, const level_t *x, const float *x_scale,
                           int64_t rows, float *out, int64_t out_stride) {
    const int64_t blocks = matrix->blocks, stride = blocks * BLOCK;
    if (rows == 8) {
        multiply_tile(matrix, group, x, x_scale, 8, 1, out, out_stride);
        return;
    }
    for (; rows >= 4; rows -= 4, x += 4 * stride, x_scale += 4 * blocks, out += 4 * out_stride)
        multiply_tile(matrix, group, x, x_scale, 4, 1, out, out_stride);
    for (; rows >= 2; rows -= 2, x += 2 * stride, x_scale += 2 * blocks, out += 2 * out_stride)
        multiply_tile(matrix, group, x, x_scale, 2, 2, out, out_stride);
    if (rows) multiply_tile(matrix, group, x, x_scale, 1, 4, out, out_stride);
}

#endif
