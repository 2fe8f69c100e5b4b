"""A verify worker in one process and in two ranks, and sessions on it that send trees which it accepts and rejects."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from cluster import free_port

from sequoia.cli.process import ServerProcess, wait_for_end, wait_until_serving
from sequoia.rpc import open_sync_channel
from sequoia.rules import COUPLED, GREEDY
from sequoia.sampling import Sampling
from sequoia.v1 import tree_pb2, verify_pb2, verify_pb2_grpc
from sequoia.wire import rule_to_wire, sampling_to_wire

FLAGS: dict[str, object] = {
    "dtype": "float32",
    "num-threads": 1,
    "context-length": 512,
    "max-tree-size": 8,
    "kv-tokens": 4096,
    "prefill-chunk": 32,
}
_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "100", "GLOO_SOCKET_IFNAME": "lo"}
# The tokens of the nodes 2, 4 and 5 are right, those beside them wrong: what is kept has to be moved.
_PARENTS = (-1, 0, 0, 2, 2, 4)
RIGHT_NODES = (2, 4, 5)


@contextmanager
def one_and_two(model: Path, log_dir: Path) -> Iterator[tuple[str, str]]:
    """The addresses of a worker alone, and of one in two ranks."""
    flags = {"model": model, **FLAGS}
    world = {**_ENVIRONMENT, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free_port()}"}
    roles: list[tuple[str, dict[str, object], dict[str, str]]] = [("alone", {"engine": "transformers"}, _ENVIRONMENT)]
    roles += [(f"rank{n}", {"tensor-parallel": 2}, {**world, "RANK": f"{n}", "LOCAL_RANK": f"{n}"}) for n in range(2)]
    processes = [
        ServerProcess(name, "verify_worker.server", {**flags, **more}, environment, log_dir)
        for name, more, environment in roles
    ]
    try:
        list(wait_until_serving(processes[:2]))
        yield processes[0].address, processes[1].address
        processes[1].terminate()
        ended = wait_for_end(processes[1:])
        assert all("ended with status 0" in each.obituary() for each in ended)
    finally:
        for each in processes:
            each.kill()
            each.stdout.close()


def under_torchrun(model: Path, log_dir: Path) -> ServerProcess:
    """Two ranks as an operator starts them."""
    launcher = {"nproc-per-node": 2, "master-port": free_port(), "module": "verify_worker.server"}
    flags = {**launcher, "model": model, **FLAGS, "tensor-parallel": 2}
    return ServerProcess("torchrun", "torch.distributed.run", flags, _ENVIRONMENT, log_dir)


def rank_pid(launcher: ServerProcess, rank: int) -> int:
    """Of a rank that it started."""
    pids = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return next(int(pid) for pid in pids if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text())


class Session:
    """A stream of the worker at that address; a context manager."""

    def __init__(self, address: str, prompt: Sequence[int], seed: int | None) -> None:
        self._channel = open_sync_channel(address)
        self._requests: SimpleQueue[verify_pb2.VerifyRequest | None] = SimpleQueue()
        stub = verify_pb2_grpc.VerifyServiceStub(self._channel)
        self.responses = stub.Verify(iter(self._requests.get, None), timeout=60)
        sampling = Sampling(temperature=0.0) if seed is None else Sampling(temperature=0.8, seed=seed)
        opening: dict[str, Any] = {
            "sampling": sampling_to_wire(sampling),
            "rule": rule_to_wire(GREEDY if seed is None else COUPLED),
        }
        self._send(open=verify_pb2.VerifyOpen(token_ids=prompt, num_prompt_tokens=len(prompt), **opening))
        first = next(self.responses)
        self.num_reused_tokens = first.num_reused_tokens
        self.prefix_len, self.token_ids = len(prompt), [first.verdict.bonus_token_id]

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._requests.put(None)
        list(self.responses)
        self._channel.close()

    def ask_plainly(self, num_steps: int) -> None:
        """So many plain steps, of which the first has been asked for when this returns."""
        self._send(step=verify_pb2.VerifyStep(step=1, prefix_len=self.prefix_len, num_plain_steps=num_steps - 1))

    def plain(self, num_steps: int) -> list[int]:
        """The answer, so many tokens longer."""
        self.ask_plainly(num_steps)
        for _ in range(num_steps):
            self.token_ids.append(next(self.responses).verdict.bonus_token_id)
        return self.token_ids

    def with_trees(self, expected: Sequence[int]) -> list[int]:
        """The answer that grows by trees along the expected one. Fails where a right node is rejected."""
        while (done := len(self.token_ids)) + len(RIGHT_NODES) < len(expected):
            one, two, three = expected[done : done + len(RIGHT_NODES)]
            tokens = (self.token_ids[-1], one ^ 1, one, two ^ 1, two, three)
            topology = tree_pb2.Topology(parents=_PARENTS)
            tree = tree_pb2.TokenTree(topology=topology, token_ids=tokens)
            self._send(step=verify_pb2.VerifyStep(step=done, prefix_len=self.prefix_len + done - 1, tree=tree))
            verdict = next(self.responses).verdict
            assert tuple(verdict.accepted_nodes) == RIGHT_NODES
            self.token_ids += [one, two, three, verdict.bonus_token_id]
        return self.token_ids

    def _send(self, **kind: Any) -> None:
        self._requests.put(verify_pb2.VerifyRequest(**kind))
