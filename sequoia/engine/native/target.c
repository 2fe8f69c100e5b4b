/* The target's p after a node, from its row of logits: `sampling.py` and `siblings.WholeTarget` in C, which make three
 * passes over the row at most and write nothing of its length.
 *
 * p at a token is exp((logit - largest logit) / temperature) over the sum of these, in double. Rows are changed while a
 * function runs, and left as they were.
 */
#include <math.h>
#include <string.h>

#include "decoder.h"
#include "ranking.h"

enum { BROKEN = -1, UNKNOWN = -2 }; /* as in targets.py */
enum { BLOCK = 512 };

/* What a request asks of p; see `sampling.Sampling`. */
typedef struct {
    int64_t vocab_size; /* logits that count */
    int64_t top_k;      /* 0: all */
    double temperature, top_p;
    double least_log; /* log of min_p; -inf: none */
    uint64_t seed;
} Parameters;

/* The tokens that have p, likeliest first; where nothing is cut, the likeliest of them. Weights are up to a constant. */
typedef struct {
    int count;
    uint32_t ids[COUPLED_WIDTH];
    double logs[COUPLED_WIDTH], weights[COUPLED_WIDTH];
} Support;

static inline int is_cut(const Parameters *wanted) {
    return wanted->top_k || wanted->top_p < 1.0 || wanted->least_log > -INFINITY;
}

/* ---- sums over a row ---- */

/* exp(x) for x <= 0 within 1 unit of the last digit: a power of two, and the Taylor series for what is left. */
static inline __m512d exponential_of(__m512d x) {
    static const double inverse_factorials[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
                                                1.0 / 362880,     1.0 / 40320,     1.0 / 5040,     1.0 / 720,
                                                1.0 / 120,        1.0 / 24,        1.0 / 6,        1.0 / 2,
                                                1.0,              1.0};
    x = _mm512_max_pd(_mm512_set1_pd(-1000.0), x); /* its power of two is zero */
    __m512d n = _mm512_roundscale_pd(_mm512_mul_pd(x, _mm512_set1_pd(0x1.71547652b82fep0)), _MM_FROUND_TO_NEAREST_INT);
    __m512d r = _mm512_fnmadd_pd(n, _mm512_set1_pd(0x1.62e42fefa39efp-1), x);
    r = _mm512_fnmadd_pd(n, _mm512_set1_pd(0x1.abc9e3b39803fp-56), r);
    __m512d p = _mm512_set1_pd(inverse_factorials[0]);
#pragma GCC unroll 13
    for (int i = 1; i < 14; i++) p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(inverse_factorials[i]));
    return _mm512_scalef_pd(p, n);
}

/* The largest of a row; NaN where there is one. */
static float peak_of(const float *logits, int64_t size) {
    __m512 most = _mm512_set1_ps(-INFINITY);
    __mmask16 broken = 0;
    for (int64_t i = 0; i < size; i += LANES) {
        __mmask16 lanes = first_lanes(size - i);
        __m512 values = _mm512_mask_loadu_ps(most, lanes, logits + i);
        broken |= _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
        most = _mm512_max_ps(most, values);
    }
    return broken ? NAN : _mm512_reduce_max_ps(most);
}

/* Of 8 tokens from `first` on, and of none behind the row's end. */
static inline __m512d weights_at(const float *logits, int64_t size, int64_t first, double peak, double temperature) {
    __mmask8 lanes = (__mmask8)first_lanes(size - first);
    __m512d values = _mm512_cvtps_pd(_mm256_maskz_loadu_ps(lanes, logits + first));
    /* A product instead of a quotient is off by a unit of the last digit, in a third of the time. */
    values = _mm512_mul_pd(_mm512_sub_pd(values, _mm512_set1_pd(peak)), _mm512_set1_pd(1.0 / temperature));
    return _mm512_maskz_mov_pd(lanes, exponential_of(values));
}

static double mass_of(const float *logits, int64_t first, int64_t end, double peak, double temperature) {
    __m512d left = _mm512_setzero_pd(), right = left;
    for (int64_t i = first; i < end; i += 16) {
        left = _mm512_add_pd(left, weights_at(logits, end, i, peak, temperature));
        right = _mm512_add_pd(right, weights_at(logits, end, i + 8, peak, temperature));
    }
    return _mm512_reduce_add_pd(_mm512_add_pd(left, right));
}

