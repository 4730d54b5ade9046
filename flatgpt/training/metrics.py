"""Metrics of a run: metrics.jsonl and loss.png; TensorBoard and wandb if enabled."""

import errno
import html
import json
import math
import os
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from flatgpt.errors import UserError, counted, reason_of
from flatgpt.files import atomic_file
from flatgpt.training.state import TrainState

ON = 'val_loss_on_'  # followed by the name of a dataset of the mixture


def read_metrics(out_dir: str | Path) -> list[dict]:
    """The lines of metrics.jsonl, without invalid ones, such as one cut short by a kill."""
    lines = []
    path = Path(out_dir) / 'metrics.jsonl'
    text = path.read_text(encoding='utf-8', errors='replace') if path.exists() else ''
    for line in text.splitlines():
        with suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and type(line.get('step')) is int]


def format_setup(config: dict, model, data, runtime, tokens_per_step: int) -> str:
    """The model, data and machine, printed before the first step."""
    return (
        f'model: {config["arch"]}, {model.num_params() / 1e6:,.2f}M parameters, '
        f'{counted(config["n_layer"], "layer")} of {config["n_embd"]}, '
        f'{counted(config["n_head"], "head")}, '
        f'context {config["block_size"]}; {config["optimizer"]}\n'
        f'data: {data.name}, {data.tokens["train"]:,} tokens, {tokens_per_step:,} per step\n'
        f'machine: {runtime}'
    )


def format_losses(step: int, losses: dict[str, float]) -> str:
    """'step 0: train loss 4.1, val loss 4.2, val bpb 1.5, on books 4.3, reward margin 0.1'"""
    labels = {'train_loss': 'train loss', 'val_loss': 'val loss', 'val_bpb': 'val bpb'}
    labels |= {k: f'on {k.removeprefix(ON)}' for k in losses if k.startswith(ON)}
    if 'val_reward' in losses:  # reinforcement learning, where the loss is the reward, negated
        labels = {k: k.removeprefix('val_').replace('pass_at_', 'pass@') for k in losses}
        labels = {k: label.replace('_', ' ') for k, label in labels.items()}
        del labels['val_loss']
    rewards = [k for k in losses if k.startswith('val_reward_')]
    labels |= {k: k.removeprefix('val_').replace('_', ' ') for k in rewards}
    shown = [
        f'{label} {losses[k]:{".1e" if 0 < losses[k] < 1e-4 else ".4f"}}'
        for k, label in labels.items()
        if k in losses
    ]
    return f'step {step}: {", ".join(shown)}'


def format_result(state: TrainState, objective: str) -> str:
    """The final validation loss, the best, and the time."""
    losses = state.losses
    spent = f'{tqdm.format_interval(state.seconds)} after the start'
    if objective == 'rl':
        best = f'; best {-state.best_val_loss:.4f}' if state.stale else ''
        return f'validation reward {losses["val_reward"]:.4f}{best}, {spent}'
    bpb = f', {losses["val_bpb"]:.4f} bits per byte' if 'val_bpb' in losses else ''
    best = f'; best {state.best_val_loss:.4f}' if state.stale else ''
    unit = 'per pair' if objective in ('dpo', 'reward') else 'nats per token'
    return f'validation loss {losses["val_loss"]:.4f} {unit}{bpb}{best}, {spent}'


class Progress:
    """The progress bar, or plain lines without a terminal; and the speed."""

    BAR = 'step {n}/{total} |{bar:24}| {desc}, ETA {remaining}'

    def __init__(self, live: bool, step: int, total: int):
        self.step, self.total, self.live = step, total, live
        self.bar = tqdm(
            total=total, initial=step, disable=not live, bar_format=self.BAR, desc='starting'
        )
        self.seconds = self.steps = 0  # since the last status
        self.last = 0.0  # when the last step ended

    def advance(self, started: float) -> None:
        """Count a step that started then, perhaps before the last one ended."""
        now = time.perf_counter()
        self.seconds += now - max(started, self.last)
        self.step, self.steps, self.last = self.step + 1, self.steps + 1, now
        self.bar.update()

    def set_total(self, total: int) -> None:
        self.total = self.bar.total = total

    def steps_per_second(self) -> float:
        return self.steps / self.seconds

    def status(self, text: str) -> str:
        """Show `text` in the progress bar -> '', or the plain line to print instead."""
        eta = tqdm.format_interval((self.total - self.step) * self.seconds / self.steps)
        self.seconds = self.steps = 0
        self.bar.set_description_str(text, refresh=False)
        return '' if self.live else f'step {self.step}/{self.total}: {text}, ETA {eta}'

    def close(self) -> None:
        self.bar.close()


