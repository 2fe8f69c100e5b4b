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

enum { PANEL = 32, TILE = 12, WIDE_TILE = 6 };

/* ---- rows and tiles ---- */

/* Rows go through a linear layer in tiles of nearly the same height, as high as the registers allow. */
static inline int num_tiles(const Linear *linear, int rows) {
    int most = linear->kind != BFLOAT16 && linear->activation_bits == 16 ? WIDE_TILE : TILE;
    return (rows + most - 1) / most;
}

static inline int tile_start(const Linear *linear, int rows, int tile) {
    return (int)((int64_t)rows * tile / num_tiles(linear, rows));
}

static inline int tile_of(const Linear *linear, int rows, int row) {
    int tile = (int)((int64_t)row * num_tiles(linear, rows) / rows);
    while (tile_start(linear, rows, tile + 1) <= row) tile++;
    return tile;
}

static inline float from_bfloat16(uint16_t bits) {
    union { uint32_t u; float f; } cast = {(uint32_t)bits << 16};
    return cast.f;
}

static inline __m512 load_bfloat16(const uint16_t *from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)from)), 16));
}

static inline void store_bfloat16(uint16_t *to, __m512 x) {
    _mm256_storeu_si256((void *)to, (__m256i)_mm512_cvtneps_pbh(x));
}

/* ---- a linear layer's input ---- */

/* Scale, sums and integers of one group of a row. Two integers a value for 16 bits: value = 256 * high + low. */
static void quantize_group(const float *x, int group, int bits, float *scale, int32_t *sums, int8_t *high,
                           int8_t *low) {
    __m512 most = _mm512_setzero_ps();
    __mmask16 broken = 0; /* an integer cannot say NaN, so the scale does */
    for (int i = 0; i < group; i += LANES) {
        __m512 value = _mm512_loadu_ps(x + i);
        broken |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
        most = _mm512_max_ps(most, _mm512_abs_ps(value));
    }
    float largest = broken ? NAN : _mm512_reduce_max_ps(most);
    float range = bits == 8 ? 127.0f : 32512.0f;
    *scale = largest / range;
    __m512 inverse = _mm512_set1_ps(largest > 0 ? range / largest : 0.0f);
    __m512i high_sum = _mm512_setzero_si512(), low_sum = _mm512_setzero_si512();
    for (int i = 0; i < group; i += LANES) {
        __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), inverse));
        __m512i upper = value;
        if (bits == 16) {
            upper = _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(128)), 8);
            __m512i lower = _mm512_sub_epi32(value, _mm512_slli_epi32(upper, 8));
            low_sum = _mm512_add_epi32(low_sum, lower);
            _mm_storeu_si128((void *)(low + i), _mm512_cvtepi32_epi8(lower));
        }
        high_sum = _mm512_add_epi32(high_sum, upper);
        _mm_storeu_si128((void *)(high + i), _mm512_cvtepi32_epi8(upper));
    }
    sums[0] = _mm512_reduce_add_epi32(high_sum);
    sums[1] = _mm512_reduce_add_epi32(low_sum);
}

/* Put a row, (inputs,) float32, where the linear's tile finds it: for each tile (words, rows of the tile), a word being
 * two bfloat16 or four int8 inputs; a second block of the same shape behind it holds the low halves of 16 bits. */
