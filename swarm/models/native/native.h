/* What the files of this folder share. They are compiled on the machine that runs them (building.py).

   All arithmetic is in float32 and whole numbers, and what becomes of a row depends on nothing else that is computed
   with it: not on how many rows there are, nor on how many threads. */
#pragma once

#include <stdint.h>

/* Outputs of a linear layer that lie side by side in memory. The last panel is filled up with zeros. */
#define PANEL 32
/* Inputs of a 4-bit weight that share a scale. */
#define GROUP 32
/* So many rows are worth more than one thread, even where little is done with each. */
#define MANY_ROWS 16

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

/* Whether weights that are read once go past the outer caches, from now on in this process. Results are the same. */
void swarm_fetch_past_caches(int32_t yes);

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
    /* A position looks at so many, itself included. 0: at all before it. */
    int32_t window;
    /* float [key_heads, slots, size] */
    float *keys, *values;
    int64_t slots;
} Block;

/* Rows of a step that are neighbouring positions of one sequence. */
typedef struct {
    int64_t first_row, rows;
    /* Positions of the sequence before them. */
    int64_t before;
    /* Slots [begin, end), run by run, where keys and values of all its positions stand, those of these rows last. */
    const int64_t *runs;
    int64_t run_count;
} Sequence;

typedef struct {
    int64_t rows, hidden;
    /* float [rows, hidden]: goes in, and comes out */
    float *states;
    /* float [positions, size], and [rows], the positions */
    const float *cos, *sin;
    const int64_t *positions;
    /* [rows]: where keys and values are written */
    const int64_t *slots;
    /* All rows belong to one of these. */
    const Sequence *sequences;
    int64_t sequence_count;
} Step;

/* Attention of a block whose keys and values have been written: of queries [rows, heads, size], a row of which begins
   `stride` floats after the one before, to float [rows, heads, size]. `places`: of each sequence the slots of all its
   positions. Not 0: no memory. */
int swarm_attend(const Block *block, const Step *step, const int64_t *const *places, const float *queries,
                 int64_t stride, float *to, int32_t threads);

/* Run `count` blocks, one after another. Not 0: no memory. */
int swarm_blocks(const Block *blocks, int64_t count, const Step *step, int32_t threads);
