/* A decode step of blocks that are built as Llama's, for a few positions of any sequences.

   Root mean square norms (Zhang and Sennrich, 2019), rotary embeddings by halves (Su et al., 2021), grouped queries
   (Ainslie et al., 2023) over keys and values that stand on pages, and a gated MLP with SiLU (Shazeer, 2020). */
#include "native.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Sums are made in so many parts, which fit into registers. */
#define PARTS 16

static float sum_of(const float *parts) {
    float sums[PARTS];
    memcpy(sums, parts, sizeof sums);
    for (int width = PARTS / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) sums[i] += sums[i + width];
    return sums[0];
}

static float dot(const float *one, const float *other, int64_t count) {
    float parts[PARTS] = {0}, rest = 0;
    int64_t at = 0;
    for (; at + PARTS <= count; at += PARTS)
        for (int i = 0; i < PARTS; i++) parts[i] += one[at + i] * other[at + i];
    for (; at < count; at++) rest += one[at] * other[at];
    return sum_of(parts) + rest;
}

/* e to the power of `x` (between -87 and 88), to a unit or two in the last place: 2^n times a polynomial, that of
   Cephes' expf. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float n = rintf(x * 1.44269504f);
    const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    const int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return y * power;
}

static void normalize(const Norm *norm, const float *from, float *to, int64_t size) {
    const float factor = 1.0f / sqrtf(dot(from, from, size) / (float)size + norm->eps);
    for (int64_t i = 0; i < size; i++) to[i] = norm->weight[i] * (from[i] * factor);
}

static void rotate(float *head, const float *cos, const float *sin, int64_t size) {
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        const float first = head[i], second = head[i + half];
        head[i] = first * cos[i] - second * sin[i];
        head[i + half] = second * cos[i + half] + first * sin[i + half];
    }
}

/* The heads of one row that share keys and values: queries [each, size] to [each, size]; `weights` has room for
   [each, slots in all stretches]. */
static void attend(const Block *block, int64_t key_head, const int64_t *begin, const int64_t *end, const float *queries,
                   float *weights, int64_t length, float *to) {
    const int64_t size = block->size, each = block->heads / block->key_heads;
    const float *keys = block->keys + key_head * block->slots * size;
    const float *values = block->values + key_head * block->slots * size;
    int64_t seen = 0;
    for (const int64_t *of = begin; of < end; of += 2)
        for (int64_t slot = of[0]; slot < of[1]; slot++, seen++)
            for (int64_t head = 0; head < each; head++)
                weights[head * length + seen] = dot(queries + head * size, keys + slot * size, size) * block->scaling;
    for (int64_t head = 0; head < each; head++) {
        float *of_head = weights + head * length, largest = -INFINITY, parts[PARTS] = {0}, rest = 0;
        for (int64_t i = 0; i < length; i++) largest = of_head[i] > largest ? of_head[i] : largest;
        for (int64_t i = 0; i < length; i++) of_head[i] = exponential(of_head[i] - largest);
        int64_t at = 0;
        for (; at + PARTS <= length; at += PARTS)
            for (int i = 0; i < PARTS; i++) parts[i] += of_head[at + i];
        for (; at < length; at++) rest += of_head[at];
        const float factor = 1.0f / (sum_of(parts) + rest);
        float *sums = to + head * size;
        memset(sums, 0, size * sizeof *sums);
        seen = 0;
        for (const int64_t *of = begin; of < end; of += 2)
            for (int64_t slot = of[0]; slot < of[1]; slot++, seen++) {
                const float weight = of_head[seen], *value = values + slot * size;
                for (int64_t i = 0; i < size; i++) sums[i] += weight * value[i];
            }
        for (int64_t i = 0; i < size; i++) sums[i] *= factor;
    }
}

static void attend_in_all_heads(const Block *block, const Step *step, int64_t row, const float *projected,
                                float *weights, float *to) {
    const int64_t size = block->size, heads = block->heads, key_heads = block->key_heads, each = heads / key_heads;
    const View *view = step->views + block->view;
    const int64_t *begin = view->stretches + 2 * view->begins[row], *end = view->stretches + 2 * view->begins[row + 1];
    int64_t length = 0;
    for (const int64_t *of = begin; of < end; of += 2) length += of[1] - of[0];
    for (int64_t head = 0; head < key_heads; head++)
        attend(block, head, begin, end, projected + head * each * size, weights, length, to + head * each * size);
}

