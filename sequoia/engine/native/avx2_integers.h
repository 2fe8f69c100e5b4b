/* Integer products on AVX2, which has none of four bytes at once: their inputs, and those of one tile of rows by one
 * panel of outputs. The sums of a group are exact, the same as those of linear.c, and are added up in the same order.
 *
 * INT8: bytes are multiplied as integers of 16 bits, so inputs of 16 bits cost no more than those of 8. A word is four
 * inputs, (first, third, second, fourth): two for the even bytes of the weights and two for the odd ones.
 * INT4: a weight is at most 15, so the products of a whole group fit 16 bits. A word is four bytes, as on AVX-512.
 */
#ifndef SEQUOIA_AVX2_INTEGERS_H
#define SEQUOIA_AVX2_INTEGERS_H

enum { BYTES_TILE = 4, NIBBLES_TILE = 4, WIDE_NIBBLES_TILE = 2, NIBBLES_GROUP = 32 };

OF_TWO(add_epi16, Integers, _mm256_add_epi16)
OF_TWO(madd_epi16, Integers, _mm256_madd_epi16)
OF_TWO(maddubs_epi16, Integers, _mm256_maddubs_epi16)

/* 16 integers of 16 bits as four words of INT8's, `stride` apart. */
INLINE void put_integers(uint64_t *to, int64_t stride, Integers values) {
    uint64_t words[4];
    __m256i all = _mm256_permute4x64_epi64(_mm256_packs_epi32(values.low, values.high), 0xd8);
    _mm256_storeu_si256((void *)words, _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(all, 0xd8), 0xd8));
    for (int i = 0; i < 4; i++) to[i * stride] = words[i];
}

/* Nothing; but the compiler cannot add products to each other before they are added to this, which takes more registers
 * than there are. */
INLINE __m256i in_register(__m256i a) {
    __asm__("" : "+x"(a));
    return a;
}

/* sums += `words` of INT8's by as many halves of a panel. Vectors by themselves: of pairs that last through a loop the
 * compiler makes memory. */
INLINE void sum_bytes(const int height, const int halves, const uint8_t *w, const uint64_t *x, int words, int fetches,
                      Integers sums[][2]) {
    const int vectors = 2 * halves;
    const __m256i even_bytes = _mm256_set1_epi32(0x00ff00ff);
    __m256i own[BYTES_TILE][4];
#pragma GCC unroll 4
    for (int i = 0; i < height; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) own[i][v] = v & 1 ? sums[i][v / 2].high : sums[i][v / 2].low;
    for (int word = 0; word < words; word++, w += 128, x += height) {
        if (fetches) fetch_ahead(w, 128);
#pragma GCC unroll 2
        for (int is_odd = 0; is_odd < 2; is_odd++) {
            __m256i a[4];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                __m256i bytes = _mm256_loadu_si256((const __m256i *)w + v);
                a[v] = is_odd ? _mm256_srli_epi16(bytes, 8) : _mm256_and_si256(bytes, even_bytes);
            }
#pragma GCC unroll 4
            for (int i = 0; i < height; i++) {
                __m256i b = _mm256_set1_epi32(((const int *)x)[2 * i + is_odd]);
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++)
                    own[i][v] = in_register(_mm256_add_epi32(own[i][v], _mm256_madd_epi16(a[v], b)));
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < height; i++)
#pragma GCC unroll 2
        for (int half = 0; half < halves; half++) sums[i][half] = (Integers){own[i][2 * half], own[i][2 * half + 1]};
}

/* sums = one group of INT4's by as many halves of a panel. */
INLINE void sum_nibbles(const int height, const int halves, const uint8_t *w, const uint32_t *x, int fetches,
                        Integers sums[][2]) {
    const int vectors = 2 * halves;
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256i own[NIBBLES_TILE][4];
#pragma GCC unroll 4
    for (int i = 0; i < height; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) own[i][v] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int word = 0; word < NIBBLES_GROUP / 4; word += 2, w += 128, x += 2 * height) {
        if (fetches) fetch_ahead(w, 128);
#pragma GCC unroll 2
        for (int is_high = 0; is_high < 2; is_high++) {
            __m256i a[4];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                __m256i pairs = _mm256_loadu_si256((const __m256i *)w + v);
                a[v] = _mm256_and_si256(is_high ? _mm256_srli_epi16(pairs, 4) : pairs, nibble);
            }
#pragma GCC unroll 4
            for (int i = 0; i < height; i++) {
                __m256i b = _mm256_set1_epi32((int)x[is_high * height + i]);
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++)
                    own[i][v] = in_register(_mm256_add_epi16(own[i][v], _mm256_maddubs_epi16(a[v], b)));
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < height; i++)
#pragma GCC unroll 2
        for (int half = 0; half < halves; half++)
            sums[i][half] = (Integers){_mm256_madd_epi16(own[i][2 * half], ones),
                                       _mm256_madd_epi16(own[i][2 * half + 1], ones)};
}

