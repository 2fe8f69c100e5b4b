/* One forward of a decoder (Llama, Qwen, Gemma) on a CPU with AVX-512 BF16 and VNNI.
 *
 * The promise: a token's result is the same bits whatever else is in the forward. Every output of a linear layer is
 * one sum in one lane, over the inputs in ascending order, and every token attends to the rows that it sees one after
 * the other, in the order of their positions. Threads divide outputs and tokens, never a sum.
 *
 * Activations between the layers are float32. A linear layer rounds its input to bfloat16 (bfloat16 weights) or to
 * integers of 8 or 16 bits with one scale a group (integer weights), so that the products of a group are exact.
 */
#include "decoder.h"

#include <math.h>
#include <omp.h>

#include "attention.h"
#include "linear.h"

/* ---- element by element ---- */

static inline __m512 activated(__m512 x, int activation) {
    __m512 one = _mm512_set1_ps(1.0f), inner = x;
    if (activation == GELU_TANH) { /* 0.5 x (1 + tanh u) = x / (1 + exp(-2 u)) */
        __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
        inner = _mm512_mul_ps(_mm512_set1_ps(1.5957691216f), _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x));
    }
    __m512 negative = _mm512_sub_ps(_mm512_setzero_ps(), inner);
    return _mm512_div_ps(x, _mm512_add_ps(one, exponential(negative)));
}

/* to = x * weight / rms(x); all (size,), size a multiple of 16. */
static void normalize(const float *x, const float *weight, float epsilon, int size, float *to) {
    __m512 squares = _mm512_setzero_ps();
    for (int i = 0; i < size; i += LANES) {
        __m512 v = _mm512_loadu_ps(x + i);
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    __m512 factor = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)size + epsilon));
    for (int i = 0; i < size; i += LANES)
        _mm512_storeu_ps(to + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), factor),
                                               _mm512_loadu_ps(weight + i)));
}

static void rotate(float *head, const float *rotation, int size) {
    int half = size / 2;
    for (int i = 0; i < half; i += LANES) {
        __mmask16 lanes = first_lanes(half - i);
        __m512 a = _mm512_maskz_loadu_ps(lanes, head + i), b = _mm512_maskz_loadu_ps(lanes, head + half + i);
        __m512 cosine = _mm512_maskz_loadu_ps(lanes, rotation + i);
        __m512 sine = _mm512_maskz_loadu_ps(lanes, rotation + half + i);
        _mm512_mask_storeu_ps(head + i, lanes, _mm512_fnmadd_ps(b, sine, _mm512_mul_ps(a, cosine)));
        _mm512_mask_storeu_ps(head + half + i, lanes, _mm512_fmadd_ps(a, sine, _mm512_mul_ps(b, cosine)));
    }
}

/* Normalise and rotate a token's queries and keys in place, and write its row of the KV cache. */
static void place_token(const Model *model, const Layer *layer, const Batch *batch, float *qkv, int token) {
    int size = model->head_size, heads = model->heads, kv_heads = model->kv_heads;
    const float *rotation = layer->rotations + batch->positions[token] * size;
    for (int head = 0; head < heads + kv_heads; head++) {
        float *x = qkv + (int64_t)head * size;
        const float *norm = head < heads ? layer->query_norm : layer->key_norm;
        if (norm) normalize(x, norm, model->epsilon, size, x);
        rotate(x, rotation, size);
    }
    for (int head = 0; head < kv_heads; head++) {
        int64_t at = ((int64_t)head * model->pool_rows + batch->write_rows[token]) * size;
        const float *key = qkv + (int64_t)(heads + head) * size, *value = key + (int64_t)kv_heads * size;
        for (int i = 0; i < size; i += LANES) {
            store_bfloat16(layer->keys + at + i, _mm512_loadu_ps(key + i));
            store_bfloat16(layer->values + at + i, _mm512_loadu_ps(value + i));
        }
    }
}

/* ---- a forward ---- */

static void pack_normalized(const Model *model, const Scratch *scratch, const Linear *linear, const float *norm,
                            int rows) {
    int hidden = model->hidden;
#pragma omp for
    for (int row = 0; row < rows; row++) {
        float *x = scratch->narrow + (int64_t)row * hidden;
        normalize(scratch->residual + (int64_t)row * hidden, norm, model->epsilon, hidden, x);
        pack_row(linear, scratch, x, row, rows);
    }
}

static void add_rows(const Model *model, const Scratch *scratch, const Linear *linear, const float *norm, int *call,
                     int rows) {
    int hidden = model->hidden;
    if (!norm) {
        multiply(linear, scratch, call, rows, scratch->residual, 1);
        return;
    }
    multiply(linear, scratch, call, rows, scratch->narrow, 0);
#pragma omp for
    for (int row = 0; row < rows; row++) {
        float *x = scratch->narrow + (int64_t)row * hidden, *to = scratch->residual + (int64_t)row * hidden;
        normalize(x, norm, model->epsilon, hidden, x);
        for (int i = 0; i < hidden; i += LANES)
            _mm512_storeu_ps(to + i, _mm512_add_ps(_mm512_loadu_ps(to + i), _mm512_loadu_ps(x + i)));
    }
}

