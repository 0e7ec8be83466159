/* Attention over keys and values that stand on pages, for positions of any sequences (PagedAttention: Kwon et al., 2023;
   grouped queries: Ainslie et al., 2023). */
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

/* The heads of some rows of a sequence that share keys and values. A query is one of these heads of one of these rows;
   it looks at the positions [begin, end) of the sequence. */
typedef struct {
    const Block *block;
    const Sequence *sequence;
    const int64_t *places;
    int64_t key_head, first_row, rows;
    const float *queries; /* of the step's first row, [rows, stride] */
    int64_t stride;
    float *to; /* likewise, [rows, heads, size] */
    float *weights;
    int64_t weights_stride;
} Part;

INLINE int64_t heads_of(const Part *part) { return part->block->heads / part->block->key_heads; }

INLINE int64_t end_of(const Part *part, int64_t query) {
    return part->sequence->before + part->first_row + query / heads_of(part) + 1;
}

INLINE int64_t begin_of(const Part *part, int64_t query) {
    const int64_t window = part->block->window, end = end_of(part, query);
    return window && end > window ? end - window : 0;
}

INLINE const float *slot_of(const Part *part, const float *pool, int64_t position) {
    const Block *block = part->block;
    return pool + (part->key_head * block->slots + part->places[position]) * block->size;
}

INLINE const float *query_of(const Part *part, int64_t query) {
    const int64_t each = heads_of(part), row = part->sequence->first_row + part->first_row + query / each;
    return part->queries + row * part->stride + (part->key_head * each + query % each) * part->block->size;
}

INLINE float *output_of(const Part *part, int64_t query) {
    const int64_t each = heads_of(part), row = part->sequence->first_row + part->first_row + query / each;
    return part->to + (row * part->block->heads + part->key_head * each + query % each) * part->block->size;
}

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