class Tracker:
    """Writes each logged step to metrics.jsonl and to the enabled trackers.

    A tracker that fails gives one warning and loses data; it never stops a run.
    """

    def __init__(
        self, out_dir: str | Path, config: dict, step: int, print0: Callable[[str], object] = print
    ):
        """step: the current step. Later lines are dropped: their steps are trained again.

        UserError if a tracker is not installed or the directory cannot be written.
        """
        self.print0, self.warned, self.sinks = print0, set(), {}
        for name in SINKS:
            if config[f'{name}_log']:
                self._try(name, self._open, name, out_dir, config, step)
        self.sinks['metrics.jsonl'] = MetricsFile(Path(out_dir) / 'metrics.jsonl', step)

    def _open(self, name: str, *arguments) -> None:
        try:
            self.sinks[name] = SINKS[name](*arguments)
        except ImportError as error:
            raise UserError(f'{name}_log=True needs: pip install -e ".[all]"') from error

    def _try(self, name: str, function: Callable, *arguments) -> None:
        """Call function(); report only the first failure of each sink."""
        try:
            function(*arguments)
        except UserError:
            raise
        except Exception as error:
            if name not in self.warned:
                self.warned.add(name)
                self.print0(f'warning: {name}: {reason_of(error)}; {SINK_TROUBLE[name]}')

    def log(self, step: int, **values) -> None:
        """values: numbers. None is omitted; the file has null for non-finite values."""
        values = {key: value for key, value in values.items() if value is not None}
        for name, sink in self.sinks.items():
            self._try(name, sink.log, step, values)

    def log_text(self, step: int, text: str) -> None:
        """Log a generated sample to the enabled trackers."""
        for name, sink in self.sinks.items():
            self._try(name, sink.log_text, step, text)

    def close(self) -> None:
        for name, sink in self.sinks.items():
            self._try(name, sink.close)


