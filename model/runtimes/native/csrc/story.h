/* What Python hands to the decoder: weights, sizes, and where each stream's memory lies.
 *
 * Only pointers and 64-bit integers stand in these records, so that `model/runtimes/native/library.py` can declare them again
 * for ctypes without a word about padding. Python owns all memory; the C side allocates nothing and keeps nothing.
 *
 * Shapes: D width, V vocabulary, H heads, P values a head, N keys a head, K taps, W window, E = H x P,
 * M = 2 x H x N + E channels that the convolution mixes, S floats of one stream's memory.
 */
#ifndef STORY_H
#define STORY_H

#include <stdint.h>

enum {
    BLOCK = 64,      /* inputs that share one scale, in weights and in activations */
    GROUP = 16,      /* outputs whose weights lie together: one AVX-512 register of sums */
    QUAD = 4,        /* inputs whose weights lie together: what one VNNI instruction adds up for an output */
    MOST_ROWS = 32,  /* tokens that go through a layer together; more are taken in turns */
};

/* A linear layer: int8 weights in blocks, (outputs / GROUP, inputs / QUAD, GROUP, QUAD), padded with zeros. */
typedef struct {
    int64_t outputs, inputs;
    int64_t blocks;            /* of inputs */
    int64_t positive_inputs;   /* 1 where inputs are never negative, and get 255 levels instead of 127 */
    const int8_t *levels;
    const float *scale;        /* (outputs / GROUP, blocks, GROUP) */
    const int32_t *start;      /* like scale: what undoes the offset that makes VNNI's inputs unsigned */
} Matrix;

typedef struct {
    int64_t attention;         /* 1 attention, 0 recurrence */
    int64_t memory;            /* where in a stream's memory this layer's part begins, in floats */
    Matrix inputs, output, up, down;
    const float *taps;         /* (K, M), oldest first */
    const float *rate;         /* (H, D) */
    const float *rate_bias;    /* (H) */
    const float *speed;        /* (H): exp(log_decay) */
    const float *skip;         /* (H) */
    const float *gain;         /* (H): attention's, times P^-0.5 */
} Layer;

typedef struct {
    int64_t vocab, width, layer_count, heads, head_dim, key_dim, taps, window, mlp;
    int64_t memory;            /* S */
    const Layer *layers;
    const float *embedding;    /* (V, D) */
    Matrix logits;
    const double *frequency;   /* (P / 2): rotary angle a position */
} Network;

/* Tokens to take in. Those of one stream stand in the order of its story. */
typedef struct {
    int64_t rows;
    const int64_t *slot;       /* (rows): the stream's place in `memory` and `position` */
    const int64_t *token;      /* (rows) */
    const int64_t *take;       /* (rows): 1 where the logits are wanted */
    float *memory;             /* (slots, S) */
    int64_t *position;         /* (slots): tokens taken in since the story began */
    float *logits;             /* (taken, V) */
    float *scratch;            /* story_scratch() bytes, 64-byte aligned */
} Work;

/* Tokens to choose, one a row, and by which rules (`model/runtimes/sampling.py`). C blocks of 256 tokens. */
typedef struct {
    int64_t rows, vocab;
    const float *logits;       /* (rows, V) */
    const int64_t *position;   /* (rows): the place in the story of the token to be chosen */
    const float *scale;        /* (rows): one over the temperature */
    const float *penalty;      /* (rows) */
    const double *min_p, *top_p; /* (rows) */
    const int64_t *top_k;      /* (rows): V where all are kept */
    const uint64_t *start;     /* (rows): where the seed's counter begins */
    const uint8_t *greedy;     /* (rows) */
    const int64_t *mask;       /* (rows): a row of `forbidden` */
    const uint8_t *adjusted;   /* (rows): 1 where `bias` and `deduction` hold anything */
    const float *forbidden;    /* (masks, V): 0, or -infinity for tokens that must not come */
    const uint8_t *seen;       /* (rows, V): 1 for tokens of the story so far, where there is a penalty */
    const float *bias;         /* (rows, V): added to logits */
    const float *deduction;    /* (rows, V): subtracted from scaled and penalised logits */
    int64_t *token;            /* (rows): chosen, or -1 where the logits are not numbers */
    float *levels, *weights;   /* scratch: (C, 256) each */
    uint64_t *keys;            /* scratch: (V + 8) */
    int64_t *ends;             /* scratch: (V + 8) */
    double *blocks;            /* scratch: (C) */
} Draw;

#endif