/* `size` is a constant where it is one of the usual. */
INLINE void weigh_keys(const Part *part, int64_t query, int64_t from, int64_t until, int64_t size) {
    const int64_t begin = greatest(begin_of(part, query), from), end = least(end_of(part, query), until);
    const float *of_query = query_of(part, query);
    float *weights = part->weights + query * part->weights_stride;
    for (int64_t at = begin; at < end; at += WIDTH) {
        const float *keys[WIDTH];
        for (int key = 0; key < WIDTH; key++) keys[key] = slot_of(part, part->block->keys, least(at + key, end - 1));
        store(weights + at - begin_of(part, query), products(of_query, keys, size) * part->block->scaling);
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

/* Some queries, and what they give to the values from the position `begin` on. */
typedef struct {
    const float *weights[QUERIES];
    float *to[QUERIES];
    int64_t begin, end;
} Weighing;

/* Add the numbers from `at` on of these values: so many registers of them, of which the last has `left`. All sums of
   products are made of registers, for compilers round others as they please. */
INLINE void add_numbers(const int count, const int vectors, const Part *part, const Weighing *weighing, int64_t at,
                        int64_t left) {
    floats sums[QUERIES][VALUE_VECTORS];
    UNROLL for (int query = 0; query < count; query++)
        UNROLL for (int v = 0; v < vectors; v++)
            sums[query][v] = load_some(weighing->to[query] + at + v * WIDTH, left - v * WIDTH);
    for (int64_t position = weighing->begin; position < weighing->end; position++) {
        const float *value = slot_of(part, part->block->values, position) + at;
        UNROLL for (int v = 0; v < vectors; v++) {
            const floats numbers = load_some(value + v * WIDTH, left - v * WIDTH);
            UNROLL for (int query = 0; query < count; query++)
                sums[query][v] += weighing->weights[query][position - weighing->begin] * numbers;
        }
    }
    UNROLL for (int query = 0; query < count; query++)
        UNROLL for (int v = 0; v < vectors; v++)
            store_some(weighing->to[query] + at + v * WIDTH, sums[query][v], left - v * WIDTH);
}

/* Add the values of [begin, end) to the outputs of `count` queries from `first` on, a constant where this is called. */
INLINE void add_values(const int count, const Part *part, int64_t first, int64_t begin, int64_t end) {
    Weighing weighing = {.begin = begin, .end = end};
    UNROLL for (int query = 0; query < count; query++) {
        const float *weights = part->weights + (first + query) * part->weights_stride;
        weighing.weights[query] = weights + begin - begin_of(part, first + query);
        weighing.to[query] = output_of(part, first + query);
    }
    const int64_t size = part->block->size;
    int64_t at = 0;
    for (; at + VALUE_VECTORS * WIDTH <= size; at += VALUE_VECTORS * WIDTH)
        add_numbers(count, VALUE_VECTORS, part, &weighing, at, VALUE_VECTORS * WIDTH);
    for (; at < size; at += WIDTH) add_numbers(count, 1, part, &weighing, at, size - at);
}

/* Likewise, of [from, until) what each of the queries looks at: first and last what not all of them do. */
INLINE void add_values_of(const int count, const Part *part, int64_t first, int64_t from, int64_t until) {
    int64_t begin = from, end = until;
    for (int query = 0; query < count; query++) {
        begin = greatest(begin, begin_of(part, first + query));
        end = least(end, end_of(part, first + query));
    }
    end = greatest(begin, end);
    for (int query = 0; query < count; query++)
        add_values(1, part, first + query, greatest(from, begin_of(part, first + query)),
                   least(begin, end_of(part, first + query)));
    add_values(count, part, first, begin, end);
    for (int query = 0; query < count; query++)
        add_values(1, part, first + query, greatest(end, begin_of(part, first + query)),
                   least(until, end_of(part, first + query)));
}

#define IF_AT_LEAST(number)                                \
    if (queries - query >= number) {                       \
        add_values_of(number, part, query, from, until);   \
        query += number;                                   \
        continue;                                          \
    }

static void attend_part(const Part *part) {
    const int64_t size = part->block->size, queries = part->rows * heads_of(part);
    const int64_t begin = begin_of(part, 0), end = end_of(part, queries - 1);
    for (int64_t from = begin; from < end; from += TOGETHER) {
        const int64_t until = least(from + TOGETHER, end);
        for (int64_t query = 0; query < queries; query++) {
            if (size == 64)
                weigh_keys(part, query, from, until, 64);
            else if (size == 128)
                weigh_keys(part, query, from, until, 128);
            else
                weigh_keys(part, query, from, until, size);
        }
    }
    float factors[queries];
    for (int64_t query = 0; query < queries; query++) {
        const int64_t count = end_of(part, query) - begin_of(part, query);
        factors[query] = softmax(part->weights + query * part->weights_stride, count);
        memset(output_of(part, query), 0, size * sizeof(float));
    }
    for (int64_t from = begin; from < end; from += TOGETHER) {
        const int64_t until = least(from + TOGETHER, end);
        for (int64_t query = 0; query < queries;) {
#if QUERIES >= 4
            IF_AT_LEAST(4)
            IF_AT_LEAST(3)
#endif
            IF_AT_LEAST(2)
            IF_AT_LEAST(1)
        }
    }
    for (int64_t query = 0; query < queries; query++) {
        float *to = output_of(part, query);
        for (int64_t i = 0; i < size; i++) to[i] *= factors[query];
    }
}

static int64_t rows_at_a_time(const Block *block, int64_t longest) {
    const int64_t of_a_row = longest * (block->heads / block->key_heads);
    return greatest(1, least(MOST_ROWS, MOST_WEIGHTS / of_a_row));
}

INLINE int64_t parts_of(const Sequence *sequence, int64_t rows) { return (sequence->rows + rows - 1) / rows; }

int swarm_attend(const Block *block, const Step *step, const int64_t *const *places, const float *queries,
                 int64_t stride, float *to, int32_t threads) {
    int64_t longest = 0, parts = 0;
    for (int64_t i = 0; i < step->sequence_count; i++)
        longest = greatest(longest, step->sequences[i].before + step->sequences[i].rows);
    longest = (longest + WIDTH - 1) / WIDTH * WIDTH;
    const int64_t rows = rows_at_a_time(block, longest), each = block->heads / block->key_heads;
    for (int64_t i = 0; i < step->sequence_count; i++)
        parts += parts_of(step->sequences + i, rows) * block->key_heads;
    int failed = 0;
    (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1 && parts > 1) reduction(| : failed)
    {
        float *weights = malloc(rows * each * longest * sizeof *weights);
        failed = !weights;
#pragma omp for schedule(dynamic)
        for (int64_t number = 0; number < parts; number++) {
            if (!weights) continue;
            int64_t index = 0, left = number / block->key_heads;
            for (int64_t here; left >= (here = parts_of(step->sequences + index, rows)); index++) left -= here;
            const Sequence *sequence = step->sequences + index;
            const Part part = {
                .block = block, .sequence = sequence, .places = places[index], .key_head = number % block->key_heads,
                .first_row = left * rows, .rows = least(rows, sequence->rows - left * rows),
                .queries = queries, .stride = stride, .to = to, .weights = weights, .weights_stride = longest,
            };
            attend_part(&part);
        }
        free(weights);
    }
    return failed;
}
