/* The vectors of AVX-512 that the engine is written with, as pairs of AVX2's, under the same names: for CPUs without it.
 *
 * Every function does what Intel's guide says of the instruction, for the arguments that the engine gives it: indices
 * and shuffles that it does not use are not here. Products of bfloat16 are multiplied and added in float32, even inputs
 * first, so numbers differ in their last digits from those of AVX-512; a row is the same bits in any company either way.
 */
#ifndef SEQUOIA_AVX2_H
#define SEQUOIA_AVX2_H

#include <immintrin.h>
#include <stdint.h>

typedef struct { __m256 low, high; } Floats;
typedef struct { __m256d low, high; } Doubles;
typedef struct { __m256i low, high; } Integers;

#define __m512 Floats
#define __m512d Doubles
#define __m512i Integers
#define __m512bh Integers
#define INLINE static inline __attribute__((always_inline))

#define OF_ONE(name, To, From, half) \
    INLINE To pair_##name(From a) { return (To){half(a.low), half(a.high)}; }
#define OF_TWO(name, Type, half) \
    INLINE Type pair_##name(Type a, Type b) { return (Type){half(a.low, b.low), half(a.high, b.high)}; }
#define OF_THREE(name, Type, half) \
    INLINE Type pair_##name(Type a, Type b, Type c) { \
        return (Type){half(a.low, b.low, c.low), half(a.high, b.high, c.high)}; \
    }
#define SHIFT(name, half) \
    INLINE Integers pair_##name(Integers a, int count) { return (Integers){half(a.low, count), half(a.high, count)}; }
#define ALL(name, Type, Element, half) \
    INLINE Type pair_##name(Element x) { return (Type){half(x), half(x)}; }

ALL(set1_ps, Floats, float, _mm256_set1_ps)
ALL(set1_pd, Doubles, double, _mm256_set1_pd)
ALL(set1_epi32, Integers, int, _mm256_set1_epi32)
ALL(set1_epi8, Integers, char, _mm256_set1_epi8)
OF_TWO(add_ps, Floats, _mm256_add_ps)
OF_TWO(sub_ps, Floats, _mm256_sub_ps)
OF_TWO(mul_ps, Floats, _mm256_mul_ps)
OF_TWO(div_ps, Floats, _mm256_div_ps)
OF_TWO(max_ps, Floats, _mm256_max_ps)
OF_TWO(min_ps, Floats, _mm256_min_ps)
OF_TWO(unpacklo_ps, Floats, _mm256_unpacklo_ps)
OF_TWO(unpackhi_ps, Floats, _mm256_unpackhi_ps)
OF_TWO(add_pd, Doubles, _mm256_add_pd)
OF_TWO(sub_pd, Doubles, _mm256_sub_pd)
OF_TWO(mul_pd, Doubles, _mm256_mul_pd)
OF_TWO(max_pd, Doubles, _mm256_max_pd)
OF_TWO(unpacklo_pd, Doubles, _mm256_unpacklo_pd)
OF_TWO(unpackhi_pd, Doubles, _mm256_unpackhi_pd)
OF_TWO(add_epi32, Integers, _mm256_add_epi32)
OF_TWO(sub_epi32, Integers, _mm256_sub_epi32)
OF_TWO(and_si512, Integers, _mm256_and_si256)
OF_TWO(or_si512, Integers, _mm256_or_si256)
OF_THREE(fmadd_ps, Floats, _mm256_fmadd_ps)
OF_THREE(fnmadd_ps, Floats, _mm256_fnmadd_ps)
OF_THREE(fmadd_pd, Doubles, _mm256_fmadd_pd)
OF_THREE(fnmadd_pd, Doubles, _mm256_fnmadd_pd)
OF_ONE(cvtepi32_ps, Floats, Integers, _mm256_cvtepi32_ps)
OF_ONE(cvtps_epi32, Integers, Floats, _mm256_cvtps_epi32)
OF_ONE(castsi512_ps, Floats, Integers, _mm256_castsi256_ps)
OF_ONE(castps_si512, Integers, Floats, _mm256_castps_si256)
OF_ONE(castps_pd, Doubles, Floats, _mm256_castps_pd)
OF_ONE(castpd_ps, Floats, Doubles, _mm256_castpd_ps)
SHIFT(slli_epi32, _mm256_slli_epi32)
SHIFT(srai_epi32, _mm256_srai_epi32)
SHIFT(srli_epi32, _mm256_srli_epi32)
SHIFT(srli_epi16, _mm256_srli_epi16)
SHIFT(slli_epi64, _mm256_slli_epi64)

