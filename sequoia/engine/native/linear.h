/* Linear layers: how their input is packed, and the products. */
#ifndef SEQUOIA_LINEAR_H
#define SEQUOIA_LINEAR_H

#include "decoder.h"

/* Row `row` of `rows`, (inputs,) float32, put where `multiply` finds it. */
void pack_row(const Linear *linear, const Scratch *scratch, const float *x, int row, int rows);

/* y (rows, outputs) = packed input times weights, or added to y. Called by all threads, in step; the `call`-th of a
 * forward. */
void multiply(const Linear *linear, const Scratch *scratch, int *call, int rows, float *y, int add);

/* Every thread that multiplies does so between these two. */
void begin_products(void);
void end_products(void);

#endif
