"""
The choice of a token: SamplingParams says how, sample_tokens() draws from logits.

Rules and order are those of `transformers`; penalties and biases those of OpenAI's API.
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

HEAD = 1024  # likeliest tokens among which top_p is looked for first


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when a text ends, checked. ConfigError names what is wrong."""

    max_new_tokens: int = 16
    temperature: float = 1.0  # 0 takes the likeliest
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # of what the prompt or the text has
    frequency_penalty: float = 0.0  # for each time the text has a token
    presence_penalty: float = 0.0  # if it has it at all
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)
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
    def rule(self) -> tuple:
        """What filter_logits() looks at: texts with the same rule choose their tokens together."""
        return self.temperature, self.top_k, self.top_p, self.min_p

    @property
    def has_penalties(self) -> bool:
        neutral = self.repetition_penalty == 1 and not self.logit_bias
        return not (neutral and self.frequency_penalty == self.presence_penalty == 0)


def filter_logits(logits, sampling: SamplingParams):
    """Logits (R, V) -> those over the temperature of K tokens, -inf if left out, and their ids.

    Both (R, K), the likeliest first where top_k or top_p ask for an order. Rules and order are
    those of `transformers`: temperature, top-k, top-p (Holtzman et al. 2020), min-p (Nguyen et al.
    2024). Sums run along a row one by one, so that no row's rounding depends on its neighbours.
    """
    s, size = sampling, logits.size(-1)
    if s.temperature < 1e-6:
        return logits.max(-1, keepdim=True)
    k = min(s.top_k or size, size)
    if k == size and s.top_p == 1:
        values, ids = logits, torch.arange(size, device=logits.device).expand_as(logits)
    else:
        # sorting all of a large vocabulary on a CPU takes as long as a small model's step
        few = min(k, HEAD) if k == size and logits.device.type == 'cpu' else k
        values, ids = logits.topk(few)
    top = logits.amax(-1, keepdim=True)  # (R, 1)
    values = (values - top) / s.temperature  # the likeliest at 0, so that no temperature overflows
    if s.top_p < 1:  # a token stays if those before it do not yet make up top_p
        whole = values if values.size(-1) == k else (logits - top) / s.temperature
        probs = values.exp() / whole.exp().cumsum(-1)[:, -1:]
        short = probs.cumsum(-1)[:, -1] < s.top_p
        if values.size(-1) < k and short.any():  # these rows need all; no row sees another's
            rest = size - values.size(-1)
            values, probs = F.pad(values, (0, rest), value=-math.inf), F.pad(probs, (0, rest))
            ids = F.pad(ids, (0, rest))
            values[short], ids[short] = whole[short].sort(descending=True)
            probs[short] = values[short].softmax(-1)
        beyond = probs.cumsum(-1) - probs >= s.top_p
        beyond[:, 0] = False  # however little top_p asks for
        values = values.masked_fill(beyond, -math.inf)
    if s.min_p:
        values = values.masked_fill(values < math.log(s.min_p), -math.inf)
    return values, ids


def sample_tokens(logits, sampling: SamplingParams, uniforms):
    """Next token of each row (R,) by the inverse CDF of `uniforms` (R, 1); -1 for broken logits."""
    values, ids = filter_logits(logits, sampling)
    broken = ~values.amax(-1, keepdim=True).isfinite()
    if ids.size(-1) == 1:
        return ids.masked_fill(broken, -1)[:, 0]
    cdf = values.softmax(-1).cumsum(-1)
    # the first above a number that lies below cdf's end: never one of probability 0
    at = torch.searchsorted(cdf, uniforms * cdf[:, -1:], right=True)
    ids = ids.gather(-1, at.clamp(max=ids.size(-1) - 1))  # past the end if the logits are broken
    return ids.masked_fill(broken, -1)[:, 0]


def apply_penalties(
    logits, sampling: SamplingParams, prompt: Iterable[int], written: Iterable[int] | Counter[int]
) -> None:
    """Penalties and biases on one row of logits (V,), in place.

    prompt, written: token ids; better each once, and counted, where a text is long.

    The repetition penalty is that of Keskar et al. 2019 (CTRL), the others those of OpenAI's API:
    logit - count * frequency_penalty - (count > 0) * presence_penalty + bias.
    """
    s, tensor = sampling, lambda values: to_device(torch.tensor(values), logits.device)
    if s.repetition_penalty != 1:
        seen = tensor([*{*prompt, *written}])
        found = logits[seen]
        penalty = torch.where(found < 0, s.repetition_penalty, 1 / s.repetition_penalty)
        logits[seen] = found * penalty
    if written and (s.frequency_penalty or s.presence_penalty):
        seen, counts = map(tensor, zip(*Counter(written).items(), strict=True))
        logits[seen] -= counts * s.frequency_penalty + s.presence_penalty
    if s.logit_bias:
        seen, biases = map(tensor, zip(*s.logit_bias, strict=True))
        logits[seen] += biases


def suppressed_ids(tokenizer: Tokenizer, model: GPT):
    """Ids that stand for no text (V,): a padded vocabulary's, gaps, special tokens but the ends."""
    suppressed = torch.ones(model.config.vocab_size, dtype=torch.bool)
    suppressed[: tokenizer.vocab_size] = torch.from_numpy(~tokenizer.samplable)
    return suppressed.to(model.embedding.weight.device)


def scores_of(logits, tokens: list[int], top: int) -> list[tuple]:
    """(log-probability of a token in nats, the `top` likeliest with theirs) for logits (T, V)."""
    scores = logits.float().log_softmax(-1)
    values, ids = scores.topk(min(top, scores.size(-1)))
    own = scores.gather(1, to_device(torch.tensor(tokens), scores.device)[:, None])
    each = zip(torch.cat((own, values), 1).tolist(), ids.tolist(), strict=True)
    return [(score, tuple(zip(ids, best, strict=True))) for (score, *best), ids in each]