/* The token where the running sum of weights exceeds that share of them all; never one without weight. */
static int64_t invert(const float *logits, int64_t size, double peak, double temperature, double share) {
    int64_t num_blocks = (size + BLOCK - 1) / BLOCK, chosen = 0, token = 0;
    double masses[num_blocks], total = 0.0, before = 0.0, sum = 0.0;
    for (int64_t block = 0; block < num_blocks; block++) {
        int64_t first = block * BLOCK, end = first + BLOCK < size ? first + BLOCK : size;
        total += masses[block] = mass_of(logits, first, end, peak, temperature);
    }
    for (int64_t block = 0; block < num_blocks && sum <= share * total; block++) {
        if (masses[block] == 0.0) continue;
        chosen = block;
        before = sum;
        sum += masses[block];
    }
    for (int64_t i = chosen * BLOCK; i < size && i < (chosen + 1) * BLOCK && before <= share * total; i += 8) {
        double weights[8];
        _mm512_storeu_pd(weights, weights_at(logits, size, i, peak, temperature));
        for (int lane = 0; lane < 8 && before <= share * total; lane++) {
            before += weights[lane];
            if (weights[lane] > 0.0) token = i + lane;
        }
    }
    return token;
}

/* ---- tokens taken out of a row ---- */

static void take_out(float *logits, const int64_t *ids, int64_t count, float *taken) {
    for (int64_t i = 0; i < count; i++) {
        taken[i] = logits[ids[i]];
        logits[ids[i]] = -INFINITY;
    }
}

static void put_back(float *logits, const int64_t *ids, int64_t count, const float *taken) {
    for (int64_t i = count - 1; i >= 0; i--) logits[ids[i]] = taken[i];
}

/* ---- the tokens that a cut leaves ---- */

/* How many of the support's tokens top_p leaves. */
static int nucleus(const Support *support, double top_p, double mass) {
    double total = 0.0;
    int kept = 0;
    while (kept < support->count && total < top_p * mass) total += support->weights[kept++];
    return kept;
}

/* Returns 0, BROKEN, or UNKNOWN where a cut leaves, or may leave, more than COUPLED_WIDTH tokens. */
static int find_support(const Parameters *wanted, const float *logits, Support *support) {
    int has_top_k = wanted->top_k && wanted->top_k <= COUPLED_WIDTH, has_min_p = wanted->least_log > -INFINITY;
    int width = has_top_k ? (int)wanted->top_k : COUPLED_WIDTH, is_broken;
    uint64_t keys[COUPLED_WIDTH + RANKING_ROOM];
    int found = sequoia_largest(logits, wanted->vocab_size, width, keys, &is_broken);
    if (is_broken || !found || isinf(value_of(keys[0]))) return BROKEN;
    double peak = value_of(keys[0]);
    support->count = 0;
    for (int i = 0; i < found; i++) {
        double log = (value_of(keys[i]) - peak) / wanted->temperature;
        if (log < wanted->least_log) break;
        support->ids[i] = id_of(keys[i]);
        support->logs[i] = log;
        support->weights[i] = exp(log);
        support->count++;
    }
    if (!is_cut(wanted)) return 0;
    int is_whole = has_top_k || support->count < width;
    if (wanted->top_p >= 1.0) return is_whole ? 0 : UNKNOWN;
    if (!is_whole && (wanted->top_k || has_min_p)) return UNKNOWN;
    double mass = 0.0;
    for (int i = 0; i < support->count; i++) mass += support->weights[i];
    if (!is_whole) mass = mass_of(logits, 0, wanted->vocab_size, peak, wanted->temperature);
    int kept = nucleus(support, wanted->top_p, mass);
    if (!is_whole && kept == support->count) return UNKNOWN;
    support->count = kept;
    return 0;
}

/* ---- what verification asks ---- */