static void run_layer(const Model *model, const Layer *layer, const Batch *batch, const Scratch *scratch, int *call) {
    int rows = batch->num_tokens;
    int64_t qkv_width = layer->qkv.outputs, attended_width = layer->out.inputs;
    float *own_scores = scratch->scores +
        (int64_t)omp_get_thread_num() * 4 * (batch->most_rows + LANES);
    pack_normalized(model, scratch, &layer->qkv, layer->attention_norm, rows);
    multiply(&layer->qkv, scratch, call, rows, scratch->wide, 0);
#pragma omp for
    for (int row = 0; row < rows; row++) place_token(model, layer, batch, scratch->wide + row * qkv_width, row);
#pragma omp for schedule(dynamic)
    for (int item = 0; item < rows * model->kv_heads; item++) {
        int row = item % rows; /* one head after the other: its keys and values are then in the cache for all tokens */
        attend(model, layer, batch, scratch->wide + row * qkv_width, row, item / rows, own_scores,
               scratch->narrow + row * attended_width);
    }
#pragma omp for
    for (int row = 0; row < rows; row++)
        pack_row(&layer->out, scratch, scratch->narrow + row * attended_width, row, rows);
    add_rows(model, scratch, &layer->out, layer->attention_output_norm, call, rows);
    pack_normalized(model, scratch, &layer->gate_up, layer->mlp_norm, rows);
    multiply(&layer->gate_up, scratch, call, rows, scratch->wide, 0);
#pragma omp for
    for (int row = 0; row < rows; row++) {
        float *gate = scratch->wide + (int64_t)row * 2 * model->intermediate, *up = gate + model->intermediate;
        for (int i = 0; i < model->intermediate; i += LANES)
            _mm512_storeu_ps(gate + i, _mm512_mul_ps(activated(_mm512_loadu_ps(gate + i), model->activation),
                                                     _mm512_loadu_ps(up + i)));
        pack_row(&layer->down, scratch, gate, row, rows);
    }
    add_rows(model, scratch, &layer->down, layer->mlp_output_norm, call, rows);
}

static void embed(const Model *model, const Batch *batch, const Scratch *scratch) {
    int hidden = model->hidden;
#pragma omp for
    for (int row = 0; row < batch->num_tokens; row++) {
        const uint16_t *from = model->embedding + batch->token_ids[row] * hidden;
        float *to = scratch->residual + (int64_t)row * hidden;
        for (int i = 0; i < hidden; i += LANES)
            _mm512_storeu_ps(to + i, _mm512_mul_ps(load_bfloat16(from + i), _mm512_set1_ps(model->embedding_scale)));
    }
}

/* Logits of some rows of (..., hidden) behind the last layer: of those that `wanted` names, NULL: of the first ones. */
static void run_head(const Model *model, const float *behind_layers, const int64_t *wanted, int rows,
                     const Scratch *scratch, int *call, float *logits) {
    int hidden = model->hidden;
#pragma omp for
    for (int row = 0; row < rows; row++) {
        float *x = scratch->narrow + (int64_t)row * hidden;
        const float *from = behind_layers + (wanted ? wanted[row] : row) * hidden;
        normalize(from, model->output_norm, model->epsilon, hidden, x);
        pack_row(&model->head, scratch, x, row, rows);
    }
    multiply(&model->head, scratch, call, rows, logits, 0);
}

void sequoia_layers(const Model *model, const Batch *batch, const Scratch *scratch, int32_t first, int32_t end,
                    float *logits) {
#pragma omp parallel num_threads(model->num_threads)
    {
        int call = LINEARS_IN_LAYER * first;
        begin_products();
        if (first == 0) embed(model, batch, scratch);
        for (int layer = first; layer < end; layer++) run_layer(model, model->layers + layer, batch, scratch, &call);
        if (logits && end == model->num_layers && batch->num_wanted)
            run_head(model, scratch->residual, batch->wanted, batch->num_wanted, scratch, &call, logits);
        end_products();
    }
}

void sequoia_head(const Model *model, const float *behind_layers, int32_t rows, const Scratch *scratch, float *logits) {
#pragma omp parallel num_threads(model->num_threads)
    {
        int call = 0;
        begin_products();
        run_head(model, behind_layers, NULL, rows, scratch, &call, logits);
        end_products();
    }
}

void sequoia_forward(const Model *model, const Batch *batch, const Scratch *scratch, float *logits) {
    sequoia_layers(model, batch, scratch, 0, model->num_layers, logits);
}
