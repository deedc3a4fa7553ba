/* The whole network over some rows, once for each path: it is included where `multiply_group` has been defined.
 *
 * Prefill, step and scoring are this one function: the linear layers take all rows together, for their weights are
 * then read once; what has a memory takes them one after the other. So the three give the same bits.
 */
#ifndef FORWARD_H
#define FORWARD_H

#include "layers.h"
#include "quantize.h"
#include "sample.h"

/* Where the parts of `Work.scratch` lie. */
typedef struct {
    float *stream, *normed, *wide, *narrow, *scales, *tile, *weights, *cos, *sin;
    level_t *levels;
} Scratch;

enum { CACHED_WEIGHTS = 128 << 10 }; /* bytes */

INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Divide `base` into parts; returns the bytes that takes. */
static int64_t divide(const Network *net, float *base, Scratch *parts) {
    const int64_t inner = net->heads * net->head_dim;
    const int64_t mixed = 2 * net->heads * net->key_dim + 2 * inner; /* what a recurrence projects to */
    const int64_t wide = larger(net->mlp, larger(mixed, inner + 2 * net->head_dim));
    const int64_t deep = (larger(larger(net->width, inner), net->mlp) + BLOCK - 1) / BLOCK; /* blocks */
    float *at = base;
#define PART(name, floats) (parts->name = at, at += ((floats) + 15) / 16 * 16)
    PART(stream, MOST_ROWS * net->width);
    PART(normed, MOST_ROWS * net->width);
    PART(wide, MOST_ROWS * wide);
    PART(narrow, MOST_ROWS * larger(net->width, inner));
    PART(scales, MOST_ROWS * deep);
    PART(tile, TILE_ROWS * GROUP);
    PART(weights, 4 * net->window);
    PART(cos, MOST_ROWS * net->head_dim / 2);
    PART(sin, MOST_ROWS * net->head_dim / 2);
#undef PART
    parts->levels = (level_t *)at;
    return (at - base) * (int64_t)sizeof(float) + MOST_ROWS * deep * BLOCK * (int64_t)sizeof(level_t);
}

/* x (rows, inputs) times the matrix: out (rows, outputs), which may be x: all of it is quantised first. */
static void linear(const Matrix *matrix, const float *x, int64_t rows, const Scratch *scratch, float *out) {
    for (int64_t row = 0; row < rows; row++)
        quantize(matrix, x + row * matrix->inputs, scratch->levels + row * matrix->blocks * BLOCK,
                 scratch->scales + row * matrix->blocks);
    /* A part of the weights that stays in the second cache goes past all rows before the next is fetched. */
    const int64_t groups = (matrix->outputs + GROUP - 1) / GROUP, whole = matrix->outputs / GROUP;
    const int64_t part = larger(1, CACHED_WEIGHTS / (matrix->blocks * BLOCK * GROUP));
    for (int64_t first = 0; first < groups; first += part)
        for (int64_t row = 0; row < rows; row += TILE_ROWS) {
            const int64_t count = rows - row < TILE_ROWS ? rows - row : TILE_ROWS;
            const level_t *levels = scratch->levels + row * matrix->blocks * BLOCK;
            const float *scales = scratch->scales + row * matrix->blocks;
            float *to = out + row * matrix->outputs;
            for (int64_t group = first; group < first + part && group < groups; group++)
                if (group < whole) {
                    multiply_group(matrix, group, levels, scales, count, to + group * GROUP, matrix->outputs);
                } else { /* the last outputs do not fill their group */
                    multiply_group(matrix, group, levels, scales, count, scratch->tile, GROUP);
                    for (int64_t i = 0; i < count; i++)
                        memcpy(to + i * matrix->outputs + group * GROUP, scratch->tile + i * GROUP,
                               (size_t)(matrix->outputs - group * GROUP) * sizeof(float));
                }
        }
}

static void mix(const Network *net, const Layer *layer, const Row *row, int64_t rows, const Scratch *scratch) {
    const int64_t inner = net->heads * net->head_dim, projected = layer->inputs.outputs;
    linear(&layer->inputs, scratch->normed, rows, scratch, scratch->wide);
    for (int64_t i = 0; i < rows; i++) {
        float *wide = scratch->wide + i * projected, *out = scratch->narrow + i * inner;
        if (layer->attention)
            attend(net, layer, row + i, wide, scratch->weights, out);
        else
            recur(net, layer, row + i, scratch->normed + i * net->width, wide, out);
    }
    linear(&layer->output, scratch->narrow, rows, scratch, scratch->wide);
}

