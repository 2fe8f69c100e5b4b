"""Messages that no honest peer sends, made from the protos' own descriptors, and valid ones to spoil."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from sequoia.topology import Topology
from sequoia.v1 import coordinator_pb2, draft_pb2, sampling_pb2, tree_pb2, verify_pb2

TREE = Topology((-1, 0, 0, 1, 1, 3))
PROMPT = list(range(40, 60))
_INTEGERS = (0, 1, 2, 3, 7, 63, 64, 255, 4096, 2**31 - 1, 2**32 - 1)
_REALS = (0.0, -0.0, 0.5, 1.0, -1.0, 2.0, 1e-300, 1e308, math.inf, -math.inf, math.nan)
_Int = FieldDescriptor
_RANGES = {
    **dict.fromkeys((_Int.TYPE_UINT32, _Int.TYPE_FIXED32), (0, 2**32 - 1)),
    **dict.fromkeys((_Int.TYPE_INT32, _Int.TYPE_SINT32, _Int.TYPE_SFIXED32), (-(2**31), 2**31 - 1)),
    **dict.fromkeys((_Int.TYPE_UINT64, _Int.TYPE_FIXED64), (0, 2**64 - 1)),
    **dict.fromkeys((_Int.TYPE_INT64, _Int.TYPE_SINT64, _Int.TYPE_SFIXED64), (-(2**63), 2**63 - 1)),
}


class Spoiler:
    """Random messages of any type."""

    def __init__(self, choose: random.Random) -> None:
        self._choose = choose

    def fill(self, message: Message, share: float = 0.5) -> None:
        """Set about that share of the fields to anything."""
        for each in message.DESCRIPTOR.fields:
            if self._choose.random() < share:
                self._set(message, each, share)

    def spoil(self, message: Message) -> None:
        """Set some field, of the message or of one inside, to anything."""
        each = self._choose.choice(message.DESCRIPTOR.fields)
        is_inside = each.type == each.TYPE_MESSAGE and not each.is_repeated and message.HasField(each.name)
        if is_inside and self._choose.random() < 0.9:
            self.spoil(getattr(message, each.name))
        else:
            self._set(message, each, 0.3)

    def _set(self, message: Message, each: FieldDescriptor, share: float) -> None:
        message.ClearField(each.name)
        if each.message_type is not None and each.message_type.GetOptions().map_entry:
            entries = getattr(message, each.name)
            for _ in range(self._length()):
                entries[self._integer(0, 2**32 - 1)] = self._choose.choice(_REALS)
        elif each.is_repeated:
            for _ in range(self._length()):
                if each.type == each.TYPE_MESSAGE:
                    self.fill(getattr(message, each.name).add(), share / 2)
                else:
                    getattr(message, each.name).append(self._value(each))
        elif each.type == each.TYPE_MESSAGE:
            inside = getattr(message, each.name)
            inside.SetInParent()
            self.fill(inside, share / 1.5)
        else:
            setattr(message, each.name, self._value(each))

    def _value(self, each: FieldDescriptor) -> Any:
        if each.type in (each.TYPE_DOUBLE, each.TYPE_FLOAT):
            return self._choose.choice((*_REALS, self._choose.uniform(0, 2)))
        if each.type == each.TYPE_BOOL:
            return self._choose.random() < 0.5
        if each.type == each.TYPE_STRING:
            return "".join(chr(self._choose.randrange(32, 0xD7FF)) for _ in range(self._length()))
        if each.type == each.TYPE_BYTES:
            return self._choose.randbytes(self._length() * 4)
        if each.type == each.TYPE_ENUM:
            return self._choose.choice((0, 1, 2, 3, 4, 5, 6, 99))
        return self._integer(*_RANGES[each.type])

    def _integer(self, least: int, most: int) -> int:
        kind = self._choose.random()
        if kind < 0.2:
            return self._choose.choice((least, most))
        if kind < 0.7:
            return self._choose.randrange(0, 400)
        return min(most, self._choose.choice(_INTEGERS))

    def _length(self) -> int:
        return self._choose.choice((0, 1, 1, 2, 3, 6, 20, 64, 65, 400, 3000))


def valid_sampling(choose: random.Random) -> sampling_pb2.Sampling:
    """With one possible token everywhere, so that the first one is known."""
    return sampling_pb2.Sampling(temperature=choose.choice((0.0, 0.7)), top_k=1, seed=choose.choice((3, 2**63)))


def valid_opening(choose: random.Random, kind: type[Any]) -> Any:
    """Of a worker's session."""
    sampling = valid_sampling(choose)
    rule = sampling_pb2.RULE_GREEDY if sampling.temperature == 0 else choose.choice((2, 3, 4, 5))
    return kind(token_ids=PROMPT, num_prompt_tokens=len(PROMPT), sampling=sampling, rule=rule)


