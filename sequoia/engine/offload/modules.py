"""A model's own modules, whose layers have weights only while they are called: any architecture, streamed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sequoia.engine.attention import PackedBatch
from sequoia.engine.decoder import TransformersDecoder
from sequoia.engine.kv_cache import KVCache
from sequoia.engine.offload.block import Tensors
from sequoia.engine.offload.checkpoint import Checkpoint
from sequoia.engine.offload.layout import OnProgress, Store, give_back
from sequoia.engine.offload.stream import BlockStream
from sequoia.engine.weights import DecoderShape
from sequoia.errors import FailedPrecondition, InvalidArgument


class _Place(NamedTuple):
    """Where a layer's tensor belongs."""

    owner: nn.Module
    attribute: str
    name: str  # within the layer

    def put(self, tensor: Tensor) -> None:
        """No copy."""
        setattr(self.owner, self.attribute, nn.Parameter(tensor, requires_grad=False))


class HollowModules:
    """A module on the meta device; all but its layers comes into memory at once.

    Raises InvalidArgument naming `offload` for a module whose layers cannot be told, and `model` for weights that are
    not there or cannot be read, here and with the layers.
    """

    def __init__(self, module: PreTrainedModel, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._kind = checkpoint, module.config.model_type
        self._name, layers = _layers(module)
        module.tie_weights()
        _check(module, self._name)
        self.layers = list(layers)
        self._places = [list(_places(layer)) for layer in self.layers]
        checkpoint.fill(module, "", leave_out=f"{self._name}.")
        module.tie_weights()  # again: to what has come into its place

    def encode(self, store: Store, on_progress: OnProgress) -> None:
        """Store one layer's tensors after another, by its index, each out of memory before the next one."""
        for index, layer in enumerate(self.layers):
            self._checkpoint.fill(layer, f"{self._name}.{index}.")
            store(index, {name: each.detach().contiguous() for name, each in layer.named_parameters()})
            self.empty(index)
            give_back()
            on_progress(index + 1, len(self.layers))

    def put(self, index: int, tensors: Tensors) -> None:
        """Let a layer compute with these."""
        for place in self._places[index]:
            place.put(tensors[place.name])

    def empty(self, index: int) -> None:
        """Leave a layer without weights."""
        nothing = torch.empty(0)
        for place in self._places[index]:
            place.put(nothing)


class StreamedModules:
    """Runs the modules; every layer has the stream's next block from the beginning of its call to the end."""

    grow = None
    make_target = None
    hidden_rows = None
    logits = None

    def __init__(self, decoder: TransformersDecoder, hollow: HollowModules, stream: BlockStream[Any]) -> None:
        self._decoder, self._hollow, self._stream = decoder, hollow, stream
        self.name, self.rows_are_independent = decoder.name, decoder.rows_are_independent
        self._blocks: Iterator[Tensors] = iter(())
        self._next = 0
        if stream.is_resident:
            for index, tensors in enumerate(stream.blocks()):
                hollow.put(index, tensors)
            return
        for index, layer in enumerate(hollow.layers):
            hollow.empty(index)
            layer.register_forward_pre_hook(self._before(index))
            layer.register_forward_hook(self._after(index))

    def attach(self, cache: KVCache) -> None:
        """Nothing: the first forward shows the shapes."""

    def forward(self, batch: PackedBatch, cache: KVCache) -> Tensor:
        """One call of the module, one pass of the stream."""
        if self._stream.is_resident:
            return self._decoder.forward(batch, cache)
        blocks = self._stream.blocks()
        self._blocks, self._next = blocks, 0
        try:
            logits = self._decoder.forward(batch, cache)
            next(blocks, None)  # the pass ends behind its last block
        finally:
            blocks.close()
        return logits

    def _before(self, index: int) -> Any:
        def hook(*_: object) -> None:
            if index != self._next:
                problem = f"layer {index} is called where layer {self._next} comes next"
                raise FailedPrecondition(f"{problem}: such a model cannot be streamed; serve it in memory", "offload")
            self._next += 1
            self._hollow.put(index, next(self._blocks))

        return hook

    def _after(self, index: int) -> Any:
        return lambda *_: self._hollow.empty(index)


def modules_shape(module: PreTrainedModel) -> DecoderShape:
    """Sizes by the configuration; what only other decoders read is left at a neutral value."""
    config: Any = module.config.get_text_config()
    heads = config.num_attention_heads
    widths = (getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner"))
    return DecoderShape(
        hidden=config.hidden_size,
        intermediate=next(filter(None, widths), 4 * config.hidden_size),
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        epsilon=0.0,
        attention_scale=1.0,
        embedding_scale=1.0,
        activation="",
        num_layers=config.num_hidden_layers,
    )


def _layers(module: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The one list of as many modules as the configuration has layers, and its name."""
    count = module.config.get_text_config().num_hidden_layers
    named = ((name, each) for name, each in module.named_modules() if isinstance(each, nn.ModuleList))
    found = [(name, each) for name, each in named if len(each) == count]
    outer = [(name, each) for name, each in found if not any(name.startswith(f"{other}.") for other, _ in found)]
    if len(outer) != 1:
        kind, names = module.config.model_type, ", ".join(name for name, _ in outer) or "none"
        problem = f"which of the modules of {kind} models are its {count} layers cannot be told ({names})"
        raise InvalidArgument(f"{problem}; serve it in memory", "offload")
    return outer[0]


def _check(module: PreTrainedModel, layers: str) -> None:
    """That every layer's weights are its own, and are parameters."""
    named = dict(module.named_parameters(remove_duplicate=False))
    uses = Counter(map(id, named.values()))
    shared = [name for name, each in named.items() if name.startswith(f"{layers}.") and uses[id(each)] > 1]
    buffers = [name for name in module.state_dict() if name not in named]
    if problem := next(iter(shared + buffers), ""):
        what = "is shared with another module" if shared else "is no parameter"
        raise InvalidArgument(f"{problem} {what}: such a model cannot be streamed; serve it in memory", "offload")


def _places(layer: nn.Module) -> Iterator[_Place]:
    for name, _ in layer.named_parameters():
        owner, _, attribute = name.rpartition(".")
        yield _Place(layer.get_submodule(owner), attribute, name)
