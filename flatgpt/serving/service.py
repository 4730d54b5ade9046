"""
The engine in a thread of its own, and the limits for requests.

    service = Service(engine, settings)                  # the settings of api.py
    job = service.submit(body, client_disconnected)      # or an APIError with the reason
    try:
        for data in job.events(envelope): ...            # or job.response(envelope)
    finally:
        service.release(job)
"""

import os
import threading
import time
from collections.abc import Callable, Sequence

from flatgpt.data.messages import template_role
from flatgpt.data.tools import without_tools
from flatgpt.errors import UserError, counted, reason_of
from flatgpt.inference.engine import Engine
from flatgpt.inference.grammar import Grammar, Grammars
from flatgpt.runtime import is_out_of_memory
from flatgpt.serving.api_error import APIError, shutting_down
from flatgpt.serving.choices import ChoiceBuilder
from flatgpt.serving.engines import Engines
from flatgpt.serving.job import LOG, CompletionJob
from flatgpt.serving.metrics import Metrics
from flatgpt.serving.schema import ChatRequest, CompletionRequest

MONITOR_INTERVAL = 0.1  # seconds between checks for clients that disconnected


def api_key_of(settings: dict) -> str:
    return settings['api_key'] or os.environ.get('FLATGPT_API_KEY', '')


