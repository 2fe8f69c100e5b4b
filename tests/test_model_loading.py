"""Loading: dtypes, devices, int8, tokenizers, and models that would be served wrongly."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, build_tokenizer, write_perturbed_model, write_tiny_model
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    Gemma2Config,
    GptOssConfig,
    Lfm2Config,
    MambaConfig,
    PreTrainedConfig,
    T5Config,
)

from sequoia.engine.architecture import check_attention, check_config
from sequoia.engine.gguf import tie_equal_head
from sequoia.engine.model import LoadedModel, load_model
from sequoia.engine.quantization import Int8Linear, quantize_int8
from sequoia.engine.sources import resolve
from sequoia.errors import InvalidArgument

IDS = torch.arange(5, 45)[None]


def load(folder: Path | str, *, dtype: str = "float32", quantization: str = "none", device: str = "cpu") -> LoadedModel:
    model = load_model(resolve(str(folder)), dtype=dtype, device=device)
    if quantization == "int8":
        quantize_int8(model.module)
    return model


@torch.inference_mode()
def logits(model: LoadedModel) -> torch.Tensor:
    return model.module(IDS).logits[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    write_tiny_model(path, "llama")
    return path


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return load("smollm2-135m")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_loads_for_inference_only(architecture: str, tmp_path: Path) -> None:
    write_tiny_model(tmp_path, architecture)
    model = load(tmp_path)
    assert not model.module.training
    assert not any(weight.requires_grad for weight in model.module.parameters())
    assert (model.dtype, model.dtype_name, model.device) == (torch.float32, "float32", torch.device("cpu"))
    assert (model.padded_vocab_size, model.context_length, model.reference) == (400, 1024, str(tmp_path))
    assert model.module.config._attn_implementation == "sdpa", "the probe was left in place"
    assert logits(model).argmax(-1).unique().numel() > 10, "a model with one answer proves nothing"


def test_tiny_models_follow_from_their_seed(folder: Path, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "same", "llama")
    write_tiny_model(tmp_path / "other", "llama", seed=1)
    revisions = [resolve(str(path)).revision for path in (folder, tmp_path / "same", tmp_path / "other")]
    assert revisions[0] == revisions[1] != revisions[2]


def test_perturbed_model_is_often_right_and_often_wrong(folder: Path, tmp_path: Path) -> None:
    write_perturbed_model(folder, tmp_path / "draft")
    agreement = (logits(load(folder)).argmax(-1) == logits(load(tmp_path / "draft")).argmax(-1)).float().mean()
    assert 0.3 < agreement < 0.95


def test_dtype_is_that_of_the_weights(folder: Path) -> None:
    model = load(folder, dtype="bfloat16")
    assert {weight.dtype for weight in model.module.parameters()} == {torch.bfloat16}
    assert model.dtype_name == "bfloat16"


@pytest.mark.parametrize(
    ("flags", "engine", "architecture", "expected"),
    [
        ({"avx512_bf16"}, "lean", "llama", "bfloat16"),
        ({"avx2", "fma"}, "auto", "llama", "bfloat16"),
        ({"avx2", "fma"}, "lean", "llama", "float32"),
        ({"avx2", "fma"}, "auto", "gpt_neox", "float32"),
        (set(), "auto", "llama", "float32"),
    ],
)
def test_auto_dtype_is_bfloat16_only_where_the_cpu_or_the_c_engine_multiplies_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: set[str], engine: str, architecture: str, expected: str
) -> None:
    if shutil.which("cc") is None:
        pytest.skip("the C engine needs a compiler")
    write_tiny_model(tmp_path / "model", architecture)
    for module in ("sequoia.engine.model", "sequoia.engine.native.library"):
        monkeypatch.setattr(f"{module}.cpu_flags", lambda: frozenset(flags))
    loaded = load_model(resolve(str(tmp_path / "model")), dtype="auto", device="cpu", engine=engine)
    assert loaded.dtype_name == expected
    assert {weight.dtype for weight in loaded.module.parameters()} == {loaded.dtype}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_on_a_machine_without_it_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(InvalidArgument) as caught:
        load(folder, device="cuda")
    assert caught.value.field == "device"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_stays_near_the_float_model_and_keeps_its_dtype(folder: Path, dtype: str) -> None:
    model = load(folder, dtype=dtype, quantization="int8")
    found, expected = logits(model), logits(load(folder, dtype=dtype))
    assert found.dtype == expected.dtype == model.dtype
    assert torch.nn.functional.cosine_similarity(found.float(), expected.float()).mean() > 0.95
    assert model.padded_vocab_size == 400


def test_int8_layer_errs_by_no_more_than_its_steps_allow() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(64, 32)
    rows = torch.rand(16, 64, generator=generator) * 2 - 1
    weight = layer.weight.detach()
    # Half a step of each factor; activations in 7 bits over a range of at most 2.
    weight_error = (weight.abs().amax(1) / 127 / 2) * rows.abs().sum(1, keepdim=True)
    row_error = (2 / 127 / 2) * (weight.abs().sum(1) + 64 * weight.abs().amax(1) / 254)
    assert ((Int8Linear(layer)(rows) - layer(rows)).abs() <= weight_error + row_error).all()


def test_int8_drops_the_float_weights_and_leaves_a_tied_embedding_alone(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "gemma3", tie_word_embeddings=True)
    model = load(tmp_path, quantization="int8").module
    assert not any(isinstance(layer, torch.nn.Linear) for layer in model.modules())
    assert isinstance(model.lm_head, Int8Linear)
    assert torch.equal(model.model.embed_tokens.weight, load(tmp_path).module.model.embed_tokens.weight)


def test_int8_layer_takes_a_forward_without_rows() -> None:
    layer = Int8Linear(torch.nn.Linear(8, 3))
    assert layer(torch.empty(1, 0, 8)).shape == (1, 0, 3)


def test_head_that_equals_the_embedding_is_tied_and_another_is_not(folder: Path, tmp_path: Path) -> None:
    module = AutoModelForCausalLM.from_pretrained(folder)
    tie_equal_head(module)
    assert module.lm_head.weight is not module.model.embed_tokens.weight
    module.lm_head.weight.data.copy_(module.model.embed_tokens.weight)
    tie_equal_head(module)
    assert module.lm_head.weight is module.model.embed_tokens.weight
    module.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidArgument, match=r"lacks 1 weights, the first is model\.layers\.1\.mlp\.up_proj\.weight"):
        load(tmp_path)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama")
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(InvalidArgument, match="cannot be loaded") as caught:
        load(tmp_path)
    assert caught.value.field == "model"


def test_damaged_gguf_file_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\1" * 60)
    files = resolve(str(tmp_path), cache_dir=tmp_path / "cache")
    with pytest.raises(InvalidArgument, match=r"model\.gguf cannot be read"):
        load_model(files, dtype="float32", device="cpu")
    assert [path.suffix for path in (tmp_path / "cache" / "dense").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T5Config(), "encoder-decoder"),
        (Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"]), "layers of type conv"),
        (MambaConfig(), "layers of type linear_attention"),
    ],
)
def test_configuration_that_cannot_be_served_is_refused_by_name(config: PreTrainedConfig, reason: str) -> None:
    with pytest.raises(InvalidArgument, match=f"some/model .*{config.model_type}.*{reason}") as caught:
        check_config(config, "some/model")
    assert caught.value.field == "model"


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = {**SMALL, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Gemma2Config(**GROUPED), "softcap"),
        (GptOssConfig(**GROUPED, num_local_experts=2, num_experts_per_tok=1), "s_aux"),
        (BertConfig(**SMALL), "not causal"),
        (MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2), "attention registry"),
    ],
)
def test_attention_that_cannot_be_served_is_refused_by_name(config: PreTrainedConfig, reason: str) -> None:
    module = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InvalidArgument, match=f"some/model .*{config.model_type}.*{reason}") as caught:
        check_attention(module, "some/model")
    assert caught.value.field == "model"


def test_tokenizer_is_the_one_in_the_folder_whatever_the_architecture(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "qwen2", num_layers=2)
    found = load(tmp_path).tokenizer
    original = build_tokenizer(400)
    assert found.tokenizer_json.decode() == original.backend_tokenizer.to_str()
    assert found.chat_template == original.chat_template
    assert found.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert (found.vocab_size, found.eos_token_ids) == (400, (1,))


def test_tokenizer_hash_is_over_every_token_by_id(folder: Path) -> None:
    found = load(folder).tokenizer
    tokenizer = Tokenizer.from_buffer(found.tokenizer_json)
    pairs = [[token_id, tokenizer.id_to_token(token_id)] for token_id in range(400)]
    assert found.tokenizer_hash == hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def test_truncation_and_padding_from_training_are_switched_off(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama", num_layers=2)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = Tokenizer.from_buffer(load(tmp_path).tokenizer.tokenizer_json)
    assert (found.truncation, found.padding) == (None, None)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [([7, 5], 1, (5, 7)), (9, [1, 2], (9,)), (None, [3, 2], (2, 3)), (None, None, (1,))],
)
def test_eos_comes_from_the_first_file_that_names_one(
    tmp_path: Path, generation: object, config: object, expected: tuple[int, ...]
) -> None:
    write_tiny_model(tmp_path, "llama", num_layers=2)
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        document = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps({**document, "eos_token_id": value}))
    assert load(tmp_path).tokenizer.eos_token_ids == expected


def test_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama", num_layers=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(InvalidArgument, match="tokenizer") as caught:
        load(tmp_path)
    assert caught.value.field == "model"


def test_packaged_model_has_its_tied_head_and_its_limits(smollm2: LoadedModel) -> None:
    module = smollm2.module
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert (smollm2.padded_vocab_size, smollm2.context_length, smollm2.reference) == (49152, 8192, "smollm2-135m")


def test_packaged_model_keeps_its_tokenizer_template_and_end_of_turn(smollm2: LoadedModel) -> None:
    files = resolve("smollm2-135m")
    gguf = AutoTokenizer.from_pretrained(files.directory, gguf_file=files.gguf_file)
    found = smollm2.tokenizer
    assert found.tokenizer_json.decode() == gguf.backend_tokenizer.to_str()
    assert found.chat_template == gguf.chat_template
    assert "<|im_start|>assistant" in found.chat_template
    assert found.eos_token_ids == (gguf.convert_tokens_to_ids("<|im_end|>"),)
    assert found.special_tokens["eos_token"] == "<|im_end|>"


def test_packaged_model_answers_and_ends_its_turn(smollm2: LoadedModel) -> None:
    tokenizer = Tokenizer.from_buffer(smollm2.tokenizer.tokenizer_json)
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    mask = torch.ones_like(ids)
    output = smollm2.module.generate(ids, attention_mask=mask, max_new_tokens=32, do_sample=False)[0].tolist()
    assert "Paris" in tokenizer.decode(output[ids.shape[1] :])
    assert output[-1] in smollm2.tokenizer.eos_token_ids
