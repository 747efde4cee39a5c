"""What /metrics shows, under vLLM's names where it has one."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counters of one server: a registry of its own, so that two in a process do not mix."""

    def __init__(self, engine, pool, name):
        self.registry, self.name = CollectorRegistry(), name
        self.prompt_tokens = self._of(Counter, "vllm:prompt_tokens", "Prompt tokens")
        self.generated = self._of(Counter, "vllm:generation_tokens", "Generated tokens")
        self.first = self._of(Histogram, "vllm:time_to_first_token_seconds", "Time to first token", buckets=SECONDS)
        self.whole = self._of(Histogram, "vllm:e2e_request_latency_seconds", "Time of a request", buckets=SECONDS)
        labels = ("model_name", "finished_reason")
        self._ended = Counter("vllm:request_success", "Requests by how they ended", labels, registry=self.registry)
        self._read("vllm:num_requests_running", "Requests that run", lambda: engine.counts()[0])
        self._read("vllm:num_requests_waiting", "Requests that wait for adapters", lambda: engine.counts()[1])
        self._read("fastlora:adapters_loaded", "Adapters that can be asked for", lambda: len(pool.names()))
        self._read("fastlora:pool_pages_used", "Pages in use on the device", pool.used_pages)
        self._read("fastlora:pool_pages", "Pages on the device", lambda: pool.pages * len(pool.layers))
        self._read("fastlora:pool_evictions_total", "Adapters that left the device for others", lambda: pool.evictions)

    def _of(self, kind, name, help, **options):
        return kind(name, help, ("model_name",), registry=self.registry, **options).labels(self.name)

    def _read(self, name, help, read):
        self._of(Gauge, name, help).set_function(read)

    def ended(self, reason):
        self._ended.labels(self.name, reason).inc()

    def text(self):
        return generate_latest(self.registry)
