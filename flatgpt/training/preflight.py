"""
Preflight checks before a long run.

$ python train.py train_gpt2 --check     # one line per check; nothing is written
$ python train.py train_gpt2 --plan      # memory only, with suggestions if it does not fit

A line starts with ok, warning or no, and has the fix. The exit status is 0 for go, 2 for no-go.
Under torchrun every rank checks its device and memory; rank 0 checks the rest.
"""

import hashlib
import importlib.util
import netrc
import os
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import filelock
import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from flatgpt.checkpoint.convert import RELEASED, is_cached, is_external, parse_model_config
from flatgpt.checkpoint.load import (
    find_checkpoint,
    list_checkpoints,
    read_state,
    reject_reward_model,
    shape_in,
    tokenizer_in,
    verify_checkpoint,
)
from flatgpt.checkpoint.peft import base_of, is_adapter
from flatgpt.data.cache import read_small_file
from flatgpt.data.dataset import (
    SPLITS,
    Dataset,
    download_gb,
    is_prepared,
    mask_file,
    missing_dataset,
    prepare_command,
    prepare_script,
    read_meta,
    reject_script_folder,
    resolve_dataset,
)
from flatgpt.data.mixture import Mixture, dataset_names, open_data
from flatgpt.errors import CheckpointError, UserError, as_config_error, counted
from flatgpt.files import free_bytes, nearest_existing, read_json
from flatgpt.runtime import Runtime, available_memory
from flatgpt.training import run_directory
from flatgpt.training.loss import loss_of
from flatgpt.training.memory import (
    checkpoint_size,
    host_memory_problem,
    min_bytes,
    workload_of,
)
from flatgpt.training.memory_report import check_fit
from flatgpt.training.reward import RewardModel, is_model, load_reward, load_reward_model
from flatgpt.training.state import TrainState
from flatgpt.training.validate import (
    check_new_model,
    check_short_blocks,
    check_unchanged,
    global_batch_size,
    is_resuming,
    lint_settings,
    new_shape,
    padded_vocab_size,
    steps_of,
    validate_data,
)
from model import GPT, GPTConfig

READ_ALL_BYTES = 2**32  # datasets up to this size are read completely; larger ones are sampled
PIECE_BYTES = 2**22  # read at a time
PIECES_PER_FILE = 64  # of a sampled dataset
# layers, heads and width of the GPT-2 models of OpenAI, and of DistilGPT2
SIZES = dict(zip(RELEASED, ((12, 12, 768), (24, 16, 1024), (36, 20, 1280), (48, 25, 1600),
                            (6, 12, 768)), strict=True))  # fmt: skip


def preflight(config: dict, runtime: Runtime) -> int:
    """Run and print the checks (with config['plan']: memory only) -> the exit status."""
    checks = Preflight(config, runtime)
    asked = ['memory'] if not config['check'] else list(CHECKS)
    asked = asked if runtime.is_main else [name for name in asked if name in ('device', 'memory')]
    mine = [(name, *line) for name in asked for line in checks.run_check(name)]
    failed, printed = any(level == 'no' for _, level, _ in mine), set()
    for rank, lines in enumerate(gather_from_ranks(mine, runtime)):
        failed = failed or any(level == 'no' for _, level, _ in lines)
        for name, level, text in lines if runtime.is_main else ():
            if level == 'no' and text in printed:  # one mistake can fail several checks
                continue
            printed.add(text)
            of = f' of rank {rank}' if rank else ''
            plain = not config['check'] and '\n' in text  # a table, not an error line
            if not rank or level != 'ok':
                print(text if plain else f'{level:<8} {name}{of}: {text}', flush=True)
    if runtime.is_main and config['check']:
        print("no-go: fix the problems in the lines that start with 'no'" if failed else 'go')
    return 2 if failed else 0


def gather_from_ranks(mine: list, runtime: Runtime) -> list[list]:
    """The results of all ranks, on every rank."""
    if runtime.world_size == 1:
        return [mine]
    everyone: list = [None] * runtime.world_size
    dist.all_gather_object(everyone, mine)
    return everyone


