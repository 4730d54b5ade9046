"""
Whether torch.compile saves more time in a run than it takes.

    work = ComputeWorkload(passes=100_000, flops=1e9, layers=6)
    if decide_compile('auto', work, runtime.peak_flops(), runtime): ...
"""

from typing import NamedTuple

from tqdm import tqdm

from flatgpt.runtime import Runtime

# Estimates of what torch.compile costs and saves. The seconds are those of one core of a processor,
# with a stub of the CUDA libraries and an empty cache; the other two were not measured.
COMPILE_SECONDS, COMPILE_LAYER_SECONDS = 10, 1  # per batch shape; per layer in each
COMPILE_SAVING = 1 / 3  # of a run's time
EAGER_MFU = 0.25  # of large models without it
EAGER_LAYER_SECONDS = 5e-4  # to launch a layer's 46 kernels ('modern': 86), forward and backward
ASSUMED_TFLOPS = 50  # if a GPU's peak is unknown


class ComputeWorkload(NamedTuple):
    """What a process computes in a run."""

    passes: int  # forward and backward
    flops: float  # of one pass
    layers: int
    batch_shapes: int = 1  # torch.compile makes kernels for each
    graphed: bool = False  # a CUDA graph launches all kernels at once

    def pass_seconds(self, peak_flops: float | None) -> tuple[float, float]:
        """Estimates of the seconds to compute a pass, and to launch its kernels."""
        speed = EAGER_MFU * (peak_flops or ASSUMED_TFLOPS * 1e12)
        launching = 0.0 if self.graphed else self.layers * EAGER_LAYER_SECONDS
        return self.flops / speed, launching


def decide_compile(
    setting: bool | str, work: ComputeWorkload, peak_flops: float | None, runtime: Runtime
) -> bool:
    """Whether to compile for this work, the same on all ranks; prints why 'auto' does or not.

    peak_flops: FLOP/s of the device, None if unknown.
    """
    if setting != 'auto' or not runtime.wants_compile(setting):
        return runtime.wants_compile(setting)
    pays, why = runtime.broadcast_from_rank0(lambda: compile_pays(work, peak_flops))
    runtime.print0(f'torch.compile: {"on" if pays else "off"}, {why}')
    return pays


def compile_pays(work: ComputeWorkload, peak_flops: float | None) -> tuple[bool, str]:
    """Whether torch.compile is estimated to save more time than it takes, and the reason."""
    seconds = max(0, work.passes) * max(work.pass_seconds(peak_flops))
    takes = work.batch_shapes * (COMPILE_SECONDS + work.layers * COMPILE_LAYER_SECONDS)
    pays, short = COMPILE_SAVING * seconds > takes, tqdm.format_interval
    why = (
        f'since the run would take about {short(seconds)} without it, and compiling {short(takes)}'
    )
    if not peak_flops:
        why += f' (assuming {ASSUMED_TFLOPS} TFLOP/s for this GPU; set --peak_tflops)'
    return pays, why + ('' if pays else '; --compile=True compiles anyway')
