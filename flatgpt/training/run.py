"""
A run in progress: its directory, state, checkpoints and log.

    run = Run(config, runtime, watchdog)   # finds the checkpoint to resume from
    run.open(max_iters, reference)         # from here on files in the run directory change
    run.save(model, optimizers, tokenizer, scaler)
"""

import math
from pathlib import Path

from flatgpt.checkpoint.load import list_checkpoints, load_model, load_optimizer, read_state
from flatgpt.checkpoint.mirror import Mirror, copy_if_missing, probe_mirror, remove_later
from flatgpt.checkpoint.save import Saver
from flatgpt.data.dataset import Dataset
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.errors import UserError, counted, warn_on_failure
from flatgpt.parallel import weights_are_finite
from flatgpt.runtime import Runtime
from flatgpt.training import run_directory
from flatgpt.training.deadline import Deadline
from flatgpt.training.evaluate import training_sample
from flatgpt.training.loss import REFERENCE_FILE, write_reference
from flatgpt.training.metrics import Progress, Tracker
from flatgpt.training.resume import find_resume_checkpoint
from flatgpt.training.state import TrainState
from flatgpt.training.watchdog import Watchdog
from model import GPT

RULE = '-' * 64


class Run:
    """out_dir: the run directory. resume_from: a verified checkpoint, None for a new run."""

    def __init__(self, config: dict, runtime: Runtime, watchdog: Watchdog):
        self.config, self.runtime, self.watchdog = config, runtime, watchdog
        self.out_dir = Path(
            config['out_dir'] or runtime.broadcast_from_rank0(run_directory.new_name)
        )
        config['out_dir'] = str(self.out_dir)
        self.resume_from, self.lock = find_resume_checkpoint(config, runtime)
        self.state = TrainState()
        self.tracker: Tracker | None = None  # on rank 0
        self.saver: Saver | None = None
        self.progress: Progress | None = None
        self.first_step = 0  # of this process

    # --- setup

    def exit_if_finished(self, max_iters: int) -> None:
        """Exit if a resumed run has no steps left to train."""
        c, state = self.config, self.state
        if not (self.resume_from and state.is_finished(max_iters, c['patience'])):
            return
        at_end = state.step >= max_iters
        longer = '--epochs' if c['epochs'] else '--max_iters' if at_end else '--patience'
        if state.events and at_end:  # the plan's number of steps means the plan with its events
            longer += f' above {c["max_iters"]}'
        if c['lr_decay_iters'] is not None and c['decay_lr']:
            longer += ' (and --lr_decay_iters)'
        if self.runtime.is_main:  # the process may have been killed before it did this
            if c['checkpoint_mirror']:
                copy_if_missing(self.resume_from, c['checkpoint_mirror'])
            if not (self.out_dir / 'DONE').exists():
                self.mark_done()
        self.runtime.print0(
            f'{self.out_dir} is finished: {state.step:,} of {counted(max_iters, "step")}; '
            f'to train longer, increase {longer}'
        )
        self.runtime.exit()

    def mark_done(self) -> None:
        """Create DONE, so that whatever restarts the run knows that it is finished."""
        with warn_on_failure('the run is finished, but has no DONE file', self.runtime.print0):
            (self.out_dir / 'DONE').touch()

    def open(self, max_iters: int, reference: dict | None) -> None:
        """Take the run directory. Everything that can fail comes before this."""
        c, runtime = self.config, self.runtime
        runtime.broadcast_from_rank0(lambda: self._open_on_rank_0(reference))
        if c['shard']:  # each rank writes its part of a checkpoint there
            if rank := runtime.first_mismatch((self.out_dir / 'config.py').exists()):
                raise UserError(
                    f'{self.out_dir} of rank 0 does not exist for rank {rank}: shard=True needs an '
                    '--out_dir on a disk that all machines share'
                )
        keep, mirror = c['always_save_checkpoint'], c['checkpoint_mirror']
        mirror = Mirror(Path(mirror), keep, self.state.run) if mirror else None
        self.saver = Saver(self.out_dir, runtime, c['shard'], keep, mirror)
        self.progress = Progress(runtime.is_interactive, self.state.step, max_iters)

    def _open_on_rank_0(self, reference: dict | None) -> None:
        c, step = self.config, self.state.step if self.resume_from else -1
        if c['checkpoint_mirror']:
            probe_mirror(c['checkpoint_mirror'])
        self.lock = run_directory.lock(self.out_dir)
        self.tracker = Tracker(self.out_dir, c, step, self.runtime.print0)
        run_directory.remove_later_steps(self.out_dir, step, c['overwrite'])
        if c['checkpoint_mirror']:
            remove_later(c['checkpoint_mirror'], step)
        if reference:
            write_reference(self.out_dir / REFERENCE_FILE, self.state.reference_key, reference)
        here = {'device': self.runtime.device, 'dtype': self.runtime.dtype_name}
        run_directory.write_config(self.out_dir, {**c, 'overwrite': False}, here)

    def restore(self, model: GPT, optimizers: list, scaler) -> None:
        """Load the optimizer and scaler state of the checkpoint to resume from."""
        load_optimizer(self.resume_from, model, optimizers)
        saved = read_state(self.resume_from).get('scaler')
        if scaler.is_enabled() and saved:
            scaler.load_state_dict(saved)

    # --- once in a while

    def log_evaluation(self, losses: dict) -> None:
        if self.runtime.is_main:
            peak = self.runtime.peak_memory()  # in bytes
            seconds = self.state.tick()
            self.tracker.log(self.state.step, **losses, peak_memory=peak, seconds=seconds)

    def log_update(self, loss: float, tokens_per_s: float, mfu: float | None, **measured) -> None:
        """Print and log the last step; tokens_per_s is the mean since the last line."""
        result = f'reward {measured["reward"]:.4f}' if 'reward' in measured else f'loss {loss:.4f}'
        text = f'{result}, {tokens_per_s:,.0f} tokens/s{f", MFU {mfu:.1%}" if mfu else ""}'
        if line := self.progress.status(text):
            self.runtime.print0(line)
        counts = self.state.pop_counts()
        if self.runtime.is_main:
            measured |= {'loss': loss, 'tokens_per_s': tokens_per_s, 'mfu': mfu, **counts}
            measured |= self.saver.times()
            self.tracker.log(self.state.step, **measured, seconds=self.state.tick())

    def refit(self, deadline: Deadline, step: int, max_iters: int) -> int:
        """The number of steps that ends in time, recorded as an event if it changes."""
        new = self.runtime.broadcast_from_rank0(lambda: deadline.refit(step, max_iters))
        if new is None:
            return max_iters
        self.state.events.append([step, new])
        self.progress.set_total(new)
        pace = f'steps take {deadline.slowdown:.2f} times as long as measured at the start'
        self.runtime.print0(f'step {step}: {pace}; {new:,} steps instead of {max_iters:,}')
        if self.runtime.is_main:
            self.tracker.log(step, max_iters=new)
        return new

    def report_skipped(self, loss: float, norm: float) -> None:
        """Report a skipped update; three in a row end the run."""
        step = self.state.step
        self.runtime.print0(f'step {step}: loss {loss} with gradient norm {norm}, update skipped')
        if self.state.skipped == 3:
            clip = '--grad_clip' if self.config['grad_clip'] else 'use --grad_clip=1.0'
            again = 'resume with --init_from=resume' if self.checkpoints else 'start again'
            raise UserError(
                f'{self.out_dir}: the loss or gradient was not finite in three steps in a row, up '
                f'to step {step}; lower {self.learning_rate_flags} or {clip}, and {again}'
            )

    def is_due_to_save(self, losses: dict | None, last: bool) -> bool:
        """Whether to save: at the end, after an evaluation, every save_interval steps; only if
        anything has changed."""
        step, interval = self.state.step, self.config['save_interval']
        new = step > self.first_step or (losses and step > 0)
        return bool(new and (losses or last or (interval and step % interval == 0)))

    def can_save(self, model: GPT, losses: dict | None, stopping: bool) -> bool:
        """Whether the weights are finite: a run cannot recover from NaN. All ranks must call it."""
        if losses:
            return math.isfinite(losses['val_loss'])
        if self.state.skipped and stopping:  # a skipped update changed nothing
            return weights_are_finite(model, self.runtime)
        return not self.state.skipped

    def save(self, model: GPT, optimizers: list, tokenizer: Tokenizer | None, scaler) -> None:
        """Save a checkpoint; saver.pop_warnings() has the errors."""
        if not (self.runtime.is_main or self.config['shard']):
            return
        self.state.tick()
        # a restart must not delete these checkpoints
        settings = {**self.config, 'overwrite': False}
        now = {**self.state.to_dict(), 'config': settings, 'scaler': scaler.state_dict()}
        self.saver.save(model, optimizers, tokenizer, now)

    def show_sample(
        self, model: GPT, tokenizer: Tokenizer | None, data: Dataset, tokens: int
    ) -> None:
        """Print and log a generated sample; tokens=0: none."""
        if not tokens or tokenizer is None or (self.config['shard'] and not self.checkpoints):
            return
        if model.config.score:
            return
        with warn_on_failure('no sample', self.runtime.print0):
            self._show_sample(model, tokenizer, data, tokens)
        model.train()

    def _show_sample(self, model: GPT, tokenizer: Tokenizer, data: Dataset, tokens: int) -> None:
        # a whole copy of a sharded model may not fit on this GPU
        whole = self._load_saved_model() if self.config['shard'] else model
        text = training_sample(whole, tokenizer, data, tokens, self.config['seed'])
        self.tracker.log_text(self.state.step, text)
        title = 'sample reply' if data.is_chat else 'sample'
        self.runtime.print0(f'{title}:\n{RULE}\n{text}\n{RULE}')

    def _load_saved_model(self) -> GPT:
        """The model just saved: of a sharded one, rank 0 holds only its shard."""
        self.saver.wait()
        return load_model(self.out_dir, 'last', self.runtime.device)[0]

    def report_problems(self, after: str = '') -> None:
        for problem in self.saver.pop_warnings():
            self.runtime.print0(f'warning: {problem}{after}')

    @property
    def learning_rate_flags(self) -> str:
        """The flags that set the learning rates."""
        muon = self.config['optimizer'] == 'muon'
        return '--learning_rate or --muon_lr' if muon else '--learning_rate'

    @property
    def checkpoints(self) -> list[Path]:
        return list_checkpoints(self.out_dir)
