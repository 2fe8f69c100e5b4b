import asyncio
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
from redis import Redis

from sequoia.acceptance import AcceptanceCounts
from sequoia.acceptance_counts import (
    MAX_DEPTH,
    MAX_RANK,
    RETENTION_SECONDS,
    SLICE_SECONDS,
    CountsKey,
    LiveAcceptance,
    LiveCounts,
)
from sequoia.cli.redis import EmbeddedRedis
from sequoia.errors import InvalidArgument, Unavailable

KEY = CountsKey("draft -> target", "coupled", "(0,0.4]")
NOW = 1_900_000_000.0
COUNTS = AcceptanceCounts(((5.0, 4.0), (), (2.0,)), ((3.0, 1.0), (), (0.5,)))
LEARNT = LiveAcceptance(COUNTS, 2, 7, 6.5, num_ahead_hits=1, num_ahead_misses=0.5)
SLICE = f"{KEY}:{int(NOW // SLICE_SECONDS)}"
NOTHING = LiveAcceptance()


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture(name="redis")
def empty_redis(server: EmbeddedRedis) -> Iterator[Redis]:
    with Redis.from_url(server.url) as redis:
        redis.flushall()
        yield redis


async def add(url: str, learnt: LiveAcceptance = LEARNT, now: float = NOW, *, times: int = 1) -> None:
    async with LiveCounts(url) as live:
        for _ in range(times):
            await live.add(KEY, learnt, now=now)


async def read(url: str, now: float = NOW, *, half_life_seconds: float = 24 * 3600.0) -> LiveAcceptance:
    async with LiveCounts(url) as live:
        return await live.read(KEY, now=now, half_life_seconds=half_life_seconds)


async def test_counts_come_back_as_they_were_added(server: EmbeddedRedis, redis: Redis) -> None:
    await add(server.url)
    assert await read(server.url) == LEARNT


async def test_counts_alone_are_enough(server: EmbeddedRedis, redis: Redis) -> None:
    await add(server.url, LiveAcceptance(COUNTS))
    assert await read(server.url) == LiveAcceptance(COUNTS)


async def test_nothing_added_is_nothing_read(server: EmbeddedRedis, redis: Redis) -> None:
    assert await read(server.url) == NOTHING


async def test_writers_at_the_same_time_add_up_exactly(server: EmbeddedRedis, redis: Redis) -> None:
    await asyncio.gather(*(add(server.url, times=25) for _ in range(8)))
    assert await read(server.url) == LiveAcceptance(COUNTS.scaled(200), 400, 1400, 1300, 200, 100)


async def test_another_pair_rule_or_temperature_counts_apart(server: EmbeddedRedis, redis: Redis) -> None:
    others = [replace(KEY, **{name: "other"}) for name in ("pair", "rule", "temperature")]
    async with LiveCounts(server.url) as live:
        for key in others:
            await live.add(key, LEARNT, now=NOW)
    assert await read(server.url) == NOTHING
    assert len(redis.keys("sequoia:acceptance:v1:*")) == 3


async def test_what_is_a_half_life_old_counts_half(server: EmbeddedRedis, redis: Redis) -> None:
    await add(server.url, LEARNT, NOW - 2 * SLICE_SECONDS)
    await add(server.url)
    live = await read(server.url, half_life_seconds=2 * SLICE_SECONDS)
    assert live == LEARNT.scaled(1.5) == LiveAcceptance(COUNTS.scaled(1.5), 3, 10.5, 9.75, 1.5, 0.75)


async def test_what_is_older_than_the_retention_is_not_read(server: EmbeddedRedis, redis: Redis) -> None:
    await add(server.url, LEARNT, NOW - RETENTION_SECONDS - SLICE_SECONDS)
    assert await read(server.url) == NOTHING


async def test_every_slice_expires(server: EmbeddedRedis, redis: Redis) -> None:
    await add(server.url, LEARNT, NOW - SLICE_SECONDS)
    await add(server.url)
    remaining = [redis.ttl(key) for key in redis.scan_iter()]
    assert remaining == [pytest.approx(RETENTION_SECONDS, abs=5)] * 2


