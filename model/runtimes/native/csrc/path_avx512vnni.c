/* For x86 processors with AVX-512 and its instructions for neural networks (VNNI). */
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "paths.h"
#include "target.h"

BEGIN_TARGET("avx2,avx512f,avx512bw,avx512vl,avx512vnni")
#include "linear_vnni.h"

#include "forward.h"

#ifdef __clang__
#pragma clang attribute pop
#endif

OFFER(avx512vnni);
#endif
