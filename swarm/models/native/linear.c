/* Linear layers whose weights lie in panels: the weights of 32 outputs for one input side by side.

   A panel is read once, from its beginning to its end, for a few rows; for many, in blocks that a cache holds while all
   rows are multiplied with them. Every sum is made in one order: along the inputs, in stretches whose sums are then
   added. */
#include "native.h"
#include "rows.h"
#include "vectors.h"

#include <stdlib.h>

#define VECTORS (PANEL / WIDTH)

/* Inputs whose products are summed before the sum is added to the others: of floats few, for precision; of 16-bit
   levels and bytes, 512 would fit. */
#define FLOATS_STRETCH 64
#define BYTES_STRETCH 256

/* Weights are asked for so many bytes before they are needed: memory answers slowly. */
#define AHEAD 8192

/* Of a panel that is multiplied with many rows. */
#define BLOCK_BYTES 24576

/* Whether what is read once goes past the outer caches, where it would only drive out what comes after the
   multiplication. That is a good deal faster on some processors, and several times slower on others. */
static int32_t past_caches;

void swarm_fetch_past_caches(int32_t yes) { past_caches = yes; }

/* Where that is asked for which is needed later, and by how many bytes this moves on with every read of a panel. */
typedef struct {
    const char *from;
    int64_t step;
    int past_caches;
} Later;

INLINE void fetch(Later *later) {
    if (later->past_caches) {
        __builtin_prefetch(later->from, 0, 0);
        __builtin_prefetch(later->from + 64, 0, 0);
    } else {
        __builtin_prefetch(later->from, 0, 2);
        __builtin_prefetch(later->from + 64, 0, 2);
    }
    later->from += later->step;
}

/* Rows of products of a panel with some of the inputs: those from `begin` to `end`. */
typedef struct {
    const Linear *linear;
    int64_t first, outputs; /* of the panel: the first, and how many are left from there */
    int64_t begin, end;
    float *product; /* of the first row */
    Later later;
} Place;

/* What the inputs before these came to. */
INLINE void resume(const Place *place, int row, floats *sums) {
    if (place->begin == 0) {
        UNROLL for (int v = 0; v < VECTORS; v++) sums[v] = (floats){0};
        return;
    }
    float all[PANEL] = {0};
    const float *product = place->product + row * (int64_t)place->linear->outputs + place->first;
    memcpy(all, product, least(place->outputs, PANEL) * sizeof *all);
    UNROLL for (int v = 0; v < VECTORS; v++) sums[v] = load(all + v * WIDTH);
}

INLINE int is_last(const Place *place, int64_t inputs) { return place->end == inputs; }

INLINE void keep(const Place *place, int row, floats *sums) {
    float *product = place->product + row * (int64_t)place->linear->outputs + place->first;
    if (place->outputs >= PANEL) {
        UNROLL for (int v = 0; v < VECTORS; v++) store(product + v * WIDTH, sums[v]);
    } else {
        float all[PANEL];
        memcpy(all, sums, sizeof all);
        memcpy(product, all, place->outputs * sizeof *all);
    }
}

INLINE void add_bias(const Place *place, floats *sums) {
    if (!place->linear->bias) return;
    float bias[PANEL] = {0};
    memcpy(bias, place->linear->bias + place->first, least(place->outputs, PANEL) * sizeof *bias);
    UNROLL for (int v = 0; v < VECTORS; v++) sums[v] += load(bias + v * WIDTH);
}

/* ---- float32 */

