"""
Look at checkpoints, check them, give them to others.

$ python -m flatgpt.checkpoint inspect out/my_run     # a table of its checkpoints
$ python -m flatgpt.checkpoint verify out/my_run      # recompute every hash
$ python -m flatgpt.checkpoint export out/my_run DIR  # for transformers; --format=gguf for
                                                      # llama.cpp, --format=peft for the adapter
"""

import argparse
import shutil
from pathlib import Path

from flatgpt.checkpoint.convert import (
    export_transformers,
    is_foreign,
)
from flatgpt.checkpoint.gguf import export_gguf
from flatgpt.checkpoint.load import (
    ADAPTER,
    find,
    list_checkpoints,
    load_model,
    read_state,
    shape_in,
    tokenizer_in,
    verify,
)
from flatgpt.checkpoint.peft import base_of, is_adapter
from flatgpt.checkpoint.weights import outline
from flatgpt.data.hf_tokenizer import MARKS
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.errors import CheckpointError, UserError, one_line_errors
from flatgpt.files import as_json, new_folder
from model import GPTConfig

LOSSES = ('train_loss', 'val_loss')  # that an evaluation can have measured


def report(paths: list[Path]) -> bool:
    """Print one line a checkpoint (step, losses, size, integrity) -> whether all are whole."""
    print(f'{"checkpoint":<16}{"train loss":>12}{"val loss":>12}{"MB":>9}  integrity')
    whole, last = True, None
    for path in paths:
        state = read_state(path) or {}
        losses = [state.get(k) if state.get('evaluated') else None for k in LOSSES]
        cells = ''.join(f'{"-":>12}' if loss is None else f'{loss:12.4f}' for loss in losses)
        size = sum(file.stat().st_size for file in path.rglob('*') if file.is_file()) / 1e6
        try:
            verify(path)
            integrity, last = 'ok', path
        except CheckpointError as error:
            integrity, whole = str(error).partition('is ')[2], False
        print(f'{path.name:<16}{cells}{size:9.1f}  {integrity}')
    if last:
        adapter = f'; LoRA of {base_of(last / ADAPTER)}' if is_adapter(last / ADAPTER) else ''
        print(describe(GPTConfig(**shape_in(last)), tokenizer_in(last)) + adapter)
    return whole


def describe(config: GPTConfig, tokenizer: Tokenizer | None) -> str:
    parameters = sum(p.numel() for p in outline(config).parameters())
    shape = f'{config.n_layer} layers of {config.n_embd}, {config.n_head} heads'
    name = tokenizer.name if tokenizer else 'none'
    return (
        f'{config.arch}, {parameters / 1e6:.2f}M parameters, {shape}, '
        f'context {config.block_size}; tokenizer {name}'
    )


def export(where: str, which: str, to: Path, kind: str, tokenizer: str | None) -> None:
    if kind == 'peft':
        return export_adapter(where, which, to)
    model, tokens, state = load_model(where, which, tokenizer=tokenizer)
    {'transformers': export_transformers, 'gguf': export_gguf}[kind](model, tokens, state, to)
    at = f', step {state["step"]}' if 'step' in state else ''
    print(f'{where}{at}: written to {to}{"" if tokens else ", without a tokenizer"}')


def export_adapter(where: str, which: str, to: Path) -> None:
    """The adapter of a run as a folder of its own, for `peft` and the base it names."""
    path = None if is_foreign(where) else find(where, which)
    if path is None or not is_adapter(path / ADAPTER):
        if is_adapter(where):
            raise UserError(f'{where} is an adapter already; without --format=peft it is merged')
        raise UserError(f'{where} has no adapter, which a run with --lora_rank makes')
    if is_adapter(base_of(path / ADAPTER)):
        raise UserError(
            f'{where}: its base {base_of(path / ADAPTER)} is an adapter too; without --format=peft '
            'the export has all of them merged'
        )
    tokenizer = tokenizer_in(path)
    with new_folder(to) as part:
        shutil.copytree(path / ADAPTER, part, dirs_exist_ok=True)
        if tokenizer and tokenizer.chat_template:
            (part / MARKS).write_bytes(as_json(tokenizer.chat_template))
    print(f'{path}: the adapter is written to {to}; its base is {base_of(to)}')


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m flatgpt.checkpoint',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument('command', choices=['inspect', 'verify', 'export'])
    parser.add_argument('out_dir', help="a run's folder, or what else --init_from takes")
    parser.add_argument('to', type=Path, nargs='?', help='export: the folder or file to write')
    parser.add_argument(
        '--format', choices=['transformers', 'gguf', 'peft'], default='transformers'
    )
    parser.add_argument('--checkpoint', default='best', help="'best', 'last', or the path of one")
    parser.add_argument('--tokenizer', help='a name, run or tokenizer.json to use instead')
    args = parser.parse_args(argv)
    if args.command == 'export':
        if args.to is None:
            raise UserError(f'say where to: python -m flatgpt.checkpoint export {args.out_dir} DIR')
        return export(args.out_dir, args.checkpoint, args.to, args.format, args.tokenizer)
    if is_foreign(args.out_dir):
        model, tokenizer, _ = load_model(args.out_dir, tokenizer=args.tokenizer)
        return print(f'{describe(model.config, tokenizer)}; read whole, there are no hashes')
    paths = list_checkpoints(args.out_dir) or [find(args.out_dir)]  # find() reports if none
    if not report(paths) and args.command == 'verify':
        raise CheckpointError(f'{args.out_dir} has damaged checkpoints')


if __name__ == '__main__':
    one_line_errors()
    main()
