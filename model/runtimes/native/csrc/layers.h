/* What lies between the products: norms, convolution, recurrence, attention. One row (one token) at a time.
 *
 * Rows of one stream come in the order of its story and change its memory in place; a row whose token starts a story
 * finds its part of the memory cleared. Nothing here depends on how many rows there are.
 */
#ifndef LAYERS_H
#define LAYERS_H

#include <math.h>
#include <string.h>

#include "lanes.h"
#include "story.h"

/* One token, as its layers need to know it. */
typedef struct {
    float *memory;          /* the whole memory of its stream */
    int64_t position;
    int64_t starts_story;
    const float *cos, *sin; /* (P / 2) */
} Row;

/* out = x / root mean square of x; no weights. `out` may be `x`. */
INLINE void rms_norm(const float *x, int64_t size, float *out) {
    f8 sum = all(0.0f);
    for (int64_t i = 0; i < size; i += LANES) sum += load(x + i) * load(x + i);
    const f8 scale = all(1.0f / sqrtf(total(sum) / (float)size + 1e-6f));
    for (int64_t i = 0; i < size; i += LANES) store(out + i, load(x + i) * scale);
}

INLINE float dot(const float *x, const float *y, int64_t size) {
    f8 sum = all(0.0f);
    for (int64_t i = 0; i < size; i += LANES) sum += load(x + i) * load(y + i);
    return total(sum);
}

/* Causal depthwise convolution, then SiLU, in place; `past` holds the last K - 1 inputs, oldest first. */
INLINE void convolve(const float *taps, int64_t count, int64_t channels, float *past, float *x) {
    for (int64_t c = 0; c < channels; c += LANES) {
        const f8 now = load(x + c);
        f8 sum = all(0.0f);
        for (int64_t tap = 0; tap < count - 1; tap++) {
            float *held = past + tap * channels + c;
            sum += load(held) * load(taps + tap * channels + c);
            store(held, tap == count - 2 ? now : load(held + channels));
        }
        sum += now * load(taps + (count - 1) * channels + c);
        store(x + c, silu8(sum));
    }
}

/* A quarter of registers each for state, read and value: `lanes` times eight values of one head at a time. */
INLINE void recur_values(float *state, const float *query, const float *key, const float *value, int64_t keys,
                         int64_t values, float write, float decay, float query_scale, const int lanes, float *read) {
    f8 sum[4], v[4];
    for (int i = 0; i < lanes; i++) {
        sum[i] = all(0.0f);
        v[i] = load(value + i * LANES);
    }
    for (int64_t n = 0; n < keys; n++, state += values) {
        const f8 q = all(query[n] * query_scale), k = all(key[n] * write);
        for (int i = 0; i < lanes; i++) {
            const f8 now = load(state + i * LANES) * decay + k * v[i];
            store(state + i * LANES, now);
            sum[i] += q * now;
        }
    }
    for (int i = 0; i < lanes; i++) store(read + i * LANES, sum[i]);
}

/* The recurrent mixer behind its input product: projected (M + E) to out (E), normed and gated. */
INLINE void recur(const Network *net, const Layer *layer, const Row *row, const float *x, float *projected, float *out) {
    const int64_t heads = net->heads, keys = net->key_dim, values = net->head_dim;
    const int64_t channels = 2 * heads * keys + heads * values, past = (net->taps - 1) * channels;
    float *memory = row->memory + layer->memory;
    if (row->starts_story) memset(memory, 0, (size_t)(past + heads * keys * values) * sizeof(float));
    convolve(layer->taps, net->taps, channels, memory, projected);
    const float *query = projected, *key = projected + heads * keys, *value = projected + 2 * heads * keys;
    const float *gate = projected + channels;
    for (int64_t head = 0; head < heads; head++) {
        /* The write strength sets the decay too. In double: these few numbers are powers of a whole story. */
        const double rate = (double)(dot(layer->rate + head * net->width, x, net->width) + layer->rate_bias[head]);
        const double write = rate > 20 ? rate : log1p(exp(rate));
        const float decay = (float)exp(-write * (double)layer->speed[head]);
        const float query_scale = 1.0f / sqrtf((float)keys);
        float *state = memory + past + head * keys * values;
        float *read = out + head * values;
        int64_t p = 0;
        for (; p + 4 * LANES <= values; p += 4 * LANES)
            recur_values(state + p, query + head * keys, key + head * keys, value + head * values + p, keys, values,
                         (float)write, decay, query_scale, 4, read + p);
        for (; p < values; p += 2 * LANES)
            recur_values(state + p, query + head * keys, key + head * keys, value + head * values + p, keys, values,
                         (float)write, decay, query_scale, 2, read + p);
        for (p = 0; p < values; p += LANES)
            store(read + p, load(read + p) + load(value + head * values + p) * layer->skip[head]);
        rms_norm(read, values, read);
        for (p = 0; p < values; p += LANES)
            store(read + p, load(read + p) * silu8(load(gate + head * values + p)));
    }
}

