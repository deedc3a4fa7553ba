/* int8 products with AVX2, which has no instruction that adds up bytes without saturating.
 *
 * So weights are widened to 16 bits as they are read (once for up to four rows) and multiplied in pairs into exact
 * 32-bit sums. Inputs are kept in 16 bits; four of them, one quad, are read by one broadcast for four outputs at a
 * time. A register then holds two partial sums for each of four outputs; they are joined at the end of a block.
 */
#ifndef LINEAR_H
#define LINEAR_H

#include <immintrin.h>
#include <string.h>

#include "lanes.h"
#include "story.h"

typedef int16_t level_t;
#define LEVEL_OFFSET 0
#define TILE_ROWS 4

/* `rows` rows times `halves` halves of a group; both are constants where this is expanded. */
INLINE void multiply_tile(const Matrix *matrix, const int8_t *levels, const float *scale, const level_t *x,
                          const float *x_scale, const int rows, const int halves, float *out, int64_t out_stride) {
    const int64_t blocks = matrix->blocks, stride = blocks * BLOCK;
    __m256 sum[4][2];
    for (int row = 0; row < rows; row++)
        for (int half = 0; half < halves; half++) sum[row][half] = _mm256_setzero_ps();
    for (int64_t block = 0; block < blocks; block++, scale += GROUP, x += BLOCK, x_scale++) {
        __m256i whole[4][4];
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
            for (int part = 0; part < 2 * halves; part++) whole[row][part] = _mm256_setzero_si256();
#pragma GCC unroll 2
        for (int quad = 0; quad < BLOCK / QUAD; quad++, levels += GROUP * QUAD) {
            __m256i weight[4];
#pragma GCC unroll 4
            for (int part = 0; part < 2 * halves; part++)
                weight[part] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(levels + 16 * part)));
#pragma GCC unroll 4
            for (int row = 0; row < rows; row++) {
                int64_t four;
                memcpy(&four, x + row * stride + quad * QUAD, sizeof four);
                const __m256i input = _mm256_set1_epi64x(four);
#pragma GCC unroll 4
                for (int part = 0; part < 2 * halves; part++)
                    whole[row][part] =
                        _mm256_add_epi32(whole[row][part], _mm256_madd_epi16(weight[part], input));
            }
        }
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++) {
            const __m256 input_scale = _mm256_set1_ps(x_scale[row * blocks]);
#pragma GCC unroll 2
            for (int half = 0; half < halves; half++) {
                /* hadd leaves outputs 0 1 4 5 2 3 6 7 */
                __m256i joined = _mm256_hadd_epi32(whole[row][2 * half], whole[row][2 * half + 1]);
                joined = _mm256_permute4x64_epi64(joined, 0xd8);
                const __m256 both = _mm256_mul_ps(_mm256_loadu_ps(scale + 8 * half), input_scale);
                sum[row][half] = _mm256_add_ps(sum[row][half], _mm256_mul_ps(_mm256_cvtepi32_ps(joined), both));
            }
        }
    }
    for (int row = 0; row < rows; row++)
        for (int half = 0; half < halves; half++)
            _mm256_storeu_ps(out + row * out_stride + 8 * half, sum[row][half]);
}

/* One group of outputs for up to TILE_ROWS rows: out[row * out_stride + output]. */
INLINE void multiply_group(const Matrix *matrix, int64_t group, const level_t *x, const float *x_scale,
                           int64_t rows, float *out, int64_t out_stride) {
    const int8_t *levels = matrix->levels + group * matrix->blocks * BLOCK * GROUP;
    const float *scale = matrix->scale + group * matrix->blocks * GROUP;
    if (rows == 4)
        for (int half = 0; half < 2; half++)
            multiply_tile(matrix, levels + 32 * half, scale + 8 * half, x, x_scale, 4, 1, out + 8 * half, out_stride);
    else if (rows == 3)
        for (int half = 0; half < 2; half++)
            multiply_tile(matrix, levels + 32 * half, scale + 8 * half, x, x_scale, 3, 1, out + 8 * half, out_stride);
    else if (rows == 2)
        multiply_tile(matrix, levels, scale, x, x_scale, 2, 2, out, out_stride);
    else
        multiply_tile(matrix, levels, scale, x, x_scale, 1, 2, out, out_stride);
}

#endif