async def test_deeper_and_wider_trees_than_bounded_are_cut(server: EmbeddedRedis, redis: Redis) -> None:
    wide = (1.0,) * (MAX_RANK + 10)
    await add(server.url, LiveAcceptance(AcceptanceCounts((wide, *[(1.0,)] * (MAX_DEPTH + 10)), ())))
    offered = (await read(server.url)).counts.offered
    assert (len(offered), len(offered[0])) == (MAX_DEPTH + 1, MAX_RANK + 1)


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("o:0:0", "many", "could not convert"),
        ("o:0:0", "nan", "nan is no count"),
        ("o:0:0", "1e308", "is no count"),
        ("a:0:1", "-1", "-1.0 is no count"),
        ("a:0:0", "6", "depth 0, rank 0: 6.0 accepted of 5.0 offered"),
        ("a:0:7", "1", "8 ranks accepted, but 2 offered"),
        ("a:9:0", "1", "depths accepted"),
        ("o:65:0", "1", "no field"),
        ("o:0:1025", "1", "no field"),
        ("o:00:0", "1", "no field"),
        ("o:99999999999999999999:0", "1", "no field"),
        (b"\xff", "1", "no field"),
        ("steps", "", "could not convert"),
        ("tokens", "inf", "inf is no count"),
    ],
)
async def test_a_slice_that_cannot_be_is_reported_and_skipped(
    server: EmbeddedRedis, redis: Redis, field: str | bytes, value: str, complaint: str
) -> None:
    await add(server.url, LEARNT, NOW - SLICE_SECONDS)
    await add(server.url)
    redis.hset(SLICE, field, value)
    live = await read(server.url, half_life_seconds=SLICE_SECONDS)
    assert live.counts == COUNTS.scaled(0.5)
    assert live.num_steps == 1.0
    [rejected] = live.rejected
    assert rejected.startswith(SLICE)
    assert complaint in rejected


async def test_a_key_of_another_type_is_reported_and_left_alone(server: EmbeddedRedis, redis: Redis) -> None:
    redis.set(SLICE, "somebody's")
    live = await read(server.url)
    assert replace(live, rejected=()) == NOTHING
    assert "WRONGTYPE" in live.rejected[0]
    with pytest.raises(Unavailable, match="WRONGTYPE"):
        await add(server.url)
    assert redis.get(SLICE) == b"somebody's"


@pytest.mark.parametrize("total", [-1.0, math.inf, math.nan])
def test_figures_that_cannot_be_are_refused(total: float) -> None:
    with pytest.raises(ValueError, match="tokens must be 0 or more and finite"):
        LiveAcceptance(COUNTS, num_tokens=total)


async def test_a_redis_that_is_down_is_unavailable() -> None:
    with pytest.raises(Unavailable, match="cannot read"):
        await read("redis://127.0.0.1:1/0")
    with pytest.raises(Unavailable, match="cannot add"):
        await add("redis://127.0.0.1:1/0")


async def test_a_redis_that_refuses_is_unavailable(server: EmbeddedRedis, redis: Redis) -> None:
    redis.acl_setuser("reader", enabled=True, nopass=True, keys=["elsewhere:*"], commands=["+@all"])
    url = server.url.replace("://", "://reader:any@")
    with pytest.raises(Unavailable, match="cannot read"):
        await read(url)
    with pytest.raises(Unavailable, match="cannot add"):
        await add(url)


async def test_a_redis_that_never_answers_is_unavailable_within_seconds() -> None:
    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(hold, "127.0.0.1", 0) as mute, asyncio.timeout(5):
        port = mute.sockets[0].getsockname()[1]
        with pytest.raises(Unavailable, match="cannot read"):
            await read(f"redis://127.0.0.1:{port}/0")


async def test_a_redis_that_comes_back_is_found_again_at_once() -> None:
    with EmbeddedRedis() as first:
        live = LiveCounts(first.url)
        await live.add(KEY, LEARNT, now=NOW)
    async with live:
        with pytest.raises(Unavailable):
            await live.add(KEY, LEARNT, now=NOW)
        with EmbeddedRedis(first.port):
            await live.add(KEY, LEARNT, now=NOW)
            assert await live.read(KEY, now=NOW, half_life_seconds=3600.0) == LEARNT


async def test_a_restart_between_two_calls_is_not_noticed() -> None:
    with EmbeddedRedis() as first:
        live = LiveCounts(first.url)
        await live.add(KEY, LEARNT, now=NOW)
    async with live:
        with EmbeddedRedis(first.port):
            await live.add(KEY, LEARNT, now=NOW)
            assert await live.read(KEY, now=NOW, half_life_seconds=3600.0) == LEARNT


def test_a_url_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(InvalidArgument, match=r"^redis: 'localhost:6379' is no Redis URL"):
        LiveCounts("localhost:6379")


def test_the_key_holds_no_free_text() -> None:
    assert str(KEY).startswith("sequoia:acceptance:v1:")
    assert str(KEY).endswith(":coupled:(0,0.4]")
    assert "target" not in str(KEY)
