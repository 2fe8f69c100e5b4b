"""The processes that hold one model together: what the first of them does to it, the others do too, in its order."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from enum import IntEnum
from typing import NamedTuple, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sequoia.errors import InvalidArgument, Unavailable
from sequoia.topology import Int

_LOG = logging.getLogger(__name__)
_FIELD = "tensor-parallel"
# For the ranks to meet.
_MEETING = timedelta(minutes=5)
# For what all of them do at once. One that dies is noticed sooner: its connections close.
_MOST_SECONDS = 300.0
# Until a request comes, or the slowest rank has read its weights.
_IDLE = timedelta(days=365)
_FAILED = 1


class Command(IntEnum):
    """What all ranks do."""

    END = 0
    FORWARD = 1
    CLEAR = 2
    COPY = 3
    MOVE = 4


class Received(NamedTuple):
    """A command with its numbers."""

    command: Command
    numbers: Int  # (as many as the command has,)


class Ranks:
    """This process among all. Called by the engine's thread only.

    Commands go by gloo through the hosts' memory, so that one who waits for a command keeps no device busy: a header
    (command, how many numbers), then the numbers. The sums within the module go by groups that
    `transformers` makes.
    """

    def __init__(self) -> None:
        self.count, self.leads = dist.get_world_size(), dist.get_rank() == 0
        self._commands = dist.new_group(backend="gloo", timeout=_IDLE)

    def wait_for_all(self) -> None:
        """Until every rank is here."""
        with _gone():
            dist.barrier(group=self._commands)

    @contextmanager
    def all_do(self, command: Command, numbers: Int) -> Iterator[None]:
        """The first rank: let the others do what is done in this block.

        An error in it, or no end of it, ends the process: the ranks may have parted, and no forward after it would be
        right.
        """
        overdue = threading.Timer(_MOST_SECONDS, _end, (f"a rank has not answered for {_MOST_SECONDS:.0f} seconds",))
        overdue.daemon = True
        overdue.start()
        try:
            self._broadcast(torch.tensor([command, len(numbers)]))
            if len(numbers):
                self._broadcast(torch.from_numpy(numbers))
            yield
        except Exception:  # noqa: BLE001 - whatever it is, nothing can be done behind it
            _end("a rank has failed")
        finally:
            overdue.cancel()

    def receive(self) -> Received:
        """Any other rank: what comes next. Raises Unavailable when the first one is gone."""
        header, numbers = torch.empty(2, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        with _gone():
            self._broadcast(header)
            command, count = header.tolist()
            if count:
                numbers = torch.empty(count, dtype=torch.int64)
                self._broadcast(numbers)
        return Received(Command(command), numbers.numpy())

    def end(self) -> None:
        """The first rank: let the others end, too."""
        with self.all_do(Command.END, np.empty(0, np.int64)):
            dist.destroy_process_group()

    def _broadcast(self, tensor: Tensor) -> None:
        dist.broadcast(tensor, src=0, group=self._commands)


def join(num_ranks: int, device: str) -> Ranks:
    """Meet the other ranks, as the launcher's environment says, each with a device of its own.

    Raises InvalidArgument naming `device` for one that `transformers` does not take, or too few of them, Unavailable
    when the others do not come.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("auto", kind):
        raise InvalidArgument(f"transformers divides models among this machine's {kind} devices; use {kind}", "device")
    if kind == "cuda":
        _take_device(dist.get_node_local_rank())
    try:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=_MEETING)
        ranks = Ranks()
    except (ValueError, RuntimeError) as error:
        raise Unavailable(f"the {num_ranks} ranks have not met: {error}", _FIELD) from error
    assert ranks.count == num_ranks, "main() has compared them"
    return ranks


def _take_device(local_rank: int) -> None:
    if local_rank >= torch.cuda.device_count():
        problem = f"rank {local_rank} of this machine finds {torch.cuda.device_count()} CUDA devices"
        raise InvalidArgument(f"{problem}; every rank needs its own", "device")
    torch.cuda.set_device(local_rank)


def _end(reason: str) -> NoReturn:
    _LOG.critical("%s, so the worker ends", reason, exc_info=sys.exc_info()[0] is not None)
    os._exit(_FAILED)


@contextmanager
def _gone() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise Unavailable(f"another rank is gone: {error}", _FIELD) from error
