"""
bench.py --report: runs side by side as one HTML file, which needs neither a server nor a network.

$ python bench.py --report=out/a,out/b                    # writes report.html

Loss curves come from metrics.jsonl, settings from the checkpoints, and samples from the models.
What `bench.py --json=out/a/bench.json` measured of a run stands in the report, too.
"""

import math
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

from flatgpt.checkpoint.load import find_checkpoint, read_state
from flatgpt.checkpoint.page import playground_style
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.errors import UserError, check_choice, counted
from flatgpt.files import atomic_file, read_json
from flatgpt.inference.engine import generate
from flatgpt.inference.sampling import SamplingParams
from flatgpt.training.metrics import evaluated_metrics, points
from model import GPT

REPORT, FIGURES = 'report.html', 'bench.json'
COLORS = ('#2f7d6b', '#c8742a', '#5b6bbf', '#b0476b', '#7a8a2c', '#3d8fb0')
WIDTH, HEIGHT, LEFT, BOTTOM = 520, 300, 56, 36  # of a chart, and its margins for labels
MAX_POINTS = 600  # of a curve
SAMPLES, SAMPLE_TOKENS = 3, 200
GREETING = 'Hello!'  # the message to a chat model, without another
UNCOMPARED = ('out_dir', 'wandb_run_name')  # they always differ
STYLE = """
h2 { margin: 32px 0 8px; font: 600 16px var(--sans) }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums }
th, td { padding: 5px 18px 5px 0; border-bottom: 1px solid var(--line); text-align: left }
th, small { color: var(--quiet); font-weight: 400 }
.wide { overflow-x: auto }
.row { display: flex; flex-wrap: wrap; gap: 16px }
.row > * { flex: 1 1 300px; min-width: 0 }
svg text { fill: var(--quiet); font: 11px var(--sans) }
svg .grid { stroke: var(--line) }
i { display: inline-block; width: 10px; height: 10px; margin-right: 7px; border-radius: 3px }
pre {
  margin: 0 0 12px; padding: 14px 18px; border: 1px solid var(--line); border-radius: 12px;
  background: var(--sheet); font: 15px/1.6 var(--serif); white-space: pre-wrap;
  overflow-wrap: anywhere;
}
pre b { color: var(--accent); font-weight: 400 }
"""


def write_report(
    settings: dict, runs: list[str], load: Callable[[dict], tuple[GPT, Tokenizer]]
) -> Path:
    """Write the report of run directories -> its path. load: as in score_tasks()."""
    metrics = {run: evaluated_metrics(run, 'val_reward') for run in runs}
    which = settings['checkpoint'] or 'best'
    check_choice(('best', 'last'), {'checkpoint': which}, 'checkpoint')
    states = {run: read_state(find_checkpoint(run, which)) for run in runs}
    figures = {run: figures_of(run) for run in runs}
    samples = {run: samples_of({**settings, 'out_dir': run}, load) for run in runs}
    parts = [
        summary(metrics, states),
        *curves(metrics),
        table_of('Settings that differ', runs, settings_that_differ(states)),
        table_of('Measured', runs, figures_side_by_side(figures)),
        samples_side_by_side(settings['start'], samples),
    ]
    path = Path(REPORT)
    with atomic_file(path) as part:
        part.write_text(page_of(', '.join(runs), ''.join(parts)), encoding='utf-8')
    return path


def page_of(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{text(title)}</title>\n<style>\n{playground_style()}{STYLE}</style>\n'
        f'<header><h1>flatGPT</h1><span id="model">{text(title)}</span></header>\n{body}'
    )


def text(value: object) -> str:
    """A value as text of the page; what is no Unicode, such as a part of a path, becomes ?."""
    return escape(str(value).encode(errors='replace').decode())


# -----------------------------------------------------------------------------
# tables


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """The cells of the head are HTML, all others text."""
    lines = [''.join(f'<th>{cell}</th>' for cell in head)]
    lines += [''.join(f'<td>{text(cell)}</td>' for cell in row) for row in rows]
    body = ''.join(f'<tr>{line}</tr>' for line in lines)
    return f'<div class="wide"><table>{body}</table></div>'


