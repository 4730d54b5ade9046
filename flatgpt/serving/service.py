"""
Between the requests of a server, each in a thread, and the engine in another: limits, answers.

    service = Service(engine, settings)                  # those of api.py
    job = service.begin(body, gone)                      # or a Refusal says why not
    try:
        for part in job.frames(): ...                    # or job.whole()
    finally:
        service.release(job)
"""

import codecs
import json
import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from flatgpt.data.tokenizer import Tokenizer
from flatgpt.errors import UserError
from flatgpt.inference.engine import NOT_FINITE, Engine
from flatgpt.inference.request import Request, TokenOutput
from flatgpt.serving.schema import CompletionRequest, Message, error_body

PACE = 0.03  # seconds between the frames of a stream: threads that wake up hold up the engine
WATCH = 0.1  # seconds until a client that left is noticed
LOWEST = -9999.0  # stands for a log-probability of minus infinity, which JSON has not
LOG = logging.getLogger('flatgpt')


class Refusal(Exception):
    """An error as a client gets it."""

    def __init__(self, status: int, message: str, param=None, code=None, headers=()):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers)
        self.body = error_body(status, message, param, code)


# -----------------------------------------------------------------------------
# what a client reads


class Answer:
    """One text of an answer: all of it, or what a frame has of it."""

    def __init__(self, request: Request, tokenizer: Tokenizer, echo: bool):
        self.request, self.tokenizer, self.echo = request, tokenizer, echo
        self.decoder, self.offset = codecs.getincrementaldecoder('utf-8')('replace'), 0

    def choice(self, pieces: list[TokenOutput]) -> dict | None:
        """The next pieces as a client reads them; None while there is nothing to read."""
        r, finish = self.request, pieces[-1].finish
        text = ''.join(piece.text for piece in pieces)
        scores = [(p.token, p.logprob, p.top) for p in pieces if p.token is not None]
        if self.echo:
            text, self.echo = self.tokenizer.decode(r.prompt) + text, False
            if r.score_prompt:
                scores[:0] = [(i, *each) for i, each in zip(r.prompt, r.prompt_scores, strict=True)]
        if not (text or finish or r.top is not None):
            return None
        logprobs = None if r.top is None else self.logprobs(scores)
        return {'index': r.row, 'text': text, 'logprobs': logprobs, 'finish_reason': finish}

    def logprobs(self, scores: list[tuple]) -> dict:
        offsets = []
        for token, _, _ in scores:
            offsets.append(self.offset)
            self.offset += len(self.decoder.decode(self.tokenizer.token_bytes[token] or b''))
        return {
            'tokens': [self.tokenizer.decode([token]) for token, _, _ in scores],
            'token_logprobs': [None if p is None else max(p, LOWEST) for _, p, _ in scores],
            'top_logprobs': [None if s[1] is None else self.likeliest(*s) for s in scores],
            'text_offset': offsets,
        }

    def likeliest(self, token: int, logprob: float, top: tuple) -> dict[str, float]:
        out: dict[str, float] = {}
        for i, p in (*top, (token, logprob)):  # several tokens may read alike
            text = self.tokenizer.decode([i])
            out[text] = max(p, out.get(text, LOWEST))
        return out


class Chat:
    """Choices of completions as those of a chat, with their text as a 'message' or a 'delta'."""

    def __init__(self, part: str):
        self.part, self.begun = part, set()

    def __call__(self, choice: dict) -> dict:
        index, scores = choice['index'], choice['logprobs']
        text = {'content': choice['text']}
        if index not in self.begun:  # the first frame says who speaks
            self.begun.add(index)
            text = {'role': 'assistant', **text}
        logprobs = None if scores is None else {'content': self.tokens(scores)}
        finish = choice['finish_reason']
        return {'index': index, self.part: text, 'logprobs': logprobs, 'finish_reason': finish}

    def tokens(self, scores: dict) -> list[dict]:
        def one(text: str, logprob: float) -> dict:
            return {'token': text, 'logprob': logprob, 'bytes': list(text.encode())}

        each = (scores[name] for name in ('tokens', 'token_logprobs', 'top_logprobs'))
        return [
            {**one(text, logprob), 'top_logprobs': [one(*other) for other in top.items()]}
            for text, logprob, top in zip(*each, strict=True)
        ]


def frame(data: dict) -> bytes:
    return b'data: ' + json.dumps(data).encode() + b'\n\n'


