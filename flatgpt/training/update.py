"""
How train.py launches an update on a GPU: as a CUDA graph, and without waiting for its result.

    update = GraphedUpdate(update, discard, print0)    # eager at first, then captured and replayed
    numbers = PendingNumbers(update(micro_batches, signals))
    ...                                                # launch the next one
    mean_loss, *others = numbers.read()

An update of a tiny model is hundreds of small kernels, which are expected to take longer to launch
one by one than to compute. A graph launches them all at once. Neither was timed on a GPU.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial

import torch

from flatgpt.cuda_graph import capture, capture_stream
from flatgpt.runtime import Runtime
from flatgpt.training.compiling import ComputeWorkload
from flatgpt.training.validate import graph_obstacles

EAGER_UPDATES = 3  # before the capture: libraries and optimizers allocate what they need
LAUNCH_BOUND = 3.0  # capture up to this ratio of computing to launching, both estimated


def should_capture(
    config: dict, work: ComputeWorkload, peak_flops: float | None, runtime: Runtime
) -> bool:
    """Whether to capture updates; 'auto': if launching kernels takes a large part of the time."""
    if config['eval_only']:
        return False
    if config['cuda_graph'] != 'auto':
        return config['cuda_graph'] is True
    can = runtime.device_type == 'cuda' and runtime.world_size == 1 and not graph_obstacles(config)
    # float16 only on request: a capture of the loss scaler was not tried on a GPU
    return can and runtime.dtype != torch.float16 and is_launch_bound(work, peak_flops)


def is_launch_bound(work: ComputeWorkload, peak_flops: float | None) -> bool:
    computing, launching = work.pass_seconds(peak_flops)
    return computing < LAUNCH_BOUND * launching


class PendingNumbers:
    """The values of a small tensor, on their way from the device to the host."""

    def __init__(self, tensor: torch.Tensor):
        self.values, self.arrived = tensor.to('cpu', non_blocking=tensor.is_cuda), None
        if tensor.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> list[float]:
        """The numbers; waits until they are computed and copied."""
        if self.arrived:
            self.arrived.synchronize()
        return self.values.tolist()


class GraphedUpdate:
    """update(micro_batches, signals), captured as one CUDA graph for each shape of micro-batches.

    The first EAGER_UPDATES calls with a shape are eager, and all calls after a capture failed. The
    divisors are constants in a graph, so other divisors are another shape.

    discard: called after a failed capture, to drop the gradients that it did not compute.
    """

    def __init__(self, update: Callable, discard: Callable, print0: Callable):
        self.update, self.discard, self.print0 = update, discard, print0
        self.calls, self.graphs, self.failed = Counter(), {}, False

    def __call__(self, micro_batches: list[tuple[dict, float]], signals) -> torch.Tensor:
        shapes = tuple((d, *(tensor.shape for tensor in b.values())) for b, d in micro_batches)
        self.calls[shapes] += 1
        if self.failed or self.calls[shapes] <= EAGER_UPDATES:
            return self.run_on_capture_stream(micro_batches, signals)
        if shapes not in self.graphs:
            try:
                self.graphs[shapes] = self.capture(micro_batches, signals)
            except Exception as error:  # also out of memory: an eager update needs less
                self.failed, reason = True, (str(error).strip().splitlines() or [''])[0][:100]
                self.print0(f'training without a CUDA graph, whose capture failed: {reason}')
                self.discard()
                return self.run_on_capture_stream(micro_batches, signals)
        inputs, replay, result = self.graphs[shapes]
        torch._foreach_copy_(inputs, tensors_of(micro_batches))
        replay()
        return result

    def run_on_capture_stream(self, micro_batches: list, signals) -> torch.Tensor:
        """An eager update on the stream of the capture, to which autograd's nodes are then tied."""
        stream, current = capture_stream(signals.device), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            result = self.update(micro_batches, signals)
        current.wait_stream(stream)
        return result

    def capture(self, micro_batches: list, signals) -> tuple:
        """Capture an update of copies of these micro-batches, without computing it -> the tensors
        to copy later micro-batches to, a function that replays it, and its result."""
        static = [({k: v.clone() for k, v in b.items()}, d) for b, d in micro_batches]
        update = partial(self.update, static, signals)
        replay, result = capture(update, signals.device, warm_up=False)
        return tensors_of(static), replay, result


def tensors_of(micro_batches: list[tuple[dict, float]]) -> list[torch.Tensor]:
    return [tensor for batch, _ in micro_batches for tensor in batch.values()]