class Preflight:
    """The checks: check_NAME() yields (level, text)."""

    def __init__(self, config: dict, runtime: Runtime):
        self.config, self.runtime, self.resuming = config, runtime, is_resuming(config)
        self.out_dir = Path(config['out_dir'] or 'out')
        self.shape: GPTConfig | None = None
        self.data: Dataset | Mixture | None = None

    def run_check(self, name: str) -> list[tuple[str, str]]:
        try:
            return list(getattr(self, f'check_{name}')())
        except UserError as error:
            return [('no', str(error))]

    # --- the model and the machine

    def check_settings(self) -> Iterator[tuple[str, str]]:
        shape, source = self.model_shape(), self.model_source()
        if source == 'scratch':
            check_new_model(self.config)
        check_short_blocks(self.config, shape.block_size)
        yield (
            'ok',
            f'{shape.arch}, {counted(shape.n_layer, "layer")} of {shape.n_embd}, from {source}',
        )
        on_hub = source != 'scratch' and not Path(source).exists()
        if on_hub and not is_cached(source):
            yield 'warning', f'{source} is not downloaded yet: the run does that first'

    def model_shape(self) -> GPTConfig:
        """The shape of the model to train, without reading weights."""
        if self.shape is None:
            source, config = self.model_source(), self.config
            if source == 'scratch':
                shape = new_shape(config, self.runtime) | {'vocab_size': self.vocab_size()}
            elif isinstance(source, Path):
                shape = shape_in(source)
            else:
                shape = external_shape(source)
            if not self.resuming:
                shape['block_size'] = min(shape.get('block_size', 1024), config['block_size'])
            with as_config_error():
                found = GPTConfig(**{**shape, 'dropout': config['dropout']})
            if config['objective'] != 'reward':
                reject_reward_model(found, config['init_from'])
            self.shape = found
        return self.shape

    def model_source(self) -> Path | str:
        """Where the model comes from: a checkpoint, 'scratch', or an external model."""
        where = self.config['init_from']
        if self.resuming:
            mirror = self.config['checkpoint_mirror']
            paths = list_checkpoints(self.out_dir) or (list_checkpoints(mirror) if mirror else [])
            if paths:
                return paths[-1]
            if where == 'resume':
                raise CheckpointError(
                    f'{self.out_dir} has no checkpoint to resume from; start a run with '
                    '--init_from=scratch'
                )
        if where == 'scratch' or is_external(where):
            return where
        if is_adapter(where):
            return base_of(where)
        if read_state(Path(where)):
            return Path(where)
        return list_checkpoints(where)[-1] if list_checkpoints(where) else find_checkpoint(where)

    def vocab_size(self) -> int:
        """That of a new model for the dataset; GPT-2's if it is not prepared."""
        with suppress(UserError):
            meta = read_meta(resolve_dataset(dataset_names(self.config['dataset'])[0])[0])
            return padded_vocab_size(meta['vocab_size'])
        return GPTConfig.vocab_size

    def check_device(self) -> Iterator[tuple[str, str]]:
        with self.runtime.autocast():  # an installed driver may still not work
            a = torch.ones(64, 64, device=self.runtime.device)
            result = (a @ a).sum().item()
        good = result == 64**3
        yield (
            'ok' if good else 'no',
            f'{self.runtime}'
            + ('' if good else ' computes wrong matrix products; use another --device'),
        )

    def check_batch(self) -> Iterator[tuple[str, str]]:
        config = self.config
        rows = global_batch_size(config)
        mine, at_once = self.runtime.split_batch(rows, config['batch_size'])
        tokens = rows * self.model_shape().block_size
        yield (
            'ok',
            f'{counted(rows, "sequence")} or {counted(tokens, "token")} per update; each process '
            f'has {counted(mine // at_once, "micro-batch")} of {at_once}',
        )
        if at_once < config['batch_size']:
            yield 'warning', f'{mine} sequences per process are not a multiple of batch_size'

    def check_memory(self) -> Iterator[tuple[str, str]]:
        shape = self.model_shape()
        fresh = self.model_source() == 'scratch'
        fits, table = check_fit(workload_of(self.config, shape, self.runtime), self.runtime, fresh)
        first = dataset_names(self.config['dataset'])[0]
        if fresh and not is_prepared(resolve_dataset(first)[0]):
            table += f'\ndataset {first} is not prepared: assuming a vocabulary of 50,304 tokens'
        yield 'ok' if fits else 'no', table.replace('\n', '\n  ') if self.config['check'] else table

    def check_compile(self) -> Iterator[tuple[str, str]]:
        if not self.runtime.wants_compile(self.config['compile']):
            yield 'ok', 'off'
            return
        small = GPTConfig(64, 256, n_layer=1, n_head=2, n_embd=64, arch=self.model_shape().arch)
        idx = torch.zeros(2, 64, dtype=torch.long, device=self.runtime.device)
        lines: list[str] = []
        model = GPT(small).to(self.runtime.device)
        _, good = self.runtime.try_compile(model, [{'x': idx, 'y': idx}], lines.append, loss_of)
        yield ('ok', 'works on a small model') if good else ('warning', lines[-1])

    # --- the data

    def check_reward(self) -> Iterator[tuple[str, str]]:
        if not (name := self.config['reward']):
            return
        if not is_model(name):
            load_reward(name)
        elif self.data is None:
            load_reward_model(name)
        else:
            longest = self.data.block_size + self.config['rl_tokens']
            RewardModel(name, self.data.tokenizer, self.runtime, longest)
        yield 'ok', f'{name} can be called'

    def check_dataset(self) -> Iterator[tuple[str, str]]:
        config, names = self.config, dataset_names(self.config['dataset'])
        for name in names:
            if '://' in name:
                yield 'warning', f'{name} is checked when the run copies it'
                return
            yield from self.check_part(name)
        if all(is_prepared(resolve_dataset(name)[0]) for name in names):
            block = self.model_shape().block_size
            where = config['dataset'], block, config['seed'], config['objective']
            self.data = open_data(*where)

    def check_part(self, dataset: str) -> Iterator[tuple[str, str]]:
        where, is_path = resolve_dataset(dataset)
        if not is_prepared(where):
            reject_script_folder(where)
            if is_path or not prepare_script(where):
                raise UserError(missing_dataset(dataset, is_path))
            size, command = download_gb(where), prepare_command(where)
            if size > 1:
                raise UserError(
                    f'{where.name} is not prepared: run {command}, which downloads {size} GB'
                )
            yield 'warning', f'{where.name} is not prepared: the run does that first ({command})'
            return
        config = self.config
        block = self.model_shape().block_size
        data = Dataset(where, block, config['seed'], config['objective'])
        counts = ', '.join(f'{data.tokens[split]:,} {split}' for split in SPLITS)
        yield 'ok', f'{where.name}: {counts} tokens in windows of {data.block_size}'
        yield from check_shards(data, self.runtime.is_interactive, 'prepare the dataset again')
        if config['data_cache']:
            yield from self.check_cached_copy(where)
        if data.vocab_size > self.model_shape().vocab_size:
            raise UserError(
                f'{where.name} has a vocabulary of {data.vocab_size} tokens, and the model only '
                f'{self.model_shape().vocab_size}: prepare it with the tokenizer of the model'
            )

    def check_cached_copy(self, source: Path) -> Iterator[tuple[str, str]]:
        # requests is slow to import
        from flatgpt.data.cache import cache_folder, is_complete

        cache = self.config['data_cache']
        copy = cache_folder(cache, source, read_small_file(str(source), 'meta.json'))
        if not os.access(nearest_existing(cache), os.W_OK):
            raise UserError(f'data_cache={cache!r}: is not writable; choose another --data_cache')
        if is_complete(copy):
            data = Dataset(copy, 1, objective=self.config['objective'])
            yield from check_shards(data, self.runtime.is_interactive, 'delete this copy')
            return
        size = sum(file.stat().st_size for file in source.rglob('*.bin'))
        text = f'{copy}: will be {size / 1e9:,.2f} GB, {free_bytes(cache) / 1e9:,.2f} GB free'
        yield 'ok' if size < free_bytes(cache) else 'no', text

    def check_tokenizer(self) -> Iterator[tuple[str, str]]:
        if self.data is None:
            return
        source = self.model_source()
        model_tokenizer = tokenizer_in(source) if isinstance(source, Path) else None
        try:
            name = self.data.tokenizer.name
        except UserError as error:
            yield 'warning', f'{error}; until then, the checkpoints have no tokenizer'
            return
        if model_tokenizer is not None and model_tokenizer != self.data.tokenizer:
            yield (
                'no',
                f'the dataset has the {name} tokenizer, and {source} another one '
                f'({model_tokenizer.name}): prepare the dataset with '
                f'--tokenizer={shlex.quote(str(source))}',
            )
        elif model_tokenizer is None and source != 'scratch':
            yield (
                'warning',
                f"the dataset's is {name}; that of {source} is checked when it is loaded",
            )
        else:
            yield 'ok', name

    def check_schedule(self) -> Iterator[tuple[str, str]]:
        if self.data is None:
            return
        validate_data({**self.config, 'block_size': self.model_shape().block_size}, self.data)
        steps, source = steps_of(self.config, self.data), self.model_source()
        if self.resuming and isinstance(source, Path):  # an event may have changed the number
            steps = TrainState.from_saved(read_state(source) or {}, '').max_iters(steps)
        rows = global_batch_size(self.config)
        yield 'ok', f'{counted(steps, "step")}, {steps * rows / self.data.n_windows:,.2f} epochs'
        for warning in lint_settings(self.config, self.data):
            yield 'warning', warning

    # --- the run directory

    def check_folder(self) -> Iterator[tuple[str, str]]:
        config = self.config
        if config['out_dir'] is None:
            yield 'ok', 'a new one, out/<name>'
            return
        lock = self.out_dir / '.lock'
        if lock.exists():
            with suppress(OSError):
                try:
                    filelock.FileLock(lock).acquire(timeout=0).lock.release()
                except filelock.Timeout:
                    raise UserError(
                        f'{self.out_dir}: another run is writing here; wait for its end or choose '
                        'another --out_dir'
                    ) from None
        if not os.access(nearest_existing(self.out_dir), os.W_OK):
            raise UserError(f'{self.out_dir}: is not writable; choose another --out_dir')
        if not self.resuming:
            if not config['overwrite']:
                run_directory.reject_used(self.out_dir, config['checkpoint_mirror'])
            gone = len(list_checkpoints(self.out_dir))
            will = f'{counted(gone, "checkpoint")} will be deleted'
            yield ('warning', will) if gone else ('ok', 'free')
            return
        yield from self.check_resume_point()

    def check_resume_point(self) -> Iterator[tuple[str, str]]:
        path = (
            run_directory.resume_point(self.out_dir, self.config)
            if list_checkpoints(self.out_dir)
            else None
        )
        mirror = self.config['checkpoint_mirror']
        if path is None and mirror and list_checkpoints(mirror):
            path = list_checkpoints(mirror)[-1]
            verify_checkpoint(path)
        if path is None:
            source = self.model_source()
            yield 'ok', f'no checkpoint yet: starts from {source}'
            return
        shape = GPTConfig(**{**shape_in(path), 'dropout': self.config['dropout']})
        check_unchanged(self.config, read_state(path)['config'], shape, path)
        yield 'ok', f'resumes from {path}, whose hashes match'
        step, last = read_state(path)['step'], self.config['max_iters']
        if step >= last and self.config['epochs'] is None:
            yield (
                'warning',
                f'it is at step {step} of {last}: to train longer, increase --max_iters',
            )

    def check_disk(self) -> Iterator[tuple[str, str]]:
        workload = workload_of(self.config, self.model_shape(), self.runtime)
        size, kept = checkpoint_size(workload), max_checkpoints(self.config, self.data)
        for name in ('out_dir', 'checkpoint_mirror'):
            where = self.config[name] or (None if name == 'checkpoint_mirror' else 'out')
            if where is None:
                continue
            there = len(list_checkpoints(where))
            free, need = free_bytes(where), size * max(2, kept + 1 - there)
            if not os.access(nearest_existing(where), os.W_OK):
                yield 'no', f'{where}: is not writable; choose another --{name}'
                continue
            text = (
                f'{where}: {counted(kept, "checkpoint")} of {size / 1e9:,.2f} GB, '
                f'{free / 1e9:,.1f} GB free'
            )
            fix = '; free disk space, use --always_save_checkpoint=False or raise --eval_interval'
            yield ('ok', text) if free >= need else ('no', text + fix)

    # --- the trackers

    def check_trackers(self) -> Iterator[tuple[str, str]]:
        used = [name for name in ('wandb', 'tensorboard') if self.config[f'{name}_log']]
        for name in used:
            if importlib.util.find_spec(name) is None:
                yield 'no', f'{name}_log=True needs: pip install -e ".[all]"'
            elif name == 'wandb' and not wandb_credentials():
                yield 'no', 'wandb has no key: run `wandb login`, or set WANDB_MODE=offline'
            else:
                yield 'ok', name
        if not used:
            yield 'ok', 'only metrics.jsonl'