# -----------------------------------------------------------------------------
# between the threads


class Job:
    """The texts that one HTTP request asks for, on their way from the engine's thread to its own.

    gone(): whether the client has left. seconds: how long they may take.
    """

    def __init__(
        self,
        body: CompletionRequest,
        prompts: list[list[int]],
        engine: Engine,
        gone: Callable[[], bool],
        seconds: float,
        shape: Callable[[dict], dict] | None = None,
    ):
        sampling, n, top = body.sampling(), body.n or 1, body.logprobs
        seed = secrets.randbits(63) if body.seed is None else body.seed % 2**64
        score = bool(body.echo) and top is not None
        # a text's random numbers depend on the seed and its number among those of its prompt
        self.requests = [
            Request(ids, sampling, self.take, i * n + j, (seed, j), top, score)
            for i, ids in enumerate(prompts)
            for j in range(n)
        ]
        echo = bool(body.echo)
        self.answers = [Answer(each, engine.tokenizer, echo) for each in self.requests]
        self.engine, self.prompts, self.gone, self.seconds = engine, prompts, gone, seconds
        self.with_usage = bool(body.stream_options and body.stream_options.include_usage)
        self.shape = shape or (lambda choice: choice)  # of a choice, as the client knows it
        self.pieces: deque[TokenOutput] = deque()
        self.left = len(self.requests)
        self.hungry = False  # whether a thread waits for the next piece
        self.arrived, self.finished = threading.Event(), threading.Event()
        self.late = False
        self.code: str | None = None  # of the error that ended a stream

    # --- in the engine's thread

    def take(self, piece: TokenOutput) -> None:
        self.pieces.append(piece)
        if piece.finish:
            self.left -= 1
            if not self.left:
                self.finished.set()
        if self.hungry:
            self.arrived.set()

    # --- in any other

    def cancel(self) -> None:
        for request in self.requests:
            request.cancel()

    def watch(self) -> None:
        """Cancel it if nobody waits for it any more, or it takes too long."""
        self.late = self.late or time.monotonic() - self.requests[0].came > self.seconds
        if self.late or self.gone():
            self.cancel()

    # --- in its own

    def batches(self) -> Iterator[list[TokenOutput]]:
        """Pieces as they come: the first and the last at once, others together every PACE."""
        done = False
        while not done:
            self.hungry = True
            if not self.pieces:
                self.arrived.wait()
            self.hungry = False
            self.arrived.clear()
            done = not self.left  # looked at first: what ends a text is in `pieces` by then
            yield [self.pieces.popleft() for _ in range(len(self.pieces))]
            self.finished.wait(PACE)

    def choices(self, pieces: list[TokenOutput]) -> list[dict]:
        """Pieces as a client reads them. Refusal if the job has failed."""
        if any(piece.finish in ('error', 'cancelled') for piece in pieces):
            raise self.failure()
        rows: dict[int, list[TokenOutput]] = {}
        for piece in pieces:
            rows.setdefault(piece.row, []).append(piece)
        choices = [self.answers[row].choice(rows[row]) for row in sorted(rows)]
        return [self.shape(choice) for choice in choices if choice]

    def whole(self, head: dict) -> dict:
        """The answer, when it is finished."""
        self.finished.wait()
        return {**head, 'choices': self.choices(list(self.pieces)), 'usage': self.usage()}

    def frames(self, head: dict) -> Iterator[bytes]:
        """The answer as server-sent events."""
        usage = {'usage': None} if self.with_usage else {}
        try:
            for pieces in self.batches():
                choices = self.choices(pieces)
                yield b''.join(frame({**head, 'choices': [each], **usage}) for each in choices)
            if usage:
                yield frame({**head, 'choices': [], 'usage': self.usage()})
        except Refusal as refusal:
            self.code = refusal.code
            yield frame(refusal.body)
        yield b'data: [DONE]\n\n'

    def failure(self) -> Refusal:
        if self.late:
            message = f'it took longer than {self.seconds:g} seconds, the limit of this server'
            # the clients of OpenAI's library would try the same again
            return Refusal(504, message, code='timeout', headers={'X-Should-Retry': 'false'})
        if self.gone():
            return Refusal(499, 'the client has left')  # as nginx calls it; for the log
        if self.engine.error is None and any(r.finish == 'error' for r in self.requests):
            LOG.error(NOT_FINITE)
            return Refusal(500, NOT_FINITE, code='not_finite')
        if self.engine.error is None and self.engine.closed:
            return Refusal(503, 'the server is shutting down', code='draining')
        return Refusal(500, 'the engine failed; the log says why', code='engine_stopped')

    def usage(self) -> dict:
        prompt, written = sum(map(len, self.prompts)), sum(len(r.written) for r in self.requests)
        return {
            'prompt_tokens': prompt,
            'completion_tokens': written,
            'total_tokens': prompt + written,
        }

    def record(self, with_text: bool) -> dict:
        """What the log says of it."""
        r = self.requests[0]
        moments = {'queued': r.began, 'first_token': r.first if r.written else None}
        out = {name: round(at - r.came, 4) for name, at in moments.items() if at}
        out |= self.usage() | {'finish': [r.finish or 'cancelled' for r in self.requests]}
        out |= {'code': self.code} if self.code else {}
        if with_text:
            decode = self.answers[0].tokenizer.decode
            out['prompts'] = [decode(ids) for ids in self.prompts]
            out['answers'] = [decode(each.written) for each in self.requests]
        return out


