"""
One HTTP request for completions, between the engine's thread and its own.

    job = CompletionJob(body, prompts, engine, client_disconnected, seconds)
    for data in job.frames(head): ...                    # or job.whole(head)
"""

import json
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from flatgpt.inference.engine import NOT_FINITE, Engine
from flatgpt.inference.request import Request, TokenOutput
from flatgpt.serving.api_error import APIError
from flatgpt.serving.choices import ChoiceBuilder
from flatgpt.serving.schema import CompletionRequest

PACE = 0.03  # seconds between the frames of a stream: threads that wake up hold up the engine
LOG = logging.getLogger('flatgpt')


class PieceQueue:
    """Pieces of some texts: the engine's thread puts them, that of the HTTP request takes them."""

    def __init__(self, texts: int):
        self.pieces: deque[TokenOutput] = deque()
        self.left = texts  # that are not finished
        self.hungry = False  # whether a thread waits for the next piece
        self.arrived, self.finished = threading.Event(), threading.Event()

    def put(self, piece: TokenOutput) -> None:
        self.pieces.append(piece)
        if piece.finish:
            self.left -= 1
            if not self.left:
                self.finished.set()
        if self.hungry:
            self.arrived.set()

    def all(self) -> list[TokenOutput]:
        """All pieces, once the texts are finished."""
        self.finished.wait()
        return list(self.pieces)

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


class CompletionJob:
    """The texts that one HTTP request asks for.

    client_disconnected(): whether the client has left. seconds: how long they may take.
    builder: of the choices that the client reads, a ChoiceBuilder or one like it.
    """

    def __init__(
        self,
        body: CompletionRequest,
        prompts: list[list[int]],
        engine: Engine,
        client_disconnected: Callable[[], bool],
        seconds: float,
        builder: Callable[..., ChoiceBuilder] = ChoiceBuilder,
    ):
        sampling, n, top, echo = body.sampling(), body.n or 1, body.logprobs, bool(body.echo)
        # -1 is no seed to the clients of llama.cpp and vLLM
        seed = secrets.randbits(63) if body.seed in (None, -1) else body.seed % 2**64
        self.queue = PieceQueue(len(prompts) * n)
        # a text's random numbers depend on the seed and its number among those of its prompt
        self.requests = [
            Request(
                ids, sampling, self.queue.put, i * n + j, (seed, j), top, echo and top is not None
            )
            for i, ids in enumerate(prompts)
            for j in range(n)
        ]
        self.builders = [builder(each, engine.tokenizer, echo) for each in self.requests]
        self.engine, self.prompts = engine, prompts
        self.client_disconnected, self.seconds = client_disconnected, seconds
        self.with_usage = bool(body.stream_options and body.stream_options.include_usage)
        self.late = False
        self.code: str | None = None  # of the error that ended a stream

    @property
    def left(self) -> int:
        """How many of its texts are not finished."""
        return self.queue.left

    # --- for the service, from any thread

    def cancel(self) -> None:
        for request in self.requests:
            request.cancel()

    def watch(self) -> None:
        """Cancel it if nobody waits for it any more, or it takes too long."""
        self.late = self.late or time.monotonic() - self.requests[0].arrival_time > self.seconds
        if self.late or self.client_disconnected():
            self.cancel()

    # --- for the HTTP request's thread

    def whole(self, head: dict) -> dict:
        """The answer, when it is finished."""
        return {**head, 'choices': self.choices(self.queue.all()), 'usage': self.usage()}

    def frames(self, head: dict) -> Iterator[bytes]:
        """The answer as server-sent events."""
        usage = {'usage': None} if self.with_usage else {}
        try:
            for pieces in self.queue.batches():
                choices = self.choices(pieces)
                yield b''.join(frame({**head, 'choices': [each], **usage}) for each in choices)
            if usage:
                yield frame({**head, 'choices': [], 'usage': self.usage()})
        except APIError as error:
            self.code = error.code
            yield frame(error.body)
        yield b'data: [DONE]\n\n'

    def choices(self, pieces: list[TokenOutput]) -> list[dict]:
        """Pieces as a client reads them. APIError if the job has failed."""
        if any(piece.finish in ('error', 'cancelled') for piece in pieces):
            raise self.failure()
        rows: dict[int, list[TokenOutput]] = {}
        for piece in pieces:
            rows.setdefault(piece.row, []).append(piece)
        choices = [self.builders[row].choice(rows[row]) for row in sorted(rows)]
        return [choice for choice in choices if choice]

    def failure(self) -> APIError:
        if self.late:
            message = f'it took longer than {self.seconds:g} seconds, the limit of this server'
            # the clients of OpenAI's library would try the same again
            return APIError(504, message, code='timeout', headers={'X-Should-Retry': 'false'})
        if self.client_disconnected():
            return APIError(499, 'the client has left')  # as nginx calls it; for the log
        if self.engine.error is None and any(r.finish == 'error' for r in self.requests):
            LOG.error(NOT_FINITE)
            return APIError(500, NOT_FINITE, code='not_finite')
        if self.engine.error is None and self.engine.closed:
            return APIError(503, 'the server is shutting down', code='draining')
        return APIError(500, 'the engine failed; the log says why', code='engine_stopped')

    # --- for answers, metrics and the log

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
        first = r.first_token_time if r.written else None
        moments = {'queued': r.admitted_time, 'first_token': first}
        out = {name: round(at - r.arrival_time, 4) for name, at in moments.items() if at}
        out |= self.usage() | {'finish': [r.finish or 'cancelled' for r in self.requests]}
        out |= {'code': self.code} if self.code else {}
        if with_text:
            decode = self.engine.tokenizer.decode
            out['prompts'] = [decode(ids) for ids in self.prompts]
            out['answers'] = [decode(each.written) for each in self.requests]
        return out


def frame(data: dict) -> bytes:
    return b'data: ' + json.dumps(data).encode() + b'\n\n'
