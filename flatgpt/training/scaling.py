"""
The loss of a model after training, predicted from its size, its context and its tokens.

    text = Text(2_452_227, 257, 1.0)
    LAW.predict(parameters=1.5e6, n_layer=5, tokens=4e6, block_size=256, text=text)

The law has the form of Hoffmann et al. (2022, "Training Compute-Optimal Large Language Models",
equation 2) with a term for the context. Of two small models with as many parameters, the one with
more layers counts as larger. Repeated tokens count as in Muennighoff et al. (2023, "Scaling
Data-Constrained Language Models", equation 5). `python bench.py --only=scaling` trains the models
that the law is fitted to; their losses are in flatgpt/benchmarks/scaling.jsonl.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional as F

FITTED = {'parameters': (9e4, 3.2e6), 'tokens': (5e5, 5e6), 'epochs': (0, 35)}  # of these runs


class Text(NamedTuple):
    """What the prediction knows of a dataset."""

    tokens: int  # of the training split
    vocab_size: int
    bytes_per_token: float
    val_tokens: int = 100_000
    max_context: int = 99_999  # tokens; the longest that all splits have room for


class Law(NamedTuple):
    """excess loss = (size / (parameters * layers^depth))^a + (data / useful tokens)^b
                  + (span / context)^c

    Its scale and the irreducible loss differ from text to text and are unknown before a model was
    trained on the text; to rank models, neither is needed.
    """

    size: float
    a: float
    depth: float
    data: float
    b: float
    span: float  # bytes
    c: float
    repeat_decay: float  # repetitions of the text after which one more is worth 1 / e of the first

    def useful_tokens(self, tokens, unique):
        """Repeated tokens are worth less than new ones. Takes and returns tensors."""
        repeats = (tokens / unique - 1).clamp(min=0)
        worth = self.repeat_decay * (1 - torch.exp(-repeats / self.repeat_decay))
        return torch.minimum(tokens, unique) + unique * worth

    def excess(self, parameters, n_layer, tokens, unique, context):
        """The excess loss of tensors. parameters: of the blocks. tokens: trained on, with
        repetitions of the `unique` ones. context: in bytes of text."""
        useful = self.useful_tokens(tokens, unique)
        size = (self.size / (parameters * n_layer**self.depth)) ** self.a
        return size + (self.data / useful) ** self.b + (self.span / context) ** self.c

    def predict(
        self, parameters: float, n_layer: int, tokens: float, block_size: int, text: Text
    ) -> float:
        """The excess loss of one model."""
        values = parameters, n_layer, tokens, text.tokens, block_size * text.bytes_per_token
        return self.excess(*torch.tensor(values, dtype=torch.float64)).item()


LAW = Law(
    size=20320,
    a=0.3342,
    depth=0.369,
    data=331300,
    b=0.3467,
    span=3.425,
    c=0.8745,
    repeat_decay=1.667,
)
# A model with more parameters for each token of its text overfits, which the law does not know: on
# 0.15M tokens, read ten times, 18 parameters per token ended above 8
MAX_PARAMETERS_PER_TOKEN = 8
# of a fit
START = Law(size=8e3, a=0.4, depth=0.4, data=2e4, b=0.4, span=4.0, c=0.7, repeat_decay=15.0)
STARTS = ((0.3, 0.3), (0.5, 0.3), (0.3, 0.5), (0.5, 0.5))  # its a and b


def fits_text(parameters: int, tokens: int) -> bool:
    """Whether the law holds for a model on a text of so many tokens."""
    return parameters <= MAX_PARAMETERS_PER_TOKEN * tokens


def parameters_of(row: dict) -> int:
    return 12 * row['n_layer'] * row['n_embd'] ** 2


def fit(rows: Iterable[dict]) -> tuple[Law, dict[str, tuple[float, float]], float]:
    """The law of these runs, {text: (its lowest loss, its unit)}, and the mean absolute error.

    Minimizes the Huber loss of the errors, as Hoffmann et al. do, from several starts, since the
    problem is not convex.
    """
    rows = [row for row in rows if fits_text(parameters_of(row), row['text_tokens'])]
    texts = sorted({row['dataset'] for row in rows})
    number = torch.tensor([texts.index(row['dataset']) for row in rows])

    def column(name):
        return torch.tensor([row[name] for row in rows], dtype=torch.float64)

    parameters = torch.tensor([*map(parameters_of, rows)], dtype=torch.float64)
    n_layer, unique = column('n_layer'), column('text_tokens')
    context = column('block_size') * column('text_bytes') / unique
    trained, target = column('trained'), column('val_loss')

    def parts(x):
        """The unknowns, whose logarithms are fitted: the law, and each text's loss and unit."""
        law, lowest, unit = x.exp().split([len(LAW), len(texts), len(texts)])
        return Law(*law), lowest, unit

    def predict(x):
        law, lowest, unit = parts(x)
        excess = law.excess(parameters, n_layer, trained, unique, context)
        return lowest[number] + unit[number] * excess

    def distance(x, start):
        loss = F.huber_loss(predict(x), target, delta=0.01)
        # the scale of the excess is undetermined: the units are 1 on average
        return loss + 1e-3 * parts(x)[2].log().mean() ** 2 + 1e-6 * (x - start).square().sum()

    found = []
    for a, b in STARTS:
        law = [*START._replace(a=a, b=b)]
        start = law + [0.5 * target.min().item()] * len(texts) + [1.0] * len(texts)
        start = torch.tensor(start, dtype=torch.float64).log()
        x = minimize(partial(distance, start=start), start)
        found.append((distance(x, start).item(), x))
    x = min(found, key=lambda each: each[0])[1]
    law, *of_texts = parts(x)
    pairs = zip(*(values.tolist() for values in of_texts), strict=True)
    law = Law(*(float(f'{value:.4g}') for value in law))
    return law, dict(zip(texts, pairs, strict=True)), (predict(x) - target).abs().mean().item()


def minimize(function: Callable, start):
    """A tensor at which function() has a local minimum, by L-BFGS."""
    x = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([x], max_iter=500, line_search_fn='strong_wolfe')

    def closure():
        optimizer.zero_grad()
        loss = function(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    return x.detach()
