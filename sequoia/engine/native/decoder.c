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

/* ---- attention ---- */

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

static inline int64_t seen_row(const Batch *batch, int token, int64_t index) {
    int64_t prefix = batch->prefix_lens[token];
    return index < prefix ? batch->first_rows[token] + index
                          : batch->own_rows[batch->own_starts[token] + index - prefix];
}

/* The sums of 16 vectors, in order; each is summed in the same order as all others. */
static inline __m512 sums_of(const __m512 *v) {
    __m512 pairs[8], fours[4];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512d left = _mm512_castps_pd(pairs[2 * i]), right = _mm512_castps_pd(pairs[2 * i + 1]);
        fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(left, right)),
                                 _mm512_castpd_ps(_mm512_unpackhi_pd(left, right)));
    }
    __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(fours[0], fours[1], 0x88), _mm512_shuffle_f32x4(fours[0], fours[1], 0xdd));
    __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2], fours[3], 0x88), _mm512_shuffle_f32x4(fours[2], fours[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}

/* What one token sees of a KV head: rows `first` to `seen` in the order of their positions. */
typedef struct {
    const Batch *batch;
    const uint16_t *keys, *values; /* of the head */
    int token, size;
    int64_t first, seen;
} View;

/* Scores of `count` queries, each (size,), against every row: (count, stride), the same bits however many there are. */
static inline __attribute__((always_inline)) void score(const int count, const View *view, const float *queries,
                                                        float scale, float *scores, int64_t stride) {
    int parts = view->size / LANES;
    for (int64_t block = view->first; block < view->seen; block += LANES) {
        int rows = view->seen - block < LANES ? (int)(view->seen - block) : LANES;
        __m512 products[4][LANES];
        for (int j = 0; j < LANES; j++) {
            __m512 sums[4];
            for (int g = 0; g < count; g++) sums[g] = _mm512_setzero_ps();
            if (j < rows) {
                const uint16_t *key = view->keys + seen_row(view->batch, view->token, block + j) * view->size;
                for (int i = 0; i < parts; i++) {
                    __m512 part = load_bfloat16(key + i * LANES);
#pragma GCC unroll 4
                    for (int g = 0; g < count; g++)
                        sums[g] = _mm512_fmadd_ps(part, _mm512_loadu_ps(queries + g * view->size + i * LANES), sums[g]);
                }
            }
            for (int g = 0; g < count; g++) products[g][j] = sums[g];
        }
        for (int g = 0; g < count; g++)
            _mm512_storeu_ps(scores + g * stride + block - view->first,
                             _mm512_mul_ps(sums_of(products[g]), _mm512_set1_ps(scale)));
    }
}

/* Scores become weights before they are divided by their sum, which is returned. */
static float weigh(float *scores, int64_t count) {
    __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += LANES)
        most = _mm512_mask_max_ps(most, first_lanes(count - i), most, _mm512_loadu_ps(scores + i));
    most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t i = 0; i < count; i += LANES) {
        __m512 weights = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + i), most));
        weights = _mm512_maskz_mov_ps(first_lanes(count - i), weights);
        total = _mm512_add_ps(total, weights);
        _mm512_storeu_ps(scores + i, weights);
    }
    return _mm512_reduce_add_ps(total);
}

/* The rows' values, weighted: `count` outputs, each (size,); `parts` vectors of them at a time. */
static inline __attribute__((always_inline)) void mix(const int count, const int parts, const View *view,
                                                      const float *weights, int64_t stride, const float *totals, int at,
                                                      float *output) {
    __m512 sums[4][4];
    for (int g = 0; g < count; g++)
        for (int i = 0; i < parts; i++) sums[g][i] = _mm512_setzero_ps();
    for (int64_t index = view->first; index < view->seen; index++) {
        const uint16_t *value = view->values + seen_row(view->batch, view->token, index) * view->size + at;
        __m512 part[4];
#pragma GCC unroll 4
        for (int i = 0; i < parts; i++) part[i] = load_bfloat16(value + i * LANES);
#pragma GCC unroll 4
        for (int g = 0; g < count; g++) {
            __m512 weight = _mm512_set1_ps(weights[g * stride + index - view->first]);
#pragma GCC unroll 4
            for (int i = 0; i < parts; i++) sums[g][i] = _mm512_fmadd_ps(weight, part[i], sums[g][i]);
        }
    }
    for (int g = 0; g < count; g++)
        for (int i = 0; i < parts; i++)
            _mm512_storeu_ps(output + g * view->size + at + i * LANES,
                             _mm512_mul_ps(sums[g][i], _mm512_set1_ps(1.0f / totals[g])));
}

/* Up to four query heads together, so that a key or value is read and widened once for all of them. */
static inline __attribute__((always_inline)) void attend_heads(const int count, const View *view, const float *queries,
                                                               float scale, float *scores, int64_t stride,
                                                               float *output) {
    float totals[4];
    score(count, view, queries, scale, scores, stride);
    for (int g = 0; g < count; g++) totals[g] = weigh(scores + g * stride, view->seen - view->first);
    int at = 0;
    for (; at + 4 * LANES <= view->size; at += 4 * LANES) mix(count, 4, view, scores, stride, totals, at, output);
    for (; at < view->size; at += LANES) mix(count, 1, view, scores, stride, totals, at, output);
}

/* The queries of one KV head of one token. `scores` is (4, most_rows + 16). */
static void attend(const Model *model, const Layer *layer, const Batch *batch, const float *qkv, int token, int kv_head,
                   float *scores, float *output) {
    int groups = model->heads / model->kv_heads;
    int64_t size = model->head_size, stride = batch->most_rows + LANES, head = kv_head * model->pool_rows * size;
    int64_t seen = batch->prefix_lens[token] + batch->own_starts[token + 1] - batch->own_starts[token];
    int64_t first = layer->window && seen > layer->window ? seen - layer->window : 0;
    View view = {batch, layer->keys + head, layer->values + head, token, (int)size, first, seen};
    for (int g = 0; g < groups; g += 4) {
        const float *queries = qkv + (int64_t)(kv_head * groups + g) * size;
        float *to = output + (int64_t)(kv_head * groups + g) * size, scale = model->attention_scale;
        switch (groups - g) {
            case 1: attend_heads(1, &view, queries, scale, scores, stride, to); break;
            case 2: attend_heads(2, &view, queries, scale, scores, stride, to); break;
            case 3: attend_heads(3, &view, queries, scale, scores, stride, to); break;
            default: attend_heads(4, &view, queries, scale, scores, stride, to);
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
        int row = item / model->kv_heads;
        attend(model, layer, batch, scratch->wide + row * qkv_width, row, item % model->kv_heads, own_scores,
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
