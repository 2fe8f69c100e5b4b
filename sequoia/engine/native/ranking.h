/* The tokens that a tree's nodes may have as children, from their logits. */
#ifndef SEQUOIA_RANKING_H
#define SEQUOIA_RANKING_H

#include <stdint.h>

enum { DRAFT_WIDTH = 32 }; /* candidates of q, as in children.py */
enum { TOP = 0, COUPLED = 1, DRAWN = 2 };

/* By what a tree's nodes are ranked. */
typedef struct {
    int32_t kind;           /* TOP, COUPLED or DRAWN */
    int32_t width;          /* tokens a node at most */
    int32_t num_candidates; /* of the distribution that is raced or drawn from, at most; DRAWN: at most DRAFT_WIDTH */
    int32_t is_cut;         /* top_p is a share of the candidates' mass, not of all tokens' */
    int64_t vocab_size;     /* logits that count */
    double temperature, top_p;
    double least_log; /* candidates below it, counted from the likeliest, are cut; -inf: none */
    uint64_t seed;
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

#endif
