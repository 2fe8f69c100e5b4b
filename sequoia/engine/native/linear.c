/* Linear layers. Weights are read once for a tile of rows; every output is one sum in one lane, over the inputs in an
 * order that is the same for every row. The input is rounded to bfloat16 (bfloat16 weights) or to integers of 8 or 16
 * bits with one scale a group (integer weights), so that the products of a group are exact.
 */
#include "linear.h"

#include <math.h>
#include <omp.h>
#include <string.h>

/* Rows of a tile: as many as the registers have room for. */
#ifdef __AVX512F__
enum { PANEL = 32, TILE = 12, INTEGER_TILE = 12, WIDE_TILE = 6 };
#else
enum { PANEL = 32, TILE = 5, INTEGER_TILE = 4, WIDE_TILE = 4 };
#endif

/* A function that does nothing but this looks to gcc like one without effect, whose calls it drops unless told so. */
#ifdef __AVX512F__
#define FETCH static inline
#else
#define FETCH INLINE
#endif

/* The cache lines that a loop over `word`s of two lines comes to 24 words later, into the first cache, and those of 128
 * words later, into the second: one distance alone cannot cover the memory's latency with the few misses that a core may
 * have under way. */
FETCH void fetch_ahead(const void *w, size_t word) {
    const char *near = (const char *)w + 24 * word, *far = (const char *)w + 128 * word;
    _mm_prefetch(near, _MM_HINT_T0);
    _mm_prefetch(near + 64, _MM_HINT_T0);
    _mm_prefetch(far, _MM_HINT_T1);
    _mm_prefetch(far + 64, _MM_HINT_T1);
}

#include "amx.h"
#ifndef __AVX512F__
#include "avx2_integers.h"
#endif

static int amx_is_on;

/* Products go through AMX from now on where that is wanted and there is one. Returns whether they do. */
int sequoia_use_amx(int wanted) {
#if HAS_AMX
    amx_is_on = wanted && amx_is_permitted();
#endif
    return amx_is_on;
}

void begin_products(void) {
#if HAS_AMX
    if (amx_is_on) amx_begin();
#endif
}

void end_products(void) {
#if HAS_AMX
    if (amx_is_on) amx_end();
#endif
}

/* ---- rows and tiles ---- */

static inline int is_wide(const Linear *linear) { return linear->kind != BFLOAT16 && linear->activation_bits == 16; }

static inline int uses_amx(const Linear *linear) {
    return amx_is_on && (linear->kind == BFLOAT16 || (linear->kind == INT8 && linear->group % 64 == 0));
}

/* Rows go through a linear layer in tiles: as high as AMX's, or of nearly the same height, as high as the registers of
 * AVX-512 allow. */
static inline int most_rows(const Linear *linear) {
    if (uses_amx(linear)) return is_wide(linear) ? 16 : 32;
    return is_wide(linear) ? WIDE_TILE : linear->kind == BFLOAT16 ? TILE : INTEGER_TILE;
}

static inline int num_tiles(const Linear *linear, int rows) {
    int most = most_rows(linear);
    return (rows + most - 1) / most;
}

static inline int tile_start(const Linear *linear, int rows, int tile) {
    if (!uses_amx(linear)) return (int)((int64_t)rows * tile / num_tiles(linear, rows));
    int start = tile * most_rows(linear);
    return start < rows ? start : rows;
}

static inline int tile_of(const Linear *linear, int rows, int row) {
    int tile = (int)((int64_t)row * num_tiles(linear, rows) / rows);
    while (tile_start(linear, rows, tile + 1) <= row) tile++;
    while (tile_start(linear, rows, tile) > row) tile--;
    return tile;
}

/* ---- a linear layer's input ---- */

/* What a group of a row is multiplied with to become integers; `scale` takes them back. */
static inline float integers_in_one(const float *x, int group, int bits, float *scale) {
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
    return largest > 0 ? range / largest : 0.0f;
}

/* Scale, sums and integers of one group of a row. Two integers a value for 16 bits: value = 256 * high + low. */
static void quantize_group(const float *x, int group, int bits, float *scale, int32_t *sums, int8_t *high,
                           int8_t *low) {
    __m512 inverse = _mm512_set1_ps(integers_in_one(x, group, bits, scale));
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

#ifndef __AVX512F__
/* The same with one integer a value, put where the tile finds them. Returns their sum. */
static int32_t pack_integers(const float *x, int group, int bits, float *scale, uint64_t *to, int height) {
    __m512 inverse = _mm512_set1_ps(integers_in_one(x, group, bits, scale));
    __m512i all = _mm512_setzero_si512();
    for (int i = 0; i < group; i += LANES, to += LANES / 4 * (int64_t)height) {
        __m512i values = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), inverse));
        all = _mm512_add_epi32(all, values);
        put_integers(to, height, values);
    }
    return _mm512_reduce_add_epi32(all);
}
#endif