class Service:
    """The engine, the jobs it runs and the limits of both.

    build: makes another engine, with the weights that its checkpoint has now; None: there is none.
    """

    def __init__(self, engine: Engine, settings: dict, build: Callable[[], Engine] | None = None):
        self.engines, self.settings, self.build = Engines(engine), settings, build
        self.name, self.created = settings['name'], int(time.time())
        self.tokenizer, self.block_size = engine.tokenizer, engine.model.config.block_size
        self.max_completions = len(engine.slots) + settings['max_queue']  # running and queued
        self.metrics = Metrics(self.engines)
        self.lock, self.grammar_lock, self.reload_lock = (threading.Lock() for _ in range(3))
        self.grammars: Grammars | None = None  # once a request needs them
        self.jobs: set[CompletionJob] = set()
        self.draining = False
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self.monitor, name='flatgpt monitor', daemon=True)
        self.thread.start()

    @property
    def engine(self) -> Engine:
        """The engine of new requests."""
        return self.engines.current

    def monitor(self) -> None:
        while not self.closed.wait(MONITOR_INTERVAL):
            for job in self.open_jobs():
                job.cancel_if_abandoned()

    def open_jobs(self) -> list[CompletionJob]:
        with self.lock:
            return list(self.jobs)

    def close(self) -> None:
        self.closed.set()
        self.engines.close()
        self.thread.join()

    def reload(self) -> None:
        """Use the weights that the checkpoint has now for new requests, with an empty cache.

        Running requests finish on those they began with. After an APIError nothing has changed.
        """
        if self.build is None:
            message = 'this application was given a loaded model; give create_app() an out_dir'
            raise APIError(400, message, code='no_checkpoint')
        if not self.reload_lock.acquire(blocking=False):
            raise APIError(429, 'a reload is running; wait for it', headers={'Retry-After': '5'})
        try:
            if len(self.engines.open) > 1:
                message = 'requests are still running on the previous weights; try again later'
                raise APIError(429, message, headers={'Retry-After': '5'})
            self.engines.check_memory()
            engine = self.build_another()
            with self.lock:
                self.engines.replace(engine)
            self.created = int(time.time())
            LOG.info('reloaded')
        finally:
            self.reload_lock.release()

    def build_another(self) -> Engine:
        try:
            engine = self.build()
        except (UserError, RuntimeError, MemoryError) as error:
            if not (isinstance(error, UserError) or is_out_of_memory(error)):
                raise
            message = f'the reload failed: {reason_of(error)}'
            raise APIError(503, message, code='not_reloaded') from None
        old, new = self.tokenizer, engine.tokenizer
        if old != new or (old.chat_template, self.block_size) != (
            new.chat_template,
            engine.model.config.block_size,
        ):
            message = 'the new model has another tokenizer or context; restart the server instead'
            raise APIError(503, message, code='not_reloaded')
        return engine

    def unavailable(self) -> APIError | None:
        """The error for every new request, None while there is none."""
        if self.engine.error or self.engine.closed:
            message = 'the engine has stopped; see the server log, then restart the server'
            return APIError(503, message, code='engine_stopped')
        if self.draining:
            return shutting_down(headers={'Retry-After': '5'})
        return None

    @property
    def names(self) -> list[str]:
        """What clients may give as `model`: the base, and its adapters."""
        return [self.name, *self.engine.adapters]

    def check_name(self, name: str) -> None:
        """APIError for a model that is not here."""
        if name not in self.names:
            names = ', '.join(map(repr, self.names))
            raise APIError(404, f'model {name!r} does not exist; use {names}', 'model')

    def adapter_of(self, body: CompletionRequest) -> str | None:
        """The adapter that a request chooses. Without adapters, every name means the one model."""
        if not self.engine.adapters or body.model in (None, self.name):
            return None
        self.check_name(body.model)
        return body.model

    def model_info(self, name: str) -> dict:
        """An entry in the list of models."""
        return {
            'id': name,
            'object': 'model',
            'created': self.created,
            'owned_by': 'flatgpt',
            'max_model_len': self.block_size,
        }

    # --- requests

    def encode_messages(self, body: ChatRequest) -> tuple[list[int], str]:
        """A chat -> the prompt's token ids; the stop string that ends the turn, or ''."""
        tokenizer = self.tokenizer
        if tokenizer.chat_template is None:
            message = "this model's tokenizer has no chat template; use /v1/completions"
            raise APIError(400, message, 'messages', 'no_chat_template')
        messages = [message.model_dump(exclude_none=True) for message in body.messages]
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []]
        try:
            messages = without_tools(messages, tools, tokenizer.chat_template)
        except UserError as error:
            raise APIError(400, f'messages: {error}', 'messages') from None
        turns = []
        for number, message in enumerate(messages):
            try:
                role = template_role(message['role'], tokenizer.chat_template)
            except UserError as error:
                raise APIError(400, f'messages[{number}]: {error}', 'messages') from None
            turns.append({'role': role, 'content': message['content']})
        try:
            ids = tokenizer.encode_chat(turns).tolist()
        except UserError as error:
            raise APIError(400, f'messages: {error}', 'messages') from None
        if not ids:
            raise APIError(400, 'messages: there is no text in them; add some', 'messages')
        end = tokenizer.chat_template['assistant'][1]
        return ids, '' if tokenizer.delimiter_id(end) is not None else end

    def max_new_tokens(self, ids: list[int]) -> int:
        """How many tokens a completion of this prompt may have."""
        limit = self.settings['max_new_tokens']
        return min(self.block_size - len(ids), self.block_size if limit is None else limit)

    def submit(
        self,
        body: CompletionRequest,
        client_disconnected: Callable[[], bool],
        builder: Callable[..., ChoiceBuilder] = ChoiceBuilder,
        grammars: Sequence[tuple[str, str, object]] = (),
    ) -> CompletionJob:
        """Start a request's job; release() must follow. APIError if it cannot be started.

        grammars: besides those of the body.
        """
        prompts, vocab_size = body.prompts(), self.tokenizer.vocab_size
        if body.max_tokens == 0 and not body.echo:
            raise APIError(400, 'max_tokens: 0 needs "echo": true', 'max_tokens')
        if len(prompts) * (body.n or 1) > self.max_completions:
            field = 'prompt' if len(prompts) > self.max_completions else 'n'
            message = (
                f'{field}: {self.max_completions} completions per request (prompts * n) are the '
                'limit of this server; send fewer'
            )
            raise APIError(400, message, field)
        if (largest := max(body.logit_bias or (0,))) >= vocab_size:
            raise APIError(400, self.no_such_token('logit_bias', largest), 'logit_bias')
        prompts = [self.to_ids(prompt, 'prompt') for prompt in prompts]
        self.check_lengths(max(map(len, prompts)), body.sampling().max_new_tokens)
        grammar = self.compile_grammar([*body.grammars(), *grammars])
        adapter = self.adapter_of(body)
        seconds = self.settings['max_seconds']
        job = CompletionJob(
            body, prompts, self.engine, client_disconnected, seconds, builder, grammar, adapter
        )
        self.start(job)
        return job

    def compile_grammar(self, found: list[tuple[str, str, object]]) -> Grammar | None:
        """The only grammar of a request, None if it has none. APIError if it is not supported."""
        if not found:
            return None
        field, kind, source = found[-1]
        if len(found) > 1:
            raise APIError(400, f'{field}: a completion has one grammar; give only one', field)
        try:
            with self.grammar_lock:  # one at a time: a large one takes seconds of a core
                self.grammars = self.grammars or Grammars(self.tokenizer)
                return self.grammars.compile(kind, source)
        except (UserError, ModuleNotFoundError) as error:
            raise APIError(400, f'{field}: {reason_of(error)}', field) from None

    def to_ids(self, prompt: str | list[int], field: str) -> list[int]:
        if isinstance(prompt, str):
            try:
                return self.tokenizer.encode(prompt, allow_eot=True).tolist()
            except UserError as error:
                raise APIError(400, f'{field}: {error}', field) from None
        if (largest := max(prompt, default=0)) >= self.tokenizer.vocab_size:
            raise APIError(400, self.no_such_token(field, largest), field)
        return prompt

    def no_such_token(self, field: str, token: int) -> str:
        last = self.tokenizer.vocab_size - 1
        return f'{field}: {token} is not a token id; use 0 to {last}'

    def check_lengths(self, prompt: int, new: int) -> None:
        """APIError if a prompt and its completion, in tokens, exceed the context or a limit."""
        if prompt + new > self.block_size:
            too_long = prompt >= self.block_size
            fix = 'shorten the prompt' if too_long else f'lower it to {self.block_size - prompt}'
            raise APIError(
                400,
                f'the prompt has {counted(prompt, "token")}, and max_tokens={new} make '
                f"{prompt + new:,}; the model's context holds {self.block_size:,}; {fix}",
                'prompt' if too_long else 'max_tokens',
                'context_length_exceeded',
            )
        for count, field, name in (
            (prompt, 'prompt', 'max_prompt_tokens'),
            (new, 'max_tokens', 'max_new_tokens'),
        ):
            limit = self.settings[name]
            if limit is not None and count > limit:
                message = f'{field}: {counted(count, "token")}; this server accepts at most {limit}'
                raise APIError(400, message, field)

    def start(self, job: CompletionJob) -> None:
        with self.lock:
            if error := self.unavailable():
                raise error
            # a finished job occupies a thread until its client has read the response
            used = sum(max(other.unfinished, 1) for other in self.jobs)
            if used + len(job.requests) > self.max_completions:
                message = f'{self.max_completions} completions are running or queued; try again'
                raise APIError(429, message, code='queue_full', headers={'Retry-After': '1'})
            self.jobs.add(job)
            job.engine = self.engine  # it may have been replaced
            try:
                for request in job.requests:
                    job.engine.submit(request)
                return
            except BaseException:  # the engine failed just now
                failure = job.failure()
        self.release(job)
        raise failure

    def release(self, job: CompletionJob) -> None:
        """Cancel what is unfinished, and record the job in the metrics."""
        job.cancel()
        with self.lock:
            if job not in self.jobs:
                return
            self.jobs.remove(job)
        self.metrics.observe(job)