static void pack_row(const Linear *linear, const Scratch *scratch, const float *x, int row, int rows) {
    int inputs = linear->inputs, tile = tile_of(linear, rows, row);
    int start = tile_start(linear, rows, tile);
    int height = tile_start(linear, rows, tile + 1) - start;
    if (linear->kind == BFLOAT16) {
        uint32_t *to = scratch->packed + (int64_t)start * (inputs / 2) + (row - start);
        for (int i = 0; i < inputs; i += LANES) {
            uint32_t words[8];
            store_bfloat16((uint16_t *)words, _mm512_loadu_ps(x + i));
            for (int j = 0; j < 8; j++) to[(int64_t)(i / 2 + j) * height] = words[j];
        }
        return;
    }
    int group = linear->group, num_groups = inputs / group, words = inputs / 4;
    uint32_t *to = scratch->packed + (int64_t)start * words * 2 + (row - start);
    uint32_t *to_low = to + (int64_t)height * words;
    for (int g = 0; g < num_groups; g++) {
        uint32_t high[256], low[256];
        int64_t at = (int64_t)row * num_groups + g;
        quantize_group(x + g * group, group, linear->activation_bits, scratch->input_scales + at,
                       scratch->input_sums + at * 2, (int8_t *)high, (int8_t *)low);
        for (int j = 0; j < group / 4; j++) {
            int64_t word = (int64_t)(g * (group / 4) + j) * height;
            to[word] = high[j];
            if (linear->activation_bits == 16) to_low[word] = low[j];
        }
    }
}

/* ---- products: one tile of rows by one panel of outputs ---- */

static inline void finish_half(__m512 sum, float *y, const float *bias, int64_t left, int add) {
    __mmask16 lanes = first_lanes(left);
    if (bias) sum = _mm512_add_ps(sum, _mm512_loadu_ps(bias));
    if (add) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes, y));
    _mm512_mask_storeu_ps(y, lanes, sum);
}

static inline __attribute__((always_inline)) void finish(const int height, const Linear *linear, __m512 sums[][2],
                                                         int panel, float *y, int add) {
    int64_t column = (int64_t)panel * PANEL;
    const float *bias = linear->bias ? linear->bias + column : 0;
#pragma GCC unroll 12
    for (int i = 0; i < height; i++)
        for (int half = 0; half < 2; half++)
            finish_half(sums[i][half], y + (int64_t)i * linear->outputs + column + half * LANES,
                        bias ? bias + half * LANES : 0, linear->outputs - column - half * LANES, add);
}

/* The two cache lines that the loop comes to 24 words later, into the first cache, and those of 128 words later, into
 * the second: one distance alone cannot cover the memory's latency with the few misses that a core may have under way. */
static inline void fetch_ahead(const void *w, size_t word) {
    const char *near = (const char *)w + 24 * word, *far = (const char *)w + 128 * word;
    _mm_prefetch(near, _MM_HINT_T0);
    _mm_prefetch(near + 64, _MM_HINT_T0);
    _mm_prefetch(far, _MM_HINT_T1);
    _mm_prefetch(far + 64, _MM_HINT_T1);
}

static inline __attribute__((always_inline)) void multiply_bfloat16(const int height, const Linear *linear,
                                                                    const uint32_t *x, int panel, float *y, int add) {
    int words = linear->inputs / 2;
    const uint16_t *w = (const uint16_t *)linear->weights + (int64_t)panel * words * 64;
    __m512 sums[TILE][2];
#pragma GCC unroll 12
    for (int i = 0; i < height; i++) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (int word = 0; word < words; word++, w += 64, x += height) {
        __m512bh left = (__m512bh)_mm512_loadu_si512(w), right = (__m512bh)_mm512_loadu_si512(w + 32);
        fetch_ahead(w, 64 * sizeof *w);
#pragma GCC unroll 12
        for (int i = 0; i < height; i++) {
            __m512bh input = (__m512bh)_mm512_set1_epi32((int)x[i]);
            sums[i][0] = _mm512_dpbf16_ps(sums[i][0], left, input);
            sums[i][1] = _mm512_dpbf16_ps(sums[i][1], right, input);
        }
    }
    finish(height, linear, sums, panel, y, add);
}