def table_of(title: str, runs: list[str], rows: dict[str, list]) -> str:
    """A table with a column for each run; nothing without rows."""
    if not rows:
        return ''
    lines = [[name, *cells] for name, cells in rows.items()]
    return f'<h2>{title}</h2>{table(["", *map(marked, range(len(runs)), runs)], lines)}'


def marked(number: int, run: str) -> str:
    """A run's name after its color in the charts."""
    return f'<i style="background: {color(number)}"></i>{text(run)}'


def color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def summary(metrics: dict[str, list[dict]], states: dict[str, dict]) -> str:
    rows = {'steps': [lines[-1]['step'] for lines in metrics.values()]}
    for key, name, best in (
        ('val_loss', 'best validation loss, nats', min),
        ('val_bpb', 'best validation loss, bits per byte', min),
        ('val_reward', 'best validation reward', max),
        ('seconds', 'seconds of training, with evaluation', max),
    ):
        found = [points(lines, 'step', key)[1] for lines in metrics.values()]
        if any(found):
            rows[name] = [figure(best(values)) if values else '-' for values in found]
    shapes = [state['model'] for state in states.values()]
    rows['model'] = [
        f'{shape.get("arch", "gpt2")}, {counted(shape["n_layer"], "layer")} of {shape["n_embd"]}'
        for shape in shapes
    ]
    return table_of('Runs', [*metrics], rows)


def figure(value: object) -> str:
    return f'{value:,.4f}' if isinstance(value, float) and abs(value) < 100 else f'{value:,.0f}'


def settings_that_differ(states: dict[str, dict]) -> dict[str, list]:
    configs = [state.get('config', {}) for state in states.values()]
    names = dict.fromkeys(name for config in configs for name in config)
    values = {name: [config.get(name, '-') for config in configs] for name in names}
    return {
        name: each
        for name, each in values.items()
        if name not in UNCOMPARED and any(value != each[0] for value in each)
    }


def figures_of(run: str) -> dict[str, str]:
    """{what: its figure} of the bench.json in a run directory: tasks and perplexities."""
    path, found = Path(run) / FIGURES, {}
    if not path.is_file():
        return found
    for entry in read_json(path, str(path)).get('results', []):
        for metric, score in entry.get('metrics', {}).items():
            error = '' if score['stderr'] is None else f' ± {figure(score["stderr"])}'
            found[f'{entry["task"]}, {metric}'] = figure(score['value']) + error
        if 'perplexity' in entry:
            found[f'perplexity, {entry["side"]}'] = figure(entry['perplexity'])
    return found


def figures_side_by_side(figures: dict[str, dict[str, str]]) -> dict[str, list]:
    names = dict.fromkeys(name for found in figures.values() for name in found)
    return {name: [found.get(name, '-') for found in figures.values()] for name in names}


# -----------------------------------------------------------------------------
# charts


def curves(metrics: dict[str, list[dict]]) -> list[str]:
    """A chart of losses and one of rewards, against steps and seconds, if runs have them."""
    parts = []
    for title, key, faint in (
        ('Loss, nats', 'val_loss', 'loss'),
        ('Reward', 'val_reward', 'reward'),
    ):
        if any(points(lines, 'step', key)[0] for lines in metrics.values()):
            charts = ''.join(chart(metrics, x, key, faint) for x in ('step', 'seconds'))
            note = '<small>validation; faint: training batches</small>'
            parts.append(f'<h2>{title}</h2>{note}<div class="row">{charts}</div>')
    return parts