/* ---- memory and masks ---- */

INLINE Floats pair_loadu_ps(const float *from) { return (Floats){_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
INLINE void pair_storeu_ps(float *to, Floats a) {
    _mm256_storeu_ps(to, a.low);
    _mm256_storeu_ps(to + 8, a.high);
}
INLINE void pair_storeu_pd(double *to, Doubles a) {
    _mm256_storeu_pd(to, a.low);
    _mm256_storeu_pd(to + 4, a.high);
}
INLINE Integers pair_loadu_si512(const void *from) {
    const __m256i *halves = from;
    return (Integers){_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}

/* All bits of the lanes whose bit is set. */
INLINE __m256i lanes_of(unsigned bits) {
    const __m256i own = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), own), own);
}
INLINE Integers pair_lanes_of(unsigned bits) { return (Integers){lanes_of(bits), lanes_of(bits >> 8)}; }

INLINE Floats pair_maskz_loadu_ps(unsigned bits, const float *from) {
    Integers lanes = pair_lanes_of(bits);
    return (Floats){_mm256_maskload_ps(from, lanes.low), _mm256_maskload_ps(from + 8, lanes.high)};
}
INLINE Floats pair_blend(Floats a, unsigned bits, Floats b) {
    Floats lanes = pair_castsi512_ps(pair_lanes_of(bits));
    return (Floats){_mm256_blendv_ps(a.low, b.low, lanes.low), _mm256_blendv_ps(a.high, b.high, lanes.high)};
}
INLINE Floats pair_mask_loadu_ps(Floats others, unsigned bits, const float *from) {
    return pair_blend(others, bits, pair_maskz_loadu_ps(bits, from));
}
INLINE Floats pair_maskz_mov_ps(unsigned bits, Floats a) { return pair_blend(pair_set1_ps(0.0f), bits, a); }
INLINE Doubles pair_maskz_mov_pd(unsigned bits, Doubles a) {
    __m256i lanes = lanes_of(bits);
    __m256i low = _mm256_cvtepi32_epi64(_mm256_castsi256_si128(lanes));
    __m256i high = _mm256_cvtepi32_epi64(_mm256_extracti128_si256(lanes, 1));
    return (Doubles){_mm256_and_pd(a.low, _mm256_castsi256_pd(low)), _mm256_and_pd(a.high, _mm256_castsi256_pd(high))};
}
INLINE Floats pair_mask_max_ps(Floats others, unsigned bits, Floats a, Floats b) {
    return pair_blend(others, bits, pair_max_ps(a, b));
}
INLINE void pair_mask_storeu_ps(float *to, unsigned bits, Floats a) {
    Integers lanes = pair_lanes_of(bits);
    _mm256_maskstore_ps(to, lanes.low, a.low);
    _mm256_maskstore_ps(to + 8, lanes.high, a.high);
}
INLINE void pair_mask_compressstoreu_epi64(uint64_t *to, unsigned bits, Integers a) {
    uint64_t values[8];
    _mm256_storeu_si256((void *)values, a.low);
    _mm256_storeu_si256((void *)(values + 4), a.high);
    for (; bits; bits &= bits - 1) *to++ = values[__builtin_ctz(bits)];
}

