/* What the files of this folder share. They are compiled on the machine that runs them (building.py).

   All arithmetic is in float32 and whole numbers, and what becomes of a row depends on nothing else that is computed
   with it: not on how many rows there are, nor on how many threads. */
#pragma once

#include <stdint.h>

/* Outputs of a linear layer that lie side by side in memory. The last panel is filled up with zeros. */
#define PANEL 32
/* Inputs of a 4-bit weight that share a scale. */
#define GROUP 32

enum { FLOATS = 0, BYTES = 1, NIBBLES = 2 };

typedef struct {
    int32_t kind;
    int32_t outputs;
    int32_t inputs;
    /* FLOATS: float [panels, inputs, PANEL]
       BYTES: int8 [panels, pairs of inputs, PANEL, 2], of which an odd last input has a zero for a neighbour
       NIBBLES: uint8 [panels, groups, GROUP / 4, PANEL, 2]: of pairs of inputs the first of two in the low halves */
    const void *weight;
    /* BYTES: float [outputs]; NIBBLES: bfloat16 [panels, groups, 2, PANEL], scale and what stands for level 0 */
    const void *scale;
    /* float [outputs], or NULL */
    const float *bias;
} Linear;

/* Outputs of `rows` rows, float [rows, inputs] to float [rows, outputs]. Not 0: no memory. */
int swarm_linear(const Linear *linear, const float *rows, int64_t count, float *product, int32_t threads);

typedef struct {
    const float *weight;
    float eps;
} Norm;

/* A block built as Llama's. */
typedef struct {
    Linear query_key_value, attention_out, gate_up, down;
    Norm before_attention, before_mlp;
    /* Without weight: there is none. */
    Norm of_query, of_key;
    int32_t heads, key_heads, size;
    int32_t rotates;
    float scaling;
    /* Which of the step's views it has. */
    int32_t view;
    /* float [key_heads, slots, size] */
    float *keys, *values;
    int64_t slots;
} Block;

/* What the positions of a step look at: slots, in stretches [begin, end). */
typedef struct {
    const int64_t *stretches;
    /* [rows + 1]: those of a row begin here, and end where those of the next begin */
    const int64_t *begins;
} View;

typedef struct {
    int64_t rows, hidden;
    /* float [rows, hidden]: goes in, and comes out */
    float *states;
    /* float [positions, size], and [rows], the positions */
    const float *cos, *sin;
    const int64_t *positions;
    /* [rows]: where keys and values are written */
    const int64_t *slots;
    const View *views;
} Step;

/* Run `count` blocks, one after another. Not 0: no memory. */
int swarm_blocks(const Block *blocks, int64_t count, const Step *step, int32_t threads);