/* totals += the sums of a group, scaled. */
INLINE void add_group(const int height, const int halves, Integers sums[][2], const uint16_t *scales,
                      const float *input_scales, int num_groups, Floats *totals) {
#pragma GCC unroll 2
    for (int half = 0; half < halves; half++) {
        Floats scale = load_bfloat16(scales + half * LANES);
#pragma GCC unroll 4
        for (int i = 0; i < height; i++) {
            Floats both = pair_mul_ps(scale, pair_set1_ps(input_scales[(int64_t)i * num_groups]));
            totals[2 * i + half] = pair_fmadd_ps(pair_cvtepi32_ps(sums[i][half]), both, totals[2 * i + half]);
        }
    }
}

/* A tile by a panel, before the bias; `halves` of the panel at a time, or the registers would not do. Weights that are
 * read in order, the whole panel, are fetched best by the CPU alone. */
INLINE void multiply_bytes(const int height, const int halves, const Linear *linear, const uint32_t *x,
                           const float *input_scales, const int32_t *input_sums, int panel, Floats totals[][2]) {
    int group = linear->group, num_groups = linear->inputs / group;
    const uint8_t *w = (const uint8_t *)linear->weights + (int64_t)panel * PANEL * linear->inputs;
    const uint16_t *scales = linear->scales + (int64_t)panel * num_groups * PANEL;
    const uint64_t *words = (const uint64_t *)x;
    for (int i = 0; i < height; i++) totals[i][0] = totals[i][1] = pair_set1_ps(0.0f);
    for (int g = 0; g < num_groups; g++, scales += PANEL, w += PANEL * group, words += group / 4 * height) {
#pragma GCC unroll 1
        for (int half = 0; half < 2; half += halves) {
            Integers sums[BYTES_TILE][2];
#pragma GCC unroll 4
            for (int i = 0; i < height; i++)
                sums[i][0] = sums[i][1] = pair_set1_epi32(-128 * input_sums[((int64_t)i * num_groups + g) * 2]);
            sum_bytes(height, halves, w + half * 64, words, group / 4, halves == 1 && half == 0, sums);
            add_group(height, halves, sums, scales + half * LANES, input_scales + g, num_groups, totals[0] + half);
        }
    }
}

INLINE void multiply_nibbles(const int height, const int halves, const int wide, const Linear *linear, const uint32_t *x,
                             const float *input_scales, const int32_t *input_sums, int panel, Floats totals[][2]) {
    int num_groups = linear->inputs / NIBBLES_GROUP;
    const uint8_t *w = (const uint8_t *)linear->weights + (int64_t)panel * PANEL / 2 * linear->inputs;
    const uint16_t *scales = linear->scales + (int64_t)panel * num_groups * PANEL;
    const uint32_t *low = x + (int64_t)height * (linear->inputs / 4);
    for (int i = 0; i < height; i++) totals[i][0] = totals[i][1] = pair_set1_ps(0.0f);
    for (int g = 0; g < num_groups; g++, scales += PANEL, w += PANEL / 2 * NIBBLES_GROUP) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; half += halves) {
            Integers sums[NIBBLES_TILE][2], low_sums[NIBBLES_TILE][2];
            sum_nibbles(height, halves, w + half * 64, x, half == 0, sums);
            if (wide) sum_nibbles(height, halves, w + half * 64, low, 0, low_sums);
#pragma GCC unroll 4
            for (int i = 0; i < height; i++) {
                const int32_t *of_inputs = input_sums + ((int64_t)i * num_groups + g) * 2;
                Integers offset = pair_set1_epi32(8 * (wide ? 256 * of_inputs[0] + of_inputs[1] : of_inputs[0]));
#pragma GCC unroll 2
                for (int j = 0; j < halves; j++) {
                    if (wide) sums[i][j] = pair_add_epi32(pair_slli_epi32(sums[i][j], 8), low_sums[i][j]);
                    sums[i][j] = pair_sub_epi32(sums[i][j], offset);
                }
            }
            add_group(height, halves, sums, scales + half * LANES, input_scales + g, num_groups, totals[0] + half);
        }
        x += NIBBLES_GROUP / 4 * height;
        low += NIBBLES_GROUP / 4 * height;
    }
}

#endif
