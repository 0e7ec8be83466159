/* Attention over keys and values that stand on pages, for positions of any sequences (PagedAttention: Kwon et al.,
   2023; grouped queries: Ainslie et al., 2023). */
#include "native.h"
#include "vectors.h"

#include <math.h>
#include <stdlib.h>

/* Keys, or values, that are looked at for all queries before the next: they stay in the first cache. */
#define TOGETHER 64
/* Rows whose weights are kept at a time, and how many weights. */
#define MOST_ROWS 16
#define MOST_WEIGHTS (1 << 18)
/* Queries that are multiplied with a value at a time, and registers of its numbers. */
#define QUERIES (WIDTH == 16 ? 4 : 2)
#define VALUE_VECTORS 4

/* A head of a row. */
typedef struct {
    const float *numbers;
    int64_t begin, end; /* the positions of its sequence at which it looks */
    float *weights;     /* of these positions; there is room for WIDTH more */
    float *to;
} Query;

/* Some of those that share keys and values. */
typedef struct {
    const Block *block;
    const float *keys, *values; /* [slots, size] */
    const int64_t *places;
    Query *queries;
    int64_t count;
} Part;

/* ---- scores */

/* The products of a query with WIDTH keys. */
INLINE floats products(const float *query, const float *const *keys, int64_t size) {
    floats parts[WIDTH];
    const int64_t whole = size / PARTS * PARTS;
    UNROLL for (int key = 0; key < WIDTH; key++) {
        floats sums[PARTS / WIDTH] = {0};
        for (int64_t at = 0; at < whole; at += PARTS)
            UNROLL for (int v = 0; v < PARTS / WIDTH; v++)
                sums[v] += load(query + at + v * WIDTH) * load(keys[key] + at + v * WIDTH);
        for (int64_t at = whole, v = 0; at < size; at += WIDTH, v++)
            sums[v] += load_some(query + at, size - at) * load_some(keys[key] + at, size - at);
        UNROLL for (int left = PARTS / WIDTH / 2; left > 0; left /= 2)
            UNROLL for (int v = 0; v < left; v++) sums[v] += sums[v + left];
        parts[key] = sums[0];
    }
    return sums_of(parts);
}

/* Scores of the positions [from, until); `size` is a constant where it is one of the usual. */
INLINE void add_scores(const Part *part, int64_t from, int64_t until, int64_t size) {
    for (int64_t at = from; at < until; at += WIDTH) {
        const float *keys[WIDTH];
        for (int key = 0; key < WIDTH; key++) keys[key] = part->keys + part->places[least(at + key, until - 1)] * size;
        for (Query *query = part->queries; query < part->queries + part->count; query++) {
            if (at + WIDTH <= query->begin || at >= query->end) continue;
            const floats scores = products(query->numbers, keys, size) * part->block->scaling;
            if (at >= query->begin)
                store(query->weights + at - query->begin, scores);
            else
                for (int64_t key = query->begin - at; key < WIDTH; key++)
                    query->weights[at + key - query->begin] = scores[key];
        }
    }
}

/* Numbers become parts of 1 (softmax), but for the factor that is returned. */
INLINE float softmax(float *weights, int64_t count) {
    float most[PARTS], parts[PARTS] = {0}, largest = -INFINITY, rest = 0;
    for (int i = 0; i < PARTS; i++) most[i] = -INFINITY;
    int64_t at = 0;
    for (; at + PARTS <= count; at += PARTS)
        for (int i = 0; i < PARTS; i++) most[i] = weights[at + i] > most[i] ? weights[at + i] : most[i];
    for (; at < count; at++) largest = weights[at] > largest ? weights[at] : largest;
    for (int i = 0; i < PARTS; i++) largest = most[i] > largest ? most[i] : largest;
    for (at = 0; at < count; at++) weights[at] = exponential(weights[at] - largest);
    for (at = 0; at + PARTS <= count; at += PARTS)
        for (int i = 0; i < PARTS; i++) parts[i] += weights[at + i];
    for (; at < count; at++) rest += weights[at];
    return 1.0f / (sum_of(parts) + rest);
}

/* ---- values */

/* Add numbers of the values of [begin, end), from the one at `at` on: so many registers of them, of which the last has
   what is `left`. All sums of products are made of registers, for compilers round others as they please. */
INLINE void add_numbers(const int count, const int vectors, const Part *part, const Query *queries, int64_t begin,
                        int64_t end, int64_t at, int64_t left) {
    const int64_t size = part->block->size;
    floats sums[QUERIES][VALUE_VECTORS];
    const float *weights[QUERIES];
    UNROLL for (int query = 0; query < count; query++) {
        weights[query] = queries[query].weights + begin - queries[query].begin;
        UNROLL for (int v = 0; v < vectors; v++)
            sums[query][v] = load_some(queries[query].to + at + v * WIDTH, left - v * WIDTH);
    }
    for (int64_t position = begin; position < end; position++) {
        const float *value = part->values + part->places[position] * size + at;
        UNROLL for (int v = 0; v < vectors; v++) {
            const floats numbers = load_some(value + v * WIDTH, left - v * WIDTH);
            UNROLL for (int query = 0; query < count; query++)
                sums[query][v] += weights[query][position - begin] * numbers;
        }
    }
    UNROLL for (int query = 0; query < count; query++)
        UNROLL for (int v = 0; v < vectors; v++)
            store_some(queries[query].to + at + v * WIDTH, sums[query][v], left - v * WIDTH);
}

