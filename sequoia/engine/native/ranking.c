/* Children of a tree's nodes: `children.py` and `noise.py` in C, for one row of logits at a time.
 *
 * Sums and exponentials are taken in another order and by another library than numpy's. So at a cut by top_p, and in a
 * race, two numbers that differ in their last digits alone may change places; nothing else differs.
 */
#include "ranking.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "decoder.h"

enum { BLOCK = 4 * LANES };
static const double MOST_DROP = 10 * 0.693147180559945309417; /* as in children.py */

/* ---- the largest of a row ---- */

static inline __m512i keys_of(__m256 values, __m256i ids) {
    /* The sum makes -0 and 0 one. */
    __m256i bits = _mm256_castps_si256(_mm256_add_ps(values, _mm256_setzero_ps()));
    __m256i flips = _mm256_or_si256(_mm256_srai_epi32(bits, 31), _mm256_set1_epi32((int)0x80000000u));
    __m512i above = _mm512_slli_epi64(_mm512_cvtepu32_epi64(_mm256_xor_si256(bits, flips)), 32);
    return _mm512_or_si512(above, _mm512_cvtepu32_epi64(_mm256_xor_si256(ids, _mm256_set1_epi32(-1))));
}

/* Put the `count` largest of `size` distinct keys first, in any order; 0 < count < size. */
static void select_largest(uint64_t *keys, int size, int count) {
    int low = 0, high = size - 1, last = count - 1;
    while (low < high) {
        uint64_t a = keys[low], b = keys[low + (high - low) / 2], c = keys[high];
        uint64_t pivot = a > b ? (b > c ? b : a > c ? c : a) : (a > c ? a : b > c ? c : b);
        int i = low, j = high;
        while (i <= j) {
            while (keys[i] > pivot) i++;
            while (keys[j] < pivot) j--;
            if (i <= j) {
                uint64_t key = keys[i];
                keys[i++] = keys[j];
                keys[j--] = key;
            }
        }
        if (last <= j) high = j;
        else if (last >= i) low = i;
        else return;
    }
}

static int falling(const void *a, const void *b) {
    uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;
    return (left < right) - (left > right);
}

/* The keys of the lanes that are above the threshold, behind those found before. Returns how many there are now. */
static inline int append(uint64_t *keys, int size, __m512 values, __mmask16 lanes, int64_t first_id) {
    __m512i ids = _mm512_add_epi32(_mm512_set1_epi32((int)first_id),
                                   _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    __mmask8 low = (__mmask8)lanes, high = (__mmask8)(lanes >> 8);
    _mm512_mask_compressstoreu_epi64(keys + size, low,
                                     keys_of(_mm512_castps512_ps256(values), _mm512_castsi512_si256(ids)));
    size += __builtin_popcount(low);
    _mm512_mask_compressstoreu_epi64(keys + size, high,
                                     keys_of(_mm512_extractf32x8_ps(values, 1), _mm512_extracti32x8_epi32(ids, 1)));
    return size + __builtin_popcount(high);
}

/* Ids ascend, so an entry that is only as large as the count-th largest of those before it is never wanted. */
int sequoia_largest(const float *values, int64_t size, int count, uint64_t *keys, int *is_broken) {
    __m512 threshold = _mm512_set1_ps(-INFINITY);
    int found = 0;
    *is_broken = 0;
    for (int64_t block = 0; block < size; block += BLOCK) {
        __m512 parts[4];
        __mmask16 above[4]; /* or NaN */
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            __mmask16 lanes = first_lanes(size - block - i * LANES);
            parts[i] = _mm512_maskz_loadu_ps(lanes, values + block + i * LANES);
            above[i] = _mm512_mask_cmp_ps_mask(lanes, parts[i], threshold, _CMP_NLE_UQ);
        }
        if (!(above[0] | above[1] | above[2] | above[3])) continue;
        for (int i = 0; i < 4; i++) {
            __mmask16 numbers = _mm512_mask_cmp_ps_mask(above[i], parts[i], parts[i], _CMP_ORD_Q);
            *is_broken |= numbers != above[i];
            if (numbers) found = append(keys, found, parts[i], numbers, block + i * LANES);
        }
        if (found > count + RANKING_ROOM - BLOCK) {
            select_largest(keys, found, count);
            found = count;
            uint64_t least = keys[0];
            for (int i = 1; i < count; i++) least = keys[i] < least ? keys[i] : least;
            threshold = _mm512_set1_ps(value_of(least));
        }
    }
    if (found > count) {
        select_largest(keys, found, count);
        found = count;
    }
    qsort(keys, (size_t)found, sizeof *keys, falling);
    return found;
}

/* ---- candidates of a distribution ---- */