# -----------------------------------------------------------------------------
# the service


def key_of(settings: dict) -> str:
    return settings['api_key'] or os.environ.get('FLATGPT_API_KEY', '')


class Service:
    """The engine in a thread of its own, and who may use it."""

    def __init__(self, engine: Engine, settings: dict):
        self.engine, self.settings = engine, settings
        self.name, self.began = settings['name'], int(time.time())
        self.tokenizer, self.size = engine.tokenizer, engine.model.config.block_size
        self.most = len(engine.slots) + settings['max_queue']  # texts at once
        self.metrics = Metrics(engine)
        self.lock = threading.Lock()
        self.jobs: set[Job] = set()
        self.draining = False
        self.closed = threading.Event()
        self.threads = [
            threading.Thread(target=work, name=f'flatgpt {work.__name__}', daemon=True)
            for work in (self.run, self.watch)
        ]
        for thread in self.threads:
            thread.start()

    def run(self) -> None:
        try:
            self.engine.serve()
        except BaseException:
            LOG.exception('the engine failed; nothing can be computed until a restart')

    def watch(self) -> None:
        while not self.closed.wait(WATCH):
            for job in self.open_jobs():
                job.watch()

    def open_jobs(self) -> list[Job]:
        with self.lock:
            return list(self.jobs)

    def close(self) -> None:
        self.closed.set()
        self.engine.close()
        for thread in self.threads:
            thread.join()

    def trouble(self) -> Refusal | None:
        """Why nothing can be computed now."""
        if self.engine.error or self.engine.closed:
            return Refusal(503, 'the engine has stopped; the log says why', code='engine_stopped')
        if self.draining:
            after = {'Retry-After': '5'}
            return Refusal(503, 'the server is shutting down', code='draining', headers=after)
        return None

    # --- requests

    def conversation(self, messages: list[Message]) -> tuple[list[int], str]:
        """The ids of a conversation up to its answer, and the text that ends that, or ''."""
        tokenizer = self.tokenizer
        if tokenizer.chat_template is None:
            message = "this model's tokenizer has no chat template: /v1/completions continues text"
            raise Refusal(400, message, 'messages', 'no_chat_template')
        try:
            ids = tokenizer.encode_chat([dict(message) for message in messages]).tolist()
        except UserError as error:
            raise Refusal(400, str(error), 'messages') from None
        end = tokenizer.chat_template['assistant'][1]
        return ids, '' if end in tokenizer.special else end

    def begin(self, body: CompletionRequest, gone: Callable[[], bool], shape=None) -> Job:
        """Have a request computed; release() must follow. Refusal if it cannot be."""
        prompts, tokens = body.prompts(), self.tokenizer.vocab_size
        if body.max_tokens == 0 and not body.echo:
            raise Refusal(400, 'max_tokens: 0 only together with echo', 'max_tokens')
        if len(prompts) * (body.n or 1) > self.most:
            which = 'prompt' if len(prompts) > self.most else 'n'
            raise Refusal(400, f'{which}: a request may have {self.most} texts', which)
        if max(body.logit_bias or (0,)) >= tokens:
            raise Refusal(400, f'logit_bias: there are {tokens} token ids', 'logit_bias')
        prompts = [self.to_ids(prompt, 'prompt') for prompt in prompts]
        self.check_lengths(max(map(len, prompts)), body.sampling().max_new_tokens)
        job = Job(body, prompts, self.engine, gone, self.settings['max_seconds'], shape)
        self.submit(job)
        return job

    def to_ids(self, prompt: str | list[int], field: str) -> list[int]:
        if isinstance(prompt, str):
            try:
                return self.tokenizer.encode(prompt, allow_eot=True).tolist()
            except UserError as error:
                raise Refusal(400, f'{field}: {error}', field) from None
        if max(prompt, default=0) >= self.tokenizer.vocab_size:
            ids = f'{max(prompt)} is none of the {self.tokenizer.vocab_size} token ids'
            raise Refusal(400, f'{field}: {ids}', field)
        return prompt

    def check_lengths(self, prompt: int, new: int) -> None:
        if prompt + new > self.size:
            raise Refusal(
                400,
                f'the prompt has {prompt} tokens, and max_tokens={new} make {prompt + new}; this '
                f"model's context holds {self.size}",
                'prompt' if prompt >= self.size else 'max_tokens',
                'context_length_exceeded',
            )
        for count, field, limit in (
            (prompt, 'prompt', 'max_prompt_tokens'),
            (new, 'max_tokens', 'max_new_tokens'),
        ):
            most = self.settings[limit]
            if most is not None and count > most:
                message = f'{field}: {count} tokens; this server takes {most} at most'
                raise Refusal(400, message, field)

    def submit(self, job: Job) -> None:
        with self.lock:
            if trouble := self.trouble():
                raise trouble
            # one whose texts are written has a thread until its client has read them
            taken = sum(max(other.left, 1) for other in self.jobs)
            if taken + len(job.requests) > self.most:
                message = f'{self.most} texts are being written or wait; try again'
                raise Refusal(429, message, code='queue_full', headers={'Retry-After': '1'})
            self.jobs.add(job)
        try:
            for request in job.requests:
                self.engine.submit(request)
        except BaseException:  # the engine failed just now
            self.release(job)
            raise job.failure() from None

    def release(self, job: Job) -> None:
        """Its thread is done with it."""
        job.cancel()
        with self.lock:
            if job not in self.jobs:
                return
            self.jobs.remove(job)
        self.metrics.count(job)


