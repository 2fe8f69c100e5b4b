"""Token trees: their shape, their tokens, the draft distributions they were drawn from."""

from __future__ import annotations

import operator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Int = NDArray[np.int64]
Bool = NDArray[np.bool_]


@dataclass(frozen=True)
class Topology:
    """The shape of a token tree, flat and in level order: `parents[0] == -1`, then `0 <= parents[i] < i`.

    Siblings stand in rank order. Raises ValueError when `parents` is not such a tree.
    """

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.parents or self.parents[0] != -1:
            raise ValueError("a topology begins with its root: parents[0] must be -1")
        for node, parent in enumerate(self.parents[1:], start=1):
            if not 0 <= parent < node:
                raise ValueError(f"parents[{node}] is {parent}; a parent must be in 0..{node - 1}")
        if any(self.depths[i] > self.depths[i + 1] for i in range(self.size - 1)):
            raise ValueError("nodes must be in level order: a node's depth is never less than the one before")

    @staticmethod
    @lru_cache(maxsize=256)
    def of(parents: tuple[int, ...]) -> Topology:
        """The same tree for the same parents, so that a step does not derive again what the one before it did."""
        return Topology(parents)

    @staticmethod
    def root_only() -> Topology:
        """The tree of plain decoding."""
        return Topology.of((-1,))

    @staticmethod
    def chain(levels: int) -> Topology:
        """One node per level; `levels` counts the root."""
        return Topology(tuple(range(-1, levels - 1)))

    @property
    def size(self) -> int:
        """Number of nodes n, root included: the tokens of the verify forward."""
        return len(self.parents)

    @property
    def levels(self) -> int:
        """Number of levels, root included."""
        return self.depths[-1] + 1

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Depth of each node; the root's is 0."""
        depths = [0] * len(self.parents)
        for node, parent in enumerate(self.parents[1:], start=1):
            depths[node] = depths[parent] + 1
        return tuple(depths)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Children of each node in rank order."""
        children: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents[1:], start=1):
            children[parent].append(node)
        return tuple(map(tuple, children))

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each node among its siblings, from 0; the root's is 0."""
        ranks = [0] * self.size
        for siblings in self.children:
            for rank, node in enumerate(siblings):
                ranks[node] = rank
        return tuple(ranks)

    @cached_property
    def internal_nodes(self) -> tuple[int, ...]:
        """Nodes with children, ascending: the rows a drafter forwards."""
        return tuple(node for node, children in enumerate(self.children) if children)

    @cached_property
    def ancestor_mask(self) -> Bool:
        """(size, size) bool: `[i, j]` is true when j is i or an ancestor of i."""
        mask = np.eye(self.size, dtype=np.bool_)
        for node, parent in enumerate(self.parents[1:], start=1):
            mask[node] |= mask[parent]
        return mask

    def truncated(self, max_levels: int) -> Topology:
        """The tree without the nodes below `max_levels` levels (at least 1, the root)."""
        if self.levels <= max_levels:
            return self
        return Topology.of(tuple(p for p, d in zip(self.parents, self.depths, strict=True) if d < max_levels))

    def cut_to(self, max_size: int) -> Topology:
        """The tree without its last nodes in level order, so that at most `max_size` (at least 1) are left."""
        return self if self.size <= max_size else Topology(self.parents[:max_size])

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"parents": list(self.parents)}

    def with_more_children(self, count: int) -> Topology:
        """The tree with that many leaves more under the root, of the ranks that come next."""
        first = 1 + len(self.children[0])
        below = tuple(parent + count if parent >= first else parent for parent in self.parents[first:])
        return Topology(self.parents[:first] + (0,) * count + below)


