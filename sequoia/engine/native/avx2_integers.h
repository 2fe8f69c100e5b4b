/* Integer products on AVX2, which has none of four bytes at once: of one tile of rows by one panel of outputs. The sums
 * of a group are exact, the same as those of AVX-512, and are added up in the same order.
 *
 * Weights are multiplied as integers of 16 bits, so inputs of 16 bits cost no more than those of 8. A word is four
 * inputs, (first, third, second, fourth): two for the even bytes of the weights and two for the odd ones. But a weight
 * of INT4 is at most 15: with inputs of 8 bits the products of a whole group fit 16 bits, and a word is four bytes, as on
 * AVX-512.
 */
#ifndef SEQUOIA_AVX2_INTEGERS_H
#define SEQUOIA_AVX2_INTEGERS_H

enum { NIBBLES_GROUP = 32 };

/* Whether a layer's input becomes integers of 16 bits, see above, not bytes. */
static inline int takes_16_bits(const Linear *linear) { return linear->kind == INT8 || linear->activation_bits == 16; }

/* 16 integers as four words, `stride` apart. */
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

/* sums += `words` of inputs by as many halves of a panel. Vectors by themselves: pairs that last through a loop become
 * memory. */
INLINE void sum_words(const int height, const int halves, const int four, const uint8_t *w, const uint64_t *x,
                      int words, int fetches, Integers sums[][2]) {
    const int vectors = 2 * halves, parts = four ? 4 : 2, shifts[] = {0, 8, 4, 12};
    const __m256i first_part = _mm256_set1_epi32(four ? 0x000f000f : 0x00ff00ff);
    __m256i own[INTEGER_TILE][4];
#pragma GCC unroll 4
    for (int i = 0; i < height; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) own[i][v] = v & 1 ? sums[i][v / 2].high : sums[i][v / 2].low;
    for (int word = 0; word < words; word += parts / 2, w += 128, x += parts / 2 * height) {
        if (fetches) fetch_ahead(w, 128);
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++) {
            __m256i a[4];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                a[v] = _mm256_loadu_si256((const __m256i *)w + v);
                if (part) a[v] = _mm256_srli_epi16(a[v], shifts[part]);
                if (part < parts - 1) a[v] = _mm256_and_si256(a[v], first_part);
            }
#pragma GCC unroll 4
            for (int i = 0; i < height; i++) {
                __m256i b = _mm256_set1_epi32(((const int *)(x + part / 2 * height + i))[part & 1]);
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

/* sums += one group of INT4's, inputs of 8 bits, by as many halves of a panel. */
INLINE void sum_nibbles(const int height, const int halves, const uint8_t *w, const uint32_t *x, int fetches,
                        Integers sums[][2]) {
    const int vectors = 2 * halves;
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256i own[INTEGER_TILE][4];
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
            sums[i][half] = (Integers){
                _mm256_add_epi32(sums[i][half].low, _mm256_madd_epi16(own[i][2 * half], ones)),
                _mm256_add_epi32(sums[i][half].high, _mm256_madd_epi16(own[i][2 * half + 1], ones))};
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

/* A tile by a panel, before the bias; `halves` of the panel at a time, or the registers would not do. `offsets`: what
 * takes the offset of the weights off each sum. INT8's weights are fetched best by the CPU alone where a whole panel is
 * read in order. */
INLINE void multiply_avx2(const int height, const int halves, const int four, const int wide, const Linear *linear,
                          const uint32_t *x, const float *input_scales, const int32_t *offsets, int panel,
                          Floats totals[][2]) {
    int group = four ? NIBBLES_GROUP : linear->group, num_groups = linear->inputs / group;
    int64_t weight_bytes = PANEL * (int64_t)group / (four ? 2 : 1), words = (int64_t)height * (group / 4);
    const uint8_t *w = (const uint8_t *)linear->weights + panel * num_groups * weight_bytes;
    const uint16_t *scales = linear->scales + (int64_t)panel * num_groups * PANEL;
    for (int i = 0; i < height; i++) totals[i][0] = totals[i][1] = pair_set1_ps(0.0f);
    for (int g = 0; g < num_groups; g++, scales += PANEL, w += weight_bytes) {
#pragma GCC unroll 1
        for (int half = 0; half < 2; half += halves) {
            /* Or the compiler keeps what both halves read in registers that the sums need. */
            __asm__ volatile("" : "+r"(half) : : "memory");
            Integers sums[INTEGER_TILE][2];
            const uint8_t *own = w + half * 64;
#pragma GCC unroll 4
            for (int i = 0; i < height; i++)
                sums[i][0] = sums[i][1] = pair_set1_epi32(offsets[((int64_t)i * num_groups + g) * 2]);
            if (four && !wide) sum_nibbles(height, halves, own, x + g * words, half == 0, sums);
            else sum_words(height, halves, four, own, (const uint64_t *)x + g * words, group / 4,
                           half == 0 && (four || halves == 1), sums);
            add_group(height, halves, sums, scales + half * LANES, input_scales + g, num_groups, totals[0] + half);
        }
    }
}

#endif
