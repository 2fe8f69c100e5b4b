/* Attention. Every score is one sum over a head, every output one sum over the rows that a token sees, both in an order
 * that is the same whatever else is in the forward.
 */
#include "attention.h"

#include <math.h>

/* Vectors of this CPU, not the pairs that the rest makes do with: more sums stay in registers. As many query heads go
 * together as there are registers for, so that a key or value is read and widened once for all of them. */
#ifdef __AVX512F__
typedef __m512 Vector;
enum { WIDTH = 16, MOST_HEADS = 4 };
#define VECTOR(name) _mm512_##name
static inline Vector widened(const uint16_t *from) { return load_bfloat16(from); }
#else
typedef __m256 Vector;
enum { WIDTH = 8, MOST_HEADS = 3 };
#define VECTOR(name) _mm256_##name
static inline Vector widened(const uint16_t *from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)from)), 16));
}
#endif
enum { PARTS = 4 };                  /* vectors of an output at a time */
enum { LINE = 32, ROWS_AHEAD = 24 }; /* numbers in a cache line; rows that a key is fetched ahead */

/* The sums of WIDTH vectors, in order; each is summed in the same order as all others. */
static inline Vector sums_of(const Vector *v) {
    Vector pairs[WIDTH / 2], fours[WIDTH / 4];
#pragma GCC unroll 8
    for (int i = 0; i < WIDTH / 2; i++)
        pairs[i] = VECTOR(add_ps)(VECTOR(unpacklo_ps)(v[2 * i], v[2 * i + 1]),
                                  VECTOR(unpackhi_ps)(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < WIDTH / 4; i++)
        fours[i] = VECTOR(add_ps)(VECTOR(shuffle_ps)(pairs[2 * i], pairs[2 * i + 1], 0x44),
                                  VECTOR(shuffle_ps)(pairs[2 * i], pairs[2 * i + 1], 0xee));
#ifdef __AVX512F__
    Vector low = _mm512_add_ps(_mm512_shuffle_f32x4(fours[0], fours[1], 0x88),
                               _mm512_shuffle_f32x4(fours[0], fours[1], 0xdd));
    Vector high = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2], fours[3], 0x88),
                                _mm512_shuffle_f32x4(fours[2], fours[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
#else
    return _mm256_add_ps(_mm256_permute2f128_ps(fours[0], fours[1], 0x20),
                         _mm256_permute2f128_ps(fours[0], fours[1], 0x31));
#endif
}

/* What one token sees of a KV head: rows `first` to `seen` in the order of their positions, of which those before
 * `prefix` lie one behind the other from `first_row` on. */
typedef struct {
    const uint16_t *keys, *values; /* of the head */
    const int64_t *own_rows;       /* from `prefix` on */
    int64_t size, first_row, prefix, first, seen;
} View;

/* Where a row's key and value begin. */
static inline int64_t seen_row(const View view, int64_t index) {
    return view.size * (index < view.prefix ? view.first_row + index : view.own_rows[index - view.prefix]);
}

/* The key some rows after this one, and this one's value, which is wanted when all scores are there. */
static inline __attribute__((always_inline)) void fetch_ahead(const View view, int64_t row) {
    for (int i = 0; i < view.size; i += LINE) {
        _mm_prefetch((const char *)(view.keys + row + ROWS_AHEAD * view.size + i), _MM_HINT_T0);
        _mm_prefetch((const char *)(view.values + row + i), _MM_HINT_T1);
    }
}

/* Scores of `count` queries, each (size,), against every row: (count, stride), the same bits however many there are. */
static inline __attribute__((always_inline)) void score(const int count, const View view, const float *queries,
                                                        float scale, float *scores, int64_t stride) {
    for (int64_t block = view.first; block < view.seen; block += WIDTH) {
        Vector products[MOST_HEADS][WIDTH];
        for (int j = 0; j < WIDTH; j++) {
            int64_t index = block + j < view.seen ? block + j : view.seen - 1; /* nobody asks for what is beyond */
            int64_t row = seen_row(view, index);
            Vector sums[MOST_HEADS];
            fetch_ahead(view, row);
#pragma GCC unroll 4
            for (int g = 0; g < count; g++) sums[g] = VECTOR(setzero_ps)();
            for (int64_t i = 0; i < view.size; i += WIDTH) {
                Vector key = widened(view.keys + row + i);
#pragma GCC unroll 4
                for (int g = 0; g < count; g++)
                    sums[g] = VECTOR(fmadd_ps)(key, VECTOR(loadu_ps)(queries + g * view.size + i), sums[g]);
            }
#pragma GCC unroll 4
            for (int g = 0; g < count; g++) products[g][j] = sums[g];
        }
        for (int g = 0; g < count; g++)
            VECTOR(storeu_ps)(scores + g * stride + block - view.first,
                              VECTOR(mul_ps)(sums_of(products[g]), VECTOR(set1_ps)(scale)));
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
static inline __attribute__((always_inline)) void mix(const int count, const int parts, const View view,
                                                      const float *weights, int64_t stride, const float *totals, int at,
                                                      float *output) {
    Vector sums[MOST_HEADS][PARTS];
#pragma GCC unroll 4
    for (int g = 0; g < count; g++)
#pragma GCC unroll 4
        for (int i = 0; i < parts; i++) sums[g][i] = VECTOR(setzero_ps)();
    for (int64_t index = view.first; index < view.seen; index++) {
        const uint16_t *value = view.values + seen_row(view, index) + at;
        Vector own[MOST_HEADS];
#pragma GCC unroll 4
        for (int g = 0; g < count; g++) own[g] = VECTOR(set1_ps)(weights[g * stride + index - view.first]);
#pragma GCC unroll 4
        for (int i = 0; i < parts; i++) {
            Vector part = widened(value + i * WIDTH);
#pragma GCC unroll 4
            for (int g = 0; g < count; g++) sums[g][i] = VECTOR(fmadd_ps)(own[g], part, sums[g][i]);
        }
    }
#pragma GCC unroll 4
    for (int g = 0; g < count; g++)
#pragma GCC unroll 4
        for (int i = 0; i < parts; i++)
            VECTOR(storeu_ps)(output + g * view.size + at + i * WIDTH,
                              VECTOR(mul_ps)(sums[g][i], VECTOR(set1_ps)(1.0f / totals[g])));
}

static inline __attribute__((always_inline)) void attend_heads(const int count, const View view, const float *queries,
                                                               float scale, float *scores, int64_t stride,
                                                               float *output) {
    float totals[MOST_HEADS];
    score(count, view, queries, scale, scores, stride);
    for (int g = 0; g < count; g++) totals[g] = weigh(scores + g * stride, view.seen - view.first);
    int at = 0;
    for (; at + PARTS * WIDTH <= view.size; at += PARTS * WIDTH)
        mix(count, PARTS, view, scores, stride, totals, at, output);
    for (; at < view.size; at += WIDTH) mix(count, 1, view, scores, stride, totals, at, output);
}

void attend(const Model *model, const Layer *layer, const Batch *batch, const float *qkv, int token, int kv_head,
            float *scores, float *output) {
    int groups = model->heads / model->kv_heads;
    int64_t size = model->head_size, stride = batch->most_rows + LANES, head = kv_head * model->pool_rows * size;
    int64_t seen = batch->prefix_lens[token] + batch->own_starts[token + 1] - batch->own_starts[token];
    int64_t first = layer->window && seen > layer->window ? seen - layer->window : 0;
    View view = {layer->keys + head, layer->values + head, batch->own_rows + batch->own_starts[token], size,
                 batch->first_rows[token], batch->prefix_lens[token], first, seen};
    for (int g = 0; g < groups; g += MOST_HEADS) {
        const float *queries = qkv + (int64_t)(kv_head * groups + g) * size;
        float *to = output + (int64_t)(kv_head * groups + g) * size, scale = model->attention_scale;
        switch (groups - g) {
            case 1: attend_heads(1, view, queries, scale, scores, stride, to); break;
            case 2: attend_heads(2, view, queries, scale, scores, stride, to); break;
#ifdef __AVX512F__
            case 3: attend_heads(3, view, queries, scale, scores, stride, to); break;
#endif
            default: attend_heads(MOST_HEADS, view, queries, scale, scores, stride, to);
        }
    }
}
