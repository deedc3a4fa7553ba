/* The next token of each row, from logits, settings and a random number: `model/runtimes/sampling.py`, which states the rules, in C.
 *
 * The same choices but for the last bit of two float operations, the exponential and the sum of a row's weights: a draw
 * within about 1e-7 of the border of two tokens may fall on the other side. What decides is added up in whole numbers.
 *
 * Only what a choice needs is sorted: an incremental quicksort (Paredes and Navarro, "Optimal incremental sorting",
 * ALENEX 2006, section 3) hands out the likeliest tokens one by one, until they fill the nucleus.
 */
#ifndef SAMPLE_H
#define SAMPLE_H

#include <math.h>
#include <string.h>

#include "lanes.h"
#include "story.h"

enum {
    TOKEN_BITS = 20,
    MASS_BLOCK = 256,  /* weights that are added up in single precision before doubles go on */
    SMALL = 12,        /* keys that are sorted by insertion */
};
static const double WEIGHT_ONE = 1099511627776.0; /* 2^40 */
static const double BOUND_SLACK = 0.9;            /* keeps a bound on candidates on the safe side of rounding */

/* Candidates in order, as far as they have been asked for. */
typedef struct {
    uint64_t *key;
    int64_t *ends; /* a stack: keys before ends[depth - 1] are smaller than those behind it */
    int64_t depth, ready; /* keys before `ready` are in their place */
} Sorted;

INLINE uint64_t median(uint64_t a, uint64_t b, uint64_t c) {
    const uint64_t low = a < b ? a : b, high = a < b ? b : a;
    return c < low ? low : c > high ? high : c;
}

/* The smallest key from `at` on. Asked for at = 0, 1, 2 … in turn. */
static uint64_t next_key(Sorted *sorted, int64_t at) {
    uint64_t *key = sorted->key;
    while (sorted->ready <= at) {
        const int64_t end = sorted->ends[sorted->depth - 1];
        if (end - at <= SMALL) {
            for (int64_t i = at + 1; i < end; i++) {
                const uint64_t moving = key[i];
                int64_t to = i;
                for (; to > at && key[to - 1] > moving; to--) key[to] = key[to - 1];
                key[to] = moving;
            }
            sorted->ready = end;
            sorted->depth--;
        } else {
            const uint64_t pivot = median(key[at], key[(at + end) / 2], key[end - 1]);
            int64_t left = at - 1, right = end;
            for (;;) { /* Hoare's: no key is equal to another */
                while (key[++left] < pivot) {}
                while (key[--right] > pivot) {}
                if (left >= right) break;
                const uint64_t other = key[left];
                key[left] = key[right];
                key[right] = other;
            }
            sorted->ends[sorted->depth++] = left;
        }
    }
    return key[at];
}

/* `model.runtimes.sampling.uniform`: the output function of SplitMix64 (Steele, Lea, Flood 2014, figure 17) of a counter. */
INLINE double uniform(uint64_t start, int64_t position) {
    uint64_t z = start + (uint64_t)position * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    return (double)(z >> 11) * 0x1p-53;
}

/* A weight that exactly k of `count` weights reach, or more where some are equal: bisection over the bits of a float,
 * which are in the order of the numbers where none is negative. */
INLINE float kth_largest(const float *weight, int64_t count, int64_t k) {
    uint32_t low = 0, high = 0x3f800001; /* all reach zero, none more than one */
    while (high - low > 1) {
        const uint32_t middle = low + (high - low) / 2;
        float bound;
        memcpy(&bound, &middle, sizeof bound);
        i8 reached = {0};
        for (int64_t i = 0; i < count; i += LANES) reached -= load(weight + i) >= all(bound);
        int64_t all_reached = 0;
        for (int lane = 0; lane < LANES; lane++) all_reached += reached[lane];
        if (all_reached >= k)
            low = middle;
        else
            high = middle;
    }
    float found;
    memcpy(&found, &low, sizeof found);
    return found;
}

/* The entry of `weight` in which the share `point` in [0, 1) of all its mass lies; never one without mass. `rest`: where
 * in that entry, in [0, 1). */
static int64_t entry_of(const double *weight, int64_t count, double point, double *rest) {
    double total = 0, before = 0;
    for (int64_t i = 0; i < count; i++) total += weight[i];
    int64_t at = -1;
    const double aim = point * total;
    double sum = 0;
    for (int64_t i = 0; i < count; i++) {
        if (weight[i] > 0) {
            at = i;
            before = sum;
        }
        sum += weight[i];
        if (sum > aim) break;
    }
    const double inside = (aim - before) / weight[at];
    *rest = inside < 0 ? 0 : inside < 1 ? inside : 1 - 0x1p-53;
    return at;
}

/* From all tokens in the order of their ids: first a block of them, then one of the block. */
static int64_t draw_unfiltered(const float *weight, const double *block, int64_t blocks, double point) {
    double rest, of_block[MASS_BLOCK];
    const int64_t chosen = entry_of(block, blocks, point, &rest), first = chosen * MASS_BLOCK;
    for (int64_t i = 0; i < MASS_BLOCK; i++) of_block[i] = weight[first + i];
    return first + entry_of(of_block, MASS_BLOCK, rest, &point);
}

INLINE int64_t whole_weight(const float *weight, uint64_t key) {
    return (int64_t)((double)weight[key & ((1u << TOKEN_BITS) - 1)] * WEIGHT_ONE);
}

