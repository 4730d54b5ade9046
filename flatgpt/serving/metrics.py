"""The server's metrics, in Prometheus's format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from flatgpt.serving.engines import Engines
from flatgpt.serving.job import CompletionJob


class Metrics:
    def __init__(self, engines: Engines):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        for name, read, about in (
            ('slots', lambda e: len(e.slots), 'Completions that can run at once'),
            ('requests_running', lambda e: e.running, 'Completions that are running'),
            ('requests_waiting', lambda e: len(e.waiting), 'Completions waiting for a slot'),
        ):
            gauge = Gauge(f'flatgpt_{name}', about, registry=self.registry)
            gauge.set_function(lambda read=read: sum(map(read, engines.open)))
        self.prompt_tokens = self.counter('prompt_tokens', 'Prompt tokens, counted once for all n')
        self.generation_tokens = self.counter('generation_tokens', 'Generated tokens')
        self.finished = self.counter('requests_finished', 'Finished completions', 'reason')
        self.rejected = self.counter('requests_rejected', 'Requests answered by an error', 'status')
        long = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
        self.queue_time = self.seconds('queue', 'From request to slot', long)
        self.time_to_first_token = self.seconds(
            'time_to_first_token', 'From request to first token', long
        )
        self.request_time = self.seconds('request', 'From request to last token', long)
        short = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
        about = 'From token to token, mean of a completion'
        self.inter_token_time = self.seconds('inter_token', about, short)

    def counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f'flatgpt_{name}', about, labels, registry=self.registry)

    def seconds(self, name: str, about: str, buckets: tuple) -> Histogram:
        name = f'flatgpt_{name}_seconds'
        return Histogram(name, about, buckets=buckets, registry=self.registry)

    def observe(self, job: CompletionJob) -> None:
        """Record a released job, whose completions the engine may still be writing to."""
        if any(r.admitted_time for r in job.requests):
            self.prompt_tokens.inc(job.usage()['prompt_tokens'])
        for r in job.requests:
            tokens = len(r.output_ids)
            self.finished.labels(r.finish_reason or 'cancelled').inc()
            self.generation_tokens.inc(tokens)
            if r.admitted_time:
                self.queue_time.observe(r.admitted_time - r.arrival_time)
            if r.finish_reason in ('stop', 'length') and r.finish_time:
                self.request_time.observe(r.finish_time - r.arrival_time)
            if tokens and r.first_token_time:
                self.time_to_first_token.observe(r.first_token_time - r.arrival_time)
            if tokens > 1 and r.finish_time:
                self.inter_token_time.observe((r.finish_time - r.first_token_time) / (tokens - 1))
