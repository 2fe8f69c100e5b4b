/* A whole token tree in one call: level by level a forward of the nodes that have a token, and the ranking of their
 * children, which tells the tokens of the next level.
 *
 * Forwards are those that decoder.c would do for the same nodes, so a row and its logits are the same bits.
 */
#include <omp.h>
#include <string.h>

#include "decoder.h"
#include "ranking.h"

/* The nodes of a planned tree that have children, in level order; the first is the root, whose row is the last of the
 * slot's valid ones. */
typedef struct {
    int64_t num_nodes, num_levels;
    const int64_t *parents;      /* (nodes,) which of these nodes; the root's is not read */
    const int64_t *ranks;        /* (nodes,) among all the children of its parent */
    const int64_t *level_starts; /* (levels + 1,) */
    int64_t first_row, num_valid_rows, root_position;
} Tree;

/* What comes of it, node for node. */
typedef struct {
    int64_t *token_ids;  /* (nodes, width) */
    int64_t *num_tokens; /* (nodes,): those ranked; -1: the node has no token, as its parent has fewer than its rank */
    uint32_t *q_ids;     /* (nodes, DRAFT_WIDTH); DRAWN only */
    float *q_weights;
    int64_t num_forwards;
    double ranking_seconds; /* that were not spent in them */
} Grown;

/* The caller's memory. */
typedef struct {
    float *logits;     /* (nodes of the widest level, vocabulary) */
    int64_t *batch;    /* (7 * nodes + 1,) */
    int64_t *own_rows; /* (nodes * levels,) */
    int64_t *rows;     /* (nodes,): where each node's keys and values are */
    int64_t *living;   /* (nodes,): the nodes of a level that have a token */
    int64_t *standing; /* (nodes,): which of the trie's nodes each stands on; below 0: none */
} Memory;

/* The nodes of a level that have a token, and those tokens. Returns how many they are. */
static int find_living(const Tree *tree, const Ranker *ranker, const Grown *grown, int64_t level, int64_t *living,
                       int64_t *tokens) {
    int count = 0;
    for (int64_t node = tree->level_starts[level]; node < tree->level_starts[level + 1]; node++) {
        int64_t parent = tree->parents[node], rank = tree->ranks[node];
        grown->num_tokens[node] = -1;
        if (rank >= grown->num_tokens[parent]) continue;
        tokens[count] = grown->token_ids[parent * ranker->width + rank];
        living[count++] = node;
    }
    return count;
}

/* The forward of `count` living nodes, all of one level, behind `num_forwarded` before them. */
static Batch make_batch(const Tree *tree, const Memory *memory, int64_t level, int count, int64_t num_forwarded) {
    int64_t nodes = tree->num_nodes, *tokens = memory->batch, *positions = tokens + nodes;
    int64_t *write_rows = positions + nodes, *first_rows = write_rows + nodes, *prefix_lens = first_rows + nodes;
    int64_t *wanted = prefix_lens + nodes, *own_starts = wanted + nodes;
    own_starts[0] = 0;
    for (int i = 0; i < count; i++) {
        int64_t node = memory->living[i];
        positions[i] = tree->root_position + level;
        first_rows[i] = tree->first_row;
        prefix_lens[i] = tree->num_valid_rows;
        write_rows[i] = memory->rows[node] = tree->first_row + tree->num_valid_rows + num_forwarded + i;
        wanted[i] = i;
        own_starts[i + 1] = own_starts[i] + level;
        for (int64_t above = level - 1; above >= 0; above--, node = tree->parents[node])
            memory->own_rows[own_starts[i] + above] = memory->rows[node];
    }
    return (Batch){count, count, tokens, positions, write_rows, first_rows, prefix_lens, own_starts, memory->own_rows,
                   wanted, tree->num_valid_rows + level};
}

/* Mix into a node's logits what its place on the trie says; its parent has been ranked before. */
static void mix_node(const Tree *tree, const Ranker *ranker, const Trie *trie, int64_t node, float *logits,
                     int64_t *standing, const Grown *grown) {
    standing[node] = 0;
    if (node) {
        int64_t parent = tree->parents[node];
        int64_t token = grown->token_ids[parent * ranker->width + tree->ranks[node]];
        standing[node] = sequoia_find_child(trie, standing[parent], token);
    }
    sequoia_mix(trie, standing[node], ranker->vocab_size, logits);
}

/* Rank the children of a level's living nodes; row i of the logits and of the exponentials is the i-th one's. */
static void rank_level(const Model *model, const Tree *tree, const Ranker *ranker, const Trie *trie,
                       const double *exponentials, float *logits, const Memory *memory, int count, int64_t level,
                       Grown *grown) {
    double started = omp_get_wtime();
#pragma omp parallel for schedule(dynamic) num_threads(model->num_threads) if (count > 1)
    for (int i = 0; i < count; i++) {
        int64_t node = memory->living[i];
        Ranked ranked = {grown->token_ids + node * ranker->width, grown->num_tokens + node,
                         grown->q_ids + node * DRAFT_WIDTH, grown->q_weights + node * DRAFT_WIDTH};
        float *row = logits + (int64_t)i * model->head.outputs;
        if (trie) mix_node(tree, ranker, trie, node, row, memory->standing, grown);
        sequoia_rank(ranker, row, tree->root_position + 1 + level, exponentials + (int64_t)i * DRAFT_WIDTH, &ranked);
    }
    grown->ranking_seconds += omp_get_wtime() - started;
}

/* `trie`: NULL where there is none. `root_logits`: (vocabulary,), which become the mixture's where there is one.
 * `exponentials`: (nodes, DRAFT_WIDTH), a row for each node with a token, in their order; DRAWN only. */
void sequoia_grow(const Model *model, const Scratch *scratch, const Tree *tree, const Ranker *ranker, const Trie *trie,
                  const double *exponentials, float *root_logits, const Memory *memory, Grown *grown) {
    int64_t num_counters = (4 * (int64_t)model->num_layers + 1) * model->num_threads * CACHE_LINE, num_ranked = 1;
    memory->living[0] = 0;
    grown->num_forwards = 0;
    grown->ranking_seconds = 0.0;
    rank_level(model, tree, ranker, trie, exponentials, root_logits, memory, 1, 0, grown);
    for (int64_t level = 1; level < tree->num_levels; level++) {
        int count = find_living(tree, ranker, grown, level, memory->living, memory->batch);
        if (!count) continue; /* the nodes below have no tokens either, and are told so */
        Batch batch = make_batch(tree, memory, level, count, num_ranked - 1);
        memset(scratch->taken, 0, (size_t)num_counters * sizeof *scratch->taken);
        sequoia_forward(model, &batch, scratch, memory->logits);
        grown->num_forwards++;
        rank_level(model, tree, ranker, trie, exponentials + num_ranked * DRAFT_WIDTH, memory->logits, memory, count,
                   level, grown);
        num_ranked += count;
    }
}