/* Integer weights are the unsigned side of the product; what their offset adds is taken off by the inputs' sums. */
static inline __attribute__((always_inline)) void multiply_integers(const int height, const int four, const int wide,
                                                                    const Linear *linear, const uint32_t *x,
                                                                    const float *input_scales,
                                                                    const int32_t *input_sums, int panel, float *y,
                                                                    int add) {
    int words = linear->inputs / 4, group_words = linear->group / 4, num_groups = linear->inputs / linear->group;
    const uint8_t *w = (const uint8_t *)linear->weights + (int64_t)panel * words * (four ? 64 : 128);
    const uint16_t *scales = linear->scales + (int64_t)panel * num_groups * PANEL;
    const uint32_t *low = x + (int64_t)height * words;
    const int offset = four ? 8 : 128;
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512 totals[TILE][2];
#pragma GCC unroll 12
    for (int i = 0; i < height; i++) totals[i][0] = totals[i][1] = _mm512_setzero_ps();
    for (int g = 0; g < num_groups; g++, scales += PANEL) {
        __m512i high_sums[TILE][2], low_sums[TILE][2];
#pragma GCC unroll 12
        for (int i = 0; i < height; i++) {
            const int32_t *sums = input_sums + ((int64_t)i * num_groups + g) * 2;
            high_sums[i][0] = high_sums[i][1] = _mm512_set1_epi32(-offset * sums[0]);
            if (wide) low_sums[i][0] = low_sums[i][1] = _mm512_set1_epi32(-offset * sums[1]);
        }
        for (int word = 0; word < group_words; word += four ? 2 : 1, w += 128) {
            __m512i left = _mm512_loadu_si512(w), right = _mm512_loadu_si512(w + 64);
            fetch_ahead(w, 128 * sizeof *w);
#pragma GCC unroll 2
            for (int half = 0; half < (four ? 2 : 1); half++) {
                __m512i a = left, b = right;
                if (four) {
                    a = _mm512_and_si512(half ? _mm512_srli_epi16(left, 4) : left, nibble);
                    b = _mm512_and_si512(half ? _mm512_srli_epi16(right, 4) : right, nibble);
                }
#pragma GCC unroll 12
                for (int i = 0; i < height; i++) {
                    __m512i input = _mm512_set1_epi32((int)x[i]);
                    high_sums[i][0] = _mm512_dpbusd_epi32(high_sums[i][0], a, input);
                    high_sums[i][1] = _mm512_dpbusd_epi32(high_sums[i][1], b, input);
                    if (wide) {
                        __m512i lower = _mm512_set1_epi32((int)low[i]);
                        low_sums[i][0] = _mm512_dpbusd_epi32(low_sums[i][0], a, lower);
                        low_sums[i][1] = _mm512_dpbusd_epi32(low_sums[i][1], b, lower);
                    }
                }
                x += height;
                low += height;
            }
        }
        __m512 scale[2] = {load_bfloat16(scales), load_bfloat16(scales + LANES)};
#pragma GCC unroll 12
        for (int i = 0; i < height; i++) {
            __m512 input_scale = _mm512_set1_ps(input_scales[(int64_t)i * num_groups + g]);
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                __m512i sum = high_sums[i][half];
                if (wide) sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), low_sums[i][half]);
                totals[i][half] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale[half], input_scale),
                                                  totals[i][half]);
            }
        }
    }
    finish(height, linear, totals, panel, y, add);
}

#define UP_TO_6(CASE) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#define UP_TO_12(CASE) UP_TO_6(CASE) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)

