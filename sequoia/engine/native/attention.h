/* What a token attends to. */
#ifndef SEQUOIA_ATTENTION_H
#define SEQUOIA_ATTENTION_H

#include "decoder.h"

/* The queries of one KV head of one token, whose row of `qkv` this is; `output` is its row, too. `scores` is
 * (4, most_rows + 16). The token sees rows one after the other, in the order of their positions. */
void attend(const Model *model, const Layer *layer, const Batch *batch, const float *qkv, int token, int kv_head,
            float *scores, float *output);

#endif
