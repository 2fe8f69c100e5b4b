"""What a draft is worth: predicted tokens per second with the best plan for its acceptance and its speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sequoia.acceptance import AcceptanceCounts
from sequoia.cli.benchmarks.replay import count, replay
from sequoia.config import num_cores
from sequoia.engine.decoders import Arithmetic, build_decoder
from sequoia.engine.distillation.ranking import Ranks, acceptance_of
from sequoia.engine.forwards import Engine
from sequoia.engine.kv_cache import KVCache
from sequoia.engine.model import load_model
from sequoia.engine.sources import resolve
from sequoia.engine.warmup import measure_profile
from sequoia.hardware import LatencyCurve
from sequoia.optimal_tree import optimal_tree
from sequoia.planner import TreePlan, choose
from sequoia.pricing import PlanInputs

# The tree along whose steps acceptance is counted, as a coordinator would.
_SIZE, _LEVELS = 16, 6
_MAX_TREE_SIZE, _CONTEXT_TOKENS = 64, 512


@dataclass(frozen=True, slots=True)
class Worth:
    """A draft's acceptance at T = 0 on text that it has not seen, its curve, and the plan that follows."""

    counts: AcceptanceCounts
    curve: LatencyCurve
    plan: TreePlan

    @property
    def acceptance(self) -> tuple[float, ...]:
        """By rank, along the steps."""
        seen = self.counts.by_rank
        accepted, offered = seen.accepted[0], seen.offered[0]
        return tuple(hits / max(1.0, offers) for hits, offers in zip(accepted, offered, strict=True))

    @property
    def tokens_per_second(self) -> float:
        """Predicted, with the plan."""
        return 1.0 / self.plan.chosen.seconds_per_token


def worth_of(ranks: Sequence[Ranks], draft: LatencyCurve, target: LatencyCurve, step_seconds: float) -> Worth:
    """From the ranks of the target's tokens. `step_seconds`: what a drafted step takes beside the forwards."""
    tree = optimal_tree(acceptance_of(ranks), _SIZE, _LEVELS)
    counts = count(step for each in ranks for step in replay(tree, each))
    inputs = PlanInputs(counts.by_rank.estimate().rows, target, draft, host_seconds=step_seconds)
    return Worth(counts, draft, choose(inputs))


def measured_curve(model: str, *, device: str, is_draft: bool) -> LatencyCurve:
    """Seconds of a forward by its tokens, as a worker with default settings has them."""
    files = resolve(model)
    loaded = load_model(files, dtype="auto", device=device)
    has_int8 = is_draft and loaded.device.type == "cpu" and loaded.dtype_name == "bfloat16"
    arithmetic = Arithmetic(quantization="int8" if has_int8 else "none", is_draft=is_draft, num_threads=num_cores())
    num_rows = min(_CONTEXT_TOKENS, loaded.context_length)
    decoder = build_decoder(loaded, arithmetic, num_rows, files.cache_dir)
    cache = KVCache(loaded.module.config.get_text_config().num_hidden_layers, 1, num_rows)
    engine = Engine(decoder, cache, loaded.device, loaded.dtype, vocabulary=loaded.vocabulary)
    return measure_profile(engine, _MAX_TREE_SIZE, num_rows).base.curve
