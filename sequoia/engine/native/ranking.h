/* The tokens that a tree's nodes may have as children, from their logits; and what that shares with `target.c`. */
#ifndef SEQUOIA_RANKING_H
#define SEQUOIA_RANKING_H

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { DRAFT_WIDTH = 32 };    /* candidates of q, as in children.py */
enum { COUPLED_WIDTH = 256 }; /* tokens with noise of their own, as in sampling.py */
enum { RANKING_ROOM = 1024 }; /* keys that `sequoia_largest` needs room for, beside those wanted */
/* ---- noise: noise.py ---- */

static const uint64_t GOLDEN = 0x9E3779B97F4A7C15u, OTHERS = -1, DRAW_FROM_OTHERS = -2;

static inline uint64_t mixed(uint64_t x) { /* SplitMix64's output function */
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

static inline uint64_t noise_stream(uint64_t seed, int64_t position) {
    return mixed(seed + ((uint64_t)position + 1) * GOLDEN);
}

static inline double uniform(uint64_t stream, uint64_t id) {
    return ((double)(mixed((id + 1) * GOLDEN + stream) >> 12) + 0.5) * 0x1p-52;
}

static inline double gumbel_of(double uniform) { return -log(-log(uniform)); }

/* Whether a token of that weight (or more tokens, of that mass) may beat a race, of which `scale` is exp(-race): it does
 * if -log(uniform) < weight * scale, and 1 - uniform is not above -log(uniform). So most of a race is run without a
 * logarithm. Numbers that double cannot tell from 0 or infinity may. */
static inline int may_win(double uniform, double weight, double scale) {
    return weight == 0.0 || !(1.0 - uniform > weight * scale * (1.0 + 1e-9));
}

/* ---- the largest of a row ---- */

/* Keys order a row's entries: the order of the values above, the falling order of the ids below. */
static inline float value_of(uint64_t key) {
    uint32_t bits = (uint32_t)(key >> 32);
    bits ^= bits >> 31 ? 0x80000000u : 0xffffffffu;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t id_of(uint64_t key) { return ~(uint32_t)key; }

/* Keys of the `count` (at least 1) largest of `values`, falling, into `keys` with room for count + RANKING_ROOM. Returns
 * how many there are: -inf and NaN are none. `is_broken` tells whether there is a NaN. */
int sequoia_largest(const float *values, int64_t size, int count, uint64_t *keys, int *is_broken);

/* ---- rankings ---- */

enum { TOP = 0, COUPLED = 1, DRAWN = 2 };

/* By what a tree's nodes are ranked. */
typedef struct {
    int32_t kind;           /* TOP, COUPLED or DRAWN */
    int32_t width;          /* tokens a node at most */
    int32_t num_candidates; /* of the distribution that is raced or drawn from, at most; DRAWN: at most DRAFT_WIDTH */
    int32_t is_cut;         /* top_p is a share of the candidates' mass, not of all tokens' */
    int64_t vocab_size;     /* logits that count */
    double temperature, top_p;
    double sharpness; /* see `sequoia_score` */
    double least_log; /* candidates below it, counted from the likeliest, are cut; -inf: none */
    uint64_t seed;
    const int64_t *token_ids; /* (vocab_size,) ascending: what the logits are of; NULL: the tokens from 0 on */
} Ranker;

/* One row's ranking. */
typedef struct {
    int64_t *token_ids;  /* (width,), in the order of the ranks */
    int64_t *num_tokens; /* how many of them there are */
    uint32_t *q_ids;     /* (DRAFT_WIDTH,), zeros where q has fewer; DRAWN only */
    float *q_weights;    /* (DRAFT_WIDTH,) */
} Ranked;

/* Rank one row of logits. `position` is that of the tokens ranked; `exponentials`: (DRAFT_WIDTH,), DRAWN only. */
void sequoia_rank(const Ranker *ranker, const float *logits, int64_t position, const double *exponentials,
                  const Ranked *ranked);

/* Rank one row, TOP or COUPLED, and score what is ranked: the logarithm of each one's chance to be the target's choice,
 * which is the softmax of the candidates' logits, COUPLED with T times their noise, by the sharpness. (width,). */
void sequoia_score(const Ranker *ranker, const float *logits, int64_t position, const Ranked *ranked, double *scores);

/* ---- mixtures ---- */

/* Continuations that are mixed into the distributions of a tree's nodes: trie.py. */
typedef struct {
    int64_t num_nodes;
    const int64_t *parents, *token_ids; /* (nodes,) in level order, root first */
    const int64_t *logit_rows;          /* (nodes,): where the logits have each token; behind them: they do not */
    const double *log_odds;             /* (nodes,) */
    double temperature;
    double *shares; /* (nodes,): of the probability of each token that was raised the part that is the trie's */
} Trie;

/* The child of a node that has this token; -1: none, as of no node at all. */
int64_t sequoia_find_child(const Trie *trie, int64_t node, int64_t token);

/* Make a row of logits those of the mixture at a node, in place. No two rows may be mixed at one node. */
void sequoia_mix(const Trie *trie, int64_t node, int64_t vocab_size, float *logits);

#endif
