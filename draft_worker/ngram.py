"""What a session's tokens repeat: where the last of them stood before, and what came after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from sequoia.engine.trie import Trie

# Lengths of the sequences that are looked up, the longest first; matches in between are found by comparing.
ORDERS = (8, 4, 2)
LONGEST, SHORTEST = ORDERS[0], ORDERS[-1]
# Places that a trie is made from, at most: the latest of the longest sequence, then those of shorter ones.
MOST_PLACES = 16
# A place weighs so much less for each token that its match is shorter than the longest one.
_DISCOUNT = 0.25

Tokens = tuple[int, ...]


class _Place(NamedTuple):
    """Where the last tokens stood before."""

    position: int  # of the token that followed
    length: int  # of the match, in tokens
    weight: float


class _Order:
    """Where every sequence of one length ended last, and before each place where it ended before that."""

    def __init__(self, order: int) -> None:
        self._order = order
        self._latest: dict[Tokens, int] = {}
        self._before: list[int] = [0] * order  # by position; 0: nowhere, as no sequence ends there

    def extend(self, tokens: Tokens) -> None:
        """Take the sequences that end before the tokens which are new."""
        order, latest, before = self._order, self._latest, self._before
        for position in range(len(before), len(tokens)):
            sequence = tokens[position - order : position]
            before.append(latest.get(sequence, 0))
            latest[sequence] = position

    def places(self, tokens: Tokens) -> Iterator[int]:
        """Positions behind the ends of the last sequence of `tokens`, the latest first."""
        position = self._latest.get(tokens[-self._order :], 0)
        while position:
            yield position
            position = self._before[position]


class NgramIndex:
    """Where every short sequence of a text ended. Grows with the text, by some words a token and order."""

    def __init__(self) -> None:
        self._orders = tuple(map(_Order, ORDERS))

    def extend(self, tokens: Tokens) -> None:
        """Take `tokens`, which begin with those of the last call, as the text."""
        for order in self._orders:
            order.extend(tokens)

    def continuations(self, tokens: Tokens, depth: int, most: int) -> Trie | None:
        """What followed the ends of `tokens` in the text, `depth` tokens far and at most `most` nodes; None: nothing.

        `tokens` are the text, or begin with it. A continuation that reaches their end goes on as if they repeated
        themselves from its place on.
        """
        places = self._find(tokens)
        return _trie(tokens, places, depth, most) if places else None

    def _find(self, tokens: Tokens) -> list[_Place]:
        found = dict.fromkeys(
            position for order in self._orders for position in islice(order.places(tokens), MOST_PLACES)
        )
        if not found:
            return []
        positions = list(found)[:MOST_PLACES]
        lengths = [_match_length(tokens, position) for position in positions]
        longest = max(lengths)
        weights = (_DISCOUNT ** (longest - length) for length in lengths)
        return list(map(_Place, positions, lengths, weights))


def _match_length(tokens: Tokens, position: int) -> int:
    """How many tokens before the position are the last ones, at most LONGEST."""
    most = min(LONGEST, position)
    return next((i for i in range(SHORTEST, most) if tokens[position - 1 - i] != tokens[-1 - i]), most)


def _trie(tokens: Tokens, places: Sequence[_Place], depth: int, most: int) -> Trie:
    parents, token_ids, weights, lengths = [-1], [tokens[-1]], [1.0], [max(place.length for place in places)]
    level: list[tuple[int, Sequence[_Place]]] = [(0, places)]
    for offset in range(depth):
        below: list[tuple[int, Sequence[_Place]]] = []
        for node, own in level:
            total = sum(place.weight for place in own)
            for token, members in _by_token(tokens, own, offset):
                below.append((len(parents), members))
                parents.append(node)
                token_ids.append(token)
                weights.append(sum(place.weight for place in members) / total)
                lengths.append(min(LONGEST, max(place.length for place in members) + offset + 1))
        level = below
        if len(parents) >= most:
            break
    return Trie(tuple(parents[:most]), tuple(token_ids[:most]), tuple(weights[:most]), tuple(lengths[:most]))


def _by_token(tokens: Tokens, places: Sequence[_Place], offset: int) -> list[tuple[int, list[_Place]]]:
    """The places by the token that stands `offset` behind them, the heaviest first."""
    groups: dict[int, list[_Place]] = {}
    for place in places:
        groups.setdefault(tokens[place.position + offset % (len(tokens) - place.position)], []).append(place)
    return sorted(groups.items(), key=lambda group: -sum(place.weight for place in group[1]))
