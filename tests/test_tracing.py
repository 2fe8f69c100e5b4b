"""Traces as a collector gets them from real processes: one tree of spans a request, and nothing where nobody asks."""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from collector import Collector, collecting, eventually, named, only
from conftest import System, start_tiny_system
from opentelemetry.sdk.trace import TracerProvider

from coordinator.fallback import Fallback
from coordinator.report import Report
from sequoia.errors import InvalidArgument
from sequoia.request_scope import call_metadata, current_scope, request_scope
from sequoia.topology import Topology
from sequoia.tracing import traced, tracing_as_asked

PROMPT = [5, 6, 7, 8]
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
MISSING = """
import sys
sys.modules["opentelemetry.exporter.otlp.proto.grpc.trace_exporter"] = None
from coordinator.server import main
sys.argv = ["coordinator", "--verify", "127.0.0.1:1"]
main()
"""
LOADED = "import sys; print(sorted(name for name in sys.modules if name.startswith({!r})))"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def system(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Both processes: the coordinator with its workers, and the gateway."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{collector.address}")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        patch.setenv("SEQUOIA_LOG_LEVEL", "debug")
        folder = tmp_path_factory.mktemp("traced")
        yield from start_tiny_system(folder, "llama", placement="colocated", http_port=0)


def ask_over_http(system: System, headers: dict[str, str], **body: Any) -> tuple[bytes, Any]:
    """The answer's body and its headers."""
    content = json.dumps({"model": "target", "prompt": "one two", "max_tokens": 8, "temperature": 0, **body})
    ours = {"content-type": "application/json", **headers}
    request = urllib.request.Request(f"{system.deployment.url}/completions", content.encode(), ours)
    with urllib.request.urlopen(request, timeout=30) as response:
        return response.read(), response.headers


def has_line(system: System, name: str, fields: dict[str, str]) -> bool:
    """Whether a process's log has a line with these fields."""
    lines = system.deployment.processes[name].log_path.read_text().splitlines()
    return any(json.loads(line).items() >= fields.items() for line in lines)


def test_one_request_is_one_tree_of_spans(system: System, collector: Collector) -> None:
    with TracerProvider().get_tracer("test").start_as_current_span("program") as span:
        answer = system.client.generate(PROMPT, max_tokens=24, temperature=0, speculation=Topology.chain(3))
    trace_id, span_id = f"{span.get_span_context().trace_id:032x}", f"{span.get_span_context().span_id:016x}"
    spans = collector.trace(trace_id, "generate", "verify_session", "draft_session")
    generate, verify, draft = (only(spans, name) for name in ("generate", "verify_session", "draft_session"))
    assert (generate.service, generate.parent_id) == ("sequoia-coordinator", span_id)
    assert (verify.service, verify.parent_id) == ("sequoia-verify", generate.span_id)
    assert (draft.service, draft.parent_id) == ("sequoia-draft", generate.span_id)
    for name in ("queue", "step"):
        assert {each.parent_id for each in named(spans, name)} == {generate.span_id}
    assert {each.parent_id for each in named(spans, "verify")} == {verify.span_id}
    assert {each.parent_id for each in named(spans, "draft")} == {draft.span_id}
    assert {each.service: each.parent_id for each in named(spans, "prefill")} == {
        "sequoia-coordinator": generate.span_id,
        "sequoia-draft": draft.span_id,
    }
    steps, told = named(spans, "step"), answer.speculation
    assert len(steps) == told.num_steps > 0
    assert len(named(spans, "verify")) == told.num_steps + 1, "the opening is one as well"
    assert sum(each.attributes["drafted"] for each in steps) == told.num_drafted_steps > 0
    assert sum("fallback" in each.attributes for each in steps) == told.num_fallback_steps
    assert sum(each.attributes["num_tokens"] for each in steps) + 1 == len(answer.token_ids)
    assert {each.attributes["tree_size"] for each in steps if each.attributes["drafted"]} <= {2, 3}
    assert generate.attributes["rule"] == "greedy"
    assert generate.attributes["finish_reason"] == answer.finish_reason
    assert generate.attributes["num_prompt_tokens"] == len(PROMPT)
    assert generate.attributes["num_completion_tokens"] == len(answer.token_ids)


def test_a_step_lasts_as_long_as_its_stages_and_follows_the_one_before(system: System, collector: Collector) -> None:
    with TracerProvider().get_tracer("test").start_as_current_span("program") as span:
        answer = system.client.generate(PROMPT, max_tokens=16, temperature=0)
    spans = collector.trace(f"{span.get_span_context().trace_id:032x}", "generate")
    generate, steps = only(spans, "generate"), named(spans, "step")
    for stage in ("draft", "verify", "network", "host", "forwards", "work"):
        seconds = sum(each.attributes[f"{stage}_seconds"] for each in steps)
        assert seconds == pytest.approx(getattr(answer.speculation.stage_seconds, stage))
    for before, behind in itertools.pairwise(steps):
        assert behind.start == pytest.approx(before.end, abs=2e-3)
    assert generate.start <= only(spans, "queue").start
    assert steps[-1].end <= generate.end


