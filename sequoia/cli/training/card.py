"""The card of a trained draft: what it is for, what it came from, what it measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from sequoia.cli.training.recipe import CorpusRecipe, Size
from sequoia.cli.training.worth import Worth
from sequoia.engine.distillation.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Made:
    """A draft, what it was made of, and what it is worth here."""

    size: Size
    corpus: CorpusRecipe
    training: Schedule
    command: str
    target_revision: str
    tokenizer_hash: str
    num_parameters: int
    num_tokens_known: int
    coverage: float  # share of what the target expects that it knows
    began_as: str  # the draft that was trained further; empty: the target's first layers
    num_text_tokens: int  # trained on, all documents once
    num_steps_done: int
    loss: float | None  # nats a token, lately; None: no step was taken
    worth: Worth

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        plan = self.worth.plan
        return {
            "size": str(self.size),
            "target": self.corpus.target,
            "target_revision": self.target_revision,
            "tokenizer_hash": self.tokenizer_hash,
            "command": self.command,
            "num_parameters": self.num_parameters,
            "num_tokens_known": self.num_tokens_known,
            "coverage": self.coverage,
            "began_as": self.began_as or None,
            "num_text_tokens": self.num_text_tokens,
            "num_steps": self.num_steps_done,
            "training": asdict(self.training),
            "loss": self.loss,
            "num_steps_measured": self.worth.counts.num_steps,
            "acceptance": self.worth.acceptance,
            "level_seconds": self.worth.curve.to_dict(),
            "plan": plan.chosen.to_dict(),
            "tokens_per_second": self.worth.tokens_per_second,
        }

    def to_markdown(self) -> str:
        """The model card."""
        rows = "\n".join(f"| {name} | {value} |" for name, value in self._facts().items())
        return f"""---
tags: [speculative-decoding, draft]
base_model: {self.corpus.target}
---
# A draft for {self.corpus.target}

{self._origin}. It proposes tokens that the target then verifies,
so it changes how long an answer takes and never what it says; by itself it is of no use.

| | |
|---|---|
{rows}

Made with

```
{self.command}
```
"""

    @property
    def _origin(self) -> str:
        done = "trained further to expect what it expects" if self.num_steps_done else "as they are, over fewer tokens"
        count = self.size.num_layers
        start = (
            f"{count} layers, begun as {self.began_as}"
            if self.began_as
            else f"The first {count} of the target's layers"
        )
        return f"{start}, {done}"

    def _facts(self) -> dict[str, str]:
        plan, training, worth = self.worth.plan.chosen, self.training, self.worth
        shape = f"{plan.kind} of {plan.shape.size} nodes, {plan.shape.levels} levels"
        return {
            "target": f"{self.corpus.target}, revision {self.target_revision}",
            "tokenizer (SHA-256 of the vocabulary)": self.tokenizer_hash,
            "parameters": f"{self.num_parameters:,}",
            "tokens it knows": f"{self.num_tokens_known:,}, {self.coverage:.1%} of what the target expects",
            "text": f"{self.num_text_tokens:,} tokens: questions that the target made up, and its answers",
            "training": f"{self.num_steps_done:,} steps of {training.batch_tokens:,} tokens, learning rate "
            f"{training.learning_rate:g}, seed {training.seed}",
            **({} if self.loss is None else {"loss, lately": f"{self.loss:.3f} nats a token"}),
            "acceptance by rank, T = 0": " ".join(f"{each:.3f}" for each in worth.acceptance[:8])
            + f" ({worth.counts.num_steps:.0f} steps along held-out answers)",
            "one level of one token, here": f"{worth.curve.at(1) * 1e3:.2f} ms",
            "best plan here": f"{shape}: {plan.tokens_per_step:.2f} tokens a step, {plan.speedup:.2f} times plain "
            "decoding (predicted)",
        }
