/* A whole token tree in one call whose shape its scores decide: draft_worker/dynamic.py in C.
 *
 * Level by level a forward of the likeliest nodes of the level above, and the ranking of their children; after each the
 * nodes of the largest scores are kept, and the others dropped for good.
 */
#include <math.h>
#include <omp.h>
#include <string.h>

#include "decoder.h"
#include "ranking.h"

typedef struct {
    int64_t size, num_levels, width; /* as of `DynamicShape`; the root's level is one */
    int64_t most_children;           /* proposed under a node */
    int64_t first_row, num_valid_rows, root_position;
    double least_chance, least_gain, hit; /* their logarithms; hit: of `Calibration` in children.py */
} DynamicTree;

typedef struct {
    double score; /* the logarithm of the chance that the draft gives its path */
    int64_t parent, token;
    int64_t index;    /* among those that were forwarded, the root the first; -1: it was not */
    int64_t standing; /* which of the trie's nodes it stands on, of those that were forwarded; below 0: none */
} Node;

/* What comes of it: by node, and by node that was forwarded. */
typedef struct {
    Node *nodes; /* (size + width * most_children,): of the tree, in level order */
    int64_t num_nodes;
    int64_t *token_ids;  /* (forwarded, ranker's width): the root's row first */
    int64_t *num_tokens; /* (forwarded,): those ranked */
    double *scores;      /* as token_ids: of each under its own node */
    int64_t num_ranked, num_forwards;
    double ranking_seconds; /* that were not spent in forwards */
} GrownDynamic;

/* The caller's memory. */
typedef struct {
    float *logits;     /* (width, vocabulary) */
    int64_t *batch;    /* (7 * width + 1,) */
    int64_t *own_rows; /* (width * levels,) */
    int64_t *order;    /* (size,) */
    int64_t *places;   /* (size + width * most_children,) */
    int64_t *frontier; /* (width,) */
} DynamicMemory;

/* Of first..end-1 the `most` nodes whose scores are the largest and above `least`, of equal ones the first; ascending.
 * Returns how many they are. */
static int select_best(const Node *nodes, int64_t first, int64_t end, double least, int64_t most, int64_t *best) {
    int count = 0;
    for (int64_t node = first; node < end; node++) {
        int place = count;
        if (!(nodes[node].score > least)) continue;
        while (place && nodes[best[place - 1]].score < nodes[node].score) place--;
        if (place == most) continue;
        if (count < most) count++;
        memmove(best + place + 1, best + place, (size_t)(count - 1 - place) * sizeof *best);
        best[place] = node;
    }
    for (int i = 1; i < count; i++) {
        int64_t node = best[i];
        int place = i;
        for (; place && best[place - 1] > node; place--) best[place] = best[place - 1];
        best[place] = node;
    }
    return count;
}

/* Keep the root and the nodes of the largest scores, but none of less than the least chance, numbered anew. Returns the first that is not below `first_new`. */
static int64_t keep_best(const DynamicTree *tree, const DynamicMemory *memory, int64_t first_new, GrownDynamic *grown) {
    Node *nodes = grown->nodes;
    int count = select_best(nodes, 1, grown->num_nodes, tree->least_chance, tree->size - 1, memory->order);
    int64_t first_kept = 1;
    memory->places[0] = 0;
    for (int i = 0; i < count; i++) {
        int64_t node = memory->order[i];
        first_kept += node < first_new;
        memory->places[node] = i + 1;
        nodes[i + 1] = nodes[node];
        nodes[i + 1].parent = memory->places[nodes[i + 1].parent];
    }
    grown->num_nodes = count + 1;
    return first_kept;
}

/* The nodes to forward next: when the tree is full, a child of its last one could not displace any other. None where
 * all of them together are reached too seldom. */
static int find_frontier(const DynamicTree *tree, const GrownDynamic *grown, int64_t first, int64_t *frontier) {
    double least = -INFINITY;
    if (grown->num_nodes == tree->size) {
        least = INFINITY;
        for (int64_t node = 1; node < grown->num_nodes; node++) least = fmin(least, grown->nodes[node].score);
    }
    int count = select_best(grown->nodes, first, grown->num_nodes, least, tree->width, frontier);
    double chance = 0.0;
    for (int i = 0; i < count; i++) chance += exp(grown->nodes[frontier[i]].score);
    return chance >= exp(tree->least_gain) ? count : 0;
}