CHECKS = (
    'settings', 'device', 'batch', 'dataset', 'reward', 'tokenizer', 'schedule', 'compile',
    'memory', 'folder', 'disk', 'trackers',
)  # fmt: skip


def external_shape(where: str) -> dict:
    """The shape of an external model, from its config.json, local or cached."""
    path = Path(where)
    if where in SIZES:
        n_layer, n_head, n_embd = SIZES[where]
        shape = {'n_layer': n_layer, 'n_head': n_head, 'n_embd': n_embd, 'vocab_size': 50257}
        return {**shape, 'bias': True, 'block_size': 1024}
    if (path / 'config.json').is_file():
        return parse_model_config(read_json(path / 'config.json', where), where)
    path = path / 'ckpt.pt' if path.is_dir() else path
    if path.is_file():  # nanoGPT's checkpoint: only its settings are read
        with suppress(Exception):
            return dict(torch.load(path, 'meta', weights_only=True, mmap=True)['model_args'])
        raise CheckpointError(
            f'{where}: is not a nanoGPT checkpoint; give a ckpt.pt or a run directory'
        )
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(where, 'config.json')
    if isinstance(cached, str):
        return parse_model_config(read_json(Path(cached), where), where)
    raise CheckpointError(
        f'{where}: is not downloaded yet, so its shape is unknown; first run hf download {where}'
    )


