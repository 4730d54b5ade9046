"""
Sampling: sample_tokens() draws from logits as SamplingParams specify. sample_rows() does the
same in a CUDA graph, for rows with different parameters.

Filters and their order are those of `transformers`; penalties and biases those of OpenAI's API.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch.nn import functional as F

from flatgpt.data.tokenizer import Tokenizer
from flatgpt.errors import ConfigError
from flatgpt.runtime import to_device
from model import GPT

TOP_P_CANDIDATES = 1024  # most likely tokens, which are nearly always enough for top_p
MIN_TEMPERATURE = 1e-6  # below it, sampling is greedy
NUM_SETTINGS = 5  # of sample_rows(), per row
# how much sample_rows() computes: each value includes the one before
ARGMAX, DRAW, SORT = range(3)


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled and when a completion ends. ConfigError for an invalid value."""

    max_new_tokens: int = 16
    temperature: float = 1.0  # 0: greedy
    top_k: int | None = None  # sample from this many most likely tokens; 0, None: all
    top_p: float = 1.0  # from the most likely ones whose probabilities add up to this
    min_p: float = 0.0  # from those at least min_p times as likely as the most likely one
    repetition_penalty: float = 1.0  # of tokens in the prompt or the completion
    frequency_penalty: float = 0.0  # per occurrence of a token in the completion
    presence_penalty: float = 0.0  # if a token occurs in the completion
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, added to its logit)
    stop: tuple[str, ...] = ()
    seed: int = 1337

    def __post_init__(self):
        for name, good, need in (
            ('max_new_tokens', self.max_new_tokens >= 0, 'at least 0'),
            ('temperature', 0 <= self.temperature < math.inf, 'at least 0 (0 is greedy)'),
            ('top_k', (self.top_k or 0) >= 0, 'at least 1, or 0 or None for all'),
            ('top_p', 0 < self.top_p <= 1, 'above 0 and at most 1'),
            ('min_p', 0 <= self.min_p <= 1, 'between 0 and 1'),
            ('repetition_penalty', 0 < self.repetition_penalty < math.inf, 'above 0 (1 is off)'),
            ('frequency_penalty', math.isfinite(self.frequency_penalty), 'finite (0 is off)'),
            ('presence_penalty', math.isfinite(self.presence_penalty), 'finite (0 is off)'),
            ('stop', '' not in self.stop, 'text, not an empty string'),
            ('seed', self.seed >= 0, 'at least 0'),
        ):
            if not good:
                raise ConfigError(f'{name}={getattr(self, name)!r}: must be {need}')

    @property
    def filters(self) -> tuple:
        """The settings of filter_logits(): requests with equal ones are sampled together."""
        return self.temperature, self.top_k, self.top_p, self.min_p

    @cached_property
    def row_settings(self) -> tuple[float, float, float, float]:
        """The filters as sample_rows() takes them; one that is off has a value without effect."""
        top_p = self.top_p if self.top_p < 1 else math.inf
        log_min_p = math.log(self.min_p) if self.min_p else -math.inf
        return self.temperature, self.top_k or math.inf, top_p, log_min_p

    @cached_property
    def work(self) -> int:
        """The work of sample_rows() that a row with these filters needs."""
        if self.temperature < MIN_TEMPERATURE:
            return ARGMAX
        return SORT if self.top_k or self.top_p < 1 else DRAW

    @property
    def has_penalties(self) -> bool:
        neutral = self.repetition_penalty == 1 and not self.logit_bias
        return not (neutral and self.frequency_penalty == self.presence_penalty == 0)


def filter_logits(logits, sampling: SamplingParams):
    """Logits (R, V) -> scaled logits of K tokens, -inf if filtered out, and their ids.

    Both (R, K), sorted by logit if top_k or top_p need it. In the order of `transformers`:
    temperature, top-k, top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024). Sums are
    cumulative along a row, so that rounding does not depend on the other rows.
    """
    s, size = sampling, logits.size(-1)
    if s.temperature < MIN_TEMPERATURE:
        return logits.max(-1, keepdim=True)
    k = min(s.top_k or size, size)
    if k == size and s.top_p == 1:
        values, ids = logits, torch.arange(size, device=logits.device).expand_as(logits)
    else:
        # on a CPU, sorting a large vocabulary takes as long as a step of a small model
        on_cpu = logits.device.type == 'cpu'
        values, ids = logits.topk(min(k, TOP_P_CANDIDATES) if k == size and on_cpu else k)
    top = logits.amax(-1, keepdim=True)  # (R, 1)
    values = (values - top) / s.temperature  # the maximum is 0, so that nothing overflows
    if s.top_p < 1:  # a token stays if the sum of those before it is below top_p
        scaled = values if values.size(-1) == k else (logits - top) / s.temperature
        probs = values.exp() / scaled.exp().cumsum(-1)[:, -1:]
        short = probs.cumsum(-1)[:, -1] < s.top_p
        if values.size(-1) < k and short.any():  # only these rows need all tokens
            rest = size - values.size(-1)
            values, probs = F.pad(values, (0, rest), value=-math.inf), F.pad(probs, (0, rest))
            ids = F.pad(ids, (0, rest))
            values[short], ids[short] = scaled[short].sort(descending=True)
            probs[short] = values[short].softmax(-1)
        beyond = probs.cumsum(-1) - probs >= s.top_p
        beyond[:, 0] = False  # the most likely token stays for any top_p
        values = values.masked_fill(beyond, -math.inf)
    if s.min_p:
        values = values.masked_fill(values < math.log(s.min_p), -math.inf)
    return values, ids


