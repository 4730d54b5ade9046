"""
Many requests at once: prompts and new tokens are computed together, and each text comes out as
alone.

    engine = Engine(model, tokenizer, rows=8)
    engine.submit(Request(tokenizer.encode('To be'), SamplingParams(top_p=0.9), print))
    while engine.step():           # or engine.serve() in a thread of its own
        pass

scheduler.py decides what is computed next, model_runner.py computes it; this file joins them.
"""

import threading
from collections import deque
from collections.abc import Iterator

import torch

from flatgpt.data.tokenizer import Tokenizer
from flatgpt.errors import UserError
from flatgpt.inference.model_runner import ModelRunner, take_rows
from flatgpt.inference.request import Request, TokenOutput
from flatgpt.inference.sampling import SamplingParams
from flatgpt.inference.scheduler import ScheduledBatch, Scheduler, Slot
from model import GPT

NOT_FINITE = (
    'the model gives no finite logits: its weights are broken, or too large for this number '
    'format; try --dtype=float32 or another --checkpoint'
)
MAX_GENERATE_ROWS = 64  # of one generate(): further texts wait for a slot


class Engine:
    """Continues the texts of all requests, as many at once as it has slots.

    model: in evaluation mode. rows: requests computed together; further ones wait, first come first
    served. chunk: tokens of prompts between two steps of the texts. length: of the cache, where no
    context will be as long as block_size. deterministic: a request gives the same logits to the
    last bit, whatever else is computed: always all rows, every prompt by itself, no keys of others.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        rows: int = 8,
        chunk: int = 256,
        length: int | None = None,
        deterministic: bool = False,
    ):
        assert not model.training, 'dropout would be on'
        self.model, self.tokenizer = model, tokenizer
        # first, since it fails at once where memory is too small for so many rows
        self.runner = ModelRunner(model, tokenizer, rows, length)
        self.scheduler = Scheduler(rows, model.config.block_size, chunk, deterministic)
        self.arrival = threading.Condition()
        self.closed = False
        self.error: BaseException | None = None

    @property
    def slots(self) -> list[Slot]:
        return self.scheduler.slots

    @property
    def waiting(self) -> deque[Request]:
        return self.scheduler.waiting

    @property
    def running(self) -> int:
        return self.scheduler.running

    # --- from any thread

    def submit(self, request: Request) -> None:
        """Have a request computed; its on_token is called from step()."""
        with self.arrival:
            if self.error or self.closed:
                raise self.error or UserError('the engine is closed')
            self.waiting.append(request)
            self.arrival.notify()

    def serve(self) -> None:
        """step() until close(). An exception ends every request, and is kept in `error`."""
        try:
            while not self.closed:
                if not self.step():
                    with self.arrival:
                        self.arrival.wait_for(lambda: self.waiting or self.closed)
            self.end_all('cancelled')
        except BaseException as error:
            self.error = error
            self.end_all('error')
            raise

    def close(self) -> None:
        """Have serve() end what is open, and return."""
        with self.arrival:
            self.closed = True
            self.arrival.notify()

    def end_all(self, finish: str) -> None:
        with self.arrival:
            dropped = self.scheduler.drop_all()
        for request in dropped:
            request.send(TokenOutput(request.row, None, '', finish))

    # --- one step

    @torch.inference_mode()
    def step(self) -> bool:
        """Compute a part of the waiting prompts and a token of every text -> whether any did."""
        self.drop_cancelled()
        self.scheduler.admit()
        prompts = self.prefill()
        return self.decode() or prompts

    def drop_cancelled(self) -> None:
        dropped = []
        for slot in self.scheduler.cancelled_slots():
            dropped.append(slot.request)
            self.release(slot, forget=not slot.request.written)
        if self.waiting:
            with self.arrival:  # others append to it at any moment
                dropped += self.scheduler.drop_cancelled()
        for request in dropped:
            request.send(TokenOutput(request.row, None, '', 'cancelled'))

    def prefill(self) -> bool:
        if batch := self.scheduler.schedule_prefill():
            self.emit_tokens(batch, self.runner.prefill(batch))
        return batch is not None

    def decode(self) -> bool:
        if batch := self.scheduler.schedule_decode():
            self.emit_tokens(batch, self.runner.decode(batch))
        return batch is not None

    def emit_tokens(self, batch: ScheduledBatch, logits) -> None:
        """Sample the next token of each slot from its row of logits (R, V), and pass it on."""
        self.scheduler.mark_cached(batch)
        sampled = []
        for i, slot in enumerate(batch.slots):
            if slot.uncached_ids:  # more of its prompt is to be computed
                continue
            if finish := slot.request.ended_by_prompt():
                self.emit(slot, TokenOutput(slot.request.row, None, '', finish))
            else:
                sampled.append(i)
        if not sampled:
            return
        slots = [batch.slots[i] for i in sampled]
        requests = [slot.request for slot in slots]
        tokens, scores = self.runner.sample(requests, take_rows(logits, sampled))
        for slot, token, score in zip(slots, tokens, scores, strict=True):
            self.emit(slot, slot.request.take(token, self.tokenizer, *score))

    def emit(self, slot: Slot, output: TokenOutput) -> None:
        """Give a request its next token, or its end."""
        request = slot.request
        if output.finish:
            self.release(slot, forget=output.finish == 'error')
        else:
            self.scheduler.append(slot, output.token)
        request.send(output)

    def release(self, slot: Slot, forget: bool) -> None:
        """Free a slot. forget: its keys may not be finite."""
        slot.end()
        if forget:
            slot.cached_ids = []
            self.runner.clear(slot.row)


# -----------------------------------------------------------------------------
# without an engine at hand


def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: list,
    sampling: SamplingParams,
    seeds: list | None = None,
) -> Iterator[TokenOutput]:
    """Continue all prompts side by side, yielding each token as it is chosen.

    prompts: token ids, at least one each; the last block_size count. model: in evaluation mode.
    seeds: what seeds each text's random numbers, by default sampling.seed and its number; a text
    depends on nothing else, whatever stands in the other rows. Raises UserError for broken weights.
    """
    outputs: deque[TokenOutput] = deque()
    longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
    length = min(model.config.block_size, longest)
    engine = Engine(model, tokenizer, min(len(prompts), MAX_GENERATE_ROWS) or 1, length=length)
    for row, prompt in enumerate(prompts):
        seed = seeds[row] if seeds else None
        engine.submit(Request(prompt, sampling, outputs.append, row, seed))
    while engine.step():
        while outputs:
            output = outputs.popleft()
            if output.finish == 'error':
                raise UserError(NOT_FINITE)
            yield output


def complete(
    model: GPT, tokenizer: Tokenizer, texts: list[str], sampling: SamplingParams
) -> list[str]:
    """What the model writes after each text."""
    prompts = [tokenizer.encode(text, allow_eot=True) for text in texts]
    out = [''] * len(texts)
    for output in generate(model, tokenizer, prompts, sampling):
        out[output.row] += output.text
    return out


def generate_sample(
    model: GPT, tokenizer: Tokenizer, prompt, tokens: int, seed: int, answer: bool = False
) -> str:
    """About `tokens` tokens of text that begin at `prompt`; after a short document, the next.

    answer: the prompt is a question, whose one answer comes after it.
    """
    texts = []
    while tokens > 0:
        sampling = SamplingParams(tokens, temperature=0.8, top_k=200, seed=seed + len(texts))
        outputs = list(generate(model, tokenizer, [prompt], sampling))
        texts.append(''.join(output.text for output in outputs).strip('\n'))
        if answer:
            return tokenizer.decode(prompt) + texts[0]
        tokens -= len(outputs)
    return '\n\n'.join(texts)
