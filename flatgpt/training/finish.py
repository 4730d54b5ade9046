"""
The end of a run: report the result, where it is, and how to resume.

    finish(run, model, tokenizer, data, stop_signal, finished=True)
"""

import math
import shlex
from contextlib import closing, suppress

from flatgpt.checkpoint.load import step_of
from flatgpt.data.dataset import Dataset
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.errors import UserError, warn_on_failure
from flatgpt.training.metrics import draw_loss, format_result
from flatgpt.training.run import Run
from flatgpt.training.stop_signal import StopSignal
from model import GPT


def finish(
    run: Run,
    model: GPT,
    tokenizer: Tokenizer | None,
    data: Dataset,
    stop_signal: StopSignal,
    finished: bool,
) -> None:
    """Report the result, where it is and how to resume; exit.

    finished: whether the run is complete; otherwise a signal or a read error stopped it.
    """
    run.state.tick()
    peak = run.runtime.peak_memory()  # before the plot and the sample
    run.progress.close()
    run.watchdog.close()  # the last copy to a mirror may be slow
    run.saver.finish()
    run.report_problems()
    if run.runtime.is_main:
        with suppress(KeyboardInterrupt), closing(run.tracker):
            require_saved_weights(run, finished)
            if finished:
                run.mark_done()
            # all is saved: a signal now only skips the plot and the sample
            stop_signal.raise_interrupts()
            with warn_on_failure('no loss curve', run.runtime.print0):
                run.runtime.print0(f'loss curve: {draw_loss(run.out_dir)}')
            if finished:
                report_end(run, model, tokenizer, data, peak)
            else:
                report_stop(run)
    if stop_signal.error:
        raise stop_signal.error
    run.runtime.exit(0 if finished else stop_signal.status)


def require_saved_weights(run: Run, finished: bool) -> None:
    """Exit with status 2 if the last weights are not saved."""
    again = 'resume with --init_from=resume' if run.checkpoints else 'start again'
    if run.saver.failure:
        raise UserError(f'{run.saver.failure}; free disk space and {again}')
    if finished and not math.isfinite(loss := run.state.losses['val_loss']):
        raise UserError(
            f'{run.out_dir}: the validation loss is {loss} at step {run.state.step}, so these '
            f'weights are not saved; lower {run.learning_rate_flags} and {again}'
        )


def report_end(run: Run, model: GPT, tokenizer, data: Dataset, peak: int | None) -> None:
    print0 = run.runtime.print0
    print0(format_result(run.state, run.config['objective']))
    if peak:
        each = ' in each process' if run.runtime.world_size > 1 else ''
        print0(f'peak memory {peak / 1e6:,.0f} MB{each}')
    run.show_sample(model, tokenizer, data, run.config['sample_tokens'])
    if not run.checkpoints:
        print0(f'no step was trained, so there is no checkpoint in {run.out_dir}')
    for path in run.checkpoints[-1:]:
        print0(f'checkpoint: {path}')
        where = shlex.quote(str(run.out_dir))
        if model.config.score:
            print0(f'reward a model: python train.py train_rl --reward={where} --init_from=MODEL')
        else:
            print0(f'generate text: python sample.py --out_dir={where}')


def report_stop(run: Run) -> None:
    step, print0 = run.state.step, run.runtime.print0
    if not run.checkpoints:
        return print0(
            f'stopped at step {step} with nothing to save; run the same command to start again'
        )
    last, config_file = run.checkpoints[-1], shlex.quote(str(run.out_dir / 'config.py'))
    command = f'{run.runtime.launch_command} train.py {config_file} --init_from=resume'
    kept = 'is saved' if step_of(last) == step else 'is the last good checkpoint'
    print0(f'stopped at step {step}; {last.name} {kept}, resume with: {command}')
