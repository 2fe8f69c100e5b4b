import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest
from redis import Redis

from sequoia.cli.redis import EmbeddedRedis
from sequoia.errors import InvalidArgument, Unavailable
from sequoia.hardware import LatencyCurve
from sequoia.planner import PlanInputs, TreePlan, choose
from sequoia.tree_cache import TEMPERATURE_BUCKETS, PlanKey, TreeCache, temperature_bucket

KEY = PlanKey("draft -> target", "cpu 2", "gpu 1", "greedy", "0")
PLAN = choose(PlanInputs((0.6, 0.2), LatencyCurve((1, 8), (0.1, 0.12)), LatencyCurve((1, 8), (0.01, 0.01))))


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture(name="redis")
def empty_redis(server: EmbeddedRedis) -> Iterator[Redis]:
    with Redis.from_url(server.url) as redis:
        redis.flushall()
        yield redis


async def lookup(url: str, *keys: PlanKey) -> tuple[dict[PlanKey, TreePlan], dict[PlanKey, str]]:
    async with TreeCache(url) as cache:
        return await cache.get_many(keys)


async def test_a_plan_comes_back_as_it_was_put(server: EmbeddedRedis, redis: Redis) -> None:
    async with TreeCache(server.url) as cache:
        await cache.put(KEY, PLAN, ttl_seconds=60)
        other = replace(KEY, pair="another -> target")
        assert await cache.get_many([KEY, other]) == ({KEY: PLAN}, {})
    assert 0 < redis.ttl(str(KEY)) <= 60


async def test_no_keys_need_no_redis() -> None:
    assert await lookup("redis://127.0.0.1:1/0") == ({}, {})


@pytest.mark.parametrize("entry", [b"", b"\xff", b"{}", b"null", PLAN.to_json().replace(":", ";").encode()])
async def test_an_entry_that_is_no_plan_is_reported_and_skipped(
    server: EmbeddedRedis, redis: Redis, entry: bytes
) -> None:
    good = replace(KEY, rule="sequoia")
    redis.mset({str(KEY): entry, str(good): PLAN.to_json()})
    plans, rejected = await lookup(server.url, KEY, good)
    assert plans == {good: PLAN}
    assert "not a tree plan" in rejected[KEY]


async def test_an_entry_of_another_redis_type_is_not_there(server: EmbeddedRedis, redis: Redis) -> None:
    redis.lpush(str(KEY), PLAN.to_json())
    assert await lookup(server.url, KEY) == ({}, {})


async def test_a_redis_that_is_down_is_unavailable() -> None:
    async with TreeCache("redis://127.0.0.1:1/0") as cache:
        with pytest.raises(Unavailable, match="cannot read"):
            await cache.get_many([KEY])
        with pytest.raises(Unavailable, match="cannot write"):
            await cache.put(KEY, PLAN, ttl_seconds=60)


async def test_a_redis_that_never_answers_is_unavailable_within_seconds() -> None:
    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(hold, "127.0.0.1", 0) as mute, asyncio.timeout(5):
        port = mute.sockets[0].getsockname()[1]
        with pytest.raises(Unavailable, match="cannot read"):
            await lookup(f"redis://127.0.0.1:{port}/0", KEY)


async def test_a_restarted_redis_is_found_again_at_once() -> None:
    with EmbeddedRedis() as first:
        cache = TreeCache(first.url)
        await cache.put(KEY, PLAN, ttl_seconds=60)
    async with cache:
        with EmbeddedRedis(first.port):
            assert await cache.get_many([KEY]) == ({}, {})


def test_a_url_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(InvalidArgument, match=r"^redis: 'localhost:6379' is no Redis URL"):
        TreeCache("localhost:6379")


def test_keys_differ_in_every_part_and_hold_no_free_text() -> None:
    changed = [replace(KEY, **{name: "x y:z"}) for name in ("pair", "draft_hardware", "verify_hardware")]
    keys = {
        str(key) for key in [KEY, *changed, replace(KEY, rule="sequoia"), replace(KEY, temperature_bucket="(0,0.4]")]
    }
    assert len(keys) == 6
    assert all(key.startswith("sequoia:plan:v1:") and " " not in key for key in keys)


@pytest.mark.parametrize(
    ("temperature", "index"), [(0.0, 0), (1e-6, 1), (0.4, 1), (0.41, 2), (0.8, 2), (0.81, 3), (1.0, 3), (100.0, 3)]
)
def test_temperatures_fall_in_four_buckets(temperature: float, index: int) -> None:
    assert temperature_bucket(temperature) == TEMPERATURE_BUCKETS[index]
