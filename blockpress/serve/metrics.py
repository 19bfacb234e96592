"""What a server counts, in Prometheus' text form and under vLLM's names, so that dashboards and routers for it work.

Source: the names and kinds of vLLM's metrics, its counters of diffusion included; Prometheus' text format 0.0.4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from blockpress.decoding import Committed, Denoised, Done, Event

if TYPE_CHECKING:
    from blockpress.serve.service import Service

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS = (1, 8, 32, 128, 256, 512, 1024, 4096, 16384, 65536, 262144)


@final
class Metrics:
    """The counters of one server; each has the model's name as a label."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model

        def counter(name: str, what: str) -> Counter:
            return Counter(name, what, ("model_name",), registry=self.registry).labels(model)

        def gauge(name: str, what: str) -> Gauge:
            return Gauge(name, what, ("model_name",), registry=self.registry).labels(model)

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, what, ("model_name",), registry=self.registry, buckets=buckets).labels(model)

        self._prompt = counter("vllm:prompt_tokens", "Prompt tokens read.")
        self._generated = counter("vllm:generation_tokens", "Tokens returned.")
        reasons = ("model_name", "finished_reason")
        self._success = Counter("vllm:request_success", "Finished requests.", reasons, registry=self.registry)
        self._preemptions = gauge("vllm:num_preemptions_total", "Requests that gave their pages to others.")
        self._steps = counter("vllm:diffusion_num_denoising_steps", "Denoising steps of all canvases.")
        self._positions = counter("vllm:diffusion_num_canvas_positions", "Positions denoised, over all steps.")
        self._committed = counter("vllm:diffusion_num_committed_tokens", "Tokens of finished canvases.")
        self._retries = counter("blockpress:empty_retries", "Canvases written again because the answer was empty.")
        self._running = gauge("vllm:num_requests_running", "Requests in forwards.")
        self._waiting = gauge("vllm:num_requests_waiting", "Requests in the queue.")
        self._pages = gauge("vllm:kv_cache_usage_perc", "Share of pages held by requests, 0 to 1.")
        self._forwards = gauge("blockpress:forwards_total", "Runs of the network.")
        self._hits = gauge("vllm:prefix_cache_hits_total", "Prompt tokens found in cached pages.")
        self._first = histogram("vllm:time_to_first_token_seconds", "Until the first text.", SECONDS)
        self._whole = histogram("vllm:e2e_request_latency_seconds", "Until the answer was whole.", SECONDS)
        self._prompts = histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", TOKENS)
        self._answers = histogram("vllm:request_generation_tokens", "Tokens of an answer.", TOKENS)

    def first_text(self, seconds: float) -> None:
        """Count how long a request waited for its first text."""
        self._first.observe(seconds)

    def denoised(self, event: Denoised) -> None:
        """Count a step of a canvas, from any thread."""
        self._positions.inc(len(event.argmax))

    def event(self, event: Event, seconds: float) -> None:
        """Count an event that came `seconds` after its request."""
        if isinstance(event, Committed):
            self._committed.inc(len(event.tokens))
        elif isinstance(event, Done):
            usage = event.reply.usage
            self._prompt.inc(usage.prompt_tokens)
            self._generated.inc(usage.completion_tokens)
            self._success.labels(self._model, event.reply.finish_reason).inc()
            self._steps.inc(usage.steps)
            self._retries.inc(usage.empty_retries)
            self._whole.observe(seconds)
            self._prompts.observe(usage.prompt_tokens)
            self._answers.observe(usage.completion_tokens)

    def text(self, service: Service) -> bytes:
        """All of it now, as Prometheus reads it."""
        whole = service.engine.core.stats
        stats = whole.scheduler
        self._forwards.set(whole.forwards)
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._preemptions.set(stats.preemptions)
        self._hits.set(stats.reused_tokens)
        total = sum(pages.total for pages in stats.pages.values())
        self._pages.set(sum(pages.held for pages in stats.pages.values()) / max(1, total))
        return generate_latest(self.registry)