/* Turn queries and keys, and write keys and values to where they belong. */
static void place_row(const Block *block, const Step *step, int64_t row, float *projected) {
    const int64_t size = block->size, heads = block->heads, key_heads = block->key_heads;
    const float *cos = step->cos + step->positions[row] * size, *sin = step->sin + step->positions[row] * size;
    for (int64_t head = 0; head < heads + key_heads; head++) {
        float *of_head = projected + head * size;
        const Norm *norm = head < heads ? &block->of_query : &block->of_key;
        if (norm->weight) normalize(norm, of_head, of_head, size);
        if (block->rotates) rotate(of_head, cos, sin, size);
    }
    for (int64_t head = 0; head < key_heads; head++) {
        const int64_t at = (head * block->slots + step->slots[row]) * size;
        memcpy(block->keys + at, projected + (heads + head) * size, size * sizeof(float));
        memcpy(block->values + at, projected + (heads + key_heads + head) * size, size * sizeof(float));
    }
}

static void gate(const float *gate_up, float *to, int64_t size) {
    for (int64_t i = 0; i < size; i++) to[i] = gate_up[i] / (1.0f + exponential(-gate_up[i])) * gate_up[size + i];
}

/* Room for what comes and goes within a block. */
typedef struct {
    float *normed, *wide, *narrow, *weights;
} Room;

static int run_block(const Block *block, const Step *step, const Room *room, int32_t threads) {
    const int64_t rows = step->rows, hidden = step->hidden;
    const int64_t projected = block->query_key_value.outputs, attended = block->attention_out.inputs;
    const int64_t inner = block->down.inputs;
    int failed = 0;
    for (int64_t row = 0; row < rows; row++)
        normalize(&block->before_attention, step->states + row * hidden, room->normed + row * hidden, hidden);
    failed |= swarm_linear(&block->query_key_value, room->normed, rows, room->wide, threads);
    for (int64_t row = 0; row < rows; row++) place_row(block, step, row, room->wide + row * projected);
    for (int64_t row = 0; row < rows; row++)
        attend_in_all_heads(block, step, row, room->wide + row * projected, room->weights,
                            room->narrow + row * attended);
    failed |= swarm_linear(&block->attention_out, room->narrow, rows, room->normed, threads);
    for (int64_t i = 0; i < rows * hidden; i++) step->states[i] += room->normed[i];
    for (int64_t row = 0; row < rows; row++)
        normalize(&block->before_mlp, step->states + row * hidden, room->normed + row * hidden, hidden);
    failed |= swarm_linear(&block->gate_up, room->normed, rows, room->wide, threads);
    for (int64_t row = 0; row < rows; row++) gate(room->wide + row * 2 * inner, room->narrow + row * inner, inner);
    failed |= swarm_linear(&block->down, room->narrow, rows, room->normed, threads);
    for (int64_t i = 0; i < rows * hidden; i++) step->states[i] += room->normed[i];
    return failed;
}

static int64_t greater(int64_t one, int64_t other) { return one > other ? one : other; }

int swarm_blocks(const Block *blocks, int64_t count, const Step *step, int32_t threads) {
    int64_t wide = 0, narrow = 0, weights = 0;
    for (const Block *block = blocks; block < blocks + count; block++) {
        wide = greater(wide, greater(block->query_key_value.outputs, block->gate_up.outputs));
        narrow = greater(narrow, greater(block->attention_out.inputs, block->down.inputs));
        const View *view = step->views + block->view;
        for (int64_t row = 0; row < step->rows; row++) {
            int64_t length = 0;
            for (int64_t of = view->begins[row]; of < view->begins[row + 1]; of++)
                length += view->stretches[2 * of + 1] - view->stretches[2 * of];
            weights = greater(weights, length * (block->heads / block->key_heads));
        }
    }
    float *all = malloc((step->rows * (step->hidden + wide + narrow) + weights) * sizeof *all);
    if (!all) return 1;
    Room room = {all, all + step->rows * step->hidden, NULL, NULL};
    room.narrow = room.wide + step->rows * wide;
    room.weights = room.narrow + step->rows * narrow;
    int failed = 0;
    for (int64_t number = 0; number < count && !failed; number++)
        failed = run_block(blocks + number, step, &room, threads);
    free(all);
    return failed;
}
