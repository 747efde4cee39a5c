"""What /metrics shows, under vLLM's names where it has one."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self, engine, pool, name):
        self.engine, self.pool, registry = engine, pool, CollectorRegistry()

        def of(kind, title, help, labels=(), **options):
            metric = kind(title, help, ("model_name", *labels), registry=registry, **options)
            return metric if labels else metric.labels(name)

        self.prompt_tokens = of(Counter, "vllm:prompt_tokens", "Prompt tokens")
        self.generated = of(Counter, "vllm:generation_tokens", "Generated tokens")
        self.first = of(Histogram, "vllm:time_to_first_token_seconds", "Time to first token", buckets=SECONDS)
        self.next = of(Histogram, "vllm:inter_token_latency_seconds", "Time between two tokens", buckets=SECONDS)
        self.whole = of(Histogram, "vllm:e2e_request_latency_seconds", "Time of a request", buckets=SECONDS)
        ended = of(Counter, "vllm:request_success", "Requests, by how they ended", ("finished_reason",))
        self.ended = lambda reason: ended.labels(name, reason).inc()
        for title, help, read in (
            ("vllm:num_requests_running", "Requests that run", lambda: engine.counts()[0]),
            ("vllm:num_requests_waiting", "Requests that wait for adapters", lambda: engine.counts()[1]),
            ("fastlora:adapters_loaded", "Adapters that can be asked for", lambda: len(pool.names())),
            ("fastlora:pool_pages_used", "Pages in use on the device", pool.used_pages),
            ("fastlora:pool_pages", "Pages on the device", lambda: pool.page_count * len(pool.layers)),
            ("fastlora:pool_evictions_total", "Adapters that made room for others", lambda: pool.evictions),
        ):
            of(Gauge, title, help).set_function(read)
        registry.register(self)
        self.text = lambda: generate_latest(registry)

    def collect(self):
        """Which adapters' requests run and wait: as vLLM has it, in labels, with the time as the value."""
        names = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        info = GaugeMetricFamily("vllm:lora_requests_info", "Adapters of the requests", labels=names)
        info.add_metric([str(self.pool.slots), *map(",".join, self.engine.adapters())], time.time())
        return [info]