@dataclass(frozen=True, slots=True)
class DynamicShape:
    """A tree whose shape the draft's own scores decide at every step (Li et al. 2024, arXiv 2406.16858).

    `size` nodes and `levels` levels at most, the root counting in both; at most `width` nodes of a level get children,
    which is what a draft forward has rows. Nodes that are reached with less than `least_chance`, as the draft sees it,
    are left out; no level is added to nodes that are reached with less than `least_gain`, all together, which is how
    many tokens it can gain. Raises ValueError when there is no such tree.
    """

    size: int
    levels: int
    width: int
    least_chance: float = 0.0
    least_gain: float = 0.0

    def __post_init__(self) -> None:
        if not 2 <= self.levels <= self.size:
            raise ValueError(f"levels is {self.levels}; with {self.size} nodes it must be in 2..{self.size}")
        if not 1 <= self.width < self.size:
            raise ValueError(f"width is {self.width}; with {self.size} nodes it must be in 1..{self.size - 1}")
        for name, chance in (("least_chance", self.least_chance), ("least_gain", self.least_gain)):
            if not 0.0 <= chance < 1.0:
                raise ValueError(f"{name} is {chance}; it must be from 0 to below 1")

    def __str__(self) -> str:
        return f"{self.size}x{self.levels} dynamic, width {self.width}"

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> DynamicShape:
        """From the JSON form. Raises KeyError, TypeError or ValueError when it is not of that form."""
        size, levels, width = (operator.index(data[name]) for name in ("size", "levels", "width"))
        return DynamicShape(size, levels, width, float(data["least_chance"]), float(data["least_gain"]))

    @property
    def num_rows(self) -> int:
        """KV rows that it takes at most while it grows, the root's included; some are of nodes that it drops again."""
        return 1 + (self.levels - 2) * self.width

    def truncated(self, max_levels: int) -> TreeShape:
        """The same with at most that many levels (at least 1, the root)."""
        if max_levels < 2:
            return Topology.root_only()
        return replace(self, levels=min(self.levels, max_levels))

    def cut_to(self, max_size: int) -> TreeShape:
        """The same with at most `max_size` (at least 1) nodes, and in fewer rows than that."""
        if max_size < 2:
            return Topology.root_only()
        size, levels = min(self.size, max_size), min(self.levels, max_size)
        most = (max_size - 2) // (levels - 2) if levels > 2 else size - 1
        return replace(self, size=size, levels=levels, width=min(self.width, size - 1, most))


# What a step may be asked to grow.
TreeShape: TypeAlias = Topology | DynamicShape


@dataclass(frozen=True)
class DraftDistributions:
    """Truncated draft distributions q, one row per internal node of a tree in ascending node order.

    `q[row, k] = weights[row, k] / weights[row].sum()` for token `token_ids[row, k]`; weight 0 marks an unused column.
    Every weight is a bfloat16 number, at most 1, so that it means the same on both sides of the wire: 16 bits, as exact
    as an integer, with a range that the coldest draft distributions need.
    """

    token_ids: NDArray[np.uint32]  # (rows, width)
    weights: NDArray[np.float32]  # (rows, width)


@dataclass(frozen=True)
class TokenTree:
    """A topology with a token at every node; `token_ids[0]` is the last committed token."""

    topology: Topology
    token_ids: tuple[int, ...]
    q: DraftDistributions | None = None

    def __post_init__(self) -> None:
        if len(self.token_ids) != self.topology.size:
            raise ValueError(f"{len(self.token_ids)} token ids for {self.topology.size} nodes; one per node is needed")

    @staticmethod
    def root_only(token_id: int) -> TokenTree:
        """The tree of plain decoding."""
        return TokenTree(Topology.root_only(), (token_id,))

    def path_tokens(self, node: int) -> tuple[int, ...]:
        """Tokens on the way from the root, left out, to `node`."""
        tokens: list[int] = []
        while node:
            tokens.append(self.token_ids[node])
            node = self.topology.parents[node]
        return tuple(reversed(tokens))

    def follow(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """The longest path of nodes from the root, root left out, whose tokens are a prefix of `tokens`."""
        path: list[int] = []
        node = 0
        for token in tokens:
            matching = (c for c in self.topology.children[node] if self.token_ids[c] == token)
            if (child := next(matching, None)) is None:
                break
            path.append(node := child)
        return tuple(path)


class TokenLogprobs(NamedTuple):
    """Natural logarithms of a token's probability where it was generated, and of the likeliest tokens there.

    Raw: as the model has it. Processed: after every sampling parameter, -inf where cut; at temperature 0, after all
    that acts before the temperature.

    The bytes are those of the text that a token stands for, a part of a character maybe, and of a special token its
    name; a client has them, a worker does not.
    """

    token_id: int
    raw: float
    processed: float
    top: tuple[tuple[int, float, float], ...]  # (token id, raw, processed), likeliest by raw first
    token_bytes: bytes = b""
    top_bytes: tuple[bytes, ...] = ()  # of the tokens of `top`


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the target made of a tree: accepted nodes in path order (root left out) and the token that follows them."""

    accepted_nodes: tuple[int, ...]
    bonus_token_id: int
    logprobs: tuple[TokenLogprobs, ...] = ()  # one for each of `tokens`, when asked for

    def tokens(self, tree: TokenTree) -> tuple[int, ...]:
        """The newly committed tokens: at least one."""
        return (*(tree.token_ids[node] for node in self.accepted_nodes), self.bonus_token_id)