/* p at `ids` (distinct), and the mass of all other tokens. Returns 0, BROKEN or UNKNOWN. */
int64_t sequoia_target(const Parameters *wanted, float *logits, const int64_t *ids, int64_t count, double *values,
                       double *outside) {
    double total = 0.0;
    if (is_cut(wanted)) {
        Support support;
        int failed = find_support(wanted, logits, &support);
        if (failed) return failed;
        memset(values, 0, (size_t)count * sizeof *values);
        *outside = 0.0;
        for (int i = 0; i < support.count; i++) {
            int64_t at = 0;
            while (at < count && ids[at] != support.ids[i]) at++;
            *(at < count ? values + at : outside) += support.weights[i];
        }
    } else {
        double peak = peak_of(logits, wanted->vocab_size);
        if (!isfinite(peak)) return BROKEN;
        float taken[count + 1];
        take_out(logits, ids, count, taken);
        *outside = mass_of(logits, 0, wanted->vocab_size, peak, wanted->temperature);
        put_back(logits, ids, count, taken);
        for (int64_t i = 0; i < count; i++) values[i] = exp((taken[i] - peak) / wanted->temperature);
    }
    total = *outside;
    for (int64_t i = 0; i < count; i++) total += values[i];
    for (int64_t i = 0; i < count; i++) values[i] /= total;
    *outside /= total;
    return 0;
}

/* A token drawn from p without `ids`, where p has something outside them: `share`, in [0, 1), of that mass is before
 * it. Returns it, BROKEN or UNKNOWN. */
int64_t sequoia_draw(const Parameters *wanted, float *logits, const int64_t *ids, int64_t count, double share) {
    if (!is_cut(wanted)) {
        double peak = peak_of(logits, wanted->vocab_size);
        if (!isfinite(peak)) return BROKEN;
        float taken[count + 1];
        take_out(logits, ids, count, taken);
        int64_t token = invert(logits, wanted->vocab_size, peak, wanted->temperature, share);
        put_back(logits, ids, count, taken);
        return token;
    }
    Support support;
    int failed = find_support(wanted, logits, &support);
    if (failed) return failed;
    double total = 0.0, sum = 0.0;
    int64_t token = 0;
    for (int i = 0; i < support.count; i++) {
        for (int64_t at = 0; at < count; at++)
            if (ids[at] == support.ids[i]) support.weights[i] = 0.0;
        total += support.weights[i];
    }
    for (int i = 0; i < support.count && sum <= share * total; i++) {
        sum += support.weights[i];
        if (support.weights[i] > 0.0) token = support.ids[i];
    }
    return token;
}

/* The coupled rule's token at a position: `sampling.coupled_token`. Returns it, BROKEN or UNKNOWN. */
int64_t sequoia_coupled(const Parameters *wanted, float *logits, int64_t position) {
    Support support;
    int failed = find_support(wanted, logits, &support), best = 0;
    if (failed) return failed;
    uint64_t stream = noise_stream(wanted->seed, position);
    double most = -INFINITY, scale = INFINITY;
    for (int i = 0; i < support.count; i++) {
        double u = uniform(stream, support.ids[i]);
        if (!may_win(u, support.weights[i], scale)) continue;
        double race = support.logs[i] + gumbel_of(u);
        if (race > most) {
            most = race;
            scale = exp(-most);
            best = i;
        }
    }
    int64_t token = support.ids[best], ids[COUPLED_WIDTH], num_others = wanted->vocab_size - support.count;
    if (is_cut(wanted) || support.count < COUPLED_WIDTH) return token;
    /* All other tokens as one: none of them is likelier than the last of these. */
    double u = uniform(stream, OTHERS);
    if (!may_win(u, (double)num_others * support.weights[support.count - 1], scale)) return token;
    float taken[COUPLED_WIDTH], peak = logits[support.ids[0]];
    for (int i = 0; i < support.count; i++) ids[i] = support.ids[i];
    take_out(logits, ids, support.count, taken);
    double others = mass_of(logits, 0, wanted->vocab_size, peak, wanted->temperature);
    if (others > 0.0 && log(others) + gumbel_of(u) > most)
        token = invert(logits, wanted->vocab_size, peak, wanted->temperature, uniform(stream, DRAW_FROM_OTHERS));
    put_back(logits, ids, support.count, taken);
    return token;
}