def messages(choose: random.Random, service: str, count: int, root: int) -> Iterator[bytes]:
    """Of one stream: an opening, good or bad, and steps of all kinds."""
    spoiler = Spoiler(choose)
    kinds = {"verify": verify_pb2.VerifyRequest, "draft": draft_pb2.DraftRequest}
    for index in range(count):
        chance = choose.random()
        if chance < 0.03:
            yield choose.randbytes(choose.choice((1, 10, 1000)))
            continue
        message: Any
        if service == "coordinator":
            message = coordinator_pb2.GenerateRequest(
                token_ids=coordinator_pb2.TokenIds(ids=PROMPT), sampling=valid_sampling(choose), max_tokens=3
            )
        elif index == 0:
            message = kinds[service]()
            message.open.CopyFrom(valid_opening(choose, type(message.open)))
        else:
            message = kinds[service]()
            message.step.CopyFrom(_valid_step(service, index, root))
        if service == "coordinator" or (chance < 0.3 if index == 0 else chance < 0.9):
            if choose.random() < 0.2:
                message.Clear()
                spoiler.fill(message)
            for _ in range(choose.choice((1, 1, 2, 4))):
                spoiler.spoil(message)
        yield message.SerializeToString()


def crafted_steps(root: int) -> list[verify_pb2.VerifyStep]:
    """What an attacker would try first."""
    width = 2

    def tree(parents: Sequence[int], tokens: Sequence[int], **q: Any) -> tree_pb2.TokenTree:
        drawn = tree_pb2.DraftDistributions(**q) if q else None
        return tree_pb2.TokenTree(topology=tree_pb2.Topology(parents=parents), token_ids=tokens, q=drawn)

    ids = np.array([[5, 6]], "<u4").tobytes()
    not_numbers = np.array([[0x7FC0, 0x7F80]], "<u2").tobytes()
    trees = [
        tree([-1, 2, 1], [root, 5, 6]),
        tree([-1, 1], [root, 5]),
        tree([-1, -7], [root, 5]),
        tree([-1, *range(200_000)], [root] * 200_001),
        tree([-1, 0], [root, 2**32 - 1]),
        tree([-1, 0], [root]),
        tree([-1, 0, 0], [root, 5, 5]),
        tree([-1, 0, 0], [root, 5, 6], width=width, token_ids=ids, weights=not_numbers),
        tree([-1, 0, 0], [root, 5, 6], width=width, token_ids=ids, weights=bytes(4)),
        tree([-1, 0, 0], [root, 5, 6], width=2**32 - 1, token_ids=ids, weights=bytes(4)),
        tree([-1, 0, 0], [root, 5, 6], width=width, token_ids=ids, weights=b"\x80\x3f\x01\x00"),
    ]
    steps = [verify_pb2.VerifyStep(step=1, prefix_len=len(PROMPT), tree=each) for each in trees]
    steps.append(verify_pb2.VerifyStep(step=2**64 - 1, prefix_len=len(PROMPT), num_plain_steps=3))
    steps.append(verify_pb2.VerifyStep(step=1, prefix_len=len(PROMPT), num_plain_steps=2**32 - 1))
    steps.append(verify_pb2.VerifyStep(step=1, prefix_len=2**32 - 1))
    return steps


def _valid_step(service: str, index: int, root: int) -> Any:
    if service == "draft":
        topology = tree_pb2.Topology(parents=TREE.parents)
        return draft_pb2.DraftStep(step=index, base_len=len(PROMPT), token_ids=[41], topology=topology)
    tree = tree_pb2.TokenTree(topology=tree_pb2.Topology(parents=TREE.parents), token_ids=[root, 5, 6, 7, 8, 9])
    return verify_pb2.VerifyStep(step=index, prefix_len=len(PROMPT), tree=tree)
