"""Blocks that pass through a few buffers: each as it was written, in order, whatever fails between."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sequoia.engine.offload.block import Block, Buffer, write_block
from sequoia.engine.offload.stream import BlockStream
from sequoia.errors import FailedPrecondition, Unavailable

NUM_BLOCKS = 7


def tensors_of(index: int) -> dict[str, torch.Tensor]:
    """Of different sizes and dtypes, none a multiple of a page."""
    generator = torch.Generator().manual_seed(index)
    return {
        "weight": torch.randn((300 + 13 * index, 17), generator=generator).bfloat16(),
        "norm": torch.randn(5, generator=generator),
        "panels": torch.randint(0, 256, (3, 1001), generator=generator, dtype=torch.uint8),
    }


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{index}.safetensors" for index in range(NUM_BLOCKS)]
    for index, path in enumerate(paths):
        write_block(path, tensors_of(index))
    return paths


@pytest.fixture
def blocks(paths: Sequence[Path]) -> list[Block]:
    return list(map(Block, paths))


@pytest.fixture(params=[0, 1, 3, NUM_BLOCKS])
def stream(request: pytest.FixtureRequest, blocks: list[Block]) -> Iterator[BlockStream]:
    with BlockStream(blocks, num_resident=request.param, num_buffers=2) as stream:
        yield stream


def check_pass(stream: BlockStream) -> None:
    for index, found in enumerate(stream.blocks()):
        expected = tensors_of(index)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def num_readers() -> int:
    return sum(thread.name == "offload" for thread in threading.enumerate())


def test_every_pass_has_every_block_as_it_was_written(stream: BlockStream) -> None:
    for _ in range(3):
        check_pass(stream)
    assert stream.passed.num_passes == 3


def test_resident_blocks_are_read_once(blocks: list[Block]) -> None:
    with BlockStream(blocks, num_resident=NUM_BLOCKS) as stream:
        check_pass(stream)
        assert stream.passed.num_bytes == 0


def test_a_pass_that_is_given_up_leaves_the_next_one_whole(blocks: list[Block]) -> None:
    with BlockStream(blocks, num_resident=2, num_buffers=2) as stream:
        for count in range(NUM_BLOCKS):
            given_up = stream.blocks()
            for _ in range(count):
                next(given_up)
        check_pass(stream)
        assert num_readers() == 1
    assert num_readers() == 0


def test_memory_is_bounded_by_the_buffers(blocks: list[Block]) -> None:
    with BlockStream(blocks, num_resident=0, num_buffers=2) as stream:
        places = {found["norm"].data_ptr() & -4096 for _ in range(3) for found in stream.blocks()}
    assert len(places) <= 2 * 2, "two buffers; where a tensor is in one follows from its block"


@pytest.mark.parametrize("damage", ["truncated", "touched", "replaced"])
def test_a_file_that_changes_under_our_feet_is_an_error_by_name_and_no_hang(
    paths: Sequence[Path], blocks: list[Block], damage: str
) -> None:
    with BlockStream(blocks, num_resident=0, num_buffers=2) as stream:
        check_pass(stream)
        if damage == "truncated":
            os.truncate(paths[5], 100)
        elif damage == "touched":
            os.utime(paths[5], (1, 1))
        else:
            os.replace(paths[0], paths[5])
        with pytest.raises(Unavailable, match=f"offload: .*{paths[5].name} was changed"):
            check_pass(stream)
        with pytest.raises(Unavailable, match="was changed"):
            check_pass(stream)


def test_a_read_error_reaches_the_one_who_computes_and_the_next_pass_works(
    blocks: list[Block], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, preadv = iter(range(100)), os.preadv

    def failing(file: int, buffers: Sequence[memoryview], position: int) -> int:
        if next(reads) == 4:
            raise OSError(5, "Input/output error")
        return preadv(file, buffers, position)

    monkeypatch.setattr(os, "preadv", failing)
    with BlockStream(blocks, num_resident=0, num_buffers=2) as stream:
        with pytest.raises(Unavailable, match=r"offload: .*Input/output error"):
            check_pass(stream)
        check_pass(stream)


def test_blocks_are_safetensors_files_of_aligned_tensors(paths: Sequence[Path], blocks: list[Block]) -> None:
    expected = tensors_of(3)
    with safe_open(paths[3], "pt") as file:
        assert all(torch.equal(file.get_tensor(name), each) for name, each in expected.items())
    found = blocks[3].read(Buffer(blocks[3].num_bytes))
    assert found.keys() == expected.keys()
    assert not any(each.data_ptr() % 64 for each in found.values())


def test_what_is_no_safetensors_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "0.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(FailedPrecondition, match=r"offload: .*cannot be read"):
        Block(tmp_path / "0.safetensors")
    with pytest.raises(FailedPrecondition, match="cannot be read"):
        Block(tmp_path / "1.safetensors")


def test_a_short_file_is_told_where_it_ends(paths: Sequence[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block(paths[0])
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(Unavailable, match=f"ends at byte 0 of {block.num_bytes}"):
        block.read(Buffer(block.num_bytes))