/* ---- sums over the lanes, and what moves between them ---- */

INLINE float quarter_reduce(__m128 a, int is_sum) {
    __m128 b = _mm_movehl_ps(a, a);
    a = is_sum ? _mm_add_ps(a, b) : _mm_max_ps(a, b);
    b = _mm_shuffle_ps(a, a, 1);
    return _mm_cvtss_f32(is_sum ? _mm_add_ss(a, b) : _mm_max_ss(a, b));
}
INLINE float pair_reduce_add_ps(Floats a) {
    __m256 sum = _mm256_add_ps(a.low, a.high);
    return quarter_reduce(_mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1)), 1);
}
INLINE float pair_reduce_max_ps(Floats a) {
    __m256 most = _mm256_max_ps(a.low, a.high);
    return quarter_reduce(_mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1)), 0);
}
INLINE double pair_reduce_add_pd(Doubles a) {
    __m256d sum = _mm256_add_pd(a.low, a.high);
    __m128d two = _mm_add_pd(_mm256_castpd256_pd128(sum), _mm256_extractf128_pd(sum, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}
INLINE int pair_reduce_add_epi32(Integers a) {
    __m256i sum = _mm256_add_epi32(a.low, a.high);
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
/* The even (0x88) or odd (0xdd) quarters of both. */
#define pair_shuffle_f32x4(a, b, which) \
    ((Floats){_mm256_permute2f128_ps((a).low, (a).high, (which) == 0x88 ? 0x20 : 0x31), \
              _mm256_permute2f128_ps((b).low, (b).high, (which) == 0x88 ? 0x20 : 0x31)})
#define pair_cmp_ps_mask(a, b, how) \
    ((__mmask16)(_mm256_movemask_ps(_mm256_cmp_ps((a).low, (b).low, how)) | \
                 _mm256_movemask_ps(_mm256_cmp_ps((a).high, (b).high, how)) << 8))

/* ---- other widths ---- */

INLINE Doubles pair_cvtps_pd(__m256 a) {
    return (Doubles){_mm256_cvtps_pd(_mm256_castps256_ps128(a)), _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1))};
}
INLINE Integers pair_cvtepu16_epi32(__m256i a) {
    return (Integers){_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)),
                      _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1))};
}
INLINE Integers pair_cvtepu32_epi64(__m256i a) {
    return (Integers){_mm256_cvtepu32_epi64(_mm256_castsi256_si128(a)),
                      _mm256_cvtepu32_epi64(_mm256_extracti128_si256(a, 1))};
}
/* Of integers that fit. */
INLINE __m256i to_16_bits(Integers a) {
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(a.low, a.high), 0xd8);
}
INLINE __m128i pair_cvtepi32_epi8(Integers a) {
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.low, a.high), 0xd8);
    return _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
/* To the nearest, of two the even one; what is no number stays none. */
INLINE __m256i pair_cvtneps_pbh(Floats a) {
    Integers bits = pair_castps_si512(a), one = pair_set1_epi32(1);
    Integers odd = pair_and_si512(pair_srli_epi32(bits, 16), one);
    Integers rounded = pair_srli_epi32(pair_add_epi32(bits, pair_add_epi32(odd, pair_set1_epi32(0x7fff))), 16);
    Integers quiet = pair_or_si512(pair_srli_epi32(bits, 16), pair_set1_epi32(0x40));
    unsigned broken = pair_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    Floats found = pair_blend(pair_castsi512_ps(rounded), broken, pair_castsi512_ps(quiet));
    return to_16_bits(pair_castps_si512(found));
}

/* ---- powers of two: a * 2^n in two steps, for a power that no number of its own has ---- */