def test_a_header_is_followed_through_a_stream_of_the_gateway(system: System, collector: Collector) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "x-request-id": "mine-1"}
    body, answered = ask_over_http(system, headers, stream=True)
    assert body.endswith(b"data: [DONE]\n\n")
    assert answered["x-request-id"] == "mine-1"
    spans = collector.trace(TRACE_ID, "POST /v1/completions", "generate", "verify_session")
    gateway, generate = only(spans, "POST /v1/completions"), only(spans, "generate")
    assert (gateway.service, gateway.parent_id) == ("sequoia-gateway", PARENT_ID)
    assert gateway.attributes["http_status"] == 200
    assert generate.parent_id == gateway.span_id
    assert gateway.end >= generate.end - 2e-3, "it ends with its stream"
    assert {span.attributes["request_id"] for span in spans if "request_id" in span.attributes} == {"mine-1"}
    fields = {"request_id": "mine-1", "trace_id": TRACE_ID}
    for name, event in (("system", "generated"), ("gateway", "answered"), ("system", "session begins")):
        assert eventually(partial(has_line, system, name, fields | {"event": event})), name


def test_a_request_that_fails_is_marked(system: System, collector: Collector) -> None:
    with TracerProvider().get_tracer("test").start_as_current_span("program") as span, pytest.raises(InvalidArgument):
        system.client.generate([10**6], max_tokens=8)
    spans = collector.trace(f"{span.get_span_context().trace_id:032x}", "generate")
    assert only(spans, "generate").is_error


def test_what_the_caller_does_not_sample_nobody_does(system: System, collector: Collector) -> None:
    unsampled, sampled = "1" * 32, "2" * 32
    ask_over_http(system, {"traceparent": f"00-{unsampled}-{PARENT_ID}-00"})
    ask_over_http(system, {"traceparent": f"00-{sampled}-{PARENT_ID}-01"})
    collector.trace(sampled, "POST /v1/completions", "generate", "verify_session")
    assert not collector.trace(unsampled)


@pytest.mark.parametrize(
    ("module", "part"),
    [
        ("sequoia.client", "opentelemetry"),
        ("coordinator.server, coordinator.gateway.server", "opentelemetry.sdk.trace"),  # redis loads others of it
    ],
)
def test_opentelemetry_is_not_loaded_unasked(module: str, part: str) -> None:
    program = f"import {module}; {LOADED.format(part)}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_why_a_step_has_no_tree_is_told_of_that_step_only() -> None:
    report = Report()
    report.host()
    report.fell_back("draft: no tree within 1 s", Fallback.LATE)
    assert report.fallback is Fallback.LATE
    report.host()
    assert report.fallback is None


def test_asked_for_without_the_packages_it_names_the_extra() -> None:
    environment = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    done = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "pip install sequoia-serving[tracing]" in done.stderr


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:1", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:1", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_nobody_asks(environ: dict[str, str]) -> None:
    with tracing_as_asked("sequoia-test", environ) as tracing:
        assert tracing is None


def test_another_protocol_is_refused() -> None:
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:1", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
    with pytest.raises(InvalidArgument, match="OTEL_EXPORTER_OTLP_PROTOCOL"), tracing_as_asked("sequoia-test", environ):
        pass


@pytest.fixture
def silent_address() -> Iterator[str]:
    """Connections are taken there, and nothing else happens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield "http://{}:{}".format(*server.getsockname())


@pytest.mark.parametrize("is_silent", [True, False])
def test_a_broken_collector_costs_a_line_of_the_log(
    silent_address: str, is_silent: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint = silent_address if is_silent else "http://127.0.0.1:1"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    began = time.monotonic()
    with tracing_as_asked("sequoia-test", os.environ) as tracing:
        for _ in range(3000):  # more than are kept
            with request_scope(()), traced(tracing, "generate") as span:
                assert span is not None
                span.ended("step", 0.1, {"tree_size": 3})
        spent = time.monotonic() - began
    assert spent < 2, "nobody waits for it"
    assert time.monotonic() - began - spent < 3, "neither does the process's end"
    assert any(record.levelno >= logging.WARNING for record in caplog.records)


def test_calls_carry_the_request_they_are_made_for() -> None:
    came = [("x-request-id", "r1"), ("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01"), ("tracestate", "a=1"), ("b", "2")]
    with request_scope(came):
        assert call_metadata() == tuple(came[:3])
    assert call_metadata() == ()


@pytest.mark.parametrize("given", ["", "a b", "a\n", "x" * 129, "\xe9"])
def test_an_id_that_is_none_is_replaced(given: str) -> None:
    with request_scope([("x-request-id", given)]) as scope:
        assert scope.request_id not in ("", given)


@pytest.mark.parametrize(
    "given", ["", "00-1-2-01", f"00-{TRACE_ID}-{PARENT_ID}-01\n", f"00-{TRACE_ID.upper()}-{PARENT_ID}-01"]
)
def test_a_trace_context_that_is_none_is_left_out(given: str) -> None:
    with request_scope([("traceparent", given), ("tracestate", "a=1")]) as scope:
        assert scope.trace == {}
        assert scope.log_fields == {"request_id": scope.request_id}
    assert current_scope() is None
