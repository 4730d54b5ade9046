"""
The engines of a server: the one that gets new requests, and after a reload the one before it.

    engines = Engines(engine)
    engines.check_memory()                               # an APIError if a second does not fit
    engines.replace(another)                             # the first finishes its requests
"""

import threading

import torch

from flatgpt.checkpoint.weights import meta_model
from flatgpt.inference.engine import Engine
from flatgpt.runtime import (
    available_host_memory,
    is_out_of_memory,
    out_of_memory,
    resident_memory,
)
from flatgpt.serving.api_error import APIError
from flatgpt.serving.job import LOG


def memory_advice(slots: int) -> str:
    """The flag to restart a server with whose memory is too small for so many slots."""
    return f'--max_rows={slots // 2}' if slots > 1 else '--quantize=int8, or a smaller model'


class Engines:
    """Runs each engine in a thread of its own."""

    def __init__(self, engine: Engine):
        self.current = engine
        self.threads: dict[Engine, threading.Thread] = {}
        self.start(engine)

    def start(self, engine: Engine) -> None:
        thread = threading.Thread(target=self.run, args=[engine], name='flatgpt run', daemon=True)
        self.threads[engine] = thread
        thread.start()

    def run(self, engine: Engine) -> None:
        try:
            engine.serve()
        except BaseException as error:
            if is_out_of_memory(error):
                fix = f'a restart with {memory_advice(len(engine.slots))}'
                device = str(engine.model.embedding.weight.device)
                LOG.error('%s', out_of_memory(error, device, fix))
            else:
                LOG.exception('the engine failed; restart the server')
        if engine is not self.current:
            self.threads.pop(engine, None)  # and its memory

    def replace(self, engine: Engine) -> None:
        """Use another engine for new requests; the current one finishes those it has."""
        before, self.current = self.current, engine
        self.start(engine)
        before.retire()
        if before.error:  # it had failed
            self.threads.pop(before, None)

    @property
    def open(self) -> list[Engine]:
        return list(self.threads)

    def close(self) -> None:
        for engine, thread in list(self.threads.items()):
            engine.close()
            thread.join()

    def check_memory(self) -> None:
        """APIError if there is no memory for a second engine like the current one."""
        host, device = self.second_engine_bytes()
        weight = self.current.model.embedding.weight
        free = available_host_memory()
        checks = [('main memory', host, None if free is None else free - resident_memory())]
        if weight.is_cuda:
            checks.append((str(weight.device), device, torch.cuda.mem_get_info(weight.device)[0]))
        for where, needed, free in checks:
            if free is not None and needed > free:
                raise APIError(
                    503,
                    f'a second model needs {needed / 2**30:.1f} GiB and {where} has '
                    f'{free / 2**30:.1f} GiB free; restart the server instead',
                    code='memory',
                )

    def second_engine_bytes(self) -> tuple[int, int]:
        """Bytes of main memory and of the device that another engine needs while it is loaded."""
        loaded = kept = 0
        for runner in self.current.runners:
            parameters = sum(p.numel() for p in meta_model(runner.model.config).parameters())
            loaded += parameters * 4  # checkpoints are read in float32
            kept += parameters * runner.model.embedding.weight.element_size()
            kept += runner.cache.kv.nbytes
        on_cpu = self.current.model.embedding.weight.device.type == 'cpu'
        return (loaded + kept, 0) if on_cpu else (loaded, kept)
