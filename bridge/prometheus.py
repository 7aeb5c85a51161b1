"""A Prometheus collector: what a Bridge is doing and has done, read when somebody scrapes, and at no other time.

Needs ``prometheus-client``: ``pip install 'tls-bridge[prometheus]'``.

=====================================  ===============================================================
metric                                 labels, and what it says
=====================================  ===============================================================
tls_bridge_sessions                    state: how many sessions are in it now
tls_bridge_waiting                     call, want: how many sessions wait in this call for this now
tls_bridge_queued_bytes                queue (inbox: not taken by the program; outbox: not by the kernel)
tls_bridge_handshakes_total            side, result (ok, or the class of the error), version ("" if it failed);
                                       what never was connected is not counted
tls_bridge_handshake_seconds           side: a histogram of those that succeeded
tls_bridge_endings_total               cause: WriteStalled and IdleTimeout are the stalls
tls_bridge_wants_total                 call, want: how often OpenSSL asked to wait; in the call flush the socket did,
                                       for what OpenSSL had written to memory
tls_bridge_bytes_total                 direction (received, sent): of plaintext, of sessions and of streams
tls_bridge_listener_handshakes         address: handshakes under way, or failed and not closed yet
tls_bridge_listener_waiting            address: sessions not accepted yet, or all messages in the shared inbox, whoever
                                       delivered them
=====================================  ===============================================================
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from bridge import forks
from bridge.bridge import Bridge, ListenerSnapshot
from bridge.states import State
from bridge.totals import BUCKETS, total

__all__ = ("BridgeCollector",)


class BridgeCollector(Collector):
    """The metrics of *bridge*, for `prometheus_client.CollectorRegistry.register`.  Any thread may scrape.

    A registry takes one such collector, for names must not come twice; *more* bridges are added up with the first.
    In a child of fork() those of its parent count for nothing: they are not there.
    """

    def __init__(self, bridge: Bridge, *more: Bridge) -> None:
        self._bridges = (bridge, *more)

    def describe(self) -> Iterator[Metric]:
        """As `collect`: registries ask for the names, so that they refuse a second collector."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """All metrics, as they are now."""
        here = [bridge for bridge in self._bridges if not forks.abandoned(bridge._born)]
        yield from self._present(here)
        yield from self._past(here)

    def _present(self, bridges: list[Bridge]) -> Iterator[Metric]:
        now = [bridge.snapshot() for bridge in bridges]
        states = collections.Counter(session.state for one in now for session in one.sessions)
        sessions = GaugeMetricFamily("tls_bridge_sessions", "Sessions in each state", labels=["state"])
        for state in State:
            if state is not State.CLOSED:  # such a session is only still lingering
                sessions.add_metric([state.value], states[state.value])
        yield sessions
        waits = collections.Counter(
            wait for one in now for session in one.sessions for wait in session.wants.items()
        )
        waiting = GaugeMetricFamily("tls_bridge_waiting", "Sessions that wait now", labels=["call", "want"])
        for wait, count in sorted(waits.items()):
            waiting.add_metric(wait, count)
        yield waiting
        queued = GaugeMetricFamily("tls_bridge_queued_bytes", "Bytes in queues", labels=["queue"])
        queued.add_metric(["inbox"], sum(one.inbox_bytes for one in now))
        queued.add_metric(["outbox"], sum(one.outbox_bytes for one in now))
        yield queued
        yield from self._listeners([listener for one in now for listener in one.listeners])

    def _listeners(self, listeners: list[ListenerSnapshot]) -> Iterator[Metric]:
        """Those of one address, which share it by SO_REUSEPORT, together."""
        shaking: collections.Counter[str] = collections.Counter()
        waiting: collections.Counter[str] = collections.Counter()
        for listener in listeners:
            shaking[listener.address] += listener.handshakes
            waiting[listener.address] += listener.waiting
        handshakes = GaugeMetricFamily(
            "tls_bridge_listener_handshakes", "Handshakes under way", labels=["address"]
        )
        backlog = GaugeMetricFamily("tls_bridge_listener_waiting", "Not taken yet", labels=["address"])
        for address in shaking:
            handshakes.add_metric([address], shaking[address])
            backlog.add_metric([address], waiting[address])
        yield handshakes
        yield backlog

    def _past(self, bridges: list[Bridge]) -> Iterator[Metric]:
        totals = total(account for bridge in bridges for account in bridge._accounts())
        yield _counter("handshakes", "Handshakes that ended", totals.handshakes, "side", "result", "version")
        yield _counter(
            "endings",
            "Sessions that ended",
            {(cause,): count for cause, count in totals.endings.items()},
            "cause",
        )
        yield _counter("wants", "How often OpenSSL asked to wait", totals.wants, "call", "want")
        carried = {("received",): totals.bytes_received, ("sent",): totals.bytes_sent}
        yield _counter("bytes", "Plaintext carried", carried, "direction")
        seconds = HistogramMetricFamily(
            "tls_bridge_handshake_seconds", "How long handshakes took", labels=["side"]
        )
        for side, (classes, together) in totals.handshake_seconds.items():
            buckets, count = [], 0
            for bound, members in zip((*map(str, BUCKETS), "+Inf"), classes, strict=True):
                count += members
                buckets.append((bound, count))
            seconds.add_metric([side], buckets, together)
        yield seconds


def _counter(name: str, help_: str, counts: Mapping[Any, int], *labels: str) -> CounterMetricFamily:
    family = CounterMetricFamily(f"tls_bridge_{name}", help_, labels=list(labels))
    for key, count in sorted(counts.items()):
        family.add_metric(key, count)
    return family
