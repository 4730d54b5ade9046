"""
Where a run stands, besides its weights and its optimizer: what state.json of a checkpoint keeps.

    state = TrainState.from_saved(saved, fresh_id)
    state.record_evaluation({'train_loss': 1.9, 'val_loss': 2.0})
    state.record_update(norm=0.7, skipped=False)
"""

import math
import time
from dataclasses import asdict, dataclass, field, fields

SPIKE = 3.0  # times as large as usual
USUAL = 100  # gradients whose mean is usual
NON_STATE_KEYS = (
    'config',
    'model',
    'evaluated',
    'scaler',
)  # keys of state.json that are not of the state


@dataclass
class TrainState:
    step: int = 0  # updates that are done
    samples: int = 0  # sequences they have seen, over all processes
    seconds: float = 0.0  # since the start, with compilation and evaluation; summed over starts
    evaluated_step: int | None = None  # of the last evaluation
    best_val_loss: float | None = None
    stale: int = 0  # evaluations in a row without a new best
    skipped: int = 0  # updates in a row that were left out, since they were not finite
    usual_norm: float = 0.0  # of the gradient: the mean of the last `norms` of them
    norms: int = 0
    since_log: dict = field(default_factory=lambda: {'spikes': 0, 'skipped': 0})
    run: str | None = None  # whose checkpoints these are
    data: str | None = None  # fingerprint of the dataset
    reference: str | None = None  # fingerprint of the model that objective='dpo' began with
    losses: dict = field(default_factory=dict)  # of the last evaluation: val_loss and the rest

    @classmethod
    def from_saved(cls, saved: dict, run: str) -> 'TrainState':
        """The state that a checkpoint's state.json holds. run: for one that does not say."""
        known = {each.name for each in fields(cls)} - {'losses'}
        losses = {k: v for k, v in saved.items() if k not in known and k not in NON_STATE_KEYS}
        state = {name: saved[name] for name in known if name in saved}
        return cls(**{'run': run, **state}, losses=losses)

    def to_dict(self) -> dict:
        """The plain values of state.json."""
        values = asdict(self)
        losses = values.pop('losses')
        if self.reference is None:
            del values['reference']
        return {**losses, **values, 'evaluated': self.is_evaluated}

    @property
    def reference_key(self) -> str:
        """What tells the reference of this run from that of another model or dataset."""
        return f'{self.reference} {self.data}'

    def start_clock(self) -> None:
        self._began = time.perf_counter() - self.seconds

    def tick(self) -> float:
        """Bring `seconds` up to now."""
        self.seconds = time.perf_counter() - self._began
        return self.seconds

    @property
    def is_evaluated(self) -> bool:
        """Whether the losses are of the weights as they are now."""
        return self.evaluated_step == self.step

    def is_finished(self, max_iters: int, patience: int | None) -> bool:
        """Whether the last step, or the last evaluation by patience, is done and measured."""
        out_of_patience = patience is not None and self.stale >= patience
        return (self.step >= max_iters or out_of_patience) and self.is_evaluated

    def record_evaluation(self, losses: dict) -> None:
        self.losses = {'train_loss': None, **losses}
        self.evaluated_step, self.stale = self.step, self.stale + 1
        best = math.inf if self.best_val_loss is None else self.best_val_loss
        if losses['val_loss'] < best:
            self.best_val_loss, self.stale = losses['val_loss'], 0

    def record_update(self, norm: float, skipped: bool, samples: int) -> None:
        """One more step is done, with a gradient of this norm; it may have been skipped."""
        self.step, self.samples = self.step + 1, self.samples + samples
        self.skipped = self.skipped + 1 if skipped else 0
        self.since_log['skipped'] += skipped
        self.since_log['spikes'] += self._is_spike(norm)

    def _is_spike(self, norm: float) -> bool:
        """Whether a gradient is much larger than usual, the mean of some 100 before it."""
        usual, count = self.usual_norm, self.norms
        if not math.isfinite(norm):
            return False
        self.norms = min(count + 1, USUAL)
        self.usual_norm += (norm - usual) / self.norms
        return count >= 20 and norm > SPIKE * usual

    def pop_counts(self) -> dict[str, int]:
        """Spikes and skipped updates since this was last asked."""
        counts, self.since_log = self.since_log, dict.fromkeys(self.since_log, 0)
        return counts