/* For `count` queries, a constant where this is called. */
INLINE void add_all_numbers(const int count, const Part *part, const Query *queries, int64_t begin, int64_t end) {
    if (begin >= end) return;
    const int64_t size = part->block->size;
    int64_t at = 0;
    for (; at + VALUE_VECTORS * WIDTH <= size; at += VALUE_VECTORS * WIDTH)
        add_numbers(count, VALUE_VECTORS, part, queries, begin, end, at, VALUE_VECTORS * WIDTH);
    for (; at < size; at += WIDTH) add_numbers(count, 1, part, queries, begin, end, at, size - at);
}

/* Likewise, those of [from, until) at which each of the queries looks: first and last what not all of them do. */
INLINE void add_values(const int count, const Part *part, const Query *queries, int64_t from, int64_t until) {
    int64_t begin = from, end = until;
    for (int query = 0; query < count; query++) {
        begin = greatest(begin, queries[query].begin);
        end = least(end, queries[query].end);
    }
    end = greatest(begin, end);
    for (const Query *query = queries; query < queries + count; query++)
        add_all_numbers(1, part, query, greatest(from, query->begin), least(begin, query->end));
    add_all_numbers(count, part, queries, begin, end);
    for (const Query *query = queries; query < queries + count; query++)
        add_all_numbers(1, part, query, greatest(end, query->begin), least(until, query->end));
}

/* ---- all of it */

static void attend(const Part *part) {
    const int64_t size = part->block->size, count = part->count;
    const int64_t begin = part->queries[0].begin, end = part->queries[count - 1].end;
    for (int64_t from = begin; from < end; from += TOGETHER) {
        const int64_t until = least(from + TOGETHER, end);
        if (size == 64)
            add_scores(part, from, until, 64);
        else if (size == 128)
            add_scores(part, from, until, 128);
        else
            add_scores(part, from, until, size);
    }
    float factors[count];
    for (int64_t i = 0; i < count; i++) {
        const Query *query = part->queries + i;
        factors[i] = softmax(query->weights, query->end - query->begin);
        memset(query->to, 0, size * sizeof *query->to);
    }
    for (int64_t from = begin; from < end; from += TOGETHER) {
        const int64_t until = least(from + TOGETHER, end);
        for (int64_t i = 0; i < count;) {
            const Query *queries = part->queries + i;
            if (QUERIES >= 4 && count - i >= 4) {
                add_values(4, part, queries, from, until);
                i += 4;
            } else if (QUERIES >= 3 && count - i >= 3) {
                add_values(3, part, queries, from, until);
                i += 3;
            } else if (count - i >= 2) {
                add_values(2, part, queries, from, until);
                i += 2;
            } else {
                add_values(1, part, queries, from, until);
                i += 1;
            }
        }
    }
    for (int64_t i = 0; i < count; i++)
        for (int64_t at = 0; at < size; at++) part->queries[i].to[at] *= factors[i];
}

INLINE int64_t parts_of(const Sequence *sequence, int64_t rows) { return (sequence->rows + rows - 1) / rows; }

int swarm_attend(const Block *block, const Step *step, const int64_t *const *places, const float *queries,
                 int64_t stride, float *to, int32_t threads) {
    const int64_t size = block->size, each = block->heads / block->key_heads;
    int64_t longest = 0, parts = 0;
    for (int64_t i = 0; i < step->sequence_count; i++)
        longest = greatest(longest, step->sequences[i].before + step->sequences[i].rows);
    longest += WIDTH;
    const int64_t rows = greatest(1, least(MOST_ROWS, MOST_WEIGHTS / (longest * each)));
    for (int64_t i = 0; i < step->sequence_count; i++) parts += parts_of(step->sequences + i, rows) * block->key_heads;
    int failed = 0;
    (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1 && parts > 1) reduction(| : failed)
    {
        float *weights = malloc(rows * each * longest * sizeof *weights);
        failed = !weights;
#pragma omp for schedule(dynamic)
        for (int64_t number = 0; number < parts; number++) {
            if (!weights) continue;
            const int64_t key_head = number % block->key_heads;
            int64_t index = 0, left = number / block->key_heads;
            for (int64_t here; left >= (here = parts_of(step->sequences + index, rows)); index++) left -= here;
            const Sequence *sequence = step->sequences + index;
            const int64_t first = left * rows, count = least(rows, sequence->rows - first) * each;
            Query of_part[count];
            for (int64_t i = 0; i < count; i++) {
                const int64_t row = first + i / each, head = key_head * each + i % each;
                const int64_t in_step = sequence->first_row + row, end = sequence->before + row + 1;
                of_part[i] = (Query){
                    .numbers = queries + in_step * stride + head * size,
                    .begin = block->window && end > block->window ? end - block->window : 0,
                    .end = end,
                    .weights = weights + i * longest,
                    .to = to + (in_step * block->heads + head) * size,
                };
            }
            const float *keys = block->keys + key_head * block->slots * size;
            const float *values = block->values + key_head * block->slots * size;
            attend(&(Part){block, keys, values, places[index], of_part, count});
        }
        free(weights);
    }
    return failed;
}