/* From the tokens that reach `bound`, likeliest first, as far as the filters go. `mass`: of the whole row. */
static int64_t draw_filtered(const Draw *draw, int64_t row, const float *level, const float *weight, int64_t padded,
                             float bound, double mass, int narrowed, double point) {
    uint64_t *key = draw->keys;
    int64_t count = 0;
    const int64_t most = draw->top_k[row];
    for (int64_t v = 0; v < padded; v += LANES) {
        const i8 reached = load(weight + v) >= all(bound);
        int any = 0;
        for (int lane = 0; lane < LANES; lane++) any |= reached[lane];
        if (!any) continue;
        for (int lane = 0; lane < LANES && v + lane < draw->vocab; lane++) {
            uint32_t below;
            memcpy(&below, level + v + lane, sizeof below);
            key[count] = (uint64_t)(below & 0x7fffffff) << TOKEN_BITS | (uint64_t)(v + lane);
            count += reached[lane] & 1;
        }
    }
    Sorted sorted = {key, draw->ends, 1, 0};
    sorted.ends[0] = count;
    const int64_t end = count < most ? count : most;
    int64_t counted = (int64_t)(mass * WEIGHT_ONE);
    double aim = draw->top_p[row] * (mass * WEIGHT_ONE);
    if (narrowed) { /* top-p speaks of what the other filters leave */
        counted = 0;
        for (int64_t i = 0; i < end; i++) counted += whole_weight(weight, end < count ? next_key(&sorted, i) : key[i]);
        aim = draw->top_p[row] * (double)counted;
    }
    const int64_t wanted = (int64_t)aim > 1 ? (int64_t)aim : 1;
    int64_t nucleus = 0, last = 0;
    while (last < end && nucleus < wanted) nucleus += whole_weight(weight, next_key(&sorted, last++));
    const int64_t place = (int64_t)(point * (double)nucleus);
    int64_t sum = 0, at = 0;
    while (at < last - 1 && (sum += whole_weight(weight, key[at])) <= place) at++;
    return (int64_t)(key[at] & ((1u << TOKEN_BITS) - 1));
}

/* One row: its token, or -1 where its largest logit is not a finite number. */
static int64_t sample_row(const Draw *draw, int64_t row) {
    const int64_t vocab = draw->vocab, padded = (vocab + MASS_BLOCK - 1) / MASS_BLOCK * MASS_BLOCK;
    float *level = draw->levels, *weight = draw->weights;
    const float *logits = draw->logits + row * vocab;
    const float scale = draw->scale[row], penalty = draw->penalty[row];
    const float *forbidden = draw->forbidden + draw->mask[row] * vocab;
    const int adjusted = draw->adjusted[row];
    if (adjusted) {
        const float *bias = draw->bias + row * vocab;
        for (int64_t v = 0; v < vocab; v++) level[v] = (logits[v] + forbidden[v] + bias[v]) * scale;
    } else {
        for (int64_t v = 0; v < vocab; v++) level[v] = (logits[v] + forbidden[v]) * scale;
    }
    for (int64_t v = vocab; v < padded; v++) level[v] = -INFINITY;
    if (penalty != 1) {
        const uint8_t *seen = draw->seen + row * vocab;
        for (int64_t v = 0; v < vocab; v++)
            if (seen[v]) level[v] = level[v] > 0 ? level[v] / penalty : level[v] * penalty;
    }
    if (adjusted) {
        const float *deduction = draw->deduction + row * vocab;
        for (int64_t v = 0; v < vocab; v++) level[v] -= deduction[v];
    }
    f8 top = all(-INFINITY);
    i8 wrong = {0};
    for (int64_t v = 0; v < padded; v += LANES) {
        const f8 x = load(level + v);
        wrong |= x != x;
        top = choose(x > top, x, top);
    }
    float best = top[0];
    int broken = wrong[0];
    for (int lane = 1; lane < LANES; lane++) {
        best = top[lane] > best ? top[lane] : best;
        broken |= wrong[lane];
    }
    if (broken || !(best > -INFINITY && best < INFINITY)) return -1;
    if (draw->greedy[row]) {
        int64_t token = 0;
        while (level[token] != best) token++;
        return token;
    }

    double mass = 0;
    for (int64_t first = 0; first < padded; first += MASS_BLOCK) {
        f8 sum = all(0.0f);
        for (int64_t v = first; v < first + MASS_BLOCK; v += LANES) {
            const f8 below = load(level + v) - best;
            const f8 x = choose(below < all(-87.0f), all(0.0f), exp8(below));
            store(level + v, below);
            store(weight + v, x);
            sum += x;
        }
        mass += draw->blocks[first / MASS_BLOCK] = total(sum);
    }
    const double point = uniform(draw->start[row], draw->position[row]);
    const int limited = draw->top_k[row] < vocab, narrowed = limited || draw->min_p[row] > 0;
    if (!narrowed && draw->top_p[row] == 1) return draw_unfiltered(weight, draw->blocks, padded / MASS_BLOCK, point);
    double bound = draw->min_p[row];
    if (limited) {
        const double kth = BOUND_SLACK * (double)kth_largest(weight, padded, draw->top_k[row]);
        bound = kth > bound ? kth : bound;
    } else if (!narrowed) {
        bound = mass * (1 - draw->top_p[row]) * (BOUND_SLACK / (double)vocab); /* less cannot be in the nucleus */
    }
    return draw_filtered(draw, row, level, weight, padded, (float)bound, mass, narrowed, point);
}

static void sample(const Draw *draw) {
    for (int64_t row = 0; row < draw->rows; row++) draw->token[row] = sample_row(draw, row);
}

#endif