/* The sum of exp((value - peak) / temperature) over a row. */
static double mass_of(const float *values, int64_t size, float peak, float temperature) {
    __m512d total = _mm512_setzero_pd();
    for (int64_t i = 0; i < size; i += LANES) {
        __mmask16 lanes = first_lanes(size - i);
        __m512 logs = _mm512_div_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, values + i), _mm512_set1_ps(peak)),
                                    _mm512_set1_ps(temperature));
        __m512 weights = _mm512_maskz_mov_ps(lanes, exponential(logs));
        total = _mm512_add_pd(total, _mm512_cvtps_pd(_mm512_castps512_ps256(weights)));
        total = _mm512_add_pd(total, _mm512_cvtps_pd(_mm512_extractf32x8_ps(weights, 1)));
    }
    return _mm512_reduce_add_pd(total);
}

/* How many of the candidates, whose log q are `logs`, falling, top_p leaves. */
static int nucleus(const Ranker *ranker, const float *values, float peak, const double *logs, int count) {
    double weights[COUPLED_WIDTH], mass = 0.0, total = 0.0;
    for (int i = 0; i < count; i++) mass += weights[i] = exp(logs[i]);
    if (!ranker->is_cut) mass = mass_of(values, ranker->vocab_size, peak, (float)ranker->temperature);
    for (int kept = 0; kept < count; kept++) {
        total += weights[kept];
        if (!(total - weights[kept] < ranker->top_p * mass)) return kept;
    }
    return count;
}

static inline uint32_t token_of(const Ranker *ranker, uint64_t key) {
    return ranker->token_ids ? (uint32_t)ranker->token_ids[id_of(key)] : id_of(key);
}

/* The likeliest tokens that no parameter cuts, and log q up to a constant; falling. Returns how many there are. */
static int candidates(const Ranker *ranker, const float *values, uint32_t *ids, double *logs) {
    uint64_t keys[COUPLED_WIDTH + RANKING_ROOM];
    int is_broken, count = sequoia_largest(values, ranker->vocab_size, ranker->num_candidates, keys, &is_broken);
    if (is_broken || !count || isinf(value_of(keys[0]))) return 0;
    float peak = value_of(keys[0]);
    int kept = 0;
    for (; kept < count; kept++) {
        ids[kept] = token_of(ranker, keys[kept]);
        logs[kept] = ((double)value_of(keys[kept]) - peak) / ranker->temperature;
        if (!(logs[kept] >= ranker->least_log)) break;
    }
    return ranker->top_p < 1.0 ? nucleus(ranker, values, peak, logs, kept) : kept;
}

/* ---- rankings ---- */

/* The tokens of the `ranker->width` smallest of `times`, which are used up; of equal ones the first. */
static void rank_by(const Ranker *ranker, double *times, const uint32_t *ids, int count, const Ranked *ranked) {
    int num_ranked = count < ranker->width ? count : ranker->width;
    for (int rank = 0; rank < num_ranked; rank++) {
        int first = -1;
        for (int i = 0; i < count; i++)
            if (!isnan(times[i]) && (first < 0 || times[i] < times[first])) first = i;
        ranked->token_ids[rank] = ids[first];
        times[first] = NAN;
    }
    *ranked->num_tokens = num_ranked;
}

static void rank_top(const Ranker *ranker, const float *logits, const Ranked *ranked) {
    uint64_t keys[ranker->width + RANKING_ROOM];
    int is_broken, count = sequoia_largest(logits, ranker->vocab_size, ranker->width, keys, &is_broken);
    for (int rank = 0; rank < count; rank++) ranked->token_ids[rank] = token_of(ranker, keys[rank]);
    *ranked->num_tokens = count;
}

static void rank_coupled(const Ranker *ranker, const float *logits, int64_t position, const Ranked *ranked) {
    uint32_t ids[COUPLED_WIDTH];
    double logs[COUPLED_WIDTH], races[COUPLED_WIDTH], scale = INFINITY; /* exp(-race) of the last one ranked */
    int count = candidates(ranker, logits, ids, logs), num_ranked = 0;
    int most = ranker->width < COUPLED_WIDTH ? ranker->width : COUPLED_WIDTH;
    uint64_t stream = noise_stream(ranker->seed, position);
    for (int i = 0; i < count; i++) {
        double u = uniform(stream, ids[i]);
        if (!may_win(u, exp(logs[i]), scale)) continue;
        double race = logs[i] + gumbel_of(u);
        int place = num_ranked;
        while (place && races[place - 1] < race) place--;
        if (place == most) continue;
        if (num_ranked < most) num_ranked++;
        for (int behind = num_ranked - 1; behind > place; behind--) {
            races[behind] = races[behind - 1];
            ranked->token_ids[behind] = ranked->token_ids[behind - 1];
        }
        races[place] = race;
        ranked->token_ids[place] = ids[i];
        if (num_ranked == most) scale = exp(-races[most - 1]);
    }
    *ranked->num_tokens = num_ranked;
}

