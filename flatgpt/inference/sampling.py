"""
Sampling: sample_tokens() draws from logits as SamplingParams specify.

Filters and their order are those of `transformers`; penalties and biases those of OpenAI's API.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from flatgpt.data.tokenizer import Tokenizer
from flatgpt.errors import ConfigError
from flatgpt.runtime import to_device
from model import GPT

TOP_P_CANDIDATES = 1024  # most likely tokens, which are nearly always enough for top_p


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled and when a completion ends. ConfigError for an invalid value."""

    max_new_tokens: int = 16
    temperature: float = 1.0  # 0: greedy
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
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
    if s.temperature < 1e-6:
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
    cdf = values.softmax(-1).cumsum(-1)
    # the first above a number below cdf's end: never a token of probability 0
    at = torch.searchsorted(cdf, uniforms * cdf[:, -1:], right=True)
    ids = ids.gather(-1, at.clamp(max=ids.size(-1) - 1))  # past the end if not finite
    return ids.masked_fill(broken, -1)[:, 0]


def apply_penalties(
    logits,
    sampling: SamplingParams,
    prompt_ids: Iterable[int],
    output_ids: Iterable[int] | Counter[int],
) -> None:
    """Apply penalties and biases to one row of logits (V,), in place.

    A set of prompt_ids and a Counter of output_ids are faster for long texts.

    The repetition penalty is that of Keskar et al. 2019 (CTRL), the others those of OpenAI's API:
    logit - count * frequency_penalty - (count > 0) * presence_penalty + bias.
    """
    s, tensor = sampling, lambda values: to_device(torch.tensor(values), logits.device)
    if s.repetition_penalty != 1:
        seen = tensor([*{*prompt_ids, *output_ids}])
        found = logits[seen]
        penalty = torch.where(found < 0, s.repetition_penalty, 1 / s.repetition_penalty)
        logits[seen] = found * penalty
    if output_ids and (s.frequency_penalty or s.presence_penalty):
        seen, counts = map(tensor, zip(*Counter(output_ids).items(), strict=True))
        logits[seen] -= counts * s.frequency_penalty + s.presence_penalty
    if s.logit_bias:
        seen, biases = map(tensor, zip(*s.logit_bias, strict=True))
        logits[seen] += biases


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
    each = zip(torch.cat((own, values), 1).tolist(), ids.tolist(), strict=True)
    return [(score, tuple(zip(ids, best, strict=True))) for (score, *best), ids in each]
