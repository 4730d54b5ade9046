"""
The loss of a model after training, predicted from its size, its context and its tokens.

    LAW.predict(parameters=1.5e6, tokens=4e6, block_size=256, text=Text(2_452_227, 257, 1.0))

The law has the form of Hoffmann et al. (2022, "Training Compute-Optimal Large Language Models",
equation 2) with a term for the context, and counts repeated tokens as Muennighoff et al. (2023,
"Scaling Data-Constrained Language Models", equation 5) do. `python bench.py --only=scaling` trains
the models that it is fitted to, whose losses are in docs/scaling.jsonl.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

FITTED = {'parameters': (2e4, 2e6), 'tokens': (5e5, 1.5e7), 'epochs': (0, 35)}


class Text(NamedTuple):
    """What the prediction knows of a dataset."""

    tokens: int  # of the training split
    vocab_size: int
    bytes_per_token: float
    val_tokens: int = 100_000
    max_context: int = 99_999  # tokens; the longest that all splits have room for


class Law(NamedTuple):
    """excess loss = (size / parameters)^a + (data / useful tokens)^b + (span / context)^c

    In units that differ from text to text, as does the loss that it is added to. Both are unknown
    before a model was trained on the text, but models can be compared without them.
    """

    size: float
    a: float
    data: float
    b: float
    span: float  # bytes
    c: float
    half_life: float  # passes over the text after which a repetition is worth 1 / e of the first

    def useful_tokens(self, tokens, unique):
        """Repeated tokens are worth less than new ones."""
        repeats = max(0.0, tokens / unique - 1)
        worth = self.half_life * (1 - math.exp(-repeats / self.half_life))
        return min(tokens, unique) + unique * worth

    def predict(self, parameters: float, tokens: float, block_size: int, text: Text) -> float:
        """The excess loss. parameters: of the blocks. tokens: trained on, with repetitions."""
        useful = self.useful_tokens(tokens, text.tokens)
        context = block_size * text.bytes_per_token
        return (
            (self.size / parameters) ** self.a
            + (self.data / useful) ** self.b
            + (self.span / context) ** self.c
        )


LAW = Law(size=5e3, a=0.35, data=2e4, b=0.4, span=4.0, c=0.7, half_life=15.0)


def fit(rows: Iterable[dict]) -> tuple[Law, dict[str, tuple[float, float]], float]:
    """The law of these runs, {text: (its lowest loss, its unit)}, and the mean absolute error.

    Minimizes the Huber loss of the errors from several starts, since the problem is not convex.
    """
    rows = list(rows)
    texts = sorted({row['dataset'] for row in rows})
    number = torch.tensor([texts.index(row['dataset']) for row in rows])

    def column(name):
        return torch.tensor([row[name] for row in rows], dtype=torch.float64)

    parameters = 12 * column('n_layer') * column('n_embd') ** 2
    tokens, unique = column('trained'), column('text_tokens')
    context = column('block_size') * column('text_bytes') / unique
    target = column('val_loss')

    def predict(x):
        size, a, data, b, span, c, half_life = x[:7].exp()
        lowest, unit = x[7 : 7 + len(texts)].exp(), x[7 + len(texts) :].exp()
        repeats = (tokens / unique - 1).clamp(min=0)
        useful = torch.minimum(tokens, unique)
        useful = useful + unique * half_life * (1 - torch.exp(-repeats / half_life))
        excess = (size / parameters) ** a + (data / useful) ** b + (span / context) ** c
        return lowest[number] + unit[number] * excess

    def train(start):
        x = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([x], max_iter=500, line_search_fn='strong_wolfe')

        def closure():
            optimizer.zero_grad()
            errors = predict(x) - target
            loss = torch.nn.functional.huber_loss(errors, torch.zeros_like(errors), delta=0.01)
            # one unit for all texts together: the scale of the excess is otherwise undetermined
            loss = loss + 1e-3 * x[7 + len(texts) :].mean() ** 2
            loss = loss + 1e-6 * (x - start).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return closure().item(), x.detach()

    starts = []
    for a, b in ((0.3, 0.3), (0.5, 0.3), (0.3, 0.5), (0.5, 0.5)):
        law = LAW._replace(a=a, b=b)
        start = [*map(math.log, law), *[math.log(0.5 * target.min())] * len(texts)]
        starts.append(torch.tensor(start + [0.0] * len(texts), dtype=torch.float64))
    _, best = min((train(start) for start in starts), key=lambda found: found[0])
    law = Law(*(float(f'{value:.4g}') for value in best[:7].exp().tolist()))
    units = best[7:].exp().view(2, -1).T.tolist()
    error = (predict(best) - target).abs().mean().item()
    return law, {text: tuple(pair) for text, pair in zip(texts, units, strict=True)}, error
