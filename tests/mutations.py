"""Deliberate faults, and the tests that catch them: `python tests/mutations.py` prints the list.

A fault that no test catches would be a hole in the proof. Each is one edit of the shipped source, made in a copy.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("sequoia", "coordinator", "draft_worker", "verify_worker", "tests", "protos", "pyproject.toml", "README.md")
# The proofs that need no server; those that say most of a rule are run first.
PROOFS = (
    *("test_verification.py", "test_parameters.py", "test_sampling.py", "test_noise.py", "test_drafter.py"),
    *("test_target_table.py", "test_rankings.py", "test_unseen.py", "test_dynamic.py", "test_kv_memory.py"),
    "test_grammar.py",
)
FIRST = {"sequoia": PROOFS[0], "traversal": PROOFS[0], "coupled": "test_noise.py"}
FIRST |= {"dynamic": "test_dynamic.py", "reuse": "test_kv_memory.py", "schema": "test_grammar.py"}
VERIFICATION, SAMPLING = "sequoia/engine/verification.py", "sequoia/engine/sampling.py"
SIBLINGS, CHILDREN = "sequoia/engine/siblings.py", "sequoia/engine/children.py"
RANKINGS, MEMORY = "sequoia/engine/rankings.py", "sequoia/engine/kv_memory.py"
GRAMMAR = "sequoia/engine/grammar.py"
DYNAMIC, WIRE = "draft_worker/dynamic.py", "sequoia/wire.py"
NOISE, TABLE, UNSEEN = "sequoia/engine/noise.py", "sequoia/engine/target_table.py", "draft_worker/unseen.py"

# Laws by enumeration.
LAW = "test_verification.py::test_output_has_exactly_the_targets_law_for_every_shape_up_to_5_nodes"
PARAMETER_LAW = "test_parameters.py::test_output_has_exactly_the_law_that_the_parameter_defines"
TABLE_LAW = "test_target_table.py::test_output_has_exactly_the_targets_law_for_every_shape_up_to_4_nodes"


@dataclass(frozen=True, slots=True)
class Fault:
    """One edit: `old`, which stands in `file` once, becomes `new`. `test` is the one that catches it."""

    rule: str
    what: str
    file: str
    old: str
    new: str
    test: str


FAULTS = (
    Fault(
        "greedy", "ties go to the larger id", SAMPLING,
        "token = int(values.argmax())", "token = len(values) - 1 - int(values[::-1].argmax())",
        "test_parameters.py::test_greedy_takes_the_smaller_id_of_a_tie",
    ),
    Fault(
        "greedy", "a child is followed whose token is not the target's", VERIFICATION,
        "if tree.token_ids[child] == token)", "if tree.token_ids[child] >= token)",
        f"{PARAMETER_LAW}[sample_and_walk-temperature]",
    ),
    Fault(
        "greedy", "penalties leave out the tokens on the node's own path", VERIFICATION,
        "self._decoding.num_prompt_tokens, self._tree.path_tokens(node))", "self._decoding.num_prompt_tokens)",
        f"{PARAMETER_LAW}[sequoia-presence_penalty]",
    ),
    Fault(
        "greedy", "the repetition penalty multiplies positive logits too", SAMPLING,
        "torch.where(seen > 0.0, seen / penalty, seen * penalty)", "seen * penalty",
        f"{PARAMETER_LAW}[sequoia-repetition_penalty]",
    ),
    Fault(
        "sequoia", "<= for < where the uniform number can be 0", SAMPLING,
        "return self.uniform() * denominator < numerator",
        "return self.uniform() * denominator <= numerator",
        "test_verification.py::test_a_token_with_no_target_probability_is_never_accepted_even_when_the_uniform_number_is_zero",
    ),
    Fault(
        "sequoia", "a rejected sibling stays in q", VERIFICATION,
        "                siblings.remove(child)", "                pass",
        f"{LAW}[sequoia-mixed]",
    ),
    Fault(
        "sequoia", "D is not renormalised", SIBLINGS, "self._draft /= mass", "self._draft /= 1.0",
        f"{LAW}[sequoia-mixed]",
    ),
    Fault(
        "sequoia", "R is not renormalised", SIBLINGS,
        "self._values, self._scale = values / mass, weight * self._scale / mass",
        "self._values, self._scale = values, weight * self._scale",
        f"{LAW}[sequoia-mixed]",
    ),
    Fault(
        "sequoia", "one uniform number serves every choice", SAMPLING,
        "return self.uniform() * denominator < numerator",
        "self._u = getattr(self, '_u', 0.0) or self._generator.random()\n"
        "        return self._u * denominator < numerator",
        "test_verification.py::test_two_steps_use_a_fresh_number_for_every_choice[_recursive]",
    ),
    Fault(
        "sequoia", "the bonus token is drawn from p instead of the residual", SIBLINGS,
        "weights[torch.from_numpy(ids).to(weights.device)] = torch.from_numpy(values).to(weights.device)", "pass",
        f"{LAW}[sequoia-mixed]",
    ),
    Fault(
        "sequoia", "q of the node before (off by one)", SIBLINGS,
        "row = tree.topology.internal_nodes.index(node)", "row = max(0, tree.topology.internal_nodes.index(node) - 1)",
        f"{LAW}[sequoia-mixed]",
    ),
    Fault(
        "sequoia", "siblings are tried in the order of q", SIBLINGS,
        "return iter(self._children)", "return iter(sorted(self._children, key=lambda child: -self.draft(child)))",
        f"{LAW}[sequoia-mixed]",
    ),
    Fault(
        "sequoia", "children are drawn from another q than the one that travels", CHILDREN,
        "rates = q.weights[row].astype(np.float64)", "rates = q.weights[row].astype(np.float64) ** 2",
        "test_sampling.py::test_children_are_drawn_without_replacement_from_q",
    ),
    Fault(
        "sequoia", "the verifier cuts q once more than the drafter", SIBLINGS,
        "support = tree.q.weights[row] > 0", "support = tree.q.weights[row] > tree.q.weights[row].max() // 3",
        f"{LAW}[sequoia-mixed]",
    ),
    Fault(
        "sequoia", "the nucleus is that of another temperature", SAMPLING,
        "on_host(logs), on_host(logs.exp())", "on_host(logs), on_host((logs * 0.5).exp())",
        f"{PARAMETER_LAW}[sequoia-top_p]",
    ),
    Fault(
        "sequoia", "top-p cuts the residual instead of p", VERIFICATION,
        "        return target_distribution(self._adjusted(node), self._decoding.sampling)",
        "        p = self._adjusted(node).softmax(0)\n"
        "        return p if self._tree.topology.children[node] else "
        "target_distribution(self._adjusted(node), self._decoding.sampling)",
        f"{PARAMETER_LAW}[sequoia-temperature]",
    ),
    Fault(
        "traversal", "the weight after a failure is z", SIBLINGS,
        "return mass / (mass + (1.0 - weight))", "return mass",
        f"{LAW}[traversal-mixed]",
    ),
    Fault(
        "traversal", "a child is tried without its parent's weight", VERIFICATION,
        "min(1.0, weights[-1] * siblings.target(child)", "min(1.0, siblings.target(child)",
        f"{LAW}[traversal-mixed]",
    ),
    Fault(
        "traversal", "R is not weighted before D is taken off", SIBLINGS,
        "np.maximum(weight * self._values - self._draft, 0.0)", "np.maximum(self._values - self._draft, 0.0)",
        f"{LAW}[traversal-mixed]",
    ),
    Fault(
        "traversal", "a node whose children failed is always accepted", VERIFICATION,
        "elif choices.accept(weights[-1], 1.0):", "elif choices.accept(1.0, 1.0):",
        f"{LAW}[traversal-mixed]",
    ),
    Fault(
        "traversal", "a failed sibling stays in q", VERIFICATION,
        "        visits[-1].remove(child)", "        pass",
        f"{LAW}[traversal-mixed]",
    ),
    Fault(
        "coupled", "the same noise at every position", NOISE,
        "return _signed(_mix(seed + (position + 1) * _GOLDEN))", "return _signed(_mix(seed))",
        "test_noise.py::test_bits_are_those_of_the_reference[0]",
    ),
    Fault(
        "coupled", "the verifier's position is off by one", VERIFICATION,
        "self._path(node).position)", "self._path(node).position + 1)",
        "test_parameters.py::test_coupled_output_is_the_argmax_of_log_p_plus_noise[temperature]",
    ),
    Fault(
        "coupled", "the interval is closed at 0", NOISE, ".double().add_(0.5).mul_", ".double().mul_",
        "test_noise.py::test_the_interval_is_open_for_the_least_and_the_largest_bits",
    ),
    Fault(
        "coupled", "the sign is shifted in", NOISE,
        "return (bits >> count).bitwise_and_((1 << (64 - count)) - 1)", "return bits >> count",
        "test_noise.py::test_bits_are_those_of_the_reference[0]",
    ),
    Fault(
        "coupled", "the drafter's noise is not the verifier's", CHILDREN,
        "gumbel_noise(sampling.seed, position, torch.from_numpy(every_id))",
        "gumbel_noise(sampling.seed + 1, position, torch.from_numpy(every_id))",
        "test_noise.py::test_one_node_accepts_as_computed_elsewhere[equal-1]",
    ),
    Fault(
        "coupled", "the others race without noise", SAMPLING,
        "math.log(mass) + float(gumbel_noise(sampling.seed, position, own[:1]))", "math.log(mass)",
        "test_sampling.py::test_the_tokens_of_many_seeds_have_the_law_of_p_however_many_race_alone[1]",
    ),
    Fault(
        "coupled", "the others' draw uses the noise of their race", SAMPLING,
        "uniform_noise(sampling.seed, position, own[1:])", "uniform_noise(sampling.seed, position, own[:1])",
        "test_sampling.py::test_the_tokens_of_many_seeds_have_the_law_of_p_however_many_race_alone[1]",
    ),
    Fault(
        "sample_and_walk", "after an accepted leaf the likeliest token, not a draw", VERIFICATION,
        "return self._choices.draw(self._p(node))",
        "p = self._p(node)\n"
        "        return self._choices.draw(p) if self._tree.topology.children[node] else int(p.argmax())",
        PARAMETER_LAW,
    ),
    Fault(
        "sample_and_walk", "tokens of probability 0 can be drawn", SAMPLING,
        "uniform * float(cumulative[-1]), right=True", "0.0, right=False",
        "test_sampling.py::test_an_index_of_weight_zero_is_never_drawn",
    ),
    Fault(
        "sample_and_walk", "the bonus token is one of the children's", VERIFICATION,
        "return Verdict(tuple(path), token)", "return Verdict(tuple(path), tree.token_ids[-1])",
        "test_verification.py::test_a_walk_along_drawn_tokens_is_exact_whatever_the_children[mixed]",
    ),
    Fault(
        "greedy", "read at once: ties of the draft go to the larger id", RANKINGS,
        "(last - torch.arange(logits.shape[1]", "(torch.arange(logits.shape[1]",
        "test_rankings.py::test_top_tokens_of_rows_are_those_of_each_row_ties_included[1-dtype0]",
    ),
    Fault(
        "sequoia", "read at once: the mass outside the candidates is p's, not the residual's", TABLE,
        "np.append(values, scale * self.outside)", "np.append(values, self.outside)",
        TABLE_LAW,
    ),
    Fault(
        "sequoia", "read at once: the token from outside may be a candidate", TABLE,
        "own.scatter(1, ids, -math.inf)", "own",
        TABLE_LAW,
    ),
    Fault(
        "sequoia", "grown unseen: draws of one depth serve the next", UNSEEN,
        "drawn_ranking(*q, plan.exponentials[depth])", "drawn_ranking(*q, plan.exponentials[0][:1])",
        "test_unseen.py::test_with_a_real_generator_draws_are_the_same_where_nothing_is_dead[llama]",
    ),
    Fault(
        "coupled", "read at once: all depths share the root's noise", TABLE,
        "(position + depth for depth in tree.topology.depths)", "(position for depth in tree.topology.depths)",
        "test_target_table.py::test_verdicts_without_chance_are_those_of_the_lazy_walk[coupled-{}]",
    ),
    Fault(
        "coupled", "read at once: the others never win", TABLE,
        "torch.where(race > best.values, drawn, ids", "torch.where(race > math.inf, drawn, ids",
        "test_target_table.py::test_coupled_tokens_of_rows_are_those_of_each_row_whoever_races_alone",
    ),
    Fault(
        "sample_and_walk", "read at once: every node draws with the same numbers", SAMPLING,
        "streams(key, range(len(logs)))", "streams(key, [0] * len(logs))",
        "test_target_table.py::test_first_two_tokens_have_the_targets_joint_law[sample_and_walk-0-TargetTable]",
    ),
    Fault(
        "dynamic", "rows of dropped nodes are taken for those of nodes that are kept", DYNAMIC,
        "[place.get(node, DEAD) for node in self.forwarded]", "[min(node, len(kept) - 1) for node in self.forwarded]",
        "test_dynamic.py::test_rows_of_a_dynamic_tree_that_came_true_serve_the_next_one[greedy]",
    ),
    Fault(
        "dynamic", "draws are chosen among", WIRE,
        "if not rule.takes_any_shape:", "if rule is None:",
        "test_dynamic.py::test_rules_whose_children_are_drawn_refuse_dynamic_shapes[rule0]",
    ),
    Fault(
        "dynamic", "the unlikeliest nodes are kept", DYNAMIC,
        "key=lambda node: -self._scores[node]", "key=lambda node: self._scores[node]",
        "test_dynamic.py::test_the_tree_is_the_best_of_all_that_a_beam_search_proposed[0-False]",
    ),
    Fault(
        "all", "min_tokens is off by one", SAMPLING,
        "if path.num_generated < sampling.min_tokens:", "if path.num_generated + 1 < sampling.min_tokens:",
        f"{PARAMETER_LAW}[sequoia-min_tokens]",
    ),
    Fault(
        "all", "presence and frequency count the prompt", SAMPLING,
        "_known(dict(Counter(path.generated)), adjusted)", "_known(dict(Counter(path.committed)), adjusted)",
        f"{PARAMETER_LAW}[sequoia-presence_penalty]",
    ),
    Fault(
        "all", "logprobs are those of the next node", VERIFICATION,
        "target.logprobs((0, *verdict.accepted_nodes)", "target.logprobs((*verdict.accepted_nodes, 0)",
        "test_parameters.py::test_logprobs_inside_an_accepted_run_are_those_of_each_tokens_own_place[greedy]",
    ),
    Fault(
        "reuse", "rows that are still to be copied are given to another session", MEMORY,
        "                source.num_readers += 1", "                source.num_readers += 0",
        "test_kv_memory.py::test_every_session_has_the_rows_of_its_own_tokens_whatever_comes_and_goes[0]",
    ),
    Fault(
        "reuse", "a job that ends after its session goes on in the next one's rows", "sequoia/engine/kv_cache.py",
        "run, self._run, self.is_left = self._run, replace(self._run), True", "run = self._run",
        "test_kv_memory.py::test_a_job_that_ends_after_its_session_changes_nothing_for_the_next_one",
    ),
    Fault(
        "reuse", "the last token of a prompt is not read again", MEMORY,
        "self._likest(tokens[:-1])", "self._likest(tokens)",
        "test_kv_memory.py::test_the_last_token_is_always_made_anew",
    ),
    Fault(
        "reuse", "rows pass for made as soon as their tokens are known", MEMORY,
        "return min(self.length, len(self.tokens))", "return len(self.tokens)",
        "test_kv_memory.py::test_every_session_has_the_rows_of_its_own_tokens_whatever_comes_and_goes[0]",
    ),
    Fault(
        "schema", "what may follow is asked without the node's own path", SAMPLING,
        "constraint.allowed(path.generated)", "constraint.allowed(path.committed[path.num_prompt_tokens :])",
        "test_grammar.py::test_output_has_exactly_the_law_of_the_masked_target[sequoia-alone]",
    ),
    Fault(
        "schema", "what may follow depends on what was asked before", GRAMMAR,
        "self._matcher.rollback(len(self._read) - shared)", "self._matcher.rollback(0)",
        "test_grammar.py::test_what_may_follow_depends_on_the_path_alone_whatever_was_asked_before",
    ),
    Fault(
        "schema", "the end of an answer is one more token of it", GRAMMAR,
        "if not self._eos_token_ids.isdisjoint(rest):", "if False:",
        "test_grammar.py::test_after_every_path_what_may_follow_is_what_the_definition_says",
    ),
)  # fmt: skip


def catcher(fault: Fault, *, search: bool = False) -> str | None:
    """The test that fails with the fault in place, its own or, in a `search`, the first one; None when all pass."""
    first = FIRST.get(fault.rule, "test_parameters.py")
    everything = sorted(PROOFS, key=lambda name: name != first)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in PACKAGES:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        _edit(copy / fault.file, fault)
        tests = [f"tests/{name}" for name in (everything if search else [fault.test])]
        flags = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--deselect", _DOCS_TEST]
        command = [sys.executable, "-m", "pytest", *flags, *tests]
        # Two run at a time, and their tensors are tiny.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.MULTILINE)
    assert failed, done.stdout[-2000:] + done.stderr[-2000:]
    return failed[1]


_DOCS_TEST = "tests/test_parameters.py::test_the_matrix_in_the_docs_is_the_generated_one"


def _edit(path: Path, fault: Fault) -> None:
    text = path.read_text()
    assert text.count(fault.old) == 1, f"{fault.file} has {text.count(fault.old)} times: {fault.old}"
    path.write_text(text.replace(fault.old, fault.new))


def caught(*, search: bool = False) -> Iterator[tuple[Fault, str | None]]:
    """Every fault with the test that caught it."""
    with ThreadPoolExecutor(2) as pool:
        yield from zip(FAULTS, pool.map(partial(catcher, search=search), FAULTS), strict=True)


def main() -> int:
    """Print every fault with the test that caught it; fail when one was not caught."""
    parser = argparse.ArgumentParser(description="Deliberate faults, and the tests that catch them.")
    parser.add_argument("--search", action="store_true", help="in all proofs, not only in its own test")
    num_missed = 0
    for fault, test in caught(search=parser.parse_args().search):
        print(f"{fault.rule:16} {fault.what:68} {test or 'NOT CAUGHT'}", flush=True)
        num_missed += test is None
    return 1 if num_missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