/* stream += wide, and its norm. */
static void add_and_norm(const Network *net, int64_t rows, const Scratch *scratch) {
    for (int64_t i = 0; i < rows * net->width; i += LANES)
        store(scratch->stream + i, load(scratch->stream + i) + load(scratch->wide + i));
    for (int64_t row = 0; row < rows; row++)
        rms_norm(scratch->stream + row * net->width, net->width, scratch->normed + row * net->width);
}

static void feed_forward(const Network *net, const Layer *layer, int64_t rows, const Scratch *scratch) {
    linear(&layer->up, scratch->normed, rows, scratch, scratch->wide);
    for (int64_t i = 0; i < rows * net->mlp; i += LANES) {
        const f8 x = load(scratch->wide + i);
        store(scratch->wide + i, choose(x <= all(0.0f), all(0.0f), x * x)); /* a NaN is squared, and stays */
    }
    linear(&layer->down, scratch->wide, rows, scratch, scratch->wide);
}

/* Up to MOST_ROWS rows of `work`, from `first` on; returns the logits' place behind those it wrote. */
static float *forward_rows(const Network *net, const Work *work, int64_t first, int64_t rows, float *logits) {
    Scratch scratch;
    divide(net, work->scratch, &scratch);
    const int64_t half = net->head_dim / 2;
    Row row[MOST_ROWS];
    for (int64_t i = 0; i < rows; i++) {
        const int64_t slot = work->slot[first + i], token = work->token[first + i];
        if (token == 0) work->position[slot] = 0; /* the end of a story, and the start of the next */
        row[i] = (Row){work->memory + slot * net->memory, work->position[slot]++, token == 0,
                       scratch.cos + i * half, scratch.sin + i * half};
        for (int64_t p = 0; p < half; p++) {
            const double angle = (double)row[i].position * net->frequency[p];
            scratch.cos[i * half + p] = (float)cos(angle);
            scratch.sin[i * half + p] = (float)sin(angle);
        }
        rms_norm(net->embedding + token * net->width, net->width, scratch.stream + i * net->width);
        rms_norm(scratch.stream + i * net->width, net->width, scratch.normed + i * net->width);
    }
    for (const Layer *layer = net->layers; layer < net->layers + net->layer_count; layer++) {
        mix(net, layer, row, rows, &scratch);
        add_and_norm(net, rows, &scratch);
        feed_forward(net, layer, rows, &scratch);
        add_and_norm(net, rows, &scratch);
    }
    int64_t taken = 0;
    for (int64_t i = 0; i < rows; i++)
        if (work->take[first + i])
            memmove(scratch.normed + net->width * taken++, scratch.normed + net->width * i,
                    (size_t)net->width * sizeof(float));
    linear(&net->logits, scratch.normed, taken, &scratch, logits);
    return logits + taken * net->vocab;
}

static void forward(const Network *net, const Work *work) {
    float *logits = work->logits;
    for (int64_t first = 0; first < work->rows; first += MOST_ROWS) {
        const int64_t left = work->rows - first;
        logits = forward_rows(net, work, first, left < MOST_ROWS ? left : MOST_ROWS, logits);
    }
}

/* A linear layer alone, for tests and for the check that a path means what the plain one does. */
static void product(const Network *net, const Matrix *matrix, const float *x, int64_t rows, float *scratch, float *out) {
    Scratch parts;
    divide(net, scratch, &parts);
    for (; rows > 0; rows -= MOST_ROWS, x += MOST_ROWS * matrix->inputs, out += MOST_ROWS * matrix->outputs)
        linear(matrix, x, rows < MOST_ROWS ? rows : MOST_ROWS, &parts, out);
}

static int64_t scratch_bytes(const Network *net) {
    Scratch parts;
    return divide(net, (float *)64, &parts); /* no memory is touched */
}

/* What a path offers; `paths.h` lists them. */
#define OFFER(path) const Path path = {#path, scratch_bytes, forward, product, sample}

#endif
