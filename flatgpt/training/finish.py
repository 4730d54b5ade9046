"""
The end of a run: what it reached, where it is, and how to resume it.

    finish(run, model, tokenizer, data, stop, finished=True)
"""

import math
import shlex
from contextlib import closing, suppress

from flatgpt.checkpoint.load import step_of
from flatgpt.data.dataset import Dataset
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.errors import UserError, optional
from flatgpt.runtime import StopSignal
from flatgpt.training.metrics import draw_loss, format_result
from flatgpt.training.run import Run
from model import GPT


def finish(
    run: Run,
    model: GPT,
    tokenizer: Tokenizer | None,
    data: Dataset,
    stop: StopSignal,
    finished: bool,
) -> None:
    """Report what was reached, where it is and how to resume, and end the program.

    finished: whether the run has come to its end, or a signal has stopped it.
    """
    run.state.tick()
    peak = run.runtime.peak_memory()  # before the picture and the sample
    run.progress.close()
    run.watchdog.close()  # a mirror may be slow
    run.saver.finish()
    run.report_problems()
    if run.runtime.main:
        with suppress(KeyboardInterrupt), closing(run.tracker):
            require_saved_weights(run, finished)
            if finished:
                run.mark_done()
            stop.release()  # what is left is for show: a signal cuts it short, and is no failure
            with optional('no loss curve', run.runtime.print0):
                run.runtime.print0(f'loss curve: {draw_loss(run.out_dir)}')
            if finished:
                report_end(run, model, tokenizer, data, peak)
            else:
                report_stop(run)
    if stop.error:
        raise stop.error
    run.runtime.leave(0 if finished else stop.status)


def require_saved_weights(run: Run, finished: bool) -> None:
    """End with status 2 where the last weights are not saved."""
    if run.saver.failure:
        again = 'continue with --init_from=resume' if run.checkpoints else 'start again'
        raise UserError(f'{run.saver.failure}; make room and {again}')
    if finished and not math.isfinite(loss := run.state.losses['val_loss']):
        raise UserError(
            f'the validation loss is {loss} at step {run.state.step}, and those weights are '
            f'not saved: lower {run.learning_rate_flags}'
        )


def report_end(run: Run, model: GPT, tokenizer, data: Dataset, peak: int | None) -> None:
    report = run.runtime.print0
    report(format_result(run.state, run.config['objective']))
    if peak:
        each = ' in each process' if run.runtime.world_size > 1 else ''
        report(f'peak memory {peak / 1e6:,.0f} MB{each}')
    run.show_sample(model, tokenizer, data, run.config['sample_tokens'])
    if not run.checkpoints:
        report(f'no step was trained, so there is no checkpoint in {run.out_dir}')
    for path in run.checkpoints[-1:]:
        report(f'checkpoint: {path}')
        report(f'more: python sample.py --out_dir={shlex.quote(str(run.out_dir))}')


def report_stop(run: Run) -> None:
    step, report = run.state.step, run.runtime.print0
    if not run.checkpoints:
        return report(
            f'stopped at step {step}, with nothing to save yet; the same command starts again'
        )
    last, config_file = run.checkpoints[-1], shlex.quote(str(run.out_dir / 'config.py'))
    command = f'{run.runtime.launcher} train.py {config_file} --init_from=resume'
    kept = 'is saved' if step_of(last) == step else 'is the last that is sound'
    report(f'stopped at step {step}; {last.name} {kept}, continue with: {command}')