def check_shards(data: Dataset, live: bool, fix: str) -> Iterator[tuple[str, str]]:
    """Check all token ids and hashes; UserError for the first bad file."""
    meta = read_meta(data.folder)
    shards = [shard for split in SPLITS for shard in meta['splits'][split]['shards']]
    files = [(data.folder / s['file'], s.get('sha256'), True) for s in shards]
    if data.is_chat:
        masks = ((mask_file(s['file']), s.get('mask_sha256')) for s in shards)
        files += [(data.folder / name, digest, False) for name, digest in masks]
    size = sum(path.stat().st_size for path, _, _ in files)
    whole, hashed = size <= READ_ALL_BYTES, 0
    with tqdm(total=len(files), desc='reading the dataset', disable=not live, leave=False) as bar:
        for path, digest, ids in files:
            try:
                found = scan_file(path, meta['dtype'] if ids else None, data.vocab_size, whole)
            except ValueError as error:
                raise UserError(f'{error}: {fix}') from error
            if whole and digest and found != digest:
                raise UserError(f'{path}: was changed or damaged: {fix}')
            hashed += bool(whole and digest)
            bar.update()
    if not whole:
        yield (
            'warning',
            f'{size / 1e9:,.0f} GB are too much to read: {PIECES_PER_FILE} pieces of each of '
            f'{counted(len(files), "file")} were read, and no hash computed',
        )
    elif hashed < len(files):
        yield 'ok', 'every token id is in the vocabulary; there are no hashes to compare'
    else:
        yield (
            'ok',
            'every token id is in the vocabulary, and every file matches its hash',
        )