INLINE void floats_tile(const int count, const Place *place, const float *rows, const float *panel) {
    const int64_t inputs = place->linear->inputs;
    Later later = place->later;
    floats sums[MOST_ROWS][VECTORS];
    UNROLL for (int row = 0; row < count; row++) resume(place, row, sums[row]);
    for (int64_t begin = place->begin; begin < place->end; begin += FLOATS_STRETCH) {
        const int64_t end = least(begin + FLOATS_STRETCH, place->end);
        floats partial[MOST_ROWS][VECTORS] = {0};
        for (int64_t input = begin; input < end; input++) {
            floats weights[VECTORS];
            fetch(&later);
            UNROLL for (int v = 0; v < VECTORS; v++) weights[v] = load(panel + input * PANEL + v * WIDTH);
            UNROLL for (int row = 0; row < count; row++)
                UNROLL for (int v = 0; v < VECTORS; v++) partial[row][v] += rows[input * count + row] * weights[v];
        }
        UNROLL for (int row = 0; row < count; row++)
            UNROLL for (int v = 0; v < VECTORS; v++) sums[row][v] += partial[row][v];
    }
    UNROLL for (int row = 0; row < count; row++) {
        if (is_last(place, inputs)) add_bias(place, sums[row]);
        keep(place, row, sums[row]);
    }
}

/* ---- pairs of 16-bit numbers, for quantized weights */

/* Sums of products of pairs of 16-bit numbers, for the 32 outputs of a panel. */
typedef struct {
    ints of[VECTORS];
} Sums;
/* Two inputs of the weights of a panel, as 16-bit numbers. */
typedef struct {
#if WIDTH == 16
    __m512i of[VECTORS];
#elif WIDTH == 8 && defined(__AVX2__)
    __m256i of[VECTORS];
#else
    int16_t of[2 * PANEL];
#endif
} Pair;

#if WIDTH == 16
#define WIDEN_SIGNED(from, v) _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(from) + (v)))
#elif WIDTH == 8 && defined(__AVX2__)
#define WIDEN_SIGNED(from, v) _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(from) + (v)))
#endif

INLINE Pair bytes_pair(const int8_t *from) {
    Pair pair;
#ifdef WIDEN_SIGNED
    UNROLL for (int v = 0; v < VECTORS; v++) pair.of[v] = WIDEN_SIGNED(from, v);
#else
    for (int i = 0; i < 2 * PANEL; i++) pair.of[i] = from[i];
#endif
    return pair;
}

INLINE void nibbles_pairs(const uint8_t *from, Pair *low, Pair *high) {
#ifdef WIDEN_SIGNED
    UNROLL for (int v = 0; v < VECTORS; v++) {
#if WIDTH == 16
        const __m512i both = WIDEN_SIGNED(from, v), mask = _mm512_set1_epi16(15);
        low->of[v] = _mm512_and_si512(both, mask);
        high->of[v] = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
#else
        const __m256i both = WIDEN_SIGNED(from, v), mask = _mm256_set1_epi16(15);
        low->of[v] = _mm256_and_si256(both, mask);
        high->of[v] = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
#endif
    }
#else
    for (int i = 0; i < 2 * PANEL; i++) low->of[i] = from[i] & 15, high->of[i] = from[i] >> 4;
#endif
}

INLINE void add_products(Sums *sums, const Pair *pair, const int16_t *two) {
    int32_t both;
    memcpy(&both, two, sizeof both);
#if WIDTH == 16
    const __m512i rows = _mm512_set1_epi32(both);
    UNROLL for (int v = 0; v < VECTORS; v++) {
#ifdef __AVX512VNNI__
        sums->of[v] = (ints)_mm512_dpwssd_epi32((__m512i)sums->of[v], pair->of[v], rows);
#else
        sums->of[v] += (ints)_mm512_madd_epi16(pair->of[v], rows);
#endif
    }
#elif WIDTH == 8 && defined(__AVX2__)
    const __m256i rows = _mm256_set1_epi32(both);
    UNROLL for (int v = 0; v < VECTORS; v++) sums->of[v] += (ints)_mm256_madd_epi16(pair->of[v], rows);
#else
    for (int v = 0; v < VECTORS; v++)
        for (int i = 0; i < WIDTH; i++) {
            const int at = 2 * (v * WIDTH + i);
            sums->of[v][i] += (int32_t)pair->of[at] * two[0] + (int32_t)pair->of[at + 1] * two[1];
        }
#endif
}

/* ---- 8-bit weights */