/* A row's words from `at` on, where the tile finds them; `to` is where its first one goes. AVX-512 takes the words of a
 * tile's rows in turn, AMX 16 of each row. */
static inline void put_words(const Linear *linear, uint32_t *to, int height, int at, const uint32_t *words, int count) {
    if (uses_amx(linear)) {
        for (int j = at; j < at + count; j += 8, words += 8) memcpy(to + j / 16 * 256 + j % 16, words, 8 * sizeof *words);
    } else {
        for (int j = at; j < at + count; j++) to[(int64_t)j * height] = *words++;
    }
}

/* For each tile (AMX: 16 rows of it) its words, two bfloat16 or four int8 inputs each; a second block of the same shape
 * behind them holds the low halves of 16 bits. */
void pack_row(const Linear *linear, const Scratch *scratch, const float *x, int row, int rows) {
    int inputs = linear->inputs, tile = tile_of(linear, rows, row);
    int start = tile_start(linear, rows, tile);
    int height = tile_start(linear, rows, tile + 1) - start;
    if (uses_amx(linear)) {
        start = row & ~15;
        height = 16;
    }
    int first = uses_amx(linear) ? (row - start) * 16 : row - start;
    uint32_t *to = scratch->packed + (int64_t)start * (inputs / 2) + first;
    if (linear->kind == BFLOAT16) {
        for (int i = 0; i < inputs; i += LANES) {
            uint32_t words[8];
            store_bfloat16((uint16_t *)words, _mm512_loadu_ps(x + i));
            put_words(linear, to, height, i / 2, words, 8);
        }
        return;
    }
    int group = linear->group, num_groups = inputs / group, words = inputs / 4;
    uint32_t *to_low = to + (int64_t)height * words;
    for (int g = 0; g < num_groups; g++) {
        uint32_t high[256], low[256];
        int64_t at = (int64_t)row * num_groups + g;
        float *scale = scratch->input_scales + at;
        int32_t *sums = scratch->input_sums + at * 2;
#ifndef __AVX512F__
        if (takes_16_bits(linear)) {
            uint64_t *own = (uint64_t *)(scratch->packed + (int64_t)start * (inputs / 2)) + row - start;
            sums[0] = pack_integers(x + g * group, group, linear->activation_bits, scale,
                                    own + (int64_t)g * (group / 4) * height, height);
            sums[0] *= linear->kind == INT8 ? -128 : -8;
            continue;
        }
#endif
        quantize_group(x + g * group, group, linear->activation_bits, scale, sums, (int8_t *)high, (int8_t *)low);
#ifndef __AVX512F__
        sums[0] *= -8; /* see `multiply_avx2` */
#endif
        put_words(linear, to, height, g * (group / 4), high, group / 4);
        if (is_wide(linear)) put_words(linear, to_low, height, g * (group / 4), low, group / 4);
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

#ifndef __AVX512F__
enum { BLOCK_WORDS = 64 };

/* The same sums of more than two rows, half a panel at a time, or the registers would not do. Inputs become float32
 * some words ahead, for both their numbers to be broadcast as they are loaded. */
static inline __attribute__((always_inline)) void sum_half(const int height, const uint16_t *w, const uint32_t *x,
                                                           int words, __m512 sums[][2], int half) {
    float even[BLOCK_WORDS * TILE], odd[BLOCK_WORDS * TILE];
    __m512 own[TILE];
#pragma GCC unroll 5
    for (int i = 0; i < height; i++) own[i] = _mm512_setzero_ps();
    for (int block = 0; block < words; block += BLOCK_WORDS) {
        int count = words - block < BLOCK_WORDS ? words - block : BLOCK_WORDS;
        for (int i = 0; i < count * height; i++, x++) {
            uint32_t first = *x << 16, second = *x & 0xffff0000u;
            memcpy(even + i, &first, sizeof first);
            memcpy(odd + i, &second, sizeof second);
        }
        for (int word = 0; word < count; word++, w += 64) {
            __m512i pairs = load_pairs(w);
            __m512 left = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
            __m512 right = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000u)));
            fetch_ahead(w, 64 * sizeof *w);
#pragma GCC unroll 5
            for (int i = 0; i < height; i++) {
                own[i] = _mm512_fmadd_ps(left, _mm512_set1_ps(even[word * height + i]), own[i]);
                own[i] = _mm512_fmadd_ps(right, _mm512_set1_ps(odd[word * height + i]), own[i]);
            }
        }
    }