def scan_file(path: Path, dtype: str | None, vocab_size: int, whole: bool) -> str:
    """Check the token ids of a file, or of pieces of it -> its sha256.

    ValueError for an id outside the vocabulary.
    """
    digest, size = hashlib.sha256(), path.stat().st_size
    step = PIECE_BYTES if whole else max(PIECE_BYTES, size // PIECES_PER_FILE // 4 * 4)
    with path.open('rb') as file:
        for start in range(0, size, step):
            file.seek(start)
            raw = file.read(PIECE_BYTES)
            digest.update(raw)
            if dtype and raw:
                ids = np.frombuffer(raw, np.dtype(dtype).newbyteorder('<'))
                if ids.max() >= vocab_size:
                    at = start + int(ids.argmax()) * ids.itemsize
                    raise ValueError(
                        f'{path}: token id {ids.max()} at byte {at} is outside the vocabulary of '
                        f'{vocab_size} tokens'
                    )
    return digest.hexdigest()


def max_checkpoints(config: dict, data: Dataset | Mixture | None) -> int:
    """Checkpoints that a run keeps: the last two and the best, or one per evaluation."""
    every = config['eval_interval']
    steps = config['max_iters'] if data is None else steps_of(config, data)
    evaluations = 1 + (steps // every if every else 0)
    return max(3, evaluations + 1) if config['always_save_checkpoint'] else 3


def wandb_credentials() -> bool:
    """Whether wandb has an API key or needs none; the key itself is not read."""
    if os.environ.get('WANDB_MODE') in ('offline', 'disabled', 'dryrun'):
        return True
    if os.environ.get('WANDB_API_KEY'):
        return True
    with suppress(OSError, netrc.NetrcParseError):
        return 'api.wandb.ai' in netrc.netrc().hosts
    return False


def early_warnings(shape: GPTConfig, config: dict, runtime: Runtime) -> Iterator[str]:
    """Warnings from the cheap checks, which every run prints at its start."""
    workload, memory = workload_of(config, shape, runtime), available_memory(runtime)
    if memory is not None and min_bytes(workload) > memory:
        yield (
            f'this needs at least {min_bytes(workload) / 1e9:,.1f} GB, and {runtime.device} has '
            f'{memory / 1e9:,.1f} GB free; run the same command with --plan for suggestions'
        )
    if lack := host_memory_problem(workload):
        yield lack
    size, free = checkpoint_size(workload), free_bytes(config['out_dir'])
    if free < 2 * size and not config['eval_only']:
        yield (
            f'two checkpoints take {2 * size / 1e9:,.2f} GB, and {config["out_dir"]} has '
            f'{free / 1e9:,.2f} GB free; free disk space or choose another --out_dir'
        )