INLINE __m256 half_power_ps(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
INLINE Floats pair_scalef_ps(Floats a, Floats n) {
    Integers whole = pair_cvtps_epi32(n), first = pair_srai_epi32(whole, 1), second = pair_sub_epi32(whole, first);
    a = pair_mul_ps(a, (Floats){half_power_ps(first.low), half_power_ps(first.high)});
    return pair_mul_ps(a, (Floats){half_power_ps(second.low), half_power_ps(second.high)});
}
INLINE __m256d half_power_pd(__m128i n) {
    return _mm256_castsi256_pd(
        _mm256_slli_epi64(_mm256_cvtepi32_epi64(_mm_add_epi32(n, _mm_set1_epi32(1023))), 52));
}
INLINE __m256d half_scalef_pd(__m256d a, __m256d n) {
    __m128i whole = _mm256_cvtpd_epi32(n), first = _mm_srai_epi32(whole, 1), second = _mm_sub_epi32(whole, first);
    return _mm256_mul_pd(_mm256_mul_pd(a, half_power_pd(first)), half_power_pd(second));
}
INLINE Doubles pair_scalef_pd(Doubles a, Doubles n) {
    return (Doubles){half_scalef_pd(a.low, n.low), half_scalef_pd(a.high, n.high)};
}

/* ---- products ---- */

/* sum + a * b, of the even and then of the odd bfloat16 numbers. */
INLINE __m256 half_dpbf16(__m256 sum, __m256i a, __m256i b) {
    const __m256i odd = _mm256_set1_epi32((int)0xffff0000u);
    __m256 a_even = _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), b_even = _mm256_castsi256_ps(_mm256_slli_epi32(b, 16));
    __m256 a_odd = _mm256_castsi256_ps(_mm256_and_si256(a, odd)), b_odd = _mm256_castsi256_ps(_mm256_and_si256(b, odd));
    return _mm256_fmadd_ps(a_odd, b_odd, _mm256_fmadd_ps(a_even, b_even, sum));
}
INLINE Floats pair_dpbf16_ps(Floats sum, Integers a, Integers b) {
    return (Floats){half_dpbf16(sum.low, a.low, b.low), half_dpbf16(sum.high, a.high, b.high)};
}

/* ---- the names ---- */

#define _mm512_abs_ps(a) pair_castsi512_ps(pair_and_si512(pair_castps_si512(a), pair_set1_epi32(0x7fffffff)))
#define _mm512_add_epi32 pair_add_epi32
#define _mm512_add_pd pair_add_pd
#define _mm512_add_ps pair_add_ps
#define _mm512_and_si512 pair_and_si512
#define _mm512_castpd_ps pair_castpd_ps
#define _mm512_castps512_ps256(a) ((a).low)
#define _mm512_castps_pd pair_castps_pd
#define _mm512_castsi512_ps pair_castsi512_ps
#define _mm512_castsi512_si256(a) ((a).low)
#define _mm512_cmp_ps_mask pair_cmp_ps_mask
#define _mm512_cvtepi32_epi8 pair_cvtepi32_epi8
#define _mm512_cvtepi32_ps pair_cvtepi32_ps
#define _mm512_cvtepu16_epi32 pair_cvtepu16_epi32
#define _mm512_cvtepu32_epi64 pair_cvtepu32_epi64
#define _mm512_cvtneps_pbh pair_cvtneps_pbh
#define _mm512_cvtps_epi32 pair_cvtps_epi32
#define _mm512_cvtps_pd pair_cvtps_pd
#define _mm512_div_ps pair_div_ps
#define _mm512_dpbf16_ps pair_dpbf16_ps
#define _mm512_extractf32x8_ps(a, half) ((half) ? (a).high : (a).low)
#define _mm512_extracti32x8_epi32(a, half) ((half) ? (a).high : (a).low)
#define _mm512_fmadd_pd pair_fmadd_pd
#define _mm512_fmadd_ps pair_fmadd_ps
#define _mm512_fnmadd_pd pair_fnmadd_pd
#define _mm512_fnmadd_ps pair_fnmadd_ps
#define _mm512_load_ps pair_loadu_ps
#define _mm512_load_si512 pair_loadu_si512
#define _mm512_loadu_ps pair_loadu_ps
#define _mm512_loadu_si512 pair_loadu_si512
#define _mm512_mask_cmp_ps_mask(bits, a, b, how) ((__mmask16)((bits) & pair_cmp_ps_mask(a, b, how)))
#define _mm512_mask_compressstoreu_epi64 pair_mask_compressstoreu_epi64
#define _mm512_mask_loadu_ps pair_mask_loadu_ps
#define _mm512_mask_max_ps pair_mask_max_ps
#define _mm512_mask_storeu_ps pair_mask_storeu_ps
#define _mm512_maskz_loadu_ps pair_maskz_loadu_ps
#define _mm512_maskz_mov_pd pair_maskz_mov_pd
#define _mm512_maskz_mov_ps pair_maskz_mov_ps
#define _mm512_max_pd pair_max_pd
#define _mm512_max_ps pair_max_ps
#define _mm512_min_ps pair_min_ps
#define _mm512_mul_pd pair_mul_pd
#define _mm512_mul_ps pair_mul_ps
#define _mm512_or_si512 pair_or_si512
#define _mm512_reduce_add_epi32 pair_reduce_add_epi32
#define _mm512_reduce_add_pd pair_reduce_add_pd
#define _mm512_reduce_add_ps pair_reduce_add_ps
#define _mm512_reduce_max_ps pair_reduce_max_ps
#define _mm512_roundscale_pd(a, how) \
    ((Doubles){_mm256_round_pd((a).low, (how) | _MM_FROUND_NO_EXC), _mm256_round_pd((a).high, (how) | _MM_FROUND_NO_EXC)})