class MetricsFile:
    """metrics.jsonl, a line for each logged step."""

    def __init__(self, path: Path, step: int):
        kept = [line for line in read_metrics(path.parent) if line['step'] <= step]
        with atomic_file(path) as part:
            part.write_text(''.join(json.dumps(line) + '\n' for line in kept), encoding='utf-8')
        self.file = open(path, 'ab', buffering=0)  # a line is on disk as soon as it is logged
        self.cut = False  # whether the last line is incomplete

    def log(self, step: int, values: dict) -> None:
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        line = json.dumps({'step': step, **finite}).encode() + b'\n'
        line, self.cut = (b'\n' if self.cut else b'') + line, True
        if self.file.write(line) < len(line):  # a short write, which precedes ENOSPC
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.cut = False

    def log_text(self, step: int, text: str) -> None:
        """Samples are not logged here."""

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    def __init__(self, out_dir: str | Path, config: dict, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(Path(out_dir) / 'tb'), purge_step=step + 1)

    def log(self, step: int, values: dict) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def log_text(self, step: int, text: str) -> None:
        # TensorBoard renders Markdown, where an indent means verbatim
        self.writer.add_text('sample', textwrap.indent(text, '    '), step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    def __init__(self, out_dir: str | Path, config: dict, step: int):
        import wandb

        self.html, name = wandb.Html, config['wandb_run_name']
        project = config['wandb_project']
        self.run = wandb.init(project=project, name=name, config=config, dir=out_dir)

    def log(self, step: int, values: dict) -> None:
        self.run.log(values, step=step)

    def log_text(self, step: int, text: str) -> None:
        page = self.html(f'<pre>{html.escape(text)}</pre>')  # wandb stores it as a file
        self.run.log({'sample': page}, step=step)

    def close(self) -> None:
        self.run.finish()


SINKS = {'tensorboard': TensorBoard, 'wandb': Wandb}
SINK_TROUBLE = {
    'metrics.jsonl': 'it and loss.png miss some steps',
    'tensorboard': 'its curves have gaps, but metrics.jsonl is complete',
    'wandb': 'metrics.jsonl has all; run `wandb login`, or set WANDB_MODE=offline to log to disk',
}


def draw_loss(out_dir: str | Path) -> Path:
    """Plot the training and validation loss of a run -> the path of the image."""
    lines = read_metrics(out_dir)
    figure, (axes,) = plot('step')
    # a place for the title, which would be searched for otherwise
    axes.set_title(printable(out_dir), parse_math=False, y=1.0)
    if points(lines, 'step', 'val_reward')[0]:
        return draw_rewards(lines, figure, axes, Path(out_dir))
    axes.plot(*points(lines, 'step', 'loss'), lw=1, alpha=0.5, label='training batch')
    for key, label in (('train_loss', 'train split'), ('val_loss', 'validation split')):
        steps, losses = points(lines, 'step', key)
        if steps:
            axes.plot(steps, losses, 'o-', ms=4, label=label)
    if losses:  # of the validation split
        label = f'best validation {min(losses):.4f}'
        axes.axhline(min(losses), color='grey', lw=0.8, ls=':', label=label)
    return write(figure, Path(out_dir) / 'loss.png')


def draw_rewards(lines: list[dict], figure, axes, out_dir: Path) -> Path:
    """The picture of reinforcement learning: rewards, and the share of completions that pass."""
    axes.set_ylabel('reward')
    axes.plot(*points(lines, 'step', 'reward'), lw=1, alpha=0.5, label='training batch')
    for key in sorted({key for line in lines for key in line if key.startswith('val_pass_at_')}):
        label = key.removeprefix('val_').replace('pass_at_', 'pass@')
        axes.plot(*points(lines, 'step', key), '--', lw=1, label=label)
    axes.plot(*points(lines, 'step', 'val_reward'), 'o-', ms=4, label='validation split')
    return write(figure, out_dir / 'loss.png', legend='lower right')


def evaluated_metrics(out_dir: str | Path, *keys: str) -> list[dict]:
    """The lines of a run's metrics.jsonl. UserError unless one has a validation loss, or another of
    these keys."""
    if not (Path(out_dir) / 'metrics.jsonl').is_file():
        raise UserError(f'{out_dir}: has no metrics.jsonl; give a run directory')
    lines = read_metrics(out_dir)
    if not any(points(lines, 'seconds', key)[0] for key in ('val_loss', *keys)):
        raise UserError(
            f'{out_dir}: its metrics.jsonl has no evaluation; give a run with at least one'
        )
    return lines


def draw_runs(out_dirs: list[str | Path], picture: str | Path) -> Path:
    """Plot the losses of several runs against steps and seconds."""
    figure, panels = plot('step', 'seconds since the start, including evaluation')
    for number, out_dir in enumerate(out_dirs):
        lines = evaluated_metrics(out_dir)
        for axes, x in zip(panels, ('step', 'seconds'), strict=True):
            axes.plot(*points(lines, x, 'loss'), color=f'C{number}', lw=0.8, alpha=0.4)
            along, losses = points(lines, x, 'val_loss')
            label = f'{printable(out_dir)}: {min(losses):.3f}'
            axes.plot(along, losses, 'o-', color=f'C{number}', ms=3, lw=1.5, label=label)
    panels[0].set_title('validation; faint: training batches', fontsize='medium', loc='left')
    try:
        path = Path(picture)
        return write(figure, path if path.suffix else path.with_suffix('.png'))
    except (OSError, ValueError) as error:  # no such directory or image format
        raise UserError(f'{picture}: {error}') from error


def printable(out_dir: str | Path) -> str:
    """The directory's name, with ? for what cannot be encoded."""
    return Path(out_dir).name.encode(errors='replace').decode()


def points(lines: list[dict], x: str, y: str) -> tuple[list, list]:
    """The values of two keys, from the lines that have both."""
    both = [line for line in lines if line.get(x) is not None and line.get(y) is not None]
    return [line[x] for line in both], [line[y] for line in both]


def plot(*xlabels: str):
    """A figure with one panel per x-label; the y-axis is the loss."""
    from matplotlib.figure import Figure  # not pyplot: no display is needed

    width, height = 2 + 6 * len(xlabels), 4.5
    figure = Figure(figsize=(width, height), dpi=120)
    # in inches; a layout that fits them to the labels would draw everything twice
    margins = {'left': 0.8 / width, 'right': 1 - 0.2 / width}
    figure.subplots_adjust(**margins, bottom=0.55 / height, top=1 - 0.4 / height, wspace=0.05)
    panels = figure.subplots(1, len(xlabels), sharey=True, squeeze=False)[0]
    for axes, xlabel in zip(panels, xlabels, strict=True):
        axes.set_xlabel(xlabel)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel('loss (nats)')  # per token, or per pair
    return figure, panels


def write(figure, path: Path, legend: str = 'upper right') -> Path:
    """Save the figure, with a legend at this place: to find the best one takes long."""
    for text in figure.axes[0].legend(frameon=False, loc=legend).get_texts():
        text.set_parse_math(False)  # a name may contain $
    with atomic_file(path) as part:
        figure.savefig(part, format=path.suffix[1:])
    return path
