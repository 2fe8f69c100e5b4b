"""Malformed and hostile messages to all services: `python tests/hostile.py --messages 20000 --seed 1`.

Made from the protos' own descriptors: wholly random ones, valid ones with some fields spoiled, and bytes that are no
message. Each must be answered by a named status in time, other sessions go on undisturbed, and no worker ends. Prints
how often each status came; exits with 1 when something else did.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from conftest import System, start_tiny_system
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from rich.console import Console

from sequoia.cli.steps import Steps
from sequoia.process_memory import resident_bytes
from sequoia.rpc import open_sync_channel
from sequoia.topology import Topology
from sequoia.v1 import coordinator_pb2, draft_pb2, sampling_pb2, tree_pb2, verify_pb2, verify_pb2_grpc

_SECONDS = 20.0
_TREE = Topology((-1, 0, 0, 1, 1, 3))
_PROMPT = list(range(40, 60))
_NAMED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
_METHODS = {
    "verify": "/sequoia.v1.VerifyService/Verify",
    "draft": "/sequoia.v1.DraftService/Draft",
    "coordinator": "/sequoia.v1.CoordinatorService/Generate",
}
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
    return kind(token_ids=_PROMPT, num_prompt_tokens=len(_PROMPT), sampling=sampling, rule=rule)


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
                token_ids=coordinator_pb2.TokenIds(ids=_PROMPT), sampling=valid_sampling(choose), max_tokens=3
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
    steps = [verify_pb2.VerifyStep(step=1, prefix_len=len(_PROMPT), tree=each) for each in trees]
    steps.append(verify_pb2.VerifyStep(step=2**64 - 1, prefix_len=len(_PROMPT), num_plain_steps=3))
    steps.append(verify_pb2.VerifyStep(step=1, prefix_len=len(_PROMPT), num_plain_steps=2**32 - 1))
    steps.append(verify_pb2.VerifyStep(step=1, prefix_len=2**32 - 1))
    return steps


def first_token(channel: grpc.Channel) -> int:
    """After the prompt."""
    stub = verify_pb2_grpc.VerifyServiceStub(channel)
    opening = valid_opening(random.Random(0), verify_pb2.VerifyOpen)
    return next(stub.Verify(iter([verify_pb2.VerifyRequest(open=opening)]))).verdict.bonus_token_id


def _send_crafted(channel: grpc.Channel, root: int, outcome: Outcome) -> None:
    """Behind good openings by every rule."""
    for rule in (1, 2, 3, 4, 5):
        sampling = sampling_pb2.Sampling(temperature=0.0 if rule == 1 else 0.7, top_k=1, seed=4)
        opening = verify_pb2.VerifyOpen(token_ids=_PROMPT, num_prompt_tokens=20, sampling=sampling, rule=rule)
        first = verify_pb2.VerifyRequest(open=opening).SerializeToString()
        for step in crafted_steps(root):
            _send(channel, "verify", [first, verify_pb2.VerifyRequest(step=step).SerializeToString()], outcome)
            outcome.num_messages += 2


def _valid_step(service: str, index: int, root: int) -> Any:
    if service == "draft":
        topology = tree_pb2.Topology(parents=_TREE.parents)
        return draft_pb2.DraftStep(step=index, base_len=len(_PROMPT), token_ids=[41], topology=topology)
    tree = tree_pb2.TokenTree(topology=tree_pb2.Topology(parents=_TREE.parents), token_ids=[root, 5, 6, 7, 8, 9])
    return verify_pb2.VerifyStep(step=index, prefix_len=len(_PROMPT), tree=tree)


@dataclass
class Outcome:
    """What came back."""

    num_messages: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    num_undisturbed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "messages": self.num_messages,
            "statuses": dict(sorted(self.statuses.items())),
            "undisturbed_answers": self.num_undisturbed,
            "problems": self.problems[:20],
            "num_problems": len(self.problems),
        }


def attack(
    system: System, num_messages: int, seed: int, on_progress: Callable[[int], None] = lambda _: None
) -> Outcome:
    """Send them, while another client asks for an answer again and again."""
    outcome, choose = Outcome(), random.Random(seed)
    ended = threading.Event()
    beside = threading.Thread(target=_ask_on, args=(system, ended, outcome))
    addresses = {**system.deployment.addresses, "coordinator": system.deployment.address}
    channels = {name: open_sync_channel(addresses[name]) for name in _METHODS}
    processes = [each.pid for each in system.deployment.processes.values()]
    beside.start()
    try:
        root = first_token(channels["verify"])
        _send_crafted(channels["verify"], root, outcome)
        while outcome.num_messages < num_messages:
            service = choose.choice(list(_METHODS))
            count = 1 if service == "coordinator" else choose.choice((1, 2, 3, 5))
            sent = list(messages(choose, service, count, root))
            _send(channels[service], service, sent, outcome)
            outcome.num_messages += len(sent)
            on_progress(outcome.num_messages)
    finally:
        ended.set()
        beside.join()
        for channel in channels.values():
            channel.close()
    for name in ("verify", "draft"):
        if used := system.num_slots_used(name):
            outcome.problems.append(f"{name} holds {used} slots in the end")
    if resident_bytes(processes) is None:
        outcome.problems.append("a process has ended")
    return outcome


def _send(channel: grpc.Channel, service: str, sent: list[bytes], outcome: Outcome) -> None:
    call = channel.stream_stream(_METHODS[service], lambda raw: raw, lambda raw: raw)
    if service == "coordinator":
        single = channel.unary_stream(_METHODS[service], lambda raw: raw, lambda raw: raw)
        answers = single(sent[0], timeout=_SECONDS)
    else:
        answers = call(iter(sent), timeout=_SECONDS)
    try:
        for _ in answers:
            pass
        code, details = grpc.StatusCode.OK, ""
    except grpc.RpcError as error:
        code, details = error.code(), error.details() or ""
    outcome.statuses[f"{service} {code.name}"] += 1
    if code not in _NAMED:
        outcome.problems.append(f"{service} {code.name}: {details[:300]} | {[each.hex()[:400] for each in sent]}")


def _ask_on(system: System, ended: threading.Event, outcome: Outcome) -> None:
    asked: dict[str, Any] = {"max_tokens": 40, "temperature": 0.7, "seed": 5, "ignore_eos": True}
    expected = system.client.generate(_PROMPT, speculation="off", **asked).token_ids
    while not ended.is_set():
        found = system.client.generate(_PROMPT, speculation=_TREE, **asked)
        if found.token_ids != expected:
            outcome.problems.append("another session got another text")
        outcome.num_undisturbed += 1
        ended.wait(0.05)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Malformed and hostile messages to all services.")
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    total = arguments.messages
    with tempfile.TemporaryDirectory() as folder, Steps(Console(stderr=True)).step("messages") as on_progress:
        for system in start_tiny_system(Path(folder), "llama"):
            outcome = attack(system, total, arguments.seed, lambda done: on_progress(done, total))
    print(json.dumps(outcome.to_dict(), indent=2))
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(main())