def sample_tokens(logits, sampling: SamplingParams, uniforms):
    """Next token of each row (R,), by the inverse CDF at `uniforms` (R, 1); -1 if not finite."""
    values, ids = filter_logits(logits, sampling)
    broken = ~values.amax(-1, keepdim=True).isfinite()
    if ids.size(-1) == 1:
        return ids.masked_fill(broken, -1)[:, 0]
    return ids.gather(-1, draw(values, uniforms)).masked_fill(broken, -1)[:, 0]


def draw(values, uniforms):
    """The index (R, 1) in each row of scaled logits (R, K), by the inverse CDF."""
    cdf = values.softmax(-1).cumsum(-1)
    # the first above a number below cdf's end: never a token of probability 0
    at = torch.searchsorted(cdf, uniforms * cdf[:, -1:], right=True)
    return at.clamp(max=values.size(-1) - 1)  # past the end if not finite


def sample_rows(logits, settings, work: int):
    """sample_tokens() for rows (R, V) with filters of their own, without a branch on their values.

    settings (NUM_SETTINGS, R) float32: the uniform random number and the row_settings of each row.
    work: the most that any row needs. Equal logits are ordered by id, so that the token of a row
    depends neither on the other rows nor on `work`.
    """
    uniforms, temperature, top_k, top_p, log_min_p = settings[..., None]  # each (R, 1)
    best, greedy = logits.max(-1, keepdim=True)
    broken = ~best.isfinite()
    if work == ARGMAX:
        return greedy.masked_fill(broken, -1)[:, 0]
    scale = temperature.clamp(min=MIN_TEMPERATURE)
    values = (logits - best) / scale
    tokens = draw(values.masked_fill(values < log_min_p, -math.inf), uniforms)
    if work == SORT:
        ordered, ids = logits.sort(stable=True, descending=True)
        rank = torch.arange(logits.size(-1), device=logits.device)
        values = ((ordered - best) / scale).masked_fill(rank >= top_k, -math.inf)
        probs = values.softmax(-1)
        beyond = (probs.cumsum(-1) - probs >= top_p) & (rank > 0)
        values = values.masked_fill(beyond | (values < log_min_p), -math.inf)
        in_order = (top_k < logits.size(-1)) | (top_p < 1)
        tokens = torch.where(in_order, ids.gather(-1, draw(values, uniforms)), tokens)
    tokens = torch.where(temperature < MIN_TEMPERATURE, greedy, tokens)
    return tokens.masked_fill(broken, -1)[:, 0]


Edit = tuple[int, SamplingParams, Iterable[int], Iterable[int] | Counter[int]]


def apply_penalties(logits, rows: Iterable[Edit]) -> None:
    """Apply penalties and biases to rows of logits (R, V), in place, all rows at once.

    rows: (row, its SamplingParams, prompt_ids, output_ids). A set of prompt_ids and a Counter of
    output_ids are faster for long texts.

    The repetition penalty is that of Keskar et al. 2019 (CTRL), the others those of OpenAI's API:
    logit - count * frequency_penalty - (count > 0) * presence_penalty + bias.
    """
    flat, repeated, counted, biased = logits.view(-1), [], [], []
    for row, s, prompt_ids, output_ids in rows:
        begin = row * logits.size(-1)
        if s.repetition_penalty != 1:
            penalty = s.repetition_penalty
            repeated.append((begin, [*{*prompt_ids, *output_ids}], penalty, 1 / penalty))
        if output_ids and (s.frequency_penalty or s.presence_penalty):
            ids, counts = zip(*Counter(output_ids).items(), strict=True)
            counted.append((begin, ids, counts, s.frequency_penalty, s.presence_penalty))
        if s.logit_bias:
            biased.append((begin, *zip(*s.logit_bias, strict=True)))
    if repeated:
        at, up, down = edit_columns(repeated, logits.device)
        found = flat[at]
        flat[at] = found * torch.where(found < 0, up, down)
    if counted:
        at, counts, frequency, presence = edit_columns(counted, logits.device)
        flat[at] -= counts * frequency + presence
    if biased:
        at, biases = edit_columns(biased, logits.device)
        flat[at] += biases


def edit_columns(edits: list[tuple], device) -> tuple:
    """(first position of the row, its ids, values ...) of some rows -> the positions of all edits
    (N,), and their values (N,), copied to the device at once."""
    columns = []
    for begin, ids, *values in edits:
        at = (np.array(ids, np.int32) + begin).view(np.float32)  # the bits, not the value
        columns.append([at, *(np.broadcast_to(np.array(v, np.float32), at.shape) for v in values)])
    table = to_device(torch.from_numpy(np.concatenate(columns, 1)), device)
    return table[0].view(torch.int32), *table[1:]


def suppressed_ids(tokenizer: Tokenizer, model: GPT):
    """Mask (V,) of ids never sampled: padding, gaps, special tokens that do not end a text."""
    suppressed = torch.ones(model.config.vocab_size, dtype=torch.bool)
    suppressed[: tokenizer.vocab_size] = torch.from_numpy(~tokenizer.writable)
    return suppressed.to(model.embedding.weight.device)


def logprobs_of(logits, tokens: list[int], top: int) -> list[tuple]:
    """(logprob of the token in nats, the `top` most likely as (id, logprob)) per row of (T, V)."""
    scores = logits.float().log_softmax(-1)
    values, ids = scores.topk(min(top, scores.size(-1)))
    own = scores.gather(1, to_device(torch.tensor(tokens), scores.device)[:, None])
    # the ids as bits of floats, so that one copy takes all to the host
    table = torch.cat((own, values, ids.int().view(torch.float32)), 1).cpu()
    values, ids = table.split((1 + values.size(-1), ids.size(-1)), 1)
    each = zip(values.tolist(), ids.view(torch.int32).tolist(), strict=True)
    return [(score, tuple(zip(ids, best, strict=True))) for (score, *best), ids in each]
