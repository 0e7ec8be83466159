/* Linear layers whose weights lie in panels: the weights of 32 outputs for one input side by side.

   A panel is read once, from its beginning to its end, for all rows. Every sum is made in one order: along the inputs,
   in stretches whose sums are then added. */
#include "native.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

/* How many floats a register has, and how many rows are multiplied at a time: as many as there are registers for. */
#if defined(__AVX512F__)
#define WIDTH 16
#define MOST_ROWS 12
#elif defined(__AVX__)
#define WIDTH 8
#define MOST_ROWS 3
#else
#define WIDTH 4
#define MOST_ROWS 2
#endif
#define VECTORS (PANEL / WIDTH)

typedef float floats __attribute__((vector_size(4 * WIDTH)));
typedef float floats_anywhere __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH)));

/* Inputs whose products are summed before the sum is added to the others: of floats few, for precision; of 16-bit levels
   and bytes, 512 would fit. */
#define FLOATS_STRETCH 64
#define BYTES_STRETCH 256

/* Weights are asked for so many bytes before they are needed: memory answers slowly. */
#define AHEAD 8192

/* 16-bit levels of a row: the largest number has this one. */
#define LARGEST_LEVEL 32639.0f

INLINE floats load(const float *from) { return *(const floats_anywhere *)from; }
INLINE int64_t least(int64_t one, int64_t other) { return one < other ? one : other; }

INLINE void fetch(const void *from, int64_t size) {
    for (int64_t line = 0; line < size; line += 64) __builtin_prefetch((const char *)from + AHEAD + line, 0, 2);
}

INLINE void store(floats *sums, float *product, int64_t outputs) {
    if (outputs >= PANEL) {
        UNROLL for (int v = 0; v < VECTORS; v++) *(floats_anywhere *)(product + v * WIDTH) = sums[v];
    } else {
        float all[PANEL];
        memcpy(all, sums, sizeof all);
        memcpy(product, all, outputs * sizeof *all);
    }
}

/* What a row of products needs to become outputs. */
typedef struct {
    const Linear *linear;
    int64_t first, outputs; /* of the panel: the first, and how many are left from there */
    float *product;         /* of the first row */
} Place;

INLINE void finish(const Place *place, int row, floats *sums) {
    const Linear *linear = place->linear;
    if (linear->bias) {
        float bias[PANEL] = {0};
        memcpy(bias, linear->bias + place->first, least(place->outputs, PANEL) * sizeof *bias);
        UNROLL for (int v = 0; v < VECTORS; v++) sums[v] += load(bias + v * WIDTH);
    }
    store(sums, place->product + row * (int64_t)linear->outputs + place->first, place->outputs);
}

/* ---- float32 */

INLINE void floats_tile(const int count, const Place *place, const float *rows, const float *panel) {
    const int64_t inputs = place->linear->inputs;
    floats sums[MOST_ROWS][VECTORS] = {0};
    for (int64_t begin = 0; begin < inputs; begin += FLOATS_STRETCH) {
        const int64_t end = least(begin + FLOATS_STRETCH, inputs);
        floats partial[MOST_ROWS][VECTORS] = {0};
        for (int64_t input = begin; input < end; input++) {
            floats weights[VECTORS];
            fetch(panel + input * PANEL, PANEL * sizeof *panel);
            UNROLL for (int v = 0; v < VECTORS; v++) weights[v] = load(panel + input * PANEL + v * WIDTH);
            UNROLL for (int row = 0; row < count; row++)
                UNROLL for (int v = 0; v < VECTORS; v++) partial[row][v] += rows[row * inputs + input] * weights[v];
        }
        UNROLL for (int row = 0; row < count; row++)
            UNROLL for (int v = 0; v < VECTORS; v++) sums[row][v] += partial[row][v];
    }
    UNROLL for (int row = 0; row < count; row++) finish(place, row, sums[row]);
}

/* ---- rows in 16 bits, for quantized weights */

typedef struct {
    int64_t inputs; /* of a row in memory: a whole number of pairs, or of groups */
    int16_t *levels;
    float *worth;     /* of a level, [rows] */
    float *group_sums; /* of the levels of every group, [rows, groups]; NULL if not wanted */
} Levels;

/* Of what is no number, or infinite, if there is any; at least next to nothing. As whole numbers, the bits of positive
   floats have the order of the floats, with those at the end. */
static float largest_of(const float *from, int64_t count) {
    float largest = 1e-30f;
    int32_t most;
    memcpy(&most, &largest, sizeof most);
    for (int64_t i = 0; i < count; i++) {
        int32_t bits;
        memcpy(&bits, from + i, sizeof bits);
        bits &= INT32_MAX;
        most = bits > most ? bits : most;
    }
    memcpy(&largest, &most, sizeof largest);
    return largest;
}

