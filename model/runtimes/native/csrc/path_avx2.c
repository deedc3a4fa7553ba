/* For x86 processors with AVX2, which are those since about 2014. */
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "paths.h"
#include "target.h"

BEGIN_TARGET("avx2")
#include "linear_avx2.h"

#include "forward.h"

#ifdef __clang__
#pragma clang attribute pop
#endif

OFFER(avx2);
#endif
