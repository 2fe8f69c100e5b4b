import socket
import ssl
import urllib.request
from pathlib import Path

import pytest
from certificates import Authority
from prometheus_client.parser import text_string_to_metric_families

from coordinator.gaits import PLAIN, Gaits
from coordinator.governor import Governor
from coordinator.metrics import serve_metrics
from coordinator.speculation import BUILT_IN_CHAIN, BUILT_IN_TREE, Speculator
from sequoia.rules import GREEDY
from sequoia.situation import Situation
from sequoia.tls import Tls


class Served(Speculator):
    """A speculator that has served one kind of request."""

    def __init__(self) -> None:
        self.num_ahead_hits, self.num_ahead_misses = 3, 4
        self._governors = {Situation.of(GREEDY, 0.0): Governor(Gaits.unplanned(BUILT_IN_TREE, BUILT_IN_CHAIN))}


def test_prometheus_reads_state_and_paces() -> None:
    served = Served()
    [governor] = served.governors.values()
    for shape in [BUILT_IN_TREE] * 8 + [PLAIN] * 4 + [BUILT_IN_TREE] * 4:  # with a trial in the middle
        governor.observe(shape, *((0.1, 1) if shape == PLAIN else (0.2, 4)))
    port = free_port()
    serve_metrics(served, port)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as reply:
        families = list(text_string_to_metric_families(reply.read().decode()))
    values = {
        (family.name, *(sample.labels[name] for name in ("state", "size") if name in sample.labels)): sample.value
        for family in families
        for sample in family.samples
    }
    assert values["sequoia_speculation_state", "on"] == 1.0
    assert values["sequoia_speculation_state", "off"] == 0.0
    assert values["sequoia_seconds_per_token", "8"] == pytest.approx(0.05)
    assert values["sequoia_seconds_per_token", "1"] == pytest.approx(0.1)
    assert values["sequoia_tokens_per_step", "8"] == pytest.approx(4.0)
    assert (values["sequoia_draft_ahead_attempts",], values["sequoia_draft_ahead_hits",]) == (7.0, 3.0)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def test_in_plain_text_it_is_on_loopback_alone() -> None:
    port = free_port()
    serve_metrics(Served(), port)
    with socket.create_server(("127.0.0.2", port)):
        pass  # all addresses would have been taken
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass


def test_with_certificates_it_is_https_for_who_has_one(tmp_path: Path) -> None:
    authority, port = Authority(tmp_path), free_port()
    client = authority.issue("prometheus", "prometheus.example")
    serve_metrics(Served(), port, Tls(*authority.server(), ca=authority.path))
    url = f"https://127.0.0.1:{port}/metrics"
    context = ssl.create_default_context(cafile=authority.path)
    with pytest.raises(OSError, match=r"certificate required|EOF|reset"):
        urllib.request.urlopen(url, context=context, timeout=5).read()
    context.load_cert_chain(client.cert, client.key)
    with urllib.request.urlopen(url, context=context, timeout=5) as reply:
        assert b"sequoia_draft_ahead" in reply.read()
