import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest
from redis import Redis

from sequoia.cli.redis import EmbeddedRedis
from sequoia.errors import InvalidArgument, Unavailable
from sequoia.hardware import LatencyCurve
from sequoia.planner import PlanInputs, choose
from sequoia.situation import Situation
from sequoia.tree_cache import PlanKey, StoredPlan, TreeCache

KEY = PlanKey("draft -> target", "cpu 2", "gpu 1", Situation("greedy", "0"))
PLAN = choose(PlanInputs(((0.6, 0.2),), LatencyCurve((1, 8), (0.1, 0.12)), LatencyCurve((1, 8), (0.01, 0.01))))
STORED = StoredPlan(PLAN, 1.5e9)


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture(name="redis")
def empty_redis(server: EmbeddedRedis) -> Iterator[Redis]:
    with Redis.from_url(server.url) as redis:
        redis.flushall()
        yield redis


async def lookup(url: str, *keys: PlanKey) -> tuple[dict[PlanKey, StoredPlan], dict[PlanKey, str]]:
    async with TreeCache(url) as cache:
        return await cache.get_many(keys)


async def test_a_plan_comes_back_as_it_was_put(server: EmbeddedRedis, redis: Redis) -> None:
    async with TreeCache(server.url) as cache:
        await cache.put_many({KEY: STORED}, ttl_seconds=60)
        other = replace(KEY, pair="another -> target")
        assert await cache.get_many([KEY, other]) == ({KEY: STORED}, {})
    assert 0 < redis.ttl(str(KEY)) <= 60


async def test_no_keys_need_no_redis() -> None:
    assert await lookup("redis://127.0.0.1:1/0") == ({}, {})


@pytest.mark.parametrize("entry", [b"", b"\xff", b"{}", b"null", STORED.to_json().replace(":", ";").encode()])
async def test_an_entry_that_is_no_plan_is_reported_and_skipped(
    server: EmbeddedRedis, redis: Redis, entry: bytes
) -> None:
    good = replace(KEY, situation=Situation("sequoia", "0"))
    redis.mset({str(KEY): entry, str(good): STORED.to_json()})
    plans, rejected = await lookup(server.url, KEY, good)
    assert plans == {good: STORED}
    assert "not a tree plan" in rejected[KEY]


async def test_an_entry_of_another_redis_type_is_not_there(server: EmbeddedRedis, redis: Redis) -> None:
    redis.lpush(str(KEY), STORED.to_json())
    assert await lookup(server.url, KEY) == ({}, {})


async def test_a_redis_that_is_down_is_unavailable() -> None:
    async with TreeCache("redis://127.0.0.1:1/0") as cache:
        with pytest.raises(Unavailable, match="cannot read"):
            await cache.get_many([KEY])
        with pytest.raises(Unavailable, match="cannot write"):
            await cache.put_many({KEY: STORED}, ttl_seconds=60)


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
        await cache.put_many({KEY: STORED}, ttl_seconds=60)
    async with cache:
        with EmbeddedRedis(first.port):
            assert await cache.get_many([KEY]) == ({}, {})


def test_a_url_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(InvalidArgument, match=r"^redis: 'localhost:6379' is no Redis URL"):
        TreeCache("localhost:6379")


def test_keys_differ_in_every_part_and_hold_no_free_text() -> None:
    changed = [replace(KEY, **{name: "x y:z"}) for name in ("pair", "draft_hardware", "verify_hardware")]
    situations = [
        replace(KEY.situation, **{name: "other"})
        for name in ("rule", "temperature", "sessions", "context", "round_trip")
    ]
    keys = {str(key) for key in [KEY, *changed, *(replace(KEY, situation=each) for each in situations)]}
    assert len(keys) == 9
    assert all(key.startswith("sequoia:plan:v2:") and " " not in key for key in keys)


async def test_plans_are_stored_all_or_none(server: EmbeddedRedis, redis: Redis) -> None:
    other = replace(KEY, pair="another -> target")
    redis.execute_command("ACL", "SETUSER", "default", "-set")
    try:
        async with TreeCache(server.url) as cache:
            with pytest.raises(Unavailable, match="cannot write"):
                await cache.put_many({KEY: STORED, other: STORED}, ttl_seconds=60)
    finally:
        redis.execute_command("ACL", "SETUSER", "default", "+set")
    assert redis.keys("*") == []


async def test_who_listens_hears_of_new_plans(server: EmbeddedRedis) -> None:
    async with TreeCache(server.url) as cache, asyncio.timeout(10):
        news = cache.news()
        await anext(news)
        await cache.put_many({KEY: STORED}, ttl_seconds=60)
        await anext(news)
        await news.aclose()


async def test_a_listener_hears_that_redis_is_down() -> None:
    async with TreeCache("redis://127.0.0.1:1/0") as cache:
        with pytest.raises(Unavailable, match="cannot listen"):
            await anext(cache.news())


async def test_the_lock_is_one_planners_until_it_leaves(server: EmbeddedRedis, redis: Redis) -> None:
    async with TreeCache(server.url) as first, TreeCache(server.url) as second:
        async with first.single_flight(KEY) as ours:
            async with second.single_flight(replace(KEY, situation=replace(KEY.situation, rule="other"))) as theirs:
                assert (ours, theirs) == (True, False)
            async with second.single_flight(replace(KEY, pair="another -> target")) as of_another_pair:
                assert of_another_pair
            assert 0 < redis.ttl(KEY.lock) <= 30
        async with second.single_flight(KEY) as later:
            assert later


async def test_a_lock_that_ran_out_is_given_back_without_taking_the_next_ones(
    server: EmbeddedRedis, redis: Redis
) -> None:
    async with TreeCache(server.url) as first, TreeCache(server.url) as second:
        async with first.single_flight(KEY):
            redis.delete(KEY.lock)
            async with second.single_flight(KEY) as is_theirs:
                assert is_theirs
                held = redis.get(KEY.lock)
        assert held is not None


async def test_no_lock_without_redis() -> None:
    async with TreeCache("redis://127.0.0.1:1/0") as cache:
        with pytest.raises(Unavailable, match="lock"):
            async with cache.single_flight(KEY):
                pass