def chart(metrics: dict[str, list[dict]], x: str, key: str, faint: str) -> str:
    """One SVG: a line per run through its evaluations, and a faint one through its batches."""
    lines = []
    for number, run in enumerate(metrics):
        for name, style in ((faint, 'opacity=".35"'), (key, 'stroke-width="2"')):
            xs, ys = points(metrics[run], x, name)
            every = math.ceil(len(xs) / MAX_POINTS) or 1
            lines.append((xs[::every], ys[::every], f'stroke="{color(number)}" {style}'))
    top = max(y for own in metrics.values() for y in points(own, x, key)[1])
    to_x = Axis([value for xs, _, _ in lines for value in xs], LEFT, WIDTH - 12)
    # a batch far above all evaluations would flatten the rest
    to_y = Axis([min(y, top) for _, ys, _ in lines for y in ys], HEIGHT - BOTTOM, 12)
    parts = [grid_x(to_x), grid_y(to_y)]
    for xs, ys, style in lines:
        shown = [(to_x(a), to_y(b)) for a, b in zip(xs, ys, strict=True)]
        path = ' '.join(f'{a:.1f},{max(b, 12):.1f}' for a, b in shown)
        parts.append(f'<polyline points="{path}" fill="none" {style}/>')
    parts.append(f'<text x="{WIDTH - 12}" y="{HEIGHT - 2}" text-anchor="end">{x}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


class Axis:
    """Maps the range of some values to pixels, and has about five round numbers in it."""

    def __init__(self, values: list[float], start: float, end: float):
        self.low, self.high = min(values), max(values)
        if self.low == self.high:
            self.high = self.low + 1
        self.start, self.end = start, end
        rough = (self.high - self.low) / 5
        unit = 10 ** math.floor(math.log10(rough))
        self.step = next(unit * n for n in (1, 2, 5, 10) if unit * n >= rough)

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """(where, label) of the round numbers."""
        first, last = math.ceil(self.low / self.step), math.floor(self.high / self.step)
        digits = max(0, -math.floor(math.log10(self.step)))
        values = [n * self.step for n in range(first, last + 1)]
        return [(self(value), f'{value:,.{digits}f}') for value in values]


def grid_x(to_x: Axis) -> str:
    y = HEIGHT - BOTTOM + 16
    return ''.join(
        f'<text x="{at:.1f}" y="{y}" text-anchor="middle">{label}</text>'
        for at, label in to_x.ticks()
    )


def grid_y(to_y: Axis) -> str:
    return ''.join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 12}" y1="{at:.1f}" y2="{at:.1f}"/>'
        f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{label}</text>'
        for at, label in to_y.ticks()
    )


# -----------------------------------------------------------------------------
# samples


def samples_of(settings: dict, load: Callable[[dict], tuple[GPT, Tokenizer]]) -> list[str]:
    """Texts that a run's model writes after the prompt; the same seeds for every run."""
    model, tokenizer = load(settings)
    try:
        ids = prompt_ids(settings['start'], tokenizer)
    except UserError as error:
        raise UserError(f'{settings["out_dir"]}: {error}, in --start=') from error
    sampling = SamplingParams(SAMPLE_TOKENS, temperature=0.8, top_k=200, seed=settings['seed'])
    texts = [''] * SAMPLES
    for output in generate(model, tokenizer, [ids] * SAMPLES, sampling):
        texts[output.index] += output.text
    return texts


def prompt_ids(prompt: str | None, tokenizer: Tokenizer):
    """The ids of a prompt; for a chat model, those of a message of the user."""
    if 'user' in (tokenizer.chat_template or {}):
        return tokenizer.encode_chat([{'role': 'user', 'content': prompt or GREETING}])
    if prompt is None and tokenizer.eot is not None:
        return [tokenizer.eot]
    return tokenizer.encode(prompt or '\n', allow_eot=True)


def samples_side_by_side(prompt: str | None, samples: dict[str, list[str]]) -> str:
    begin = f'<b>{text(prompt)}</b>' if prompt else ''
    columns = ''.join(
        f'<div><p>{marked(number, run)}</p>'
        + ''.join(f'<pre>{begin}{text(each)}</pre>' for each in samples[run])
        + '</div>'
        for number, run in enumerate(samples)
    )
    note = f'<small>temperature 0.8, {SAMPLE_TOKENS} tokens</small>'
    return f'<h2>Samples</h2>{note}<div class="row">{columns}</div>\n'