class Metrics:
    """What Prometheus is told."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        for name, read, about in (
            ('slots', lambda: len(engine.slots), 'Texts that can be computed at once'),
            ('requests_running', lambda: engine.running, 'Texts being computed'),
            ('requests_waiting', lambda: len(engine.waiting), 'Texts that wait for a row'),
        ):
            Gauge(f'flatgpt_{name}', about, registry=self.registry).set_function(read)
        self.prompt_tokens = self.counter('prompt_tokens', 'Tokens of prompts, once for n texts')
        self.generation_tokens = self.counter('generation_tokens', 'Tokens written')
        self.finished = self.counter('requests_finished', 'Texts that ended', 'reason')
        self.rejected = self.counter('requests_rejected', 'Requests answered by an error', 'status')
        long = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
        self.queue = self.seconds('queue', 'From request to row', long)
        self.first = self.seconds('time_to_first_token', 'From request to first token', long)
        self.total = self.seconds('request', 'From request to last token', long)
        short = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
        self.inter_token = self.seconds('inter_token', 'From token to token, mean of a text', short)

    def counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f'flatgpt_{name}', about, labels, registry=self.registry)

    def seconds(self, name: str, about: str, buckets: tuple) -> Histogram:
        name = f'flatgpt_{name}_seconds'
        return Histogram(name, about, buckets=buckets, registry=self.registry)

    def count(self, job: Job) -> None:
        """At any moment: the engine may be writing its texts still."""
        if any(r.began for r in job.requests):
            self.prompt_tokens.inc(job.usage()['prompt_tokens'])
        for r in job.requests:
            written = len(r.written)
            self.finished.labels(r.finish or 'cancelled').inc()
            self.generation_tokens.inc(written)
            if r.began:
                self.queue.observe(r.began - r.came)
            if r.finish in ('stop', 'length') and r.ended:
                self.total.observe(r.ended - r.came)
            if written and r.first:
                self.first.observe(r.first - r.came)
            if written > 1 and r.ended:
                self.inter_token.observe((r.ended - r.first) / (written - 1))