static void multiply_tile(const Linear *linear, const Scratch *scratch, int start, int height, int panel, float *y,
                          int add) {
    y += (int64_t)start * linear->outputs;
    if (linear->kind == BFLOAT16) {
        const uint32_t *x = scratch->packed + (int64_t)start * (linear->inputs / 2);
#define CASE(n) case n: multiply_bfloat16(n, linear, x, panel, y, add); break;
        switch (height) { UP_TO_12(CASE) }
#undef CASE
        return;
    }
    int num_groups = linear->inputs / linear->group;
    const uint32_t *x = scratch->packed + (int64_t)start * (linear->inputs / 4) * 2;
    const float *scales = scratch->input_scales + (int64_t)start * num_groups;
    const int32_t *sums = scratch->input_sums + (int64_t)start * num_groups * 2;
#define CASE(n) case n: multiply_integers(n, four, wide, linear, x, scales, sums, panel, y, add); break;
#define WITH(FOUR, WIDE, HEIGHTS) { enum { four = FOUR, wide = WIDE }; switch (height) { HEIGHTS(CASE) } }
    int wide_inputs = linear->activation_bits == 16;
    if (linear->kind == INT4) { if (wide_inputs) WITH(1, 1, UP_TO_6) else WITH(1, 0, UP_TO_12) }
    else { if (wide_inputs) WITH(0, 1, UP_TO_6) else WITH(0, 0, UP_TO_12) }
#undef WITH
#undef CASE
}

/* y (rows, outputs) = packed input times weights, or added to y. Called by all threads, in step.
 *
 * Every thread goes through a run of panels of its own, because memory is read fastest in order, and then helps with
 * what others have left, because another process may be using their core. */
static void multiply(const Linear *linear, const Scratch *scratch, int *call, int rows, float *y, int add) {
    int num_panels = (linear->outputs + PANEL - 1) / PANEL;
    int threads = omp_get_num_threads(), me = omp_get_thread_num();
    int32_t *taken = scratch->taken + (int64_t)(*call)++ * threads * CACHE_LINE;
    for (int other = 0; other < threads; other++) {
        int owner = (me + other) % threads;
        int first = num_panels * owner / threads, count = num_panels * (owner + 1) / threads - first;
        for (;;) {
            int index = __atomic_fetch_add(&taken[owner * CACHE_LINE], 1, __ATOMIC_RELAXED);
            if (index >= count) break;
            for (int tile = 0; tile < num_tiles(linear, rows); tile++) {
                int start = tile_start(linear, rows, tile);
                multiply_tile(linear, scratch, start, tile_start(linear, rows, tile + 1) - start, first + index, y, add);
            }
        }
    }
#pragma omp barrier
}

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

void sequoia_forward(const Model *model, const Batch *batch, const Scratch *scratch, float *logits) {
    int hidden = model->hidden;
#pragma omp parallel num_threads(model->num_threads)
    {
        int call = 0;
#pragma omp for
        for (int row = 0; row < batch->num_tokens; row++) {
            const uint16_t *from = model->embedding + batch->token_ids[row] * hidden;
            float *to = scratch->residual + (int64_t)row * hidden;
            for (int i = 0; i < hidden; i += LANES)
                _mm512_storeu_ps(to + i, _mm512_mul_ps(load_bfloat16(from + i), _mm512_set1_ps(model->embedding_scale)));
        }
        for (int layer = 0; layer < model->num_layers; layer++)
            run_layer(model, model->layers + layer, batch, scratch, &call);
        if (batch->num_wanted) {
#pragma omp for
            for (int row = 0; row < batch->num_wanted; row++) {
                float *x = scratch->narrow + (int64_t)row * hidden;
                normalize(scratch->residual + batch->wanted[row] * hidden, model->output_norm, model->epsilon, hidden, x);
                pack_row(&model->head, scratch, x, row, batch->num_wanted);
            }
            multiply(&model->head, scratch, &call, batch->num_wanted, logits, 0);
        }
    }
}

/* y (rows, outputs) of one linear layer; for measuring and for tests. */
void sequoia_linear(const Linear *linear, const Scratch *scratch, const float *x, int32_t rows, float *y,
                    int32_t num_threads) {
#pragma omp parallel num_threads(num_threads)
    {
        int call = 0;
#pragma omp for
        for (int row = 0; row < rows; row++) pack_row(linear, scratch, x + (int64_t)row * linear->inputs, row, rows);
        multiply(linear, scratch, &call, rows, y, 0);
    }
}
