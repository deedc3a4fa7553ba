/* A yardstick: the plain fp32 decoder that people know, at our model's size.
 *
 * A transformer of the Llama kind (RMS norms, rotary positions, grouped keys left out, SwiGLU, tied embedding) with
 * random weights, one token after the other, the likeliest one taken: loops over rows and nothing else, left to the
 * compiler (cc -O3 -march=native -ffast-math). `experiments/studies/decode_speed.py` compiles and runs it beside our engine,
 * so that "how much faster" is measured on one machine, in one run.
 *
 *   plain_decoder SECONDS  ->  prints "TOKENS SECONDS"
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* 5.2 million parameters: 1.05 in the table, 6 layers of 4 * 256 * 256 + 3 * 256 * 560. */
enum { WIDTH = 256, LAYERS = 6, HEADS = 4, HEAD = WIDTH / HEADS, HIDDEN = 560, VOCAB = 4096, CONTEXT = 256 };

typedef struct {
    float *query, *key, *value, *output, *gate, *up, *down;
    float keys[CONTEXT][WIDTH], values[CONTEXT][WIDTH];
} Layer;

static Layer layers[LAYERS];
static float *table;

static float *random_matrix(int rows, int columns) {
    static unsigned state = 1;
    float *matrix = malloc(sizeof(float) * (size_t)rows * (size_t)columns);
    if (!matrix) exit(1);
    for (long i = 0; i < (long)rows * columns; i++) {
        state = state * 1664525u + 1013904223u;
        matrix[i] = ((float)(state >> 8) / (1 << 24) - 0.5f) * 3.5f / sqrtf((float)columns);
    }
    return matrix;
}

static void multiply(float *out, const float *x, const float *matrix, int rows, int columns) {
    for (int row = 0; row < rows; row++) {
        float sum = 0;
        for (int i = 0; i < columns; i++) sum += matrix[(long)row * columns + i] * x[i];
        out[row] = sum;
    }
}

static void norm(float *out, const float *x) {
    float sum = 0;
    for (int i = 0; i < WIDTH; i++) sum += x[i] * x[i];
    const float scale = 1 / sqrtf(sum / WIDTH + 1e-5f);
    for (int i = 0; i < WIDTH; i++) out[i] = x[i] * scale;
}

static void rotate(float *x, int position) {
    for (int i = 0; i < WIDTH; i += 2) {
        const float angle = (float)position * powf(10000, -(float)(i % HEAD) / HEAD);
        const float cosine = cosf(angle), sine = sinf(angle), left = x[i], right = x[i + 1];
        x[i] = left * cosine - right * sine;
        x[i + 1] = left * sine + right * cosine;
    }
}

static void attend(const Layer *layer, const float *query, int position, float *out) {
    for (int head = 0; head < HEADS; head++) {
        float score[CONTEXT], top = -1e30f, total = 0;
        const int first = head * HEAD;
        for (int place = 0; place <= position; place++) {
            float sum = 0;
            for (int i = 0; i < HEAD; i++) sum += query[first + i] * layer->keys[place][first + i];
            score[place] = sum / sqrtf(HEAD);
            if (score[place] > top) top = score[place];
        }
        for (int place = 0; place <= position; place++) total += score[place] = expf(score[place] - top);
        for (int i = 0; i < HEAD; i++) out[first + i] = 0;
        for (int place = 0; place <= position; place++)
            for (int i = 0; i < HEAD; i++) out[first + i] += score[place] / total * layer->values[place][first + i];
    }
}

static int step(int token, int position) {
    static float x[WIDTH], normed[WIDTH], query[WIDTH], mixed[WIDTH], added[WIDTH], gate[HIDDEN], up[HIDDEN];
    static float logits[VOCAB];
    memcpy(x, table + (long)token * WIDTH, sizeof x);
    for (Layer *layer = layers; layer < layers + LAYERS; layer++) {
        norm(normed, x);
        multiply(query, normed, layer->query, WIDTH, WIDTH);
        multiply(layer->keys[position], normed, layer->key, WIDTH, WIDTH);
        multiply(layer->values[position], normed, layer->value, WIDTH, WIDTH);
        rotate(query, position);
        rotate(layer->keys[position], position);
        attend(layer, query, position, mixed);
        multiply(added, mixed, layer->output, WIDTH, WIDTH);
        for (int i = 0; i < WIDTH; i++) x[i] += added[i];
        norm(normed, x);
        multiply(gate, normed, layer->gate, HIDDEN, WIDTH);
        multiply(up, normed, layer->up, HIDDEN, WIDTH);
        for (int i = 0; i < HIDDEN; i++) gate[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
        multiply(added, gate, layer->down, WIDTH, HIDDEN);
        for (int i = 0; i < WIDTH; i++) x[i] += added[i];
    }
    norm(normed, x);
    multiply(logits, normed, table, VOCAB, WIDTH);
    int best = 0;
    for (int i = 1; i < VOCAB; i++)
        if (logits[i] > logits[best]) best = i;
    return best;
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

int main(int count, char **words) {
    const double seconds = count > 1 ? atof(words[1]) : 5;
    table = random_matrix(VOCAB, WIDTH);
    for (Layer *layer = layers; layer < layers + LAYERS; layer++) {
        layer->query = random_matrix(WIDTH, WIDTH);
        layer->key = random_matrix(WIDTH, WIDTH);
        layer->value = random_matrix(WIDTH, WIDTH);
        layer->output = random_matrix(WIDTH, WIDTH);
        layer->gate = random_matrix(HIDDEN, WIDTH);
        layer->up = random_matrix(HIDDEN, WIDTH);
        layer->down = random_matrix(WIDTH, HIDDEN);
    }
    long tokens = 0;
    int token = 0;
    const double began = now();
    while (now() - began < seconds)
        for (int position = 0; position < CONTEXT; position++, tokens++) token = (step(token, position) + 1) % VOCAB;
    printf("%ld %.6f\n", tokens, now() - began);
    return 0;
}
