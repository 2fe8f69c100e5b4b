"""The C engine against `transformers`, against exact products, and against itself in other company."""

from __future__ import annotations

import copy
import ctypes
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import CACHE_DIR, load_engine, needs_native
from safetensors.torch import load_file, save_file
from tiny_models import READABLE_ARCHITECTURES, write_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from sequoia.cli.seed_stability import NUM_WAYS, measure
from sequoia.cli.subject import load
from sequoia.config import cpu_flags
from sequoia.engine.attention import chunk_segment, tree_segment
from sequoia.engine.decoders import Arithmetic, build_decoder
from sequoia.engine.forwards import Engine
from sequoia.engine.model import load_model
from sequoia.engine.native.library import NativeUnavailable, library, vectors
from sequoia.engine.native.linear import NativeLinear
from sequoia.engine.native.panels import rounded
from sequoia.engine.sources import resolve
from sequoia.engine.weights import LinearWeights, is_readable
from sequoia.errors import InvalidArgument
from sequoia.sampling import Sampling
from sequoia.topology import TokenTree, Topology

# Wider and deeper than the sliding window of the tiny models (with the prompt before it).
SHAPE = Topology((-1, 0, 0, 0, 1, 1, 2, 4, 7, 8))


pytestmark = needs_native


@pytest.fixture(scope="module", params=READABLE_ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param)
    write_tiny_model(folder, request.param)
    return folder


def random_tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(5, 250, count).tolist()


PROMPT = random_tokens(30, seed=1)
TREE = TokenTree(SHAPE, tuple(random_tokens(SHAPE.size, seed=2)))


@torch.inference_mode()
def tree_logits(engine: Engine) -> Tensor:
    """Of every node, and of a token behind a path that was kept."""
    with engine.cache.slot() as slot:
        engine.forward([chunk_segment(slot, PROMPT[:20], logits=False)])
        slot.keep(range(20))
        [nodes] = engine.forward([tree_segment(slot, PROMPT[20:], TREE)])
        slot.keep([*range(10), 10, 11, 14, 17])
        [behind] = engine.forward([chunk_segment(slot, [77], logits=True)])
    return torch.cat([nodes, behind]).float()


def expected_logits(folder: Path, dtype: torch.dtype) -> Tensor:
    return logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager"))


@torch.inference_mode()
def logits_of(module: torch.nn.Module) -> Tensor:
    texts = [[*PROMPT, TREE.token_ids[0], *TREE.path_tokens(node)] for node in range(SHAPE.size)]
    texts.append([*texts[7], 77])
    return torch.stack([module(torch.tensor([text])).logits[0, -1] for text in texts]).float()


def test_errs_no_more_than_the_same_model_in_transformers(folder: Path) -> None:
    truth = expected_logits(folder, torch.float32)
    found = tree_logits(load_engine(folder, dtype="bfloat16", engine="native"))
    ours, theirs = (
        (logits - truth).square().mean().sqrt() for logits in (found, expected_logits(folder, torch.bfloat16))
    )
    assert ours < 1.2 * theirs
    assert ours < 0.1 * truth.std()