/* Norm and rotary position of one query or key, in place. */
INLINE void norm_and_rotate(float *x, int64_t size, const float *cos, const float *sin, float gain) {
    float normed[256];
    rms_norm(x, size, normed);
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        const float left = normed[i], right = normed[half + i];
        x[i] = (left * cos[i] - right * sin[i]) * gain;
        x[half + i] = (right * cos[i] + left * sin[i]) * gain;
    }
}

/* Scores of `heads` queries with all that is seen, as weights before their division by `sums`; eight places a time. */
INLINE void attend_keys(const float *queries, const float *keys, int64_t size, int64_t window, int64_t seen,
                        const int heads, float *weights, float *sums) {
    f8 top[4];
    for (int head = 0; head < heads; head++) top[head] = all(-INFINITY);
    const i8 lane = {0, 1, 2, 3, 4, 5, 6, 7};
    for (int64_t place = 0; place < seen; place += LANES) {
        f8 score[4];
        for (int head = 0; head < heads; head++) score[head] = all(0.0f);
        for (int64_t p = 0; p < size; p++) {
            const f8 key = load(keys + place * size + p * LANES);
            for (int head = 0; head < heads; head++) score[head] += key * queries[head * size + p];
        }
        const i8 visible = lane < (int32_t)(seen - place);
        for (int head = 0; head < heads; head++) {
            score[head] = choose(visible, score[head], all(-INFINITY));
            /* With the comparison this way round a NaN is taken over, and stays to the end. */
            top[head] = choose(score[head] <= top[head], top[head], score[head]);
            store(weights + head * window + place, score[head]);
        }
    }
    for (int head = 0; head < heads; head++) {
        float largest = top[head][0];
        for (int i = 1; i < LANES; i++) largest = top[head][i] <= largest ? largest : top[head][i];
        f8 sum = all(0.0f);
        for (int64_t place = 0; place < seen; place += LANES) {
            const f8 score = load(weights + head * window + place);
            const f8 weight = choose(score == all(-INFINITY), all(0.0f), exp8(score - largest));
            store(weights + head * window + place, weight);
            sum += weight;
        }
        sums[head] = total(sum);
    }
}

/* The mean of all values that are seen, by those weights: sixteen values of `heads` heads at a time. */
INLINE void attend_values(const float *weights, const float *sums, const float *values, int64_t size, int64_t window,
                          int64_t seen, const int heads, float *out) {
    f8 sum[4][2];
    for (int head = 0; head < heads; head++) sum[head][0] = sum[head][1] = all(0.0f);
    for (int64_t place = 0; place < seen; place++, values += 2 * LANES) {
        const f8 left = load(values), right = load(values + LANES);
        for (int head = 0; head < heads; head++) {
            const float weight = weights[head * window + place];
            sum[head][0] += left * weight;
            sum[head][1] += right * weight;
        }
    }
    for (int head = 0; head < heads; head++) {
        store(out + head * size, sum[head][0] / sums[head]);
        store(out + head * size + LANES, sum[head][1] / sums[head]);
    }
}

INLINE void attend_heads(const float *queries, const float *keys, const float *values, int64_t size, int64_t window,
                         int64_t seen, const int heads, float *weights, float *out) {
    float sums[4];
    attend_keys(queries, keys, size, window, seen, heads, weights, sums);
    for (int64_t p = 0; p < size; p += 2 * LANES)
        attend_values(weights, sums, values + p * window, size, window, seen, heads, out + p);
}

/* The attention mixer behind its input product: projected (E + 2 P) to out (E).
 *
 * The ring holds keys as (W / 8, P, 8), so that eight places are scored by one multiplication, and values as
 * (P / 16, W, 16): both are then read from beginning to end, in the order of the ring's places, which is what a
 * processor fetches ahead. `weights` is scratch of (4, W). */
INLINE void attend(const Network *net, const Layer *layer, const Row *row, float *projected, float *weights, float *out) {
    const int64_t heads = net->heads, size = net->head_dim, window = net->window;
    float *keys = row->memory + layer->memory, *values = keys + size * window;
    if (row->starts_story) memset(keys, 0, (size_t)(2 * size * window) * sizeof(float));
    for (int64_t head = 0; head < heads; head++)
        norm_and_rotate(projected + head * size, size, row->cos, row->sin, layer->gain[head]);
    float *key = projected + heads * size, *value = key + size;
    norm_and_rotate(key, size, row->cos, row->sin, 1.0f);
    const int64_t place = row->position % window;
    for (int64_t p = 0; p < size; p++) {
        keys[(place - place % LANES) * size + p * LANES + place % LANES] = key[p];
        values[(p - p % (2 * LANES)) * window + place * 2 * LANES + p % (2 * LANES)] = value[p];
    }
    const int64_t seen = row->position + 1 < window ? row->position + 1 : window;
    int64_t head = 0;
    for (; head + 4 <= heads; head += 4)
        attend_heads(projected + head * size, keys, values, size, window, seen, 4, weights, out + head * size);
    for (; head < heads; head++)
        attend_heads(projected + head * size, keys, values, size, window, seen, 1, weights, out + head * size);
}

#endif
