"""The workers behind the coordinator: a pool that must serve, and one that may."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from types import TracebackType

from coordinator.background import end
from coordinator.discovery import LOOKUP_SECONDS, Discovery, Resolver, parse_places, resolve
from coordinator.member import Member
from coordinator.pool import POLL_SECONDS, Pool, check_same
from sequoia.errors import FailedPrecondition, SequoiaError, Unavailable
from sequoia.rpc import Dial, open_channel
from sequoia.tls import PLAIN, Tls
from sequoia.v1 import worker_pb2


class Workers:
    """The verify workers, without which nothing starts, and the draft workers, which may be missing at any time.

    Addresses are lists with commas, in which a dns:///NAME:PORT stands for as many workers as the name has records. An
    async context manager: entering waits for a verify worker, and watches all. Raises ValueError for no such list.
    """

    def __init__(
        self,
        verify_addresses: str,
        draft_addresses: str,
        start_timeout_seconds: float,
        most_waiting: int = 0,
        tls: Tls = PLAIN,
        *,
        dial: Dial = open_channel,
        resolver: Resolver = resolve,
        lookup_seconds: float = LOOKUP_SECONDS,
    ) -> None:
        verify, draft = parse_places(verify_addresses), parse_places(draft_addresses)
        self.verify = Pool(verify.addresses, worker_pb2.WORKER_ROLE_VERIFY, self._check_target, most_waiting, tls, dial)
        self.draft = Pool(draft.addresses, worker_pb2.WORKER_ROLE_DRAFT, self._check_draft, tls=tls, dial=dial)
        self.is_speculation_configured = any(draft)
        self._verify_discovery = Discovery(self.verify, verify, resolver, lookup_seconds)
        self._draft_discovery = Discovery(self.draft, draft, resolver, lookup_seconds)
        self._start_timeout_seconds = start_timeout_seconds
        self._followers: list[asyncio.Task[None]] = []
        self._target: worker_pb2.WorkerDescription | None = None
        self.tokenizer = worker_pb2.TokenizerFiles()

    async def __aenter__(self) -> Workers:
        response = await self._first_target()
        self._target, self.tokenizer = response.worker, response.tokenizer
        await self._draft_discovery.begin(POLL_SECONDS)
        await asyncio.gather(*map(self._meet_draft_at_start, self.draft.members))
        for pool in (self.verify, self.draft):
            pool.begin_watching()
        discoveries = (self._verify_discovery, self._draft_discovery)
        self._followers = [asyncio.create_task(each.follow()) for each in discoveries]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await end(*self._followers)
        await self.verify.close()
        await self.draft.close()

    @property
    def verify_description(self) -> worker_pb2.WorkerDescription:
        """Of a verify worker that is there, or was."""
        assert self._target is not None, "entered first"
        return self.verify.description or self._target

    @property
    def draft_description(self) -> worker_pb2.WorkerDescription | None:
        """Of a draft worker that is there."""
        return self.draft.description

    @property
    def round_trip_seconds(self) -> float:
        """To the one and then to the other, as a drafted step goes."""
        return self.verify.round_trip_seconds + self.draft.round_trip_seconds

    async def _first_target(self) -> worker_pb2.DescribeResponse:
        """Of the verify worker that is there first. Raises what the last of them has raised."""
        pool, give_up = self.verify, time.monotonic() + self._start_timeout_seconds
        await self._verify_discovery.begin(self._start_timeout_seconds)
        timeout = max(POLL_SECONDS, give_up - time.monotonic())
        tasks = [asyncio.create_task(pool.meet(each, timeout, include_tokenizer=True)) for each in pool.members]
        problem: SequoiaError = Unavailable(pool.problem or "no address of a verify worker is given", "verify")
        try:
            for first in asyncio.as_completed(tasks):
                try:
                    return await first
                except SequoiaError as error:
                    problem = error
        finally:
            await asyncio.gather(*(_ended(each) for each in tasks))
        raise problem

    async def _meet_draft_at_start(self, draft: Member) -> None:
        """A draft that is there and does not fit stops the start; one that is not there yet does not."""
        with suppress(Unavailable):
            await self.draft.meet(draft, POLL_SECONDS)

    def _check_target(self, found: worker_pb2.WorkerDescription) -> None:
        """The model stays what it was when this coordinator started: requests go on on any worker."""
        if found.kv_tokens < found.context_length:
            # Requests would wait for room for ever.
            problem = f"has KV memory for {found.kv_tokens} tokens, and a session may have {found.context_length}"
            raise FailedPrecondition(
                f"the verify worker with {found.model} {problem}; is it of this version?", "verify"
            )
        if self._target is not None:
            check_same(found, self._target)

    def _check_draft(self, found: worker_pb2.WorkerDescription) -> None:
        check_pair(self.verify_description, found)


def check_pair(verify: worker_pb2.WorkerDescription, draft: worker_pb2.WorkerDescription) -> None:
    """Raises FailedPrecondition, naming both models, when the two do not speak of the same tokens.

    A draft without a tokenizer speaks of any.
    """
    if draft.tokenizer_hash not in ("", verify.tokenizer_hash):
        raise FailedPrecondition(
            f"draft {draft.model} ({draft.vocab_size} tokens) and target {verify.model} ({verify.vocab_size} tokens) "
            "have different tokenizers; choose a draft from the target's own model family",
            "draft",
        )


async def _ended(task: asyncio.Task[worker_pb2.DescribeResponse]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError, SequoiaError):
        await task