#define _mm512_roundscale_ps(a, how) \
    ((Floats){_mm256_round_ps((a).low, (how) | _MM_FROUND_NO_EXC), _mm256_round_ps((a).high, (how) | _MM_FROUND_NO_EXC)})
#define _mm512_scalef_pd pair_scalef_pd
#define _mm512_scalef_ps pair_scalef_ps
#define _mm512_set1_epi32 pair_set1_epi32
#define _mm512_set1_epi8 pair_set1_epi8
#define _mm512_set1_pd pair_set1_pd
#define _mm512_set1_ps pair_set1_ps
#undef _mm512_setr_epi32
#define _mm512_setr_epi32(a, b, c, d, e, f, g, h, ...) \
    ((Integers){_mm256_setr_epi32(a, b, c, d, e, f, g, h), _mm256_setr_epi32(__VA_ARGS__)})
#define _mm512_setzero_pd() pair_set1_pd(0.0)
#define _mm512_setzero_ps() pair_set1_ps(0.0f)
#define _mm512_setzero_si512() pair_set1_epi32(0)
#define _mm512_shuffle_f32x4 pair_shuffle_f32x4
#define _mm512_slli_epi32 pair_slli_epi32
#define _mm512_slli_epi64 pair_slli_epi64
#define _mm512_srai_epi32 pair_srai_epi32
#define _mm512_srli_epi16 pair_srli_epi16
#define _mm512_store_ps pair_storeu_ps
#define _mm512_storeu_pd pair_storeu_pd
#define _mm512_storeu_ps pair_storeu_ps
#define _mm512_sub_epi32 pair_sub_epi32
#define _mm512_sub_pd pair_sub_pd
#define _mm512_sub_ps pair_sub_ps
#define _mm512_unpackhi_pd pair_unpackhi_pd
#define _mm512_unpackhi_ps pair_unpackhi_ps
#define _mm512_unpacklo_pd pair_unpacklo_pd
#define _mm512_unpacklo_ps pair_unpacklo_ps
#define _mm256_maskz_loadu_ps(bits, from) _mm256_maskload_ps(from, lanes_of(bits))

#endif
