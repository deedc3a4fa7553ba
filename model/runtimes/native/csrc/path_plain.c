/* For any processor: what the compiler makes of plain C for the oldest one of its kind. */
#include "linear_plain.h"

#include "paths.h"

#include "forward.h"

OFFER(plain);
