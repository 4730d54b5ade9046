"""
Continuous batching: many requests are computed together, each with the tokens it would get alone.

    engine = Engine(model, tokenizer, num_slots=8)
    engine.submit(Request(tokenizer.encode('To be'), SamplingParams(top_p=0.9), print))
    while engine.step():           # or engine.serve() in a thread of its own
        pass

scheduler.py decides what is computed next, and model_runner.py computes it.
"""

import threading
from collections import deque
from collections.abc import Iterator

import torch

from flatgpt.data.tokenizer import Tokenizer
from flatgpt.errors import UserError
from flatgpt.inference.decode_graph import DecodeGraphs, free_graphs, keep_graphs, take_graphs
from flatgpt.inference.grammar import Grammar
from flatgpt.inference.model_runner import ModelRunner, Sample
from flatgpt.inference.request import Request, TokenOutput
from flatgpt.inference.sampling import SamplingParams
from flatgpt.inference.scheduler import ScheduledBatch, Scheduler, Slot
from flatgpt.inference.speculation import MAX_GUESSES, MAX_PASS_TOKENS, build_draft
from model import GPT

NOT_FINITE = (
    'the logits are not finite: the weights are broken, or too large for this dtype; try '
    '--dtype=float32 or another --checkpoint'
)
MAX_GENERATE_SLOTS = 64  # slots of one generate(); further prompts wait


