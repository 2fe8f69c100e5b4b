"""Alarms, dashboard and autoscalers ask for what the code exports, in queries that Prometheus can read."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from kustomize import Resource, render
from manifests import DEPLOY, OVERLAYS, named

from coordinator.gaits import Gaits
from coordinator.governor import Governor
from coordinator.metrics import complete
from coordinator.request_metrics import RequestMetrics
from coordinator.speculation import BUILT_IN_CHAIN, BUILT_IN_TREE, Speculator
from coordinator.workers import Workers
from sequoia.rules import GREEDY
from sequoia.situation import Situation
from sequoia.topology import Topology
from sequoia.v1 import worker_pb2

MONITORING = DEPLOY / "k8s" / "components" / "monitoring"
AUTOSCALING = DEPLOY / "k8s" / "components" / "autoscaling"
ROWS = ["Traffic", "Speculation", "Stages", "Memory", "Failures"]
# What the scraping adds to every series.
ADDED = {"namespace", "pod", "instance", "service"}
# The names that tools for other servers know.
KNOWN_ELSEWHERE = {
    "sequoia_spec_decode_num_drafts_total",
    "sequoia_spec_decode_num_draft_tokens_total",
    "sequoia_spec_decode_num_accepted_tokens_total",
    "sequoia_spec_decode_num_accepted_tokens_per_pos_total",
    "sequoia_time_to_first_token_seconds_bucket",
    "sequoia_time_per_output_token_seconds_bucket",
    "sequoia_e2e_request_latency_seconds_bucket",
    "sequoia_round_seconds_bucket",
}
_CONDITIONS = re.compile(r"\$__rate_interval")


class Served(Speculator):
    """A speculator that has served one kind of request."""

    def __init__(self) -> None:
        self.num_ahead_hits = self.num_ahead_misses = 0
        governor = Governor(Gaits.unplanned(BUILT_IN_TREE, BUILT_IN_CHAIN))
        governor.observe(BUILT_IN_TREE, 0.1, 2)
        self._governors = {Situation.of(GREEDY, 0.0): governor}


@pytest.fixture
async def exported() -> dict[str, set[str]]:
    """The labels of every series of a coordinator that has served something, by its name."""
    workers = Workers("127.0.0.1:1", "127.0.0.1:2", 1.0)
    for pool in (workers.verify, workers.draft):
        found = worker_pb2.WorkerDescription(instance_id="a", num_slots=4, kv_tokens=100)
        pool.members[0].found(found)
    requests = RequestMetrics()
    requests.drafted(Topology.chain(3), 1)
    labels: dict[str, set[str]] = {}
    for family in complete(requests, Served(), workers).collect():
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


def alarms() -> list[dict[str, Any]]:
    [group] = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["spec"]["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    return found


def queries() -> dict[str, str]:
    """By where they stand, in the form that Prometheus gets them."""
    of_alarms = {each["alert"]: each["expr"] for each in alarms()}
    of_panels = {
        f"{panel['title']} {target['refId']}": _CONDITIONS.sub("5m", target["expr"]).replace("$namespace", ".*")
        for panel in panels()
        for target in panel.get("targets", ())
    }
    return of_alarms | of_panels


def selectors(expression: Any) -> Iterator[tuple[str, set[str]]]:
    """Name and labels of every series that an expression asks for."""
    if isinstance(expression, promql_parser.VectorSelector):
        yield expression.name, {each.name for each in expression.matchers.matchers}
    for name in ("vector_selector", "expr", "lhs", "rhs"):
        if (part := getattr(expression, name, None)) is not None:
            yield from selectors(part)
    for part in getattr(expression, "args", ()):
        yield from selectors(part)


def grouped(expression: Any) -> Iterator[tuple[set[str], set[str]]]:
    """Labels that an aggregation keeps, and those of what it is about: the names of its series."""
    modifier = getattr(expression, "modifier", None)
    if isinstance(expression, promql_parser.AggregateExpr) and modifier is not None:
        yield set(modifier.labels), {name for name, _ in selectors(expression)}
    for name in ("expr", "lhs", "rhs"):
        if (part := getattr(expression, name, None)) is not None:
            yield from grouped(part)
    for part in getattr(expression, "args", ()):
        yield from grouped(part)


async def test_the_names_that_others_know_are_there(exported: dict[str, set[str]]) -> None:
    assert set(exported) >= KNOWN_ELSEWHERE
    assert exported["sequoia_spec_decode_num_accepted_tokens_per_pos_total"] == {"position"}
    assert "reason" in exported["sequoia_speculation_state"]
    assert all(name.startswith(("sequoia_", "process_")) for name in exported)


@pytest.mark.parametrize("where", sorted(queries()))
async def test_a_query_asks_for_what_is_exported(exported: dict[str, set[str]], where: str) -> None:
    expression = promql_parser.parse(queries()[where])
    found = list(selectors(expression))
    assert found
    for name, labels in found:
        assert name in exported, name
        assert labels <= exported[name] | ADDED, (name, labels)
    for labels, names in grouped(expression):
        assert labels <= ADDED | {"le"}.union(*(exported[name] for name in names))


def test_alarms_have_what_whoever_is_woken_needs() -> None:
    names = [each["alert"] for each in alarms()]
    assert len(set(names)) == len(names)
    for alarm in alarms():
        assert alarm["labels"]["severity"] in ("warning", "critical")
        assert {"summary", "description"} == set(alarm["annotations"])


def test_there_is_an_alarm_for_everything_that_was_asked_for() -> None:
    assert {each["alert"] for each in alarms()} >= {
        "SequoiaSpeculationNotActive",
        "SequoiaFallbacks",
        "SequoiaWorkerPaused",
        "SequoiaWorkerAbsent",
        "SequoiaQueueFull",
        "SequoiaKvMemoryHigh",
    }


def test_the_dashboard_is_laid_out_by_rows_and_nothing_overlaps() -> None:
    assert [each["title"] for each in panels() if each["type"] == "row"] == ROWS
    assert len({each["id"] for each in panels()}) == len(panels())
    places = set()
    for panel in panels():
        where = panel["gridPos"]
        assert where["x"] + where["w"] <= 24
        area = {
            (x, y)
            for x in range(where["x"], where["x"] + where["w"])
            for y in range(where["y"], where["y"] + where["h"])
        }
        assert not places & area, panel["title"]
        places |= area
        assert panel["type"] == "row" or panel["targets"]


async def test_autoscalers_and_their_adapter_scale_by_what_is_exported(exported: dict[str, set[str]]) -> None:
    scalers = list(yaml.safe_load_all((AUTOSCALING / "autoscalers.yaml").read_text()))
    rules = yaml.safe_load((AUTOSCALING / "prometheus-adapter.yaml").read_text())["rules"]
    served = {"External": rules["external"], "Pods": rules["custom"]}
    for scaler in scalers:
        for metric in scaler["spec"]["metrics"]:
            asked = metric[metric["type"].lower()]["metric"]
            name, labels = asked["name"], asked.get("selector", {}).get("matchLabels", {})
            assert set(labels) <= exported[name]
            [rule] = [each for each in served[metric["type"]] if _serves(each, name)]
            kept = re.search(r"by \((.*)\)", rule["metricsQuery"])
            assert kept is not None
            assert set(labels) <= {kept[1]}, "or the autoscaler's selector meets nothing"


def _serves(rule: dict[str, Any], name: str) -> bool:
    query = promql_parser.parse(rule["seriesQuery"])
    [asked] = [each for each in query.matchers.matchers if each.name == "__name__"]
    return re.fullmatch(asked.value, name) is not None


def test_what_is_scraped_is_the_coordinators_metrics() -> None:
    resources: list[Resource] = render(DEPLOY / "k8s" / "overlays" / OVERLAYS[1])
    monitor = named(resources, "ServiceMonitor")["sequoia-coordinator"]["spec"]
    found = [
        each
        for each in named(resources, "Service").values()
        if monitor["selector"]["matchLabels"].items() <= each["metadata"]["labels"].items()
    ]
    assert [each["metadata"]["name"] for each in found] == ["sequoia-coordinator"]
    assert monitor["endpoints"][0]["port"] in {each["name"] for each in found[0]["spec"]["ports"]}
    [dashboard] = [each for each in named(resources, "ConfigMap").values() if "dashboard.json" in each["data"]]
    assert json.loads(dashboard["data"]["dashboard.json"])["uid"] == "sequoia"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool")
def test_promtool_finds_the_alarms_right(tmp_path: Path) -> None:
    """Each alarm fires when it should, and in the cases beside it does not."""
    spec = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["spec"]
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(spec))
    cases = (Path(__file__).parent / "data" / "alerts_test.yaml").read_text()
    (tmp_path / "alerts_test.yaml").write_text(cases)
    for command in (["check", "rules", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]):
        subprocess.run(["promtool", *command], cwd=tmp_path, check=True, timeout=60)
    tested = {each["alertname"] for test in yaml.safe_load(cases)["tests"] for each in test["alert_rule_test"]}
    assert tested == {each["alert"] for each in alarms()}