#pragma GCC unroll 5
    for (int i = 0; i < height; i++) sums[i][half] = own[i];
}
#endif

static inline __attribute__((always_inline)) void multiply_bfloat16(const int height, const Linear *linear,
                                                                    const uint32_t *x, int panel, float *y, int add) {
    int words = linear->inputs / 2;
    const uint16_t *w = (const uint16_t *)linear->weights + (int64_t)panel * words * 64;
    __m512 sums[TILE][2];
#ifndef __AVX512F__
    if (height > 2) {
        for (int half = 0; half < 2; half++) sum_half(height, w + half * 32, x, words, sums, half);
        finish(height, linear, sums, panel, y, add);
        return;
    }
#endif
#pragma GCC unroll 12
    for (int i = 0; i < height; i++) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (int word = 0; word < words; word++, w += 64, x += height) {
        __m512bh left = load_pairs(w), right = load_pairs(w + 32);
#ifdef __AVX512F__ /* AVX2 comes here with one row or two, whose weights are fetched best by the CPU alone */
        fetch_ahead(w, 64 * sizeof *w);
#endif
#pragma GCC unroll 12
        for (int i = 0; i < height; i++) {
            __m512bh input = pair_everywhere(x[i]);
            sums[i][0] = _mm512_dpbf16_ps(sums[i][0], left, input);
            sums[i][1] = _mm512_dpbf16_ps(sums[i][1], right, input);
        }
    }
    finish(height, linear, sums, panel, y, add);
}

#ifdef __AVX512F__
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
    __m512 totals[INTEGER_TILE][2];
#pragma GCC unroll 12
    for (int i = 0; i < height; i++) totals[i][0] = totals[i][1] = _mm512_setzero_ps();
    for (int g = 0; g < num_groups; g++, scales += PANEL) {
        __m512i high_sums[INTEGER_TILE][2], low_sums[INTEGER_TILE][2];
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
#else
static inline __attribute__((always_inline)) void multiply_integers(const int height, const int four, const int wide,
                                                                    const Linear *linear, const uint32_t *x,
                                                                    const float *input_scales,
                                                                    const int32_t *input_sums, int panel, float *y,
                                                                    int add) {
    __m512 totals[INTEGER_TILE][2];
    multiply_avx2(height, height > 1 ? 1 : 2, four, wide, linear, x, input_scales, input_sums, panel, totals);
    finish(height, linear, totals, panel, y, add);
}
#endif

#if HAS_AMX
static void multiply_amx(const Linear *linear, const Scratch *scratch, int start, int height, int panel, float *y,
                         int add) {
    int64_t column = (int64_t)panel * PANEL, block = 16 * (int64_t)(linear->inputs / 2);
    const uint32_t *x = scratch->packed + (int64_t)start * (linear->inputs / 2);
    float totals[32][2][LANES] __attribute__((aligned(64)));
    Sums sums;
    if (linear->kind == BFLOAT16) {
        const uint16_t *w = (const uint16_t *)linear->weights + column * linear->inputs;
        amx_sum(1, w, linear->inputs / 32, x, height > 16 ? x + block : 0, &sums);
        for (int i = 0; i < height; i++)
            for (int half = 0; half < 2; half++)
                _mm512_store_ps(totals[i][half], _mm512_load_ps(sums.floats[i / 16 * 2 + half][i % 16]));
    } else {
        int wide = is_wide(linear), num_groups = linear->inputs / linear->group, steps = linear->group / 64;
        const uint8_t *w = (const uint8_t *)linear->weights + column * linear->inputs;
        const uint16_t *scales = linear->scales + column * num_groups;
        const uint32_t *second = wide ? x + 16 * (linear->inputs / 4) : height > 16 ? x + block : 0;
        memset(totals, 0, (size_t)height * sizeof totals[0]);
        for (int g = 0; g < num_groups; g++, scales += PANEL, w += (int64_t)linear->group * PANEL) {
            int64_t done = (int64_t)g * steps * 256;
            amx_sum(0, w, steps, x + done, second ? second + done : 0, &sums);
            __m512 scale[2] = {load_bfloat16(scales), load_bfloat16(scales + LANES)};
            for (int i = 0; i < height; i++) {
                int64_t at = (int64_t)(start + i) * num_groups + g;
                const int32_t *input_sums = scratch->input_sums + at * 2;
                __m512 input_scale = _mm512_set1_ps(scratch->input_scales[at]);
                int offset = 128 * (wide ? 256 * input_sums[0] + input_sums[1] : input_sums[0]);
                for (int half = 0; half < 2; half++) {
                    int tile = wide ? half : i / 16 * 2 + half;
                    __m512i sum = _mm512_load_si512(sums.integers[tile][i % 16]);
                    if (wide) sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8),
                                                     _mm512_load_si512(sums.integers[tile + 2][i]));
                    sum = _mm512_sub_epi32(sum, _mm512_set1_epi32(offset));
                    _mm512_store_ps(totals[i][half],
                                    _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale[half], input_scale),
                                                    _mm512_load_ps(totals[i][half])));
                }
            }
        }
    }
    const float *bias = linear->bias ? linear->bias + column : 0;
    y += (int64_t)start * linear->outputs + column;
    for (int i = 0; i < height; i++, y += linear->outputs)
        for (int half = 0; half < 2; half++)
            finish_half(_mm512_load_ps(totals[i][half]), y + half * LANES, bias ? bias + half * LANES : 0,
                        linear->outputs - column - half * LANES, add);
}
#endif

