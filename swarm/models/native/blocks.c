/* Blocks that are built as Llama's, run for positions of any sequences.

   Root mean square norms (Zhang and Sennrich, 2019), rotary embeddings by halves (Su et al., 2021), attention
   (attention.c), and a gated MLP with SiLU (Shazeer, 2020). */
#include "native.h"
#include "vectors.h"

#include <stdlib.h>

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

/* Room for what comes and goes within a block, and of each sequence the slots of all its positions. */
typedef struct {
    float *normed, *wide, *narrow;
    const int64_t **places;
} Room;

#define EVERY_ROW _Pragma("omp parallel for num_threads(threads) if (threads > 1 && rows >= MANY_ROWS)")

static int run_block(const Block *block, const Step *step, const Room *room, int32_t threads) {
    const int64_t rows = step->rows, hidden = step->hidden;
    const int64_t projected = block->query_key_value.outputs, inner = block->down.inputs;
    int failed = 0;
    EVERY_ROW
    for (int64_t row = 0; row < rows; row++)
        normalize(&block->before_attention, step->states + row * hidden, room->normed + row * hidden, hidden);
    failed |= swarm_linear(&block->query_key_value, room->normed, rows, room->wide, threads);
    EVERY_ROW
    for (int64_t row = 0; row < rows; row++) place_row(block, step, row, room->wide + row * projected);
    failed |= swarm_attend(block, step, room->places, room->wide, projected, room->narrow, threads);
    failed |= swarm_linear(&block->attention_out, room->narrow, rows, room->normed, threads);
    EVERY_ROW
    for (int64_t row = 0; row < rows; row++) {
        float *states = step->states + row * hidden, *normed = room->normed + row * hidden;
        for (int64_t i = 0; i < hidden; i++) states[i] += normed[i];
        normalize(&block->before_mlp, states, normed, hidden);
    }
    failed |= swarm_linear(&block->gate_up, room->normed, rows, room->wide, threads);
    EVERY_ROW
    for (int64_t row = 0; row < rows; row++) gate(room->wide + row * 2 * inner, room->narrow + row * inner, inner);
    failed |= swarm_linear(&block->down, room->narrow, rows, room->normed, threads);
    for (int64_t i = 0; i < rows * hidden; i++) step->states[i] += room->normed[i];
    return failed;
}

/* The slots of a run one by one; returns where the next are to be written. */
static int64_t *write_places(const Sequence *sequence, int64_t *to) {
    for (const int64_t *run = sequence->runs; run < sequence->runs + 2 * sequence->run_count; run += 2)
        for (int64_t slot = run[0]; slot < run[1]; slot++) *to++ = slot;
    return to;
}

int swarm_blocks(const Block *blocks, int64_t count, const Step *step, int32_t threads) {
    const int64_t rows = step->rows, sequences = step->sequence_count;
    int64_t wide = 0, narrow = 0, positions = 0;
    for (const Block *block = blocks; block < blocks + count; block++) {
        wide = greatest(wide, greatest(block->query_key_value.outputs, block->gate_up.outputs));
        narrow = greatest(narrow, greatest(block->attention_out.inputs, block->down.inputs));
    }
    for (int64_t i = 0; i < sequences; i++) positions += step->sequences[i].before + step->sequences[i].rows;
    float *floats = malloc(rows * (step->hidden + wide + narrow) * sizeof *floats);
    int64_t *places = malloc(positions * sizeof *places);
    const int64_t **of_each = malloc(sequences * sizeof *of_each);
    int failed = !floats || !places || !of_each;
    int64_t *next = places;
    for (int64_t i = 0; i < sequences && !failed; i++) {
        of_each[i] = next;
        next = write_places(step->sequences + i, next);
    }
    const Room room = {floats, floats + rows * step->hidden, floats + rows * (step->hidden + wide), of_each};
    for (int64_t number = 0; number < count && !failed; number++)
        failed = run_block(blocks + number, step, &room, threads);
    free(of_each);
    free(places);
    free(floats);
    return failed;
}
