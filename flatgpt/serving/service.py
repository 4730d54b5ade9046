"""
The engine in a thread of its own, and the limits of what is asked of it.

    service = Service(engine, settings)                  # those of api.py
    job = service.begin(body, client_disconnected)       # or an APIError says why not
    try:
        for part in job.frames(head): ...                # or job.whole(head)
    finally:
        service.release(job)
"""

import logging
import os
import threading
import time
from collections.abc import Callable

from flatgpt.data.messages import template_role
from flatgpt.errors import UserError
from flatgpt.inference.engine import Engine
from flatgpt.runtime import is_out_of_memory, out_of_memory
from flatgpt.serving.api_error import APIError
from flatgpt.serving.choices import ChoiceBuilder
from flatgpt.serving.job import CompletionJob
from flatgpt.serving.metrics import Metrics
from flatgpt.serving.schema import CompletionRequest, Message

WATCH = 0.1  # seconds until a client that left is noticed
LOG = logging.getLogger('flatgpt')


def key_of(settings: dict) -> str:
    return settings['api_key'] or os.environ.get('FLATGPT_API_KEY', '')


def fewer_rows(rows: int) -> str:
    """What to start a server with whose memory does not hold so many texts."""
    return f'--max_rows={rows // 2}' if rows > 1 else '--quantize=int8, or a smaller model'


class Service:
    """The engine in a thread of its own, and who may use it."""

    def __init__(self, engine: Engine, settings: dict):
        self.engine, self.settings = engine, settings
        self.name, self.began = settings['name'], int(time.time())
        self.tokenizer, self.size = engine.tokenizer, engine.model.config.block_size
        self.most = len(engine.slots) + settings['max_queue']  # texts at once
        self.metrics = Metrics(engine)
        self.lock = threading.Lock()
        self.jobs: set[CompletionJob] = set()
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
        except BaseException as error:
            if is_out_of_memory(error):
                weight = self.engine.model.embedding.weight
                cure = f'a restart with {fewer_rows(len(self.engine.slots))}'
                LOG.error('%s', out_of_memory(error, str(weight.device), cure))
            else:
                LOG.exception('the engine failed; nothing can be computed until a restart')

    def watch(self) -> None:
        while not self.closed.wait(WATCH):
            for job in self.open_jobs():
                job.watch()

    def open_jobs(self) -> list[CompletionJob]:
        with self.lock:
            return list(self.jobs)

    def close(self) -> None:
        self.closed.set()
        self.engine.close()
        for thread in self.threads:
            thread.join()

    def trouble(self) -> APIError | None:
        """Why nothing can be computed now."""
        if self.engine.error or self.engine.closed:
            return APIError(503, 'the engine has stopped; the log says why', code='engine_stopped')
        if self.draining:
            after = {'Retry-After': '5'}
            return APIError(503, 'the server is shutting down', code='draining', headers=after)
        return None

    def card(self) -> dict:
        """What a list of models says of it."""
        return {
            'id': self.name,
            'object': 'model',
            'created': self.began,
            'owned_by': 'flatgpt',
            'max_model_len': self.size,
        }

    # --- requests

    def conversation(self, messages: list[Message]) -> tuple[list[int], str]:
        """The ids of a conversation up to its answer, and the text that ends that, or ''."""
        tokenizer = self.tokenizer
        if tokenizer.chat_template is None:
            message = "this model's tokenizer has no chat template: /v1/completions continues text"
            raise APIError(400, message, 'messages', 'no_chat_template')
        talk = []
        for number, message in enumerate(messages):
            try:
                role = template_role(message.role, tokenizer.chat_template)
            except UserError as error:
                raise APIError(400, f'messages[{number}]: {error}', 'messages') from None
            talk.append({'role': role, 'content': message.content})
        try:
            ids = tokenizer.encode_chat(talk).tolist()
        except UserError as error:
            raise APIError(400, f'messages: {error}', 'messages') from None
        if not ids:
            raise APIError(400, 'messages: there is no text in them', 'messages')
        end = tokenizer.chat_template['assistant'][1]
        return ids, '' if tokenizer.delimiter_id(end) is not None else end

    def room(self, ids: list[int]) -> int:
        """How many tokens may come after a prompt."""
        most = self.settings['max_new_tokens']
        return min(self.size - len(ids), self.size if most is None else most)

    def begin(
        self,
        body: CompletionRequest,
        client_disconnected: Callable[[], bool],
        builder: Callable[..., ChoiceBuilder] = ChoiceBuilder,
    ) -> CompletionJob:
        """Have a request computed; release() must follow. APIError if it cannot be."""
        prompts, tokens = body.prompts(), self.tokenizer.vocab_size
        if body.max_tokens == 0 and not body.echo:
            raise APIError(400, 'max_tokens: 0 only together with echo', 'max_tokens')
        if len(prompts) * (body.n or 1) > self.most:
            which = 'prompt' if len(prompts) > self.most else 'n'
            raise APIError(400, f'{which}: a request may have {self.most} texts', which)
        if max(body.logit_bias or (0,)) >= tokens:
            raise APIError(400, f'logit_bias: there are {tokens} token ids', 'logit_bias')
        prompts = [self.to_ids(prompt, 'prompt') for prompt in prompts]
        self.check_lengths(max(map(len, prompts)), body.sampling().max_new_tokens)
        seconds = self.settings['max_seconds']
        job = CompletionJob(body, prompts, self.engine, client_disconnected, seconds, builder)
        self.submit(job)
        return job

    def to_ids(self, prompt: str | list[int], field: str) -> list[int]:
        if isinstance(prompt, str):
            try:
                return self.tokenizer.encode(prompt, allow_eot=True).tolist()
            except UserError as error:
                raise APIError(400, f'{field}: {error}', field) from None
        if max(prompt, default=0) >= self.tokenizer.vocab_size:
            ids = f'{max(prompt)} is none of the {self.tokenizer.vocab_size} token ids'
            raise APIError(400, f'{field}: {ids}', field)
        return prompt

    def check_lengths(self, prompt: int, new: int) -> None:
        if prompt + new > self.size:
            raise APIError(
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
                raise APIError(400, message, field)

    def submit(self, job: CompletionJob) -> None:
        with self.lock:
            if trouble := self.trouble():
                raise trouble
            # one whose texts are written has a thread until its client has read them
            taken = sum(max(other.left, 1) for other in self.jobs)
            if taken + len(job.requests) > self.most:
                message = f'{self.most} texts are being written or wait; try again'
                raise APIError(429, message, code='queue_full', headers={'Retry-After': '1'})
            self.jobs.add(job)
        try:
            for request in job.requests:
                self.engine.submit(request)
        except BaseException:  # the engine failed just now
            self.release(job)
            raise job.failure() from None

    def release(self, job: CompletionJob) -> None:
        """Its thread is done with it."""
        job.cancel()
        with self.lock:
            if job not in self.jobs:
                return
            self.jobs.remove(job)
        self.metrics.count(job)
