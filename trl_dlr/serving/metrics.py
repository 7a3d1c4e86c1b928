# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What a server counts, for Prometheus."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server."""

    def __init__(self):
        self.registry = CollectorRegistry()
        kwargs = {"namespace": "trl_dlr", "registry": self.registry}
        self.requests = Counter("requests", "Requests that have ended", ["model", "status"], **kwargs)
        self.seconds = Histogram(
            "request_seconds", "Time to the end of an answer", ["model"], buckets=SECONDS, **kwargs
        )
        self.waited = Histogram("queue_seconds", "Time until a request begins", ["model"], buckets=SECONDS, **kwargs)
        self.tokens = Counter("tokens", "Tokens of the main model", ["model", "kind"], **kwargs)
        self.num_waiting = Gauge("waiting_requests", "Requests that wait", **kwargs)
        self.num_rows = Gauge("running_answers", "Answers that are being decoded", **kwargs)
        self.num_policies = Gauge("policies", "Policies that are served", **kwargs)
        self.upstream_errors = Gauge("upstream_errors", "Requests that the vLLM server failed", **kwargs)

    def note(self, model: str, status: int, seconds: float, waited: float | None, usage: dict[str, int]) -> None:
        """Count a request that has ended, after it had `waited`; if `None`, without having begun."""
        self.requests.labels(model, status).inc()
        if waited is None:
            return
        self.seconds.labels(model).observe(seconds)
        self.waited.labels(model).observe(waited)
        for kind in ("prompt", "completion"):
            self.tokens.labels(model, kind).inc(usage[f"{kind}_tokens"])

    def refused(self, status: int) -> None:
        """Count a request that was refused before any work."""
        self.requests.labels("none", status).inc()

    def observe(self, server: Any) -> None:
        """Look at what a server does now."""
        self.num_waiting.set(server.scheduler.num_waiting)
        self.num_rows.set(server.scheduler.decoder.num_rows)
        self.num_policies.set(len(server.policies))
        self.upstream_errors.set(0 if server.upstream is None else server.upstream.num_errors)