#ifdef __AVX512F__
#define WIDE_HEIGHTS(CASE) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#define INTEGER_HEIGHTS(CASE) WIDE_HEIGHTS(CASE) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#define HEIGHTS INTEGER_HEIGHTS
#else
#define WIDE_HEIGHTS(CASE) CASE(1) CASE(2) CASE(3) CASE(4)
#define INTEGER_HEIGHTS WIDE_HEIGHTS
#define HEIGHTS(CASE) INTEGER_HEIGHTS(CASE) CASE(5)
#endif

static void multiply_tile(const Linear *linear, const Scratch *scratch, int start, int height, int panel, float *y,
                          int add) {
#if HAS_AMX
    if (uses_amx(linear)) {
        multiply_amx(linear, scratch, start, height, panel, y, add);
        return;
    }
#endif
    y += (int64_t)start * linear->outputs;
    if (linear->kind == BFLOAT16) {
        const uint32_t *x = scratch->packed + (int64_t)start * (linear->inputs / 2);
#define CASE(n) case n: multiply_bfloat16(n, linear, x, panel, y, add); break;
        switch (height) { HEIGHTS(CASE) }
#undef CASE
        return;
    }
    int num_groups = linear->inputs / linear->group;
    const uint32_t *x = scratch->packed + (int64_t)start * (linear->inputs / 4) * 2;
    const float *scales = scratch->input_scales + (int64_t)start * num_groups;
    const int32_t *sums = scratch->input_sums + (int64_t)start * num_groups * 2;
#define CASE(n) case n: multiply_integers(n, four, wide, linear, x, scales, sums, panel, y, add); break;
#define WITH(FOUR, WIDE, CASES) { enum { four = FOUR, wide = WIDE }; switch (height) { CASES(CASE) } }
    int wide_inputs = linear->activation_bits == 16;
    if (linear->kind == INT4) { if (wide_inputs) WITH(1, 1, WIDE_HEIGHTS) else WITH(1, 0, INTEGER_HEIGHTS) }
#ifdef __AVX512F__
    else { if (wide_inputs) WITH(0, 1, WIDE_HEIGHTS) else WITH(0, 0, INTEGER_HEIGHTS) }
#else
    else WITH(0, 0, INTEGER_HEIGHTS)
#endif
#undef WITH
#undef CASE
}

/* Every thread goes through a run of panels of its own, because memory is read fastest in order, and then helps with
 * what others have left, because another process may be using their core. */
void multiply(const Linear *linear, const Scratch *scratch, int *call, int rows, float *y, int add) {
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

/* y (rows, outputs) of one linear layer; for measuring and for tests. */
void sequoia_linear(const Linear *linear, const Scratch *scratch, const float *x, int32_t rows, float *y,
                    int32_t num_threads) {
#pragma omp parallel num_threads(num_threads)
    {
        int call = 0;
        begin_products();
#pragma omp for
        for (int row = 0; row < rows; row++) pack_row(linear, scratch, x + (int64_t)row * linear->inputs, row, rows);
        multiply(linear, scratch, &call, rows, y, 0);
        end_products();
    }
}
