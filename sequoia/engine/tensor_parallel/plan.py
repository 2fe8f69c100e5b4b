"""Which models `transformers` divides among ranks, and how it is asked to."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from sequoia.errors import InvalidArgument


def check_plan(config: PreTrainedConfig, num_ranks: int, reference: str) -> None:
    """Refuse what the configuration shows, before weights are read. Raises InvalidArgument naming `model`."""
    text: Any = config.get_text_config()
    kind = config.model_type
    if not getattr(text, "base_model_tp_plan", None):
        problem = f"transformers has no tensor-parallel plan for {kind} models"
        raise InvalidArgument(f"{reference} cannot be divided: {problem}; serve it with --tensor-parallel 1", "model")
    num_heads = text.num_attention_heads
    num_kv_heads = getattr(text, "num_key_value_heads", None) or num_heads
    if num_heads % num_ranks or num_kv_heads % num_ranks:
        problem = f"{num_heads} heads and {num_kv_heads} KV heads cannot be divided by {num_ranks}"
        raise InvalidArgument(f"{reference} has what fits no --tensor-parallel {num_ranks}: {problem}", "model")


def placement(num_ranks: int) -> dict[str, Any]:
    """The arguments of `from_pretrained` that leave each rank its part, on its own device.

    Raises InvalidArgument naming `tensor-parallel` where this version of `transformers` cannot.
    """
    try:
        from transformers.distributed.configuration_utils import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_size=num_ranks)}
    except (ImportError, TypeError) as error:
        raise InvalidArgument(f"it needs a newer transformers ({error})", "tensor-parallel") from error
