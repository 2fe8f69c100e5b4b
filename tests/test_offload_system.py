"""A target that does not fit: served from disk by a real worker within its memory limit, with the same text."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch
from engines import needs_native
from rich.console import Console
from tiny_models import build_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from sequoia.cli import main
from sequoia.cli.benchmarks.streaming import Streamed
from sequoia.cli.deployment import Deployment, DeploymentSettings
from sequoia.cli.steps import Steps
from sequoia.client import Client
from sequoia.config import num_bytes
from sequoia.errors import Unavailable
from sequoia.process_memory import anonymous_bytes
from sequoia.topology import Topology
from sequoia.v1 import worker_pb2_grpc
from sequoia.worker_config import WorkerConfig

NUM_LAYERS = 32
LIMIT = "768MiB"
PROMPTS = [list(range(start, start + 24)) for start in range(30, 80, 10)]
TREE = Topology((-1, 0, 0, 1, 1, 3, 5))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 0.4 GB in float32: what the limit leaves, with torch in it, is a third of that."""
    folder: Path = tmp_path_factory.mktemp("large")
    tokenizer = build_tokenizer(400)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def one_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of four would take more than the layers."""
    monkeypatch.setenv("SEQUOIA_NUM_SLOTS", "1")


@contextmanager
def system(folder: Path, dtype: str, **settings: object) -> Iterator[Client]:
    asked = DeploymentSettings(target=str(folder), dtype=dtype, listen="127.0.0.1:0", num_threads=1, **settings)  # type: ignore[arg-type]
    with (
        Deployment(asked, Steps(Console(quiet=True))) as deployment,
        Client(deployment.address, timeout_seconds=120) as client,
    ):
        yield client


def texts(client: Client, **parameters: object) -> list[tuple[int, ...]]:
    asked = {"max_tokens": 32, "ignore_eos": True, "temperature": 0, "speculation": "off", **parameters}
    return [tuple(client.generate(prompt, **asked).token_ids) for prompt in PROMPTS]  # type: ignore[arg-type]


class PeakMemory:
    """The most anonymous memory that a verify worker was seen with, from its first moment, sampled by a thread."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self.bytes = 0
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(0.02):
            found = [anonymous_bytes(process_id) or 0 for process_id in verify_workers()]
            self.bytes = max([self.bytes, *found])


def verify_workers() -> list[int]:
    """Processes of this one's."""
    ours = f"PPid:\t{os.getpid()}\n"
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if b"verify_worker" in (folder / "cmdline").read_bytes() and ours in (folder / "status").read_text():
                found.append(int(folder.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_stays_within_its_limit_and_writes_the_same(large: Path, dtype: str) -> None:
    with system(large, dtype, has_draft=False) as client:
        expected = texts(client)
    settings = {"has_draft": False, "offload": "disk", "memory_limit": LIMIT}
    with PeakMemory() as peak, system(large, dtype, **settings) as client:
        assert texts(client) == expected
    assert num_bytes(LIMIT) / 2 < peak.bytes < num_bytes(LIMIT)


@pytest.mark.slow
def test_a_draft_in_memory_speeds_up_a_target_on_disk_and_changes_nothing(large: Path) -> None:
    with system(large, "float32", draft=str(large), offload="disk", memory_limit=LIMIT) as client:
        plain, drafted = texts(client), texts(client, speculation=TREE)
        assert drafted == plain
        pair = client.describe_pair()
        assert pair.verify.max_tree_size == pair.draft.max_tree_size == 768


@needs_native
@pytest.mark.slow
def test_without_a_draft_named_it_is_the_targets_own_weights_in_4_bits(large: Path) -> None:
    with system(large, "bfloat16", offload="disk", memory_limit=LIMIT) as client:
        pair = client.describe_pair()
        assert (pair.draft.model, pair.draft.quantization) == (str(large), "int4")
        assert "in memory" not in pair.draft.hardware_key, "all of it is"
        assert texts(client, speculation=TREE) == texts(client)


@pytest.mark.slow
def test_where_4_bits_cannot_be_had_it_has_8(large: Path) -> None:
    with system(large, "float32", offload="disk", memory_limit=LIMIT) as client:
        assert client.describe_pair().draft.quantization == "int8"
        assert texts(client, speculation=TREE) == texts(client)


@pytest.mark.slow
def test_a_worker_tells_what_its_forwards_take(large: Path) -> None:
    asked = DeploymentSettings(str(large), dtype="float32", has_draft=False, offload="disk", memory_limit=LIMIT)
    with (
        Deployment(replace(asked, listen="127.0.0.1:0"), Steps(Console(quiet=True))) as deployment,
        Client(deployment.address) as client,
        grpc.insecure_channel(deployment.addresses["verify"]) as channel,
    ):
        worker = worker_pb2_grpc.WorkerServiceStub(channel)
        before = Streamed.of(worker)
        generation = client.generate(PROMPTS[0], max_tokens=8, temperature=0, ignore_eos=True)
        passed = Streamed.of(worker).since(before)
        assert passed.num_forwards == len(generation.token_ids) == 8
        assert 0.0 <= passed.stall_seconds < passed.forward_seconds <= generation.usage.total_seconds
        assert passed.bytes_of_forward > 0.2 * 2**28


@pytest.mark.slow
def test_a_layer_that_is_lost_is_told_to_the_client(large: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SEQUOIA_CACHE_DIR", str(tmp_path))
    with system(large, "float32", has_draft=False, offload="disk", memory_limit=LIMIT) as client:
        texts(client)
        for path in (tmp_path / "offload").rglob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:1000])
        for _ in range(2):
            with pytest.raises(Unavailable, match="was changed while it was in use"):
                client.generate(PROMPTS[0], max_tokens=4, temperature=0)


@pytest.mark.parametrize("size", ["2 gigs", "-1", "GiB"])
def test_a_size_that_is_none_is_refused_by_name(size: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        num_bytes(size)


@pytest.mark.parametrize(
    ("text", "count"), [("2GiB", 2 << 30), ("512 MiB", 512 << 20), ("1.5GB", 15 * 10**8), ("7", 7)]
)
def test_sizes(text: str, count: int) -> None:
    assert num_bytes(text) == count


def test_a_limit_without_offloading_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--memory-limit .* is for --offload disk, host or auto"):
        WorkerConfig(model="m", memory_limit="2GiB")
    with pytest.raises(ValueError, match=r"--resident-layers \(SEQUOIA_RESIDENT_LAYERS\) is for --offload"):
        WorkerConfig(model="m", resident_layers=3)
    with pytest.raises(ValueError, match=r"--resident-layers .* must be -1 or more"):
        WorkerConfig(model="m", offload="disk", resident_layers=-2)
    flags = DeploymentSettings(memory_limit="2GiB").worker_flags("verify")
    assert (flags["offload"], flags["memory-limit"]) == ("none", "2GiB"), "it reaches the worker, which refuses it"


def test_too_small_a_limit_is_told_before_it_serves(capfd: pytest.CaptureFixture[str], large: Path) -> None:
    flags = ["--no-draft", "--offload=disk", "--memory-limit=64MiB", "--listen=127.0.0.1:0"]
    assert main(["up", f"--target={large}", *flags]) == 1
    assert "memory-limit: it leaves" in capfd.readouterr().err