INLINE void bytes_tile(const int count, const Place *place, const Levels *levels, int64_t first_row,
                       const int8_t *panel) {
    const int64_t inputs = levels->inputs;
    const int16_t *rows = levels->levels + first_row * inputs;
    Later later = place->later;
    floats sums[MOST_ROWS][VECTORS];
    UNROLL for (int row = 0; row < count; row++) resume(place, row, sums[row]);
    for (int64_t begin = place->begin; begin < place->end; begin += BYTES_STRETCH) {
        const int64_t end = least(begin + BYTES_STRETCH, place->end);
        Sums partial[MOST_ROWS] = {0};
        for (int64_t input = begin; input < end; input += 2) {
            fetch(&later);
            const Pair pair = bytes_pair(panel + input * PANEL);
            UNROLL for (int row = 0; row < count; row++)
                add_products(&partial[row], &pair, rows + input * count + 2 * row);
        }
        UNROLL for (int row = 0; row < count; row++)
            UNROLL for (int v = 0; v < VECTORS; v++)
                sums[row][v] += __builtin_convertvector(partial[row].of[v], floats);
    }
    float scale[PANEL] = {0};
    memcpy(scale, (const float *)place->linear->scale + place->first, least(place->outputs, PANEL) * sizeof *scale);
    UNROLL for (int row = 0; row < count; row++) {
        if (is_last(place, inputs)) {
            UNROLL for (int v = 0; v < VECTORS; v++)
                sums[row][v] = sums[row][v] * load(scale + v * WIDTH) * levels->worth[first_row + row];
            add_bias(place, sums[row]);
        }
        keep(place, row, sums[row]);
    }
}

/* ---- 4-bit weights */

INLINE floats widen(const uint16_t *bfloats) {
    ints bits;
    for (int i = 0; i < WIDTH; i++) bits[i] = (int32_t)((uint32_t)bfloats[i] << 16);
    return (floats)bits;
}

INLINE void nibbles_tile(const int count, const Place *place, const Levels *levels, int64_t first_row,
                         const uint8_t *panel, const uint16_t *scales) {
    const int64_t inputs = levels->inputs, groups = inputs / GROUP;
    const int16_t *rows = levels->levels + first_row * inputs;
    Later later = place->later;
    floats sums[MOST_ROWS][VECTORS];
    UNROLL for (int row = 0; row < count; row++) resume(place, row, sums[row]);
    for (int64_t group = place->begin / GROUP; group < place->end / GROUP; group++) {
        Sums partial[MOST_ROWS] = {0};
        for (int four = 0; four < GROUP / 4; four++) {
            const int64_t input = group * GROUP + 4 * four;
            Pair low, high;
            fetch(&later);
            nibbles_pairs(panel + input / 4 * 2 * PANEL, &low, &high);
            UNROLL for (int row = 0; row < count; row++) {
                add_products(&partial[row], &low, rows + input * count + 2 * row);
                add_products(&partial[row], &high, rows + (input + 2) * count + 2 * row);
            }
        }
        floats scale[VECTORS], zero[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++) {
            scale[v] = widen(scales + group * 2 * PANEL + v * WIDTH);
            zero[v] = widen(scales + (group * 2 + 1) * PANEL + v * WIDTH) - 8.0f * scale[v];
        }
        UNROLL for (int row = 0; row < count; row++) {
            const float sum = levels->group_sums[(first_row + row) * groups + group];
            UNROLL for (int v = 0; v < VECTORS; v++) {
                sums[row][v] += scale[v] * __builtin_convertvector(partial[row].of[v], floats);
                sums[row][v] += zero[v] * sum;
            }
        }
    }
    UNROLL for (int row = 0; row < count; row++) {
        if (is_last(place, inputs)) {
            UNROLL for (int v = 0; v < VECTORS; v++) sums[row][v] *= levels->worth[first_row + row];
            add_bias(place, sums[row]);
        }
        keep(place, row, sums[row]);
    }
}

/* ---- */

/* How a panel lies in memory. */
typedef struct {
    const char *panel;
    int64_t inputs;
    int64_t bytes, of_inputs; /* that are read at a time, and of how many inputs */
} Lie;

