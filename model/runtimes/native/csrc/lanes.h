/* Eight floats at once, on any processor, with one order of adding.
 *
 * GCC and Clang compile these vectors for whatever the target has: one AVX register, two SSE or NEON registers, or
 * eight scalars. Each operation is a single IEEE one and none is fused or reordered (-ffp-contract=off, no
 * -ffast-math), so a sum has the same bits on every path. Fast-math is not only a matter of bits: an exponential
 * that overflowed in a trained gate once came out of it as NaN.
 */
#ifndef LANES_H
#define LANES_H

#include <stdint.h>

#define LANES 8
#define INLINE static inline __attribute__((always_inline, unused))

typedef float f8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef float f8_anywhere __attribute__((vector_size(32), aligned(4), may_alias));

INLINE f8 load(const float *from) { return *(const f8_anywhere *)from; }
INLINE void store(float *to, f8 x) { *(f8_anywhere *)to = x; }
INLINE f8 all(float x) { return (f8){x, x, x, x, x, x, x, x}; }
INLINE f8 choose(i8 mask, f8 yes, f8 no) { return (f8)((mask & (i8)yes) | (~mask & (i8)no)); }

INLINE float total(f8 x) {
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

/* exp(x), relative error below 2e-7. Beyond [-87, 88] it stays at that end's value; NaN stays NaN.
 * x = n ln 2 + r with |r| <= ln 2 / 2; exp(r) by its Taylor series up to r^7; 2^n by the exponent's bits. */
INLINE f8 exp8(f8 x) {
    const f8 low = all(-87.0f), high = all(88.0f), magic = all(12582912.0f); /* 1.5 * 2^23: rounds to whole numbers */
    x = choose(x < low, low, x);
    x = choose(x > high, high, x);
    f8 shifted = x * 1.44269504f + magic;
    f8 n = shifted - magic;
    f8 r = (x - n * 0.693359375f) - n * -2.12194440e-4f; /* ln 2 in two parts, the first exact in a product with n */
    f8 p = r * (1.0f / 5040) + (1.0f / 720);
    p = p * r + (1.0f / 120);
    p = p * r + (1.0f / 24);
    p = p * r + (1.0f / 6);
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    i8 power = ((i8)shifted << 23) + 0x3f800000; /* the low bits of `shifted` are n */
    return p * (f8)power;
}

/* x * sigmoid(x): the exponential is bounded, so the quotient is never infinity over infinity. */
INLINE f8 silu8(f8 x) { return x / (1.0f + exp8(-x)); }

#endif
