"""
One HTTP request for completions, shared by the engine's thread and the request's own.

    job = CompletionJob(body, prompts, engine, client_disconnected, seconds)
    for data in job.events(envelope): ...                # or job.response(envelope)
"""

import json
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from flatgpt.inference.engine import NOT_FINITE, Engine
from flatgpt.inference.grammar import Grammar
from flatgpt.inference.request import Request, TokenOutput
from flatgpt.serving.api_error import APIError, shutting_down
from flatgpt.serving.choices import ChoiceBuilder
from flatgpt.serving.schema import CompletionRequest

EVENT_INTERVAL = 0.03  # seconds between a stream's events: each one interrupts the engine
LOG = logging.getLogger('flatgpt')


class OutputQueue:
    """The outputs of some completions: the engine's thread puts, the HTTP request's takes."""

    def __init__(self, completions: int):
        self.outputs: deque[TokenOutput] = deque()
        self.unfinished = completions
        self.waiting = False  # whether a thread waits for the next output
        self.arrived, self.finished = threading.Event(), threading.Event()

    def put(self, output: TokenOutput) -> None:
        self.outputs.append(output)
        if output.finish_reason:
            self.unfinished -= 1
            if not self.unfinished:
                self.finished.set()
        if self.waiting:
            self.arrived.set()

    def wait_for_all(self) -> list[TokenOutput]:
        """All outputs, once the completions are finished."""
        self.finished.wait()
        return list(self.outputs)

    def batches(self) -> Iterator[list[TokenOutput]]:
        """Outputs as they arrive: the first and the last at once, others every EVENT_INTERVAL."""
        done = False
        while not done:
            self.waiting = True
            if not self.outputs:
                self.arrived.wait()
            self.waiting = False
            self.arrived.clear()
            done = not self.unfinished  # read first: by then the last output is in `outputs`
            yield [self.outputs.popleft() for _ in range(len(self.outputs))]
            self.finished.wait(EVENT_INTERVAL)


class CompletionJob:
    """The completions that one HTTP request asks for.

    client_disconnected(): whether the client disconnected. seconds: the time limit.
    builder: makes the response's choices, a ChoiceBuilder or a subclass. grammar, adapter:
    of each completion.
    """

    def __init__(
        self,
        body: CompletionRequest,
        prompts: list[list[int]],
        engine: Engine,
        client_disconnected: Callable[[], bool],
        seconds: float,
        builder: Callable[..., ChoiceBuilder] = ChoiceBuilder,
        grammar: Grammar | None = None,
        adapter: str | None = None,
    ):
        sampling, n, echo = body.sampling(), body.n or 1, bool(body.echo)
        # clients of llama.cpp and vLLM send -1 for "no seed"
        seed = secrets.randbits(63) if body.seed in (None, -1) else body.seed % 2**64
        self.queue = OutputQueue(len(prompts) * n)
        # random numbers depend on the seed and on the completion's number within its prompt
        self.requests = [
            Request(
                ids,
                sampling,
                self.queue.put,
                index=i * n + j,
                seed=(seed, j),
                top_logprobs=body.logprobs,
                score_prompt=echo and body.logprobs is not None,
                grammar=grammar,
                adapter=adapter,
            )
            for i, ids in enumerate(prompts)
            for j in range(n)
        ]
        self.builders = [builder(each, engine.tokenizer, echo) for each in self.requests]
        self.engine, self.prompts = engine, prompts
        self.client_disconnected, self.seconds = client_disconnected, seconds
        self.with_usage = bool(body.stream_options and body.stream_options.include_usage)
        self.timed_out = False
        self.code: str | None = None  # of the error that ended a stream

    @property
    def unfinished(self) -> int:
        """The number of its completions that are not finished."""
        return self.queue.unfinished

    # --- for the service, from any thread

    def cancel(self) -> None:
        for request in self.requests:
            request.cancel()

    def cancel_if_abandoned(self) -> None:
        """Cancel it if its client disconnected or its time is up."""
        age = time.monotonic() - self.requests[0].arrival_time
        self.timed_out = self.timed_out or age > self.seconds
        if self.timed_out or self.client_disconnected():
            self.cancel()

    # --- for the HTTP request's thread

    def response(self, envelope: dict) -> dict:
        """The whole response, once it is finished. envelope: its fields besides the choices."""
        choices = self.choices(self.queue.wait_for_all())
        return {**envelope, 'choices': choices, 'usage': self.usage()}

    def events(self, envelope: dict) -> Iterator[bytes]:
        """The response as server-sent events."""
        usage = {'usage': None} if self.with_usage else {}
        try:
            for outputs in self.queue.batches():
                choices = self.choices(outputs)
                yield b''.join(
                    encode_event({**envelope, 'choices': [each], **usage}) for each in choices
                )
            if usage:
                yield encode_event({**envelope, 'choices': [], 'usage': self.usage()})
        except APIError as error:
            self.code = error.code
            yield encode_event(error.body)
        yield b'data: [DONE]\n\n'

    def choices(self, outputs: list[TokenOutput]) -> list[dict]:
        """The choices with these outputs. APIError if the job has failed."""
        if any(output.finish_reason in ('error', 'cancelled') for output in outputs):
            raise self.failure()
        by_index: dict[int, list[TokenOutput]] = {}
        for output in outputs:
            by_index.setdefault(output.index, []).append(output)
        choices = [self.builders[i].choice(by_index[i]) for i in sorted(by_index)]
        return [choice for choice in choices if choice]

    def failure(self) -> APIError:
        if self.timed_out:
            message = (
                f'the request took longer than {self.seconds:g} seconds, the limit of this '
                'server; lower max_tokens'
            )
            # or OpenAI's library would send the same request again
            return APIError(504, message, code='timeout', headers={'X-Should-Retry': 'false'})
        if self.client_disconnected():
            return APIError(499, 'the client disconnected')  # nginx's status; only for the log
        problems = [r.grammar.problem for r in self.requests if r.grammar and r.grammar.problem]
        if problems:
            return APIError(400, problems[0], code='grammar')
        if self.engine.error is None and any(r.finish_reason == 'error' for r in self.requests):
            LOG.error(NOT_FINITE)
            return APIError(500, NOT_FINITE, code='not_finite')
        if self.engine.error is None and self.engine.closed:
            return shutting_down()
        message = 'the engine failed; see the server log, then restart the server'
        return APIError(500, message, code='engine_stopped')

    # --- for responses, metrics and the log

    def usage(self) -> dict:
        prompt = sum(map(len, self.prompts))
        completion = sum(len(r.output_ids) for r in self.requests)
        return {
            'prompt_tokens': prompt,
            'completion_tokens': completion,
            'total_tokens': prompt + completion,
        }

    def log_fields(self, with_text: bool) -> dict:
        """Its fields of the request's log line."""
        r = self.requests[0]
        first = r.first_token_time if r.output_ids else None
        moments = {'queued': r.admitted_time, 'first_token': first}
        out = {name: round(at - r.arrival_time, 4) for name, at in moments.items() if at}
        out |= self.usage() | {'finish': [r.finish_reason or 'cancelled' for r in self.requests]}
        out |= {'code': self.code} if self.code else {}
        if with_text:
            decode = self.engine.tokenizer.decode
            out['prompts'] = [decode(ids) for ids in self.prompts]
            out['answers'] = [decode(each.output_ids) for each in self.requests]
        return out


def encode_event(data: dict) -> bytes:
    return b'data: ' + json.dumps(data).encode() + b'\n\n'
