/* What the files of the engine share: a model, a forward's tokens and memory, and some arithmetic of vectors. */
#ifndef SEQUOIA_DECODER_H
#define SEQUOIA_DECODER_H

#include <immintrin.h>
#include <stdint.h>

#ifndef __AVX512F__
#include "avx2.h"
#endif

enum { LANES = 16, CACHE_LINE = 16 /* int32 */ };
enum { BFLOAT16 = 0, INT8 = 1, INT4 = 2 };
enum { SILU = 0, GELU_TANH = 1 };

/* Weights lie in panels of 32 outputs, the last one filled up with zeros.
 * bfloat16: (panels, inputs / 2, 32, 2). INT8: (panels, inputs / 4, 32, 4), each weight + 128. INT4: (panels,
 * inputs / 8, 32, 4), each weight + 8, inputs i..i+3 in the low half of the bytes and i+4..i+7 in the high half. */
typedef struct {
    int32_t kind;
    int32_t activation_bits; /* 8 or 16; integer weights only */
    int32_t inputs;
    int32_t outputs;
    int32_t group; /* inputs that share a scale; integer weights only */
    int32_t unused;
    const void *weights;
    const uint16_t *scales; /* (panels, inputs / group, 32) bfloat16; integer weights only */
    const float *bias;      /* (panels * 32,) or NULL */
} Linear;

typedef struct {
    Linear qkv, out, gate_up, down;
    const float *attention_norm, *mlp_norm;                      /* (hidden,) */
    const float *query_norm, *key_norm;                          /* (head size,) or NULL */
    const float *attention_output_norm, *mlp_output_norm;        /* (hidden,) or NULL */
    const float *rotations;                                      /* (positions, 2, head size / 2): cosines, sines */
    uint16_t *keys, *values;                                     /* (kv heads, pool rows, head size) bfloat16 */
    int64_t window;                                              /* positions that are seen; 0: all */
} Layer;

typedef struct {
    int32_t num_layers, hidden, intermediate, heads, kv_heads, head_size, activation, num_threads;
    int64_t pool_rows;
    float epsilon, attention_scale, embedding_scale, unused;
    const uint16_t *embedding; /* (vocabulary, hidden) bfloat16 */
    const float *output_norm;  /* (hidden,) */
    Linear head;
    const Layer *layers;
} Model;

/* Token t is written to pool row write_rows[t]. It sees pool rows first_rows[t] .. first_rows[t] + prefix_lens[t] - 1,
 * at the positions 0, 1, ..., and then own_rows[own_starts[t] .. own_starts[t + 1]), which are pool rows too. */
typedef struct {
    int32_t num_tokens, num_wanted;
    const int64_t *token_ids, *positions, *write_rows, *first_rows, *prefix_lens, *own_starts, *own_rows;
    const int64_t *wanted; /* tokens whose logits are asked for */
    int64_t most_rows;     /* that a token sees */
} Batch;

/* What a forward needs besides: the caller's memory. */
typedef struct {
    float *residual; /* (tokens, hidden) */
    float *wide;     /* (tokens, widest linear) */
    float *narrow;   /* (tokens, widest input) */
    float *scores;   /* (threads, 4, most_rows + 16) */
    uint32_t *packed; /* (tokens in whole tiles of 16, widest input / 2): a linear's input, see `pack_row` */
    float *input_scales; /* (tokens, widest input / 32) */
    int32_t *input_sums; /* (tokens, widest input / 32, 2) */
    int32_t *taken;      /* (linear layers, threads, 16), zero: how many of its panels are taken */
} Scratch;

static inline __mmask16 first_lanes(int64_t count) {
    return count >= LANES ? (__mmask16)0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

static inline __m512 load_bfloat16(const uint16_t *from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)from)), 16));
}

static inline void store_bfloat16(uint16_t *to, __m512 x) {
    _mm256_storeu_si256((void *)to, (__m256i)_mm512_cvtneps_pbh(x));
}

/* Pairs of bfloat16 numbers: 16 of them, or one everywhere. */
#ifdef __AVX512F__
static inline __m512bh load_pairs(const uint16_t *from) { return (__m512bh)_mm512_loadu_si512(from); }
static inline __m512bh pair_everywhere(uint32_t pair) { return (__m512bh)_mm512_set1_epi32((int)pair); }
#else
static inline __m512bh load_pairs(const uint16_t *from) { return _mm512_loadu_si512(from); }
static inline __m512bh pair_everywhere(uint32_t pair) { return _mm512_set1_epi32((int)pair); }
#endif

static inline __m512 exponential(__m512 x) {
    /* Of these two the second operand is the answer when one is NaN: broken numbers must not come out whole. */
    x = _mm512_max_ps(_mm512_set1_ps(-104.0f), _mm512_min_ps(_mm512_set1_ps(88.0f), x));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

enum { LINEARS_IN_LAYER = 4 };

/* A part of a forward: the layers from `first` up to `end`, before the first of all the embedding, behind the last of
 * all the logits, unless they are NULL. `scratch->taken` is all zeros before the first part, and `scratch` stays what it
 * is between them. What the last layer makes of the tokens is then in `scratch->residual`. */
void sequoia_layers(const Model *model, const Batch *batch, const Scratch *scratch, int32_t first, int32_t end,
                    float *logits);

/* Logits, (rows, vocabulary) float32, of rows that were in `residual` behind the last layer, (rows, hidden). */
void sequoia_head(const Model *model, const float *behind_layers, int32_t rows, const Scratch *scratch, float *logits);

/* All of it. Logits, (wanted, vocabulary) float32. */
void sequoia_forward(const Model *model, const Batch *batch, const Scratch *scratch, float *logits);

#endif