/* The forward of the frontier, all of one level. */
static Batch make_batch(const DynamicTree *tree, const DynamicMemory *memory, int64_t level, int count,
                        GrownDynamic *grown) {
    int64_t width = tree->width, *tokens = memory->batch, *positions = tokens + width;
    int64_t *write_rows = positions + width, *first_rows = write_rows + width, *prefix_lens = first_rows + width;
    int64_t *wanted = prefix_lens + width, *own_starts = wanted + width;
    int64_t before = tree->first_row + tree->num_valid_rows - 1; /* the root's row, whose index is 0 */
    own_starts[0] = 0;
    for (int i = 0; i < count; i++) {
        int64_t node = memory->frontier[i];
        grown->nodes[node].index = grown->num_ranked + i;
        tokens[i] = grown->nodes[node].token;
        positions[i] = tree->root_position + level;
        first_rows[i] = tree->first_row;
        prefix_lens[i] = tree->num_valid_rows;
        write_rows[i] = before + grown->nodes[node].index;
        wanted[i] = i;
        own_starts[i + 1] = own_starts[i] + level;
        for (int64_t above = level - 1; above >= 0; above--, node = grown->nodes[node].parent)
            memory->own_rows[own_starts[i] + above] = before + grown->nodes[node].index;
    }
    return (Batch){count, count, tokens, positions, write_rows, first_rows, prefix_lens, own_starts, memory->own_rows,
                   wanted, tree->num_valid_rows + level};
}

/* Mix into the logits of a node of the frontier what its place on the trie says; its parent was forwarded before. */
static void mix_node(const Ranker *ranker, const Trie *trie, Node *nodes, int64_t node, float *logits) {
    if (node) nodes[node].standing = sequoia_find_child(trie, nodes[nodes[node].parent].standing, nodes[node].token);
    sequoia_mix(trie, nodes[node].standing, ranker->vocab_size, logits);
}

/* Rank the children of the frontier's nodes; row i of the logits is the i-th one's. */
static void rank_frontier(const Model *model, const DynamicTree *tree, const Ranker *ranker, const Trie *trie,
                          const DynamicMemory *memory, float *logits, int64_t level, int count, GrownDynamic *grown) {
#pragma omp parallel for schedule(dynamic) num_threads(model->num_threads) if (count > 1)
    for (int i = 0; i < count; i++) {
        int64_t index = grown->num_ranked + i;
        Ranked ranked = {grown->token_ids + index * ranker->width, grown->num_tokens + index, NULL, NULL};
        float *row = logits + (int64_t)i * model->head.outputs;
        if (trie) mix_node(ranker, trie, grown->nodes, memory->frontier[i], row);
        sequoia_score(ranker, row, tree->root_position + 1 + level, &ranked, grown->scores + index * ranker->width);
    }
}

/* Behind the tree's nodes those that are ranked under the frontier's. */
static void propose(const DynamicTree *tree, const Ranker *ranker, const DynamicMemory *memory, int count,
                    GrownDynamic *grown) {
    for (int i = 0; i < count; i++) {
        int64_t parent = memory->frontier[i], index = grown->num_ranked + i, num_tokens = grown->num_tokens[index];
        for (int64_t rank = 0; rank < num_tokens && rank < tree->most_children; rank++)
            grown->nodes[grown->num_nodes++] =
                (Node){grown->nodes[parent].score + grown->scores[index * ranker->width + rank] + tree->hit, parent,
                       grown->token_ids[index * ranker->width + rank], -1, -1};
    }
}

/* `trie`: NULL where there is none. `root_logits`: (vocabulary,), which become the mixture's where there is one. */
void sequoia_grow_dynamic(const Model *model, const Scratch *scratch, const DynamicTree *tree, const Ranker *ranker,
                          const Trie *trie, float *root_logits, const DynamicMemory *memory, GrownDynamic *grown) {
    int64_t num_counters = (4 * (int64_t)model->num_layers + 1) * model->num_threads * CACHE_LINE;
    int count = 1;
    grown->nodes[0] = (Node){0.0, -1, -1, 0, 0};
    memory->frontier[0] = 0;
    grown->num_nodes = 1;
    grown->num_ranked = grown->num_forwards = 0;
    grown->ranking_seconds = 0.0;
    for (int64_t level = 0; level < tree->num_levels - 1 && count; level++) {
        if (level) {
            Batch batch = make_batch(tree, memory, level, count, grown);
            memset(scratch->taken, 0, (size_t)num_counters * sizeof *scratch->taken);
            sequoia_forward(model, &batch, scratch, memory->logits);
            grown->num_forwards++;
        }
        double started = omp_get_wtime();
        rank_frontier(model, tree, ranker, trie, memory, level ? memory->logits : root_logits, level, count, grown);
        int64_t first_new = grown->num_nodes;
        propose(tree, ranker, memory, count, grown);
        grown->num_ranked += count;
        int64_t first = keep_best(tree, memory, first_new, grown);
        count = find_frontier(tree, grown, first, memory->frontier);
        grown->ranking_seconds += omp_get_wtime() - started;
    }
}