INLINE Lie lie_of(const Linear *linear, const Levels *levels, int64_t panel) {
    const int64_t inputs = linear->kind == FLOATS ? linear->inputs : levels->inputs;
    const int64_t bytes = linear->kind == FLOATS ? PANEL * sizeof(float) : 2 * PANEL;
    const int64_t of_inputs = linear->kind == FLOATS ? 1 : linear->kind == BYTES ? 2 : 4;
    return (Lie){(const char *)linear->weight + panel * (inputs / of_inputs) * bytes, inputs, bytes, of_inputs};
}

/* A panel and `count` rows, a constant where this is called. */
INLINE void tile(const int count, const Place *place, const Lie *lie, const float *rows, const Levels *levels,
                 int64_t row) {
    const Linear *linear = place->linear;
    if (linear->kind == FLOATS)
        floats_tile(count, place, rows + row * linear->inputs, (const float *)lie->panel);
    else if (linear->kind == BYTES)
        bytes_tile(count, place, levels, row, (const int8_t *)lie->panel);
    else
        nibbles_tile(count, place, levels, row, (const uint8_t *)lie->panel,
                     (const uint16_t *)linear->scale + place->first / PANEL * (lie->inputs / GROUP) * 2 * PANEL);
}

/* A few rows ask for what they need themselves. Many ask for the next block, each for its share. */
INLINE Later later_of(int64_t begin, int64_t end, const Lie *lie, int64_t row, int64_t count, int64_t rows) {
    if (rows <= MOST_ROWS) return (Later){lie->panel + AHEAD, lie->bytes, past_caches};
    const int64_t size = (end - begin) / lie->of_inputs * lie->bytes;
    const char *next = lie->panel + end / lie->of_inputs * lie->bytes;
    return (Later){next + size * row / rows, lie->bytes * count / rows, 0};
}

static void multiply_panel(const Linear *linear, int64_t panel, const float *rows, const Levels *levels, int64_t count,
                           float *product) {
    const int64_t first = panel * PANEL;
    const Lie lie = lie_of(linear, levels, panel);
    const int64_t block = count <= MOST_ROWS ? lie.inputs : BLOCK_BYTES / lie.bytes * lie.of_inputs;
    for (int64_t begin = 0; begin < lie.inputs; begin += block)
        for (int64_t row = 0; row < count;) {
            const int64_t in_tile = tile_of(row, count).rows;
            const Place place = {
                .linear = linear, .first = first, .outputs = linear->outputs - first,
                .begin = begin, .end = least(begin + block, lie.inputs),
                .product = product + row * linear->outputs,
                .later = later_of(begin, least(begin + block, lie.inputs), &lie, row, in_tile, count),
            };
            switch (in_tile) {
#define CASE(number) case number: tile(number, &place, &lie, rows, levels, row); break;
#if MOST_ROWS >= 12
                CASE(12) CASE(11) CASE(10) CASE(9) CASE(8) CASE(7) CASE(6) CASE(5) CASE(4)
#endif
#if MOST_ROWS >= 3
                CASE(3)
#endif
                CASE(2) CASE(1)
#undef CASE
            }
            row += in_tile;
        }
}

int swarm_linear(const Linear *linear, const float *rows, int64_t count, float *product, int32_t threads) {
    Levels levels = {0};
    float *laid_out = NULL;
    if (linear->kind != FLOATS) {
        const int nibbles = linear->kind == NIBBLES;
        if (!make_room(&levels, count, linear->inputs, nibbles ? GROUP : 2, nibbles)) return 1;
    } else if (count > 1 && !(laid_out = malloc(count * linear->inputs * sizeof *laid_out))) {
        return 1;
    }
    (void)threads;
#pragma omp parallel for num_threads(threads) if (threads > 1 && count >= MANY_ROWS)
    for (int64_t row = 0; row < count; row++) {
        if (linear->kind != FLOATS)
            split_row(&levels, rows, row, count, linear->inputs);
        else if (laid_out)
            lay_out_row(rows, row, count, linear->inputs, laid_out);
    }
    const int64_t panels = (linear->outputs + PANEL - 1) / PANEL;
    const float *from = laid_out ? laid_out : rows;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t panel = 0; panel < panels; panel++) multiply_panel(linear, panel, from, &levels, count, product);
    free(laid_out);
    free(levels.levels);
    return 0;
}
