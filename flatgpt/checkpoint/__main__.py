"""
Inspect, verify and export checkpoints.

$ python -m flatgpt.checkpoint inspect out/my_run     # a table of its checkpoints
$ python -m flatgpt.checkpoint verify out/my_run      # the same; fails if one is damaged
$ python -m flatgpt.checkpoint export out/my_run DIR  # for transformers; --format=gguf for
                                                      # llama.cpp, --format=peft for the adapter
$ python -m flatgpt.checkpoint export out/my_run my.html  # a page that runs it in a browser

inspect and verify both recompute every hash. verify also exits with an error if one does not match.
"""

import shutil
from pathlib import Path

from flatgpt.errors import ArgumentParser, CheckpointError, UserError, counted, one_line_errors

if __name__ == '__main__':
    one_line_errors()  # also for Ctrl-C during the slow imports below


from flatgpt.checkpoint.convert import export_transformers, is_external
from flatgpt.checkpoint.gguf import export_gguf
from flatgpt.checkpoint.load import (
    ADAPTER_FOLDER,
    find_checkpoint,
    find_damage,
    list_checkpoints,
    load_model,
    read_state,
    shape_in,
    tokenizer_in,
)
from flatgpt.checkpoint.page import export_page
from flatgpt.checkpoint.peft import base_of, is_adapter
from flatgpt.checkpoint.weights import meta_model
from flatgpt.data.hf_tokenizer import CHAT_TEMPLATE_FILE
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.files import as_json, atomic_folder
from model import GPTConfig

FORMATS = {'transformers': export_transformers, 'gguf': export_gguf, 'page': export_page}
LOSSES = ('train_loss', 'val_loss')  # of state.json, measured by an evaluation


def print_table(paths: list[Path]) -> bool:
    """Print a table of checkpoints (losses, size, integrity) -> whether all are intact."""
    print(f'{"checkpoint":<16}{"train loss":>12}{"val loss":>12}{"MB":>9}  integrity')
    intact, last = True, None  # last: the newest intact one
    for path in paths:
        state = read_state(path) or {}
        losses = [state.get(k) if state.get('evaluated') else None for k in LOSSES]
        cells = ''.join(f'{"-":>12}' if loss is None else f'{loss:12.4f}' for loss in losses)
        size = sum(file.stat().st_size for file in path.rglob('*') if file.is_file()) / 1e6
        damage = find_damage(path)
        intact, last = intact and not damage, last if damage else path
        print(f'{path.name:<16}{cells}{size:9.1f}  {f"damaged: {damage}" if damage else "ok"}')
    if last:
        adapter = last / ADAPTER_FOLDER
        adapter = f'; LoRA of {base_of(adapter)}' if is_adapter(adapter) else ''
        print(describe_model(GPTConfig(**shape_in(last)), tokenizer_in(last)) + adapter)
    return intact


def describe_model(config: GPTConfig, tokenizer: Tokenizer | None) -> str:
    parameters = sum(p.numel() for p in meta_model(config).parameters())
    shape = (
        f'{counted(config.n_layer, "layer")} of {config.n_embd}, {counted(config.n_head, "head")}'
    )
    name = tokenizer.name if tokenizer else 'none'
    return (
        f'{config.arch}, {parameters / 1e6:.2f}M parameters, {shape}, '
        f'context {config.block_size}; tokenizer {name}{"; reward model" if config.score else ""}'
    )


def export(where: str, which: str, to: Path, kind: str, tokenizer: str | None) -> None:
    if kind == 'peft':
        return export_adapter(where, which, to)
    scores = kind == 'transformers'  # AutoModelForSequenceClassification
    model, tokens, state = load_model(where, which, tokenizer=tokenizer, reward_model=scores)
    FORMATS[kind](model, tokens, state, to)
    at = f', step {state["step"]}' if 'step' in state else ''
    print(f'{where}{at}: written to {to}{"" if tokens else ", without a tokenizer"}')


def export_adapter(where: str, which: str, to: Path) -> None:
    """Write the adapter of a run as a folder for `peft`; its config gives the base model."""
    path = None if is_external(where) else find_checkpoint(where, which)
    adapter = path / ADAPTER_FOLDER if path else None
    if adapter is None or not is_adapter(adapter):
        if is_adapter(where):
            raise UserError(
                f'{where} is already an adapter; export it without --format=peft to merge it'
            )
        raise UserError(f'{where} has no LoRA adapter; export it without --format=peft')
    if is_adapter(base_of(adapter)):
        raise UserError(
            f'{where}: its base {base_of(adapter)} is an adapter, too; export it without '
            '--format=peft to merge them all'
        )
    tokenizer = tokenizer_in(path)
    with atomic_folder(to) as part:
        shutil.copytree(adapter, part, dirs_exist_ok=True)
        if tokenizer and tokenizer.chat_template:
            (part / CHAT_TEMPLATE_FILE).write_bytes(as_json(tokenizer.chat_template))
    print(f'{path}: adapter written to {to}; its base is {base_of(to)}')


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog='python -m flatgpt.checkpoint', description=__doc__)
    parser.add_argument('command', choices=['inspect', 'verify', 'export'])
    parser.add_argument('out_dir', help='a run directory, or any other model --init_from takes')
    parser.add_argument('to', type=Path, nargs='?', help='export: the folder or file to write')
    parser.add_argument(
        '--format',
        choices=[*FORMATS, 'peft'],
        help='export: a folder for transformers (default), a file for llama.cpp, a page for '
        'browsers (default for a name that ends with .html), or a LoRA adapter',
    )
    parser.add_argument(
        '--checkpoint',
        default='best',
        help="export: 'best' (default: lowest validation loss), 'last', or a path",
    )
    parser.add_argument(
        '--tokenizer', help="replaces the model's own: a name, a run or a tokenizer.json"
    )
    args = parser.parse_intermixed_args(argv)  # flags may stand between the arguments
    if args.command == 'export':
        if args.to is None:
            raise UserError(
                'export needs a folder or file to write: '
                f'python -m flatgpt.checkpoint export {args.out_dir} DIR'
            )
        kind = args.format or ('page' if args.to.suffix == '.html' else 'transformers')
        return export(args.out_dir, args.checkpoint, args.to, kind, args.tokenizer)
    if is_external(args.out_dir):
        model, tokenizer, _ = load_model(args.out_dir, tokenizer=args.tokenizer, reward_model=True)
        return print(f'{describe_model(model.config, tokenizer)}; loaded, it has no hashes')
    # find_checkpoint() reports if there is none
    paths = list_checkpoints(args.out_dir) or [find_checkpoint(args.out_dir)]
    if not print_table(paths) and args.command == 'verify':
        raise CheckpointError(f'{args.out_dir} has damaged checkpoints; delete their folders')


if __name__ == '__main__':
    one_line_errors()
    main()