static float rounded_to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static void rank_drawn(const Ranker *ranker, const float *logits, const double *exponentials, const Ranked *ranked) {
    uint32_t ids[COUPLED_WIDTH];
    double logs[COUPLED_WIDTH], times[DRAFT_WIDTH], most = -INFINITY;
    int count = candidates(ranker, logits, ids, logs), used = 0;
    memset(ranked->q_ids, 0, DRAFT_WIDTH * sizeof *ranked->q_ids);
    memset(ranked->q_weights, 0, DRAFT_WIDTH * sizeof *ranked->q_weights);
    for (int i = 0; i < count; i++) {
        double allowed = i * MOST_DROP;
        most = fmax(most, logs[i] + allowed);
        float weight = rounded_to_bfloat16((float)exp(most - allowed));
        if (weight == 0.0f) break; /* and so are all behind it */
        ranked->q_ids[i] = ids[i];
        ranked->q_weights[i] = weight;
        times[used++] = exponentials[i] / (double)weight;
    }
    rank_by(ranker, times, ids, used, ranked);
}

void sequoia_rank(const Ranker *ranker, const float *logits, int64_t position, const double *exponentials,
                  const Ranked *ranked) {
    if (ranker->kind == TOP) rank_top(ranker, logits, ranked);
    else if (ranker->kind == COUPLED) rank_coupled(ranker, logits, position, ranked);
    else rank_drawn(ranker, logits, exponentials, ranked);
}

/* The largest of `logs`, of equal ones the first. */
static void rank_scored(const Ranker *ranker, const uint32_t *ids, const double *logs, int count, const Ranked *ranked,
                        double *scores) {
    int num_ranked = 0;
    for (int i = 0; i < count; i++) {
        int place = num_ranked;
        while (place && scores[place - 1] < logs[i]) place--;
        if (place == ranker->width) continue;
        if (num_ranked < ranker->width) num_ranked++;
        for (int behind = num_ranked - 1; behind > place; behind--) {
            scores[behind] = scores[behind - 1];
            ranked->token_ids[behind] = ranked->token_ids[behind - 1];
        }
        scores[place] = logs[i];
        ranked->token_ids[place] = ids[i];
    }
    *ranked->num_tokens = num_ranked;
}

void sequoia_score(const Ranker *ranker, const float *logits, int64_t position, const Ranked *ranked, double *scores) {
    uint32_t ids[COUPLED_WIDTH];
    double logs[COUPLED_WIDTH], scale = ranker->temperature / ranker->sharpness, total = 0.0;
    int count = candidates(ranker, logits, ids, logs);
    if (ranker->kind == COUPLED) {
        uint64_t stream = noise_stream(ranker->seed, position);
        for (int i = 0; i < count; i++) logs[i] += gumbel_of(uniform(stream, ids[i]));
    }
    rank_scored(ranker, ids, logs, count, ranked, scores);
    double peak = count ? scores[0] : 0.0;
    for (int i = 0; i < count; i++) total += exp((logs[i] - peak) * scale);
    for (int rank = 0; rank < *ranked->num_tokens; rank++) scores[rank] = (scores[rank] - peak) * scale - log(total);
}

/* ---- mixtures ---- */

int64_t sequoia_find_child(const Trie *trie, int64_t node, int64_t token) {
    for (int64_t child = 1; node >= 0 && child < trie->num_nodes; child++)
        if (trie->parents[child] == node && trie->token_ids[child] == token) return child;
    return -1;
}

/* The logarithm of a row's mass; not finite where the row is broken. */
static double log_mass_of(const float *logits, int64_t size, double temperature) {
    const __m512 none = _mm512_set1_ps(-INFINITY);
    __m512 peaks = none;
    __mmask16 broken = 0;
    for (int64_t i = 0; i < size; i += LANES) {
        __m512 values = _mm512_mask_loadu_ps(none, first_lanes(size - i), logits + i);
        broken |= _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
        peaks = _mm512_max_ps(peaks, values);
    }
    float peak = _mm512_reduce_max_ps(peaks);
    if (broken || isinf(peak)) return NAN;
    return peak / temperature + log(mass_of(logits, size, peak, (float)temperature));
}

void sequoia_mix(const Trie *trie, int64_t node, int64_t vocab_size, float *logits) {
    double mass = INFINITY; /* not known yet */
    for (int64_t child = 1; node >= 0 && child < trie->num_nodes; child++) {
        int64_t row = trie->logit_rows[child];
        if (trie->parents[child] != node || row >= vocab_size) continue;
        if (isinf(mass)) mass = log_mass_of(logits, vocab_size, trie->temperature);
        if (isnan(mass)) return;
        double own = logits[row] / trie->temperature, added = mass + trie->log_odds[child];
        if (own == -INFINITY) continue;
        double raised = fmax(own, added) + log1p(exp(-fabs(own - added)));
        logits[row] = (float)(raised * trie->temperature);
        trie->shares[child] = exp(added - raised);
    }
}
