"""Offloaded models: the same logits as in memory, whatever stays resident, and refusals by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import CACHE_DIR, load_engine, needs_native
from safetensors.torch import load_file, save_file
from test_native import tree_logits
from tiny_models import READABLE_ARCHITECTURES, write_tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

from sequoia.engine.decoders import Arithmetic
from sequoia.engine.forwards import Engine
from sequoia.engine.kv_cache import KVCache
from sequoia.engine.model import load_model
from sequoia.engine.native.library import library
from sequoia.engine.offload.decoder import NUM_BUFFERS, Offloaded, build_offloaded
from sequoia.engine.offload.modules import HollowModules
from sequoia.engine.sources import resolve
from sequoia.errors import FailedPrecondition, InvalidArgument, Unavailable

ROOM_FOR_ALL = 1 << 30
KINDS = [
    ("float32", "auto", "none"),
    pytest.param("bfloat16", "auto", "none", marks=needs_native),
    pytest.param("bfloat16", "auto", "int8", marks=needs_native),
    pytest.param("bfloat16", "auto", "int4", marks=needs_native),
    ("bfloat16", "lean", "none"),
]


@pytest.fixture(scope="module", params=READABLE_ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param)
    write_tiny_model(folder, request.param, num_layers=5)
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    write_tiny_model(tmp_path / "llama", "llama", num_layers=5)
    return tmp_path / "llama"


def build(
    folder: Path,
    cache: Path,
    dtype: str,
    engine: str,
    quantization: str,
    resident_bytes: int,
    *,
    deterministic: bool = False,
    **how: Any,
) -> Offloaded:
    model = load_model(resolve(str(folder)), dtype=dtype, device="cpu", offload="disk")
    arithmetic = Arithmetic(engine, quantization, deterministic=deterministic)
    return build_offloaded(model, arithmetic, 256, cache, lambda _: resident_bytes, **how)


def engine_of(offloaded: Offloaded, dtype: str) -> Engine:
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    return Engine(offloaded.decoder, KVCache(5, 2, 256), torch.device("cpu"), kind)


def layer_bytes(cache: Path) -> int:
    return max(path.stat().st_size for path in (cache / "offload").rglob("*.safetensors"))


@pytest.fixture(autouse=True)
def compiled_once(tmp_path: Path) -> None:
    """The caches of these tests are their own, but for the C engine."""
    (CACHE_DIR / "native").mkdir(parents=True, exist_ok=True)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "native").symlink_to(CACHE_DIR / "native")


@pytest.mark.parametrize(("dtype", "engine", "quantization"), KINDS)
def test_logits_are_those_of_the_model_in_memory(
    folder: Path, tmp_path: Path, dtype: str, engine: str, quantization: str
) -> None:
    whole = load_engine(folder, dtype=dtype, engine=engine, quantization=quantization)
    expected = tree_logits(whole)
    # torch's own products differ in their last bits with the place of a matrix in a cache line.
    tolerance = 0.0 if whole.can_grow else 2e-5 if dtype == "float32" else 0.05
    cache = tmp_path / "cache"
    rooms = [ROOM_FOR_ALL, NUM_BUFFERS, NUM_BUFFERS + 1]
    for room in rooms:
        num_bytes = room if room == ROOM_FOR_ALL else room * layer_bytes(cache)
        offloaded = build(folder, cache, dtype, engine, quantization, num_bytes)
        with offloaded.stream as stream:
            torch.testing.assert_close(tree_logits(engine_of(offloaded, dtype)), expected, rtol=0.0, atol=tolerance)
            assert stream.is_resident == (room == ROOM_FOR_ALL)
            assert stream.passed.num_passes == (1 if stream.is_resident else 3)
            assert (stream.passed.num_bytes == 0) == stream.is_resident


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_in_the_hosts_memory_give_the_same_logits(folder: Path, tmp_path: Path, dtype: str) -> None:
    expected = tree_logits(load_engine(folder, dtype=dtype, engine="lean"))
    heard: list[tuple[int, int]] = []
    for num_resident in (None, 0, 2):
        offloaded = build(
            folder,
            tmp_path / "cache",
            dtype,
            "auto",
            "none",
            ROOM_FOR_ALL,
            tier="host",
            num_resident=num_resident,
            on_progress=lambda *progress: heard.append(progress),
        )
        assert offloaded.decoder.name == "lean"
        with offloaded.stream as stream:
            tolerance = 2e-5 if dtype == "float32" else 0.05
            torch.testing.assert_close(tree_logits(engine_of(offloaded, dtype)), expected, rtol=0.0, atol=tolerance)
            assert stream.num_resident == (5 if num_resident is None else num_resident)
            assert ("from the host's memory" in str(stream)) == (num_resident is not None)
    assert heard == 3 * [(done, 5) for done in range(1, 6)]
    assert not (tmp_path / "cache" / "offload").exists()


def test_what_is_packed_piece_by_piece_and_fits_is_as_quick_as_a_model_in_memory(llama: Path, tmp_path: Path) -> None:
    if not load_engine(llama, dtype="bfloat16").can_grow:
        pytest.skip("no native engine here")
    offloaded = build(llama, tmp_path / "cache", "bfloat16", "auto", "int4", ROOM_FOR_ALL)
    with offloaded.stream:
        assert engine_of(offloaded, "bfloat16").can_grow, "whole trees in a call"


@pytest.mark.parametrize("num_resident", [0, 1])
def test_as_many_layers_stay_as_were_asked_for(llama: Path, tmp_path: Path, num_resident: int) -> None:
    cache = tmp_path / "cache"
    with build(llama, cache, "float32", "auto", "none", ROOM_FOR_ALL, num_resident=num_resident).stream as stream:
        assert stream.num_resident == num_resident


def test_more_resident_layers_than_fit_are_refused(llama: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with build(llama, cache, "float32", "auto", "none", ROOM_FOR_ALL).stream:
        pass
    with pytest.raises(InvalidArgument, match=r"resident-layers: 2 of 5 are more than the 1 that fit"):
        build(llama, cache, "float32", "auto", "none", (NUM_BUFFERS + 1) * layer_bytes(cache), num_resident=2)


@pytest.mark.parametrize(("tier", "reason"), [("host", "host is no tier of a model on cpu; use disk")])
def test_a_tier_that_is_none_here_is_refused(llama: Path, tier: str, reason: str) -> None:
    with pytest.raises(InvalidArgument, match=f"offload: {reason}"):
        load_model(resolve(str(llama)), dtype="auto", device="cpu", offload=tier)


def test_a_checkpoint_in_several_files_is_read_as_one(llama: Path, tmp_path: Path) -> None:
    expected = tree_logits(load_engine(llama))
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(llama, max_shard_size="100KB")
    (llama / "model.safetensors").unlink(missing_ok=True)
    assert (llama / "model.safetensors.index.json").exists()
    offloaded = build(llama, tmp_path / "cache", "float32", "auto", "none", ROOM_FOR_ALL)
    with offloaded.stream:
        torch.testing.assert_close(tree_logits(engine_of(offloaded, "float32")), expected, rtol=0.0, atol=2e-5)


def test_deterministic_rows_stay_so_when_they_are_streamed(llama: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    offloaded = build(llama, cache, "float32", "lean", "none", ROOM_FOR_ALL, deterministic=True)
    with offloaded.stream:
        assert offloaded.decoder.rows_are_independent
        found = tree_logits(engine_of(offloaded, "float32"))
    expected = tree_logits(load_engine(llama, engine="lean", deterministic=True))
    torch.testing.assert_close(found, expected, rtol=0.0, atol=2e-5)


def test_too_little_memory_is_refused_with_what_is_needed(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"memory-limit: it leaves 0 MiB for layers, and streaming takes"):
        build(llama, tmp_path / "cache", "float32", "auto", "none", 1000)


@pytest.mark.parametrize("tier", ["disk", "host"])
@pytest.mark.parametrize("architecture", ["gpt_neox", "phi", "starcoder2", "llama", "gemma3"])
def test_a_model_s_own_modules_are_streamed(tmp_path: Path, architecture: str, tier: str) -> None:
    folder, cache = tmp_path / architecture, tmp_path / "cache"
    write_tiny_model(folder, architecture, num_layers=5, tie_word_embeddings=architecture == "starcoder2")
    expected = tree_logits(load_engine(folder, engine="transformers"))
    for num_resident in (None, 0, 2):
        how = {"tier": tier, "num_resident": num_resident}
        offloaded = build(folder, cache, "float32", "transformers", "none", ROOM_FOR_ALL, **how)
        with offloaded.stream as stream:
            engine = engine_of(offloaded, "float32")
            for _ in range(2):
                torch.testing.assert_close(tree_logits(engine), expected, rtol=0.0, atol=2e-5)
            assert stream.num_resident == (5 if num_resident is None else num_resident)
            assert stream.passed.num_passes == (1 if num_resident is None else 6)


def test_a_forward_that_fails_leaves_the_next_one_whole(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "phi", "phi", num_layers=5)
    offloaded = build(tmp_path / "phi", tmp_path / "cache", "float32", "auto", "none", ROOM_FOR_ALL, num_resident=0)
    with offloaded.stream:
        engine = engine_of(offloaded, "float32")
        expected = tree_logits(engine)
        layer = offloaded.decoder._hollow.layers[2]  # type: ignore[attr-defined]

        def fail(*_: object) -> None:
            raise RuntimeError("in the middle")

        handle = layer.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            tree_logits(engine)
        handle.remove()
        assert torch.equal(tree_logits(engine), expected)


def test_layers_that_cannot_be_told_are_refused_by_name() -> None:
    module = torch.nn.Module()
    module.a, module.b = (torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(3)]) for _ in range(2))
    module.config = LlamaConfig(num_hidden_layers=3)
    with pytest.raises(InvalidArgument, match=r"offload: which of the modules of llama models are its 3 layers .*a, b"):
        HollowModules(module, None)  # type: ignore[arg-type]


def test_quantised_modules_are_refused_by_name(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"quantization: int8 needs the native engine"):
        build(llama, tmp_path / "cache", "float32", "transformers", "int8", ROOM_FOR_ALL)


def test_missing_weights_are_refused_by_name(llama: Path, tmp_path: Path) -> None:
    path = llama / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InvalidArgument, match=r"model: .* lacks the weights model\.layers\.3\.mlp\.up_proj\.weight"):
        build(llama, tmp_path / "cache", "float32", "auto", "none", ROOM_FOR_ALL)
    assert not list((tmp_path / "cache" / "offload").glob("*-plain-1")), "nothing half written is left"


def test_a_full_disk_is_told_and_leaves_nothing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sequoia.engine.offload.layout.write_block", full)
    with pytest.raises(FailedPrecondition, match=r"offload: layers cannot be written .* No space left on device"):
        build(llama, tmp_path / "cache", "float32", "auto", "none", ROOM_FOR_ALL)
    assert {path.suffix for path in (tmp_path / "cache" / "offload").iterdir()} == {".lock"}


def test_a_layer_that_changes_fails_the_forward_and_the_next_one_too(llama: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with build(llama, cache, "float32", "auto", "none", ROOM_FOR_ALL).stream:
        pass
    offloaded = build(llama, cache, "float32", "auto", "none", NUM_BUFFERS * layer_bytes(cache))
    [last] = (cache / "offload").rglob("0004.safetensors")
    with offloaded.stream:
        engine = engine_of(offloaded, "float32")
        tree_logits(engine)
        last.touch()
        for _ in range(2):
            with pytest.raises(Unavailable, match=r"0004\.safetensors was changed"):
                tree_logits(engine)


@pytest.fixture(scope="session", autouse=True)
def native_engine() -> Iterator[None]:
    """Compiled before the tests that link to it."""
    try:
        library(CACHE_DIR)
    finally:
        yield