static int split_rows(Levels *levels, const float *rows, int64_t count, int64_t inputs, int64_t multiple, int sums) {
    const int64_t padded = (inputs + multiple - 1) / multiple * multiple, groups = padded / GROUP;
    levels->inputs = padded;
    levels->levels = malloc(count * padded * sizeof(int16_t) + count * (1 + groups) * sizeof(float));
    if (!levels->levels) return 1;
    levels->worth = (float *)(levels->levels + count * padded);
    levels->group_sums = sums ? levels->worth + count : NULL;
    for (int64_t row = 0; row < count; row++) {
        const float *from = rows + row * inputs;
        int16_t *to = levels->levels + row * padded;
        const float largest = largest_of(from, inputs);
        const float factor = (1.0f / largest) * LARGEST_LEVEL;
        for (int64_t i = 0; i < inputs; i++) to[i] = (int16_t)(int32_t)rintf(from[i] * factor);
        for (int64_t i = inputs; i < padded; i++) to[i] = 0;
        levels->worth[row] = largest / LARGEST_LEVEL;
        for (int64_t group = 0; sums && group < groups; group++) {
            int32_t sum = 0;
            for (int i = 0; i < GROUP; i++) sum += to[group * GROUP + i];
            levels->group_sums[row * groups + group] = (float)sum;
        }
    }
    return 0;
}

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
    floats sums[MOST_ROWS][VECTORS] = {0};
    for (int64_t begin = 0; begin < inputs; begin += BYTES_STRETCH) {
        const int64_t end = least(begin + BYTES_STRETCH, inputs);
        Sums partial[MOST_ROWS] = {0};
        for (int64_t input = begin; input < end; input += 2) {
            fetch(panel + input * PANEL, 2 * PANEL);
            const Pair pair = bytes_pair(panel + input * PANEL);
            UNROLL for (int row = 0; row < count; row++)
                add_products(&partial[row], &pair, rows + row * inputs + input);
        }
        UNROLL for (int row = 0; row < count; row++)
            UNROLL for (int v = 0; v < VECTORS; v++)
                sums[row][v] += __builtin_convertvector(partial[row].of[v], floats);
    }
    float scale[PANEL] = {0};
    memcpy(scale, (const float *)place->linear->scale + place->first, least(place->outputs, PANEL) * sizeof *scale);
    UNROLL for (int row = 0; row < count; row++) {
        UNROLL for (int v = 0; v < VECTORS; v++)
            sums[row][v] = sums[row][v] * load(scale + v * WIDTH) * levels->worth[first_row + row];
        finish(place, row, sums[row]);
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
    floats sums[MOST_ROWS][VECTORS] = {0};
    for (int64_t group = 0; group < groups; group++) {
        Sums partial[MOST_ROWS] = {0};
        for (int four = 0; four < GROUP / 4; four++) {
            const int64_t input = group * GROUP + 4 * four;
            Pair low, high;
            fetch(panel + input / 4 * 2 * PANEL, 2 * PANEL);
            nibbles_pairs(panel + input / 4 * 2 * PANEL, &low, &high);
            UNROLL for (int row = 0; row < count; row++) {
                add_products(&partial[row], &low, rows + row * inputs + input);
                add_products(&partial[row], &high, rows + row * inputs + input + 2);
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
        UNROLL for (int v = 0; v < VECTORS; v++) sums[row][v] *= levels->worth[first_row + row];
        finish(place, row, sums[row]);
    }
}

/* ---- */

/* One panel for `count` rows, a constant where this is called. */
INLINE void tile(const int count, const Place *place, const float *rows, const Levels *levels, int64_t first_row) {
    const Linear *linear = place->linear;
    const int64_t panel = place->first / PANEL;
    if (linear->kind == FLOATS) {
        const int64_t inputs = linear->inputs;
        floats_tile(count, place, rows + first_row * inputs, (const float *)linear->weight + panel * inputs * PANEL);
    } else if (linear->kind == BYTES) {
        const int8_t *weight = (const int8_t *)linear->weight + panel * levels->inputs * PANEL;
        bytes_tile(count, place, levels, first_row, weight);
    } else {
        const uint8_t *weight = (const uint8_t *)linear->weight + panel * levels->inputs / 2 * PANEL;
        const uint16_t *scales = (const uint16_t *)linear->scale + panel * (levels->inputs / GROUP) * 2 * PANEL;
        nibbles_tile(count, place, levels, first_row, weight, scales);
    }
}

/* So many rows now, a constant for the compiler; what is left comes next. The panel is then in a cache. */
#define IF_AT_LEAST(number)                           \
    if (count - row >= number) {                      \
        tile(number, &place, rows, levels, row);      \
        row += number;                                \
        continue;                                     \
    }

static void multiply_panel(const Linear *linear, int64_t panel, const float *rows, const Levels *levels, int64_t count,
                           float *product) {
    const int64_t first = panel * PANEL;
    for (int64_t row = 0; row < count;) {
        const Place place = {linear, first, linear->outputs - first, product + row * linear->outputs};
#if MOST_ROWS >= 12
        IF_AT_LEAST(12)
        IF_AT_LEAST(8)
        IF_AT_LEAST(6)
        IF_AT_LEAST(4)
#endif
#if MOST_ROWS >= 3
        IF_AT_LEAST(3)
#endif
        IF_AT_LEAST(2)
        IF_AT_LEAST(1)
    }
}

int swarm_linear(const Linear *linear, const float *rows, int64_t count, float *product, int32_t threads) {
    Levels levels = {0};
    if (linear->kind != FLOATS) {
        const int nibbles = linear->kind == NIBBLES;
        if (split_rows(&levels, rows, count, linear->inputs, nibbles ? GROUP : 2, nibbles)) return 1;
    }
    const int64_t panels = (linear->outputs + PANEL - 1) / PANEL;
    (void)threads;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t panel = 0; panel < panels; panel++) multiply_panel(linear, panel, rows, &levels, count, product);
    free(levels.levels);
    return 0;
}
