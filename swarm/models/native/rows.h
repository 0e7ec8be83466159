/* Rows as tiles of a linear layer read them: some side by side, in floats or in 16-bit levels. */
#pragma once

#include "native.h"
#include "vectors.h"

#include <math.h>
#include <stdlib.h>

/* How many rows are multiplied at a time: as many as there are registers for. */
#if WIDTH == 16
#define MOST_ROWS 12
#elif WIDTH == 8
#define MOST_ROWS 3
#else
#define MOST_ROWS 2
#endif

/* Rows that are multiplied at once. */
typedef struct {
    int64_t first, rows;
} Tile;

/* The one that `row` of `count` is in. */
static Tile tile_of(int64_t row, int64_t count) {
    const int64_t first = row / MOST_ROWS * MOST_ROWS;
    return (Tile){first, least(count - first, MOST_ROWS)};
}

/* Row `row` of [count, inputs] as its tile reads it: input by input, those of all rows of the tile side by side. */
static void lay_out_row(const float *rows, int64_t row, int64_t count, int64_t inputs, float *to) {
    const Tile tile = tile_of(row, count);
    const float *from = rows + row * inputs;
    to += tile.first * inputs + row - tile.first;
    for (int64_t input = 0; input < inputs; input++) to[input * tile.rows] = from[input];
}

/* ---- in 16 bits, for quantized weights */

/* 16-bit levels of a row: the largest number has this one. */
#define LARGEST_LEVEL 32639.0f

typedef struct {
    int64_t inputs; /* of a row in memory: a whole number of pairs, or of groups */
    int16_t *levels; /* tile after tile, and in each pair by pair, [inputs / 2, rows, 2] */
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

static int make_room(Levels *levels, int64_t count, int64_t inputs, int64_t multiple, int sums) {
    const int64_t padded = (inputs + multiple - 1) / multiple * multiple, groups = padded / GROUP;
    levels->inputs = padded;
    levels->levels = malloc(count * padded * sizeof(int16_t) + count * (1 + groups) * sizeof(float));
    if (!levels->levels) return 0;
    levels->worth = (float *)(levels->levels + count * padded);
    levels->group_sums = sums ? levels->worth + count : NULL;
    return 1;
}

static void split_row(const Levels *levels, const float *rows, int64_t row, int64_t count, int64_t inputs) {
    const Tile tile = tile_of(row, count);
    const float *from = rows + row * inputs;
    const float largest = largest_of(from, inputs), factor = (1.0f / largest) * LARGEST_LEVEL;
    int16_t *to = levels->levels + tile.first * levels->inputs + 2 * (row - tile.first);
    levels->worth[row] = largest / LARGEST_LEVEL;
    for (int64_t begin = 0; begin < levels->inputs; begin += GROUP) {
        const int64_t end = least(begin + GROUP, levels->inputs);
        int16_t group[GROUP] = {0};
        for (int64_t i = begin; i < least(end, inputs); i++)
            group[i - begin] = (int16_t)(int32_t)rintf(from[i] * factor);
        for (int64_t i = begin; i < end; i += 2) memcpy(to + i * tile.rows, group + i - begin, 2 * sizeof *to);
        if (!levels->group_sums) continue;
        int32_t sum = 0;
        for (int i = 0; i < GROUP; i++) sum += group[i];
        levels->group_sums[row * (levels->inputs / GROUP) + begin / GROUP] = (float)sum;
    }
}
