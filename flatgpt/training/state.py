"""
The state of a run besides weights and optimizer, kept in state.json of a checkpoint.

    state = TrainState.from_saved(saved, fresh_id)
    state.record_evaluation({'train_loss': 1.9, 'val_loss': 2.0})
    state.record_update(norm=0.7, skipped=False, samples=480)
"""

import math
import time
from dataclasses import asdict, dataclass, field, fields

SPIKE_FACTOR = 3.0  # a gradient norm this many times the running mean is a spike
NORM_WINDOW = 100  # gradients in the running mean
NON_STATE_KEYS = ('config', 'model', 'evaluated', 'scaler')  # of state.json


@dataclass
class TrainState:
    step: int = 0  # updates so far
    samples: int = 0  # sequences trained on, over all processes
    seconds: float = 0.0  # of training, compilation and evaluation, summed over restarts
    evaluated_step: int | None = None  # step of the last evaluation
    best_val_loss: float | None = None
    stale: int = 0  # evaluations in a row without a new best
    skipped: int = 0  # consecutive non-finite updates
    usual_norm: float = 0.0  # running mean of the gradient norm, over the last `norms` updates
    norms: int = 0
    since_log: dict = field(default_factory=lambda: {'spikes': 0, 'skipped': 0})
    run: str | None = None  # random id of the run
    data: str | None = None  # fingerprint of the dataset
    reference: str | None = None  # fingerprint of the initial model, objective='dpo'
    # changes of the number of steps, [step, max_iters] each; see deadline.py
    events: list = field(default_factory=list)
    losses: dict = field(default_factory=dict)  # of the last evaluation: val_loss and others

    @classmethod
    def from_saved(cls, saved: dict, run_id: str) -> 'TrainState':
        """The state in a checkpoint's state.json. run_id: for a new run, which has none."""
        known = {field.name for field in fields(cls)} - {'losses'}
        losses = {k: v for k, v in saved.items() if k not in known and k not in NON_STATE_KEYS}
        state = {name: saved[name] for name in known if name in saved}
        return cls(**{'run': run_id, **state}, losses=losses)

    def to_dict(self) -> dict:
        """The values of state.json, as JSON types."""
        values = asdict(self)
        losses = values.pop('losses')
        for name in ('reference', 'events'):
            if not values[name]:
                del values[name]
        return {**losses, **values, 'evaluated': self.is_evaluated}

    @property
    def reference_key(self) -> str:
        """Identifies the reference log-probabilities: by initial model and dataset."""
        return f'{self.reference} {self.data}'

    def max_iters(self, planned: int) -> int:
        """The total number of steps, which an event may have changed."""
        return self.events[-1][1] if self.events else planned

    def schedule_step(self, step: int, max_iters: int) -> float:
        """The step of the schedule of max_iters steps that this step stands for.

        The same, unless an event changed the number of steps: the rest of the schedule is then
        compressed or stretched.
        """
        if not self.events:
            return step
        from_step, from_schedule, end = 0, 0.0, max_iters
        for event_step, new_end in self.events:
            if event_step >= step:
                break
            per_step = (max_iters - from_schedule) / (end - from_step)
            from_schedule += (event_step - from_step) * per_step
            from_step, end = event_step, new_end
        return from_schedule + (step - from_step) * (max_iters - from_schedule) / (end - from_step)

    def start_clock(self) -> None:
        self._began = time.perf_counter() - self.seconds

    def tick(self) -> float:
        """Update `seconds`."""
        self.seconds = time.perf_counter() - self._began
        return self.seconds

    @property
    def is_evaluated(self) -> bool:
        """Whether the losses are those of the current weights."""
        return self.evaluated_step == self.step

    def is_finished(self, max_iters: int, patience: int | None) -> bool:
        """Whether max_iters or patience is reached, and the weights are evaluated."""
        out_of_patience = patience is not None and self.stale >= patience
        return (self.step >= max_iters or out_of_patience) and self.is_evaluated

    def record_evaluation(self, losses: dict) -> None:
        self.losses = {'train_loss': None, **losses}
        self.evaluated_step, self.stale = self.step, self.stale + 1
        best = math.inf if self.best_val_loss is None else self.best_val_loss
        if losses['val_loss'] < best:
            self.best_val_loss, self.stale = losses['val_loss'], 0

    def record_update(self, norm: float, skipped: bool, samples: int) -> None:
        """Count a step, its samples and its gradient norm."""
        self.step, self.samples = self.step + 1, self.samples + samples
        self.skipped = self.skipped + 1 if skipped else 0
        self.since_log['skipped'] += skipped
        self.since_log['spikes'] += self._is_spike(norm)

    def _is_spike(self, norm: float) -> bool:
        """Whether a gradient norm is a spike compared to the running mean."""
        mean, count = self.usual_norm, self.norms
        if not math.isfinite(norm):
            return False
        self.norms = min(count + 1, NORM_WINDOW)
        self.usual_norm += (norm - mean) / self.norms
        return count >= 20 and norm > SPIKE_FACTOR * mean

    def pop_counts(self) -> dict[str, int]:
        """Spikes and skipped updates since the last call."""
        counts, self.since_log = self.since_log, dict.fromkeys(self.since_log, 0)
        return counts