@pytest.mark.parametrize(("quantization", "bits"), [("int8", 8), ("int4", 4)])
def test_quantised_target_is_the_model_of_the_rounded_weights(folder: Path, quantization: str, bits: int) -> None:
    """The truth: `transformers` in float32, each linear layer with the weights that ours stand for."""
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    module.set_input_embeddings(copy.deepcopy(module.get_input_embeddings()))  # the head may share its weight
    for layer in (each for each in module.modules() if isinstance(each, torch.nn.Linear)):
        layer.weight = torch.nn.Parameter(rounded(layer.weight.detach().bfloat16(), bits))
    truth = logits_of(module)
    found = tree_logits(load_engine(folder, dtype="bfloat16", engine="native", quantization=quantization))
    dense = tree_logits(load_engine(folder, dtype="bfloat16", engine="native"))
    error = (found - truth).square().mean().sqrt()
    assert error < 0.1 * truth.std()
    assert error < 0.5 * (dense - truth).square().mean().sqrt(), "the rounding is not seen"


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("layer", [0, 3])
def test_a_broken_number_never_becomes_a_token(folder: Path, tmp_path: Path, layer: int, quantization: str) -> None:
    shutil.copytree(folder, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights[f"model.layers.{layer}.input_layernorm.weight"][5] = torch.nan
    save_file(weights, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    engine = load_engine(tmp_path / "broken", dtype="bfloat16", engine="native", quantization=quantization)
    assert tree_logits(engine).isnan().all()


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_every_way_to_compute_a_token_gives_the_same_bits(folder: Path, quantization: str) -> None:
    """6 ways x 96 tokens: trees of three sizes, a batch, a rebuilt session."""
    subject = load(str(folder), dtype="bfloat16", engine="native", quantization=quantization, context_length=256)
    prompts = (tuple(range(30, 60)), tuple(range(100, 117)))
    found = list(measure(subject, prompts, Sampling(seed=1), 48))
    assert len(found) == NUM_WAYS
    assert {(each.max_logit_difference, each.num_flips) for each in found} == {(0.0, 0)}


@pytest.fixture(params=["AMX", "AVX-512", "AVX2"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With all that a process may multiply by, as far as this CPU has it; AVX2 is made do with everywhere."""
    if request.param == "AVX2":
        monkeypatch.setattr("sequoia.engine.native.library.cpu_flags", lambda: cpu_flags() - {"avx512_bf16"})
        library.cache_clear()
        yield
        library.cache_clear()
        return
    loaded, has_amx = library(CACHE_DIR), request.param == "AMX"
    if vectors() == "AVX2" or loaded.sequoia_use_amx(int(has_amx)) != has_amx:
        pytest.skip(f"this CPU has no {request.param}")
    yield
    loaded.sequoia_use_amx(1)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("activation_bits", [16, 8])
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 64), (50, 160), (32, 384)])
def test_linear_layer_is_the_product_of_what_it_rounds_to(
    outputs: int, inputs: int, activation_bits: int, bits: int
) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.bfloat16)
    bias = torch.randn(outputs, generator=generator)
    rows = torch.randn(40, inputs, generator=generator) * torch.logspace(-1, 3, 40)[:, None]
    found = NativeLinear(library(CACHE_DIR), LinearWeights(weight, bias), bits, activation_bits, num_threads=2)(rows)
    exact = rows.double() @ (weight if bits == 16 else rounded(weight, bits)).double().T
    # Half a step of the inputs: of bfloat16, of 16 bits, of 8 bits.
    tolerance = 4e-3 if bits == 16 else 1e-4 if activation_bits == 16 else 1.5e-2
    errors = (found - bias - exact).norm(dim=1) / exact.norm(dim=1)
    assert errors.max() < tolerance


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize(("bits", "activation_bits"), [(16, 16), (8, 16), (8, 8), (4, 16), (4, 8)])
def test_row_is_the_same_bits_in_every_number_of_rows(bits: int, activation_bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = LinearWeights(torch.randn(70, 320, generator=generator, dtype=torch.bfloat16), None)
    multiply = NativeLinear(library(CACHE_DIR), weights, bits, activation_bits, num_threads=2)
    rows = torch.randn(64, 320, generator=generator)
    whole = multiply(rows)
    for count in range(1, 65):
        assert torch.equal(multiply(rows[-count:]), whole[-count:])


@pytest.mark.parametrize("activation_bits", [16, 8])
def test_quantised_rows_are_the_same_bits_with_and_without_amx(activation_bits: int) -> None:
    """Sums of integers are exact in any order; sums of bfloat16 products are not, so they differ."""
    loaded = library(CACHE_DIR)
    generator = torch.Generator().manual_seed(0)
    weights = LinearWeights(torch.randn(70, 320, generator=generator, dtype=torch.bfloat16), None)
    multiply = NativeLinear(loaded, weights, 8, activation_bits, num_threads=2)
    rows = torch.randn(37, 320, generator=generator)
    with_amx = multiply(rows)
    loaded.sequoia_use_amx(0)
    without = multiply(rows)
    loaded.sequoia_use_amx(1)
    assert torch.equal(with_amx, without)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize(("bits", "activation_bits"), [(8, 16), (8, 8), (4, 16), (4, 8)])
@pytest.mark.parametrize("weight", [1.0, -1.0])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_sums_of_the_largest_integers_do_not_overflow(
    count: int, weight: float, bits: int, activation_bits: int
) -> None:
    """Every input is the largest of its bits, and every weight the largest in magnitude."""
    weights = LinearWeights(torch.full((32, 256), weight, dtype=torch.bfloat16), None)
    multiply = NativeLinear(library(CACHE_DIR), weights, bits, activation_bits, num_threads=1)
    rows = torch.tensor([1.0, -1.0]).repeat(4)[:count, None].expand(count, 256)
    exact = rows.double() @ rounded(weights.weight, bits).double().T
    assert torch.allclose(multiply(rows).double(), exact, rtol=1e-5)


@pytest.mark.usefixtures("products")
def test_rows_of_zeros_give_the_bias() -> None:
    weights = LinearWeights(torch.ones(32, 64, dtype=torch.bfloat16), torch.arange(32.0))
    for bits, activation_bits in ((16, 16), (8, 16), (8, 8), (4, 16), (4, 8)):
        multiply = NativeLinear(library(CACHE_DIR), weights, bits, activation_bits, num_threads=1)
        assert torch.equal(multiply(torch.zeros(3, 64)), torch.arange(32.0).expand(3, 32))


def test_four_bits_are_rounded_better_than_by_the_largest_weight_alone() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    groups = weight.view(64, 8, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    plain = ((groups / scale).round() * scale).view(64, 256)
    assert (rounded(weight, 4) - weight).norm() < 0.95 * (plain - weight).norm()


def test_number_of_threads_does_not_change_a_bit(folder: Path) -> None:
    files = resolve(str(folder))
    logits = []
    for num_threads in (1, 2, 3):
        model = load_model(files, dtype="bfloat16", device="cpu")
        decoder = build_decoder(model, Arithmetic("native", num_threads=num_threads), 256, files.cache_dir)
        engine = load_engine(folder, dtype="bfloat16", engine="native")
        logits.append(tree_logits(Engine(decoder, engine.cache, model.device, model.dtype)))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_what_it_cannot_run_is_refused_with_the_reason(folder: Path) -> None:
    with pytest.raises(InvalidArgument, match="computes in bfloat16, and the model is in float32") as caught:
        load_engine(folder, dtype="float32", engine="native")
    assert caught.value.field == "engine"


def test_code_that_came_with_a_model_runs_on_its_own_modules_whatever_it_calls_itself(folder: Path) -> None:
    module = AutoModelForCausalLM.from_pretrained(folder)
    assert is_readable(module)
    foreign = type("LlamaForCausalLM", (type(module),), {"__module__": "transformers_modules.somebody"})
    module.__class__ = foreign
    assert not is_readable(module)


def test_heads_that_are_rotated_in_part_are_left_to_transformers(folder: Path) -> None:
    module = AutoModelForCausalLM.from_pretrained(folder)
    parameters = module.config.rope_parameters
    parameters.get("full_attention", parameters)["partial_rotary_factor"] = 0.5
    assert not is_readable(module)


def test_quantised_target_is_refused_where_only_other_engines_run(folder: Path) -> None:
    with pytest.raises(InvalidArgument, match="int4 needs the native engine, but it computes in bfloat16") as caught:
        load_engine(folder, dtype="float32", quantization="int4")
    assert caught.value.field == "quantization"


def test_missing_instructions_and_compilers_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NativeUnavailable, match="there is no C compiler"):
        library(tmp_path)
    monkeypatch.setattr("sequoia.engine.native.library.cpu_flags", lambda: cpu_flags() - {"avx2"})
    with pytest.raises(NativeUnavailable, match="the CPU lacks avx2"):
        library(tmp_path / "other")


def test_library_is_compiled_once(tmp_path: Path) -> None:
    first = library(tmp_path)
    [built] = (tmp_path / "native").glob("*.so")
    changed = built.stat().st_mtime_ns
    library.cache_clear()
    assert isinstance(library(tmp_path), ctypes.CDLL)
    assert built.stat().st_mtime_ns == changed
    assert first._name == str(built)