class Engine:
    """Completes requests, as many at once as it has slots.

    model: in evaluation mode. num_slots: requests that run at once; others wait, first come first
    served. prefill_chunk: prompt tokens between two decoding steps (chunked prefill). max_length:
    tokens per slot of the cache, by default block_size. deterministic: a request's logits are
    bit-identical whatever else runs: all slots are always computed, prompts one by one, and no
    prefix is shared. batch_prompts: with deterministic, several are computed at once, padded to one
    shape, and all before the next token: faster if there are many. draft: NGRAM, or a smaller model
    with the same tokenizer, guesses tokens, with the same completions (speculation.py); without
    effect if deterministic, since several tokens of a text computed at once are not bit-identical
    to single ones, or with CUDA graphs. adapters: models by name that share the model's weights;
    requests of different ones wait for one another. graphs: of an earlier engine for this model,
    with a cache as large.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        num_slots: int = 8,
        prefill_chunk: int = 256,
        max_length: int | None = None,
        deterministic: bool = False,
        batch_prompts: bool = False,
        graphs: DecodeGraphs | None = None,
        draft: GPT | str | None = None,
        adapters: dict[str, GPT] | None = None,
    ):
        assert not model.training, 'dropout would be on'
        self.model, self.tokenizer, self.adapters = model, tokenizer, [*(adapters or {})]
        # allocates the cache first, so that too many slots fail at once
        self.runner = ModelRunner(model, tokenizer, num_slots, max_length, graphs, adapters)
        block_size = model.config.block_size
        self.scheduler = Scheduler(
            num_slots, block_size, prefill_chunk, deterministic, batch_prompts
        )
        speculates = not (deterministic or self.runner.graphs)
        self.draft = build_draft(draft if speculates else None, tokenizer, num_slots)
        self.work_available = threading.Condition()
        self.closed = self.retired = False
        self.error: BaseException | None = None

    @property
    def slots(self) -> list[Slot]:
        return self.scheduler.slots

    @property
    def runners(self) -> list[ModelRunner]:
        """Those of the model and of the draft, if that is a model."""
        draft = getattr(self.draft, 'runner', None)
        return [self.runner, draft] if draft else [self.runner]

    @property
    def waiting(self) -> deque[Request]:
        return self.scheduler.waiting

    @property
    def running(self) -> int:
        return self.scheduler.running

    # --- from any thread

    def submit(self, request: Request) -> None:
        """Add a request to the queue; its on_token is called from step()."""
        with self.work_available:
            if self.error or self.closed:
                raise self.error or UserError('the engine is closed; create another one')
            self.waiting.append(request)
            self.work_available.notify()

    def serve(self) -> None:
        """Call step() until close(). An exception ends every request, and is stored in `error`."""
        try:
            while not self.closed:
                if not self.step():
                    with self.work_available:
                        self.work_available.wait_for(
                            lambda: self.waiting or self.closed or self.retired
                        )
                        self.closed |= self.retired and not self.waiting
            self.finish_all('cancelled')
        except BaseException as error:
            self.error = error
            self.finish_all('error')
            raise

    def close(self) -> None:
        """Make serve() cancel all requests and return."""
        with self.work_available:
            self.closed = True
            self.work_available.notify()

    def retire(self) -> None:
        """Make serve() return once all requests are finished."""
        with self.work_available:
            self.retired = True
            self.work_available.notify()

    def finish_all(self, finish_reason: str) -> None:
        with self.work_available:
            dropped = self.scheduler.drop_all()
        for request in dropped:
            request.emit(TokenOutput(request.index, None, '', finish_reason))

    @torch.inference_mode()
    def capture_graphs(self) -> int:
        """Capture the CUDA graphs of the first steps of requests, before the first one waits for
        them -> their number, 0 on other devices."""
        return self.runner.capture_common(self.scheduler.batch_sizes)

    # --- one step

    @torch.inference_mode()
    def step(self) -> bool:
        """One prefill batch and one token of every decoding request -> whether there was any."""
        self.drop_cancelled()
        self.scheduler.admit()
        self.runner.use(self.scheduler.adapter)
        prefilled = self.prefill()
        return self.decode() or prefilled

    def drop_cancelled(self) -> None:
        dropped = []
        for slot in self.scheduler.cancelled_slots():
            dropped.append(slot.request)
            self.release(slot, clear_cache=not slot.request.output_ids)
        if self.waiting:
            with self.work_available:  # other threads may append to it
                dropped += self.scheduler.drop_cancelled()
        for request in dropped:
            request.emit(TokenOutput(request.index, None, '', 'cancelled'))

    def prefill(self) -> bool:
        batch = None
        while found := self.scheduler.schedule_prefill():
            batch = found
            self.emit_samples(batch, self.runner.prefill(batch))
            if not self.scheduler.batch_prompts:
                break
        return batch is not None

    def decode(self) -> bool:
        if batch := self.scheduler.schedule_decode():
            batch = self.add_guesses(batch) if self.draft else batch
            samples = self.runner.decode(batch)
            for slot, tokens, own in zip(batch.slots, batch.tokens, samples, strict=True):
                if len(tokens) > 1:
                    self.draft.record(slot.request, len(tokens) - 1, len(own) - 1)
            self.emit_samples(batch, samples)
        return batch is not None

    def add_guesses(self, batch: ScheduledBatch) -> ScheduledBatch:
        """The batch with guesses of the tokens after each slot's, as far as there is room.

        Not for a request with a grammar, whose mask depends on the tokens before it.
        """
        length, requests = self.runner.cache.max_length, [slot.request for slot in batch.slots]
        room = [
            0 if r.grammar else min(length - len(slot.cached_ids), r.tokens_left) - 1
            for slot, r in zip(batch.slots, requests, strict=True)
        ]
        guesses = self.draft.guess(requests, room)
        most, spare = MAX_GUESSES, max(0, MAX_PASS_TOKENS - len(batch.slots))
        while sum(min(len(own), most) for own in guesses) > spare:
            most -= 1
        tokens = [own + more[:most] for own, more in zip(batch.tokens, guesses, strict=True)]
        return batch._replace(tokens=tokens)

    def emit_samples(self, batch: ScheduledBatch, samples: list[list[Sample]]) -> None:
        """Emit the next tokens of each slot whose prompt is complete."""
        self.scheduler.mark_cached(batch)
        for slot, own in zip(batch.slots, samples, strict=True):
            if slot.uncached_ids:  # its prompt is not complete
                continue
            if reason := slot.request.ended_by_prompt():  # also if the cache had its prompt
                self.emit(slot, TokenOutput(slot.request.index, None, '', reason))
            else:
                self.emit_tokens(slot, own)

    def emit_tokens(self, slot: Slot, samples: list[Sample]) -> None:
        """Emit sampled tokens until one ends the request. All but the last were guessed."""
        request = slot.request
        for number, (token, *scores) in enumerate(samples):
            if number and (slot.request is not request or request.cancelled):
                return
            if number:
                slot.mark_cached(1)
            self.emit(slot, request.append_token(token, self.tokenizer, *scores))

    def emit(self, slot: Slot, output: TokenOutput) -> None:
        """Send a request its next token, and free its slot if it is the last."""
        request = slot.request
        if output.finish_reason:
            self.release(slot, clear_cache=output.finish_reason == 'error')
        else:
            self.scheduler.append(slot, output.token)
        request.emit(output)

    def release(self, slot: Slot, clear_cache: bool) -> None:
        """Free a slot. clear_cache: clear its KV entries, which may not be finite."""
        slot.end()
        if clear_cache:
            slot.cached_ids = []
            self.runner.clear_row(slot.row)


# -----------------------------------------------------------------------------
# without an engine


def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: list,
    sampling: SamplingParams,
    seeds: list | None = None,
    grammar: Grammar | None = None,
    draft: GPT | str | None = None,
) -> Iterator[TokenOutput]:
    """Complete all prompts in one batch, yielding each token as it is sampled.

    prompts: token ids, at least one each; the last block_size count. model: in evaluation mode.
    seeds: of each completion's random numbers, by default (sampling.seed, its index); completions
    do not depend on each other. grammar: of each completion. draft: see Engine. Raises UserError
    for logits that are not finite, or a grammar that the vocabulary cannot follow.

    On a GPU, the cache and its CUDA graphs are kept for the next call with this model;
    free_graphs(model) frees their memory.
    """
    outputs: deque[TokenOutput] = deque()
    longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
    max_length = min(model.config.block_size, longest)
    num_slots = min(len(prompts), MAX_GENERATE_SLOTS) or 1
    graphs = take_graphs(model, num_slots, max_length)
    engine = Engine(model, tokenizer, num_slots, max_length=max_length, graphs=graphs, draft=draft)
    for index, prompt in enumerate(prompts):
        seed = seeds[index] if seeds else None
        engine.submit(Request(prompt, sampling, outputs.append, index, seed, grammar=grammar))
    yield from run_and_drain(engine, outputs)
    keep_graphs(model, engine.runner.graphs)


def run_and_drain(engine: Engine, outputs: deque[TokenOutput]) -> Iterator[TokenOutput]:
    """Run the engine until it is idle, yielding what its requests append to `outputs`.

    Raises UserError for a request that ends in an error.
    """
    while engine.step():
        while outputs:
            output = outputs.popleft()
            if output.finish_reason == 'error':
                if output.problem:
                    raise UserError(output.problem)
                raise UserError(NOT_FINITE)
            yield output


def complete(
    model: GPT, tokenizer: Tokenizer, prompts: list[str], sampling: SamplingParams
) -> list[str]:
    """The completion of each prompt."""
    prompt_ids = [tokenizer.encode(prompt, allow_eot=True) for prompt in prompts]
    out = [''] * len(prompts)
    for output in generate(model, tokenizer, prompt_ids, sampling):
        out[output.index] += output.text
    return out


def generate_sample(
    model: GPT, tokenizer: Tokenizer, prompt, tokens: int, seed: int, answer: bool = False
) -> str:
    """About `tokens` tokens after `prompt`; if a document ends early, another one follows.

    answer: the prompt is a chat prompt, and one answer follows it. No memory of a GPU is kept.
    """
    texts = []
    try:
        while tokens > 0:
            sampling = SamplingParams(tokens, temperature=0.8, top_k=200, seed=seed + len(texts))
            outputs = list(generate(model, tokenizer, [prompt], sampling))
            texts.append(''.join(output.text for output in outputs).strip('\n'))
            if answer:
                return tokenizer.decode(prompt) + texts[0]
            tokens -= len(outputs)
    finally:
        free_graphs(model)
    return '\n\n'.join(texts)
