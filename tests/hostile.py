"""Malformed and hostile messages to all services: `python tests/hostile.py --messages 20000 --seed 1`.

Made from the protos' own descriptors: wholly random ones, valid ones with some fields spoiled, and bytes that are no
message. Each must be answered by a named status in time, other sessions go on undisturbed, and no worker ends. Prints
how often each status came; exits with 1 when something else did.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from conftest import System, start_tiny_system
from hostile_messages import PROMPT, TREE, crafted_steps, messages, valid_opening
from rich.console import Console

from sequoia.cli.steps import Steps
from sequoia.process_memory import resident_bytes
from sequoia.rpc import open_sync_channel
from sequoia.v1 import sampling_pb2, verify_pb2, verify_pb2_grpc

_SECONDS = 20.0
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


def first_token(channel: grpc.Channel) -> int:
    """After the prompt."""
    stub = verify_pb2_grpc.VerifyServiceStub(channel)
    opening = valid_opening(random.Random(0), verify_pb2.VerifyOpen)
    return next(stub.Verify(iter([verify_pb2.VerifyRequest(open=opening)]))).verdict.bonus_token_id


def _send_crafted(channel: grpc.Channel, root: int, outcome: Outcome) -> None:
    """Behind good openings by every rule."""
    for rule in (1, 2, 3, 4, 5):
        sampling = sampling_pb2.Sampling(temperature=0.0 if rule == 1 else 0.7, top_k=1, seed=4)
        opening = verify_pb2.VerifyOpen(token_ids=PROMPT, num_prompt_tokens=20, sampling=sampling, rule=rule)
        first = verify_pb2.VerifyRequest(open=opening).SerializeToString()
        for step in crafted_steps(root):
            _send(channel, "verify", [first, verify_pb2.VerifyRequest(step=step).SerializeToString()], outcome)
            outcome.num_messages += 2


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
    expected = system.client.generate(PROMPT, speculation="off", **asked).token_ids
    while not ended.is_set():
        found = system.client.generate(PROMPT, speculation=TREE, **asked)
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
