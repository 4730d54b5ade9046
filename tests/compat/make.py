"""
Make the folder made_by_7300f54: files written by the code of that commit, and its results.

$ git clone . OLD && git -C OLD checkout 7300f54
$ python -m venv VENV && VENV/bin/pip install -e OLD
$ python tests/compat/make.py OLD VENV/bin/python

That commit is the last before the modules moved into flatgpt/. test_compat.py reads the folder with
today's code: two datasets, three runs and a batch of sample.py that were killed, and a checkpoint
exported for transformers. expected.json has the results of the old code: the losses after resuming,
the generated texts and the logits.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

MADE = Path(__file__).parent / 'made_by_7300f54'
SENTENCE = 'the cat sat on a mat and saw that the dog ran to his den as rain fell at noon. '
SETTINGS = """\
block_size = 64
batch_size = 4
gradient_accumulation_steps = 2
n_layer = 1
n_head = 2
n_embd = 8
learning_rate = 3e-2
max_iters = 40
warmup_iters = 0
lr_decay_iters = 40
eval_interval = 20
eval_iters = 2
sample_tokens = 0
device = 'cpu'
dtype = 'float32'
compile = False
"""
MODERN = ('--arch=modern', '--n_kv_head=1', '--optimizer=muon', '--muon_lr=0.05')
RUNS = {  # each stops after step 20 of 40
    'gpt2': ('--dataset=data/letters',),
    'modern': ('--dataset=data/bpe', *MODERN),
    'lora': ('--dataset=data/letters', '--init_from=runs/gpt2', '--lora_rank=2', '--seed=2'),
}
RESUME = ('--init_from=resume', '--max_iters=24')
NEW_RUNS = {  # started from the folder alone
    'init_from': ('--dataset=data/letters', '--init_from=runs/gpt2', '--max_iters=2'),
    'talks': ('--dataset=data/talks', '--init_from=runs/modern', '--max_iters=2'),
}
NEW_RUNS['talks'] += ('--objective=sft',)
PROMPT = 'the dog'
GREEDY = ('--temperature=0', '--num_samples=1', '--max_new_tokens=24', '--dtype=float32')
BATCH = ('--batch=prompts.txt', '--out=answers.jsonl', '--out_dir=runs/gpt2', '--rows=1')
LOGITS = """
import json, sys
import torch
from checkpoint import load_model
for where in sys.argv[1:]:
    model = load_model(where)[0]
    print(json.dumps(model(torch.arange(16)[None])[0][0, -1].tolist()))
"""
KILLED = """
import runpy, sys
import tqdm
class Killed(tqdm.tqdm):
    written = 0
    def update(self, n=1):  # for each answer that is written
        self.written += n
        if self.written == 3:
            raise KeyboardInterrupt
tqdm.tqdm = Killed
sys.argv[:] = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


class Old:
    """The commands of a clone of the old commit, run in a folder."""

    def __init__(self, clone, python, folder):
        self.clone, self.python, self.folder = Path(clone).resolve(), python, Path(folder)
        kept = {'PATH': os.environ['PATH'], 'HOME': str(folder)}
        self.environment = {**kept, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(self.clone)}

    def python_with(self, *args, status=0):
        command = [self.python, *map(str, args)]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        if done.returncode != status:
            sys.exit(f'{command}: {done.stdout}{done.stderr}')
        return done.stdout

    def __call__(self, script, *args):
        return self.python_with(self.clone / script, *args)

    def losses(self, name):
        """The losses of a run, by step."""
        lines = (self.folder / name / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
        found = {'loss': {}, 'val_loss': {}}
        for line in map(json.loads, lines):
            for key in found.keys() & line.keys():
                found[key][line['step']] = line[key]
        return found


def prepare(old):
    folder = old.folder
    (folder / 'text.txt').write_text(SENTENCE * 20, encoding='utf-8')
    talk = [{'role': 'user', 'content': 'the cat'}, {'role': 'assistant', 'content': 'sat'}]
    talks = '\n'.join([json.dumps({'messages': talk})] * 20)
    (folder / 'talks.jsonl').write_text(talks, encoding='utf-8')
    text = ('text.txt', '--workers=1')
    old('data/text/prepare.py', *text, '--out_dir=data/letters', '--tokenizer=char')
    bpe = ('--tokenizer=bpe', '--vocab_size=270')
    old('data/text/prepare.py', *text, '--out_dir=data/bpe', *bpe)


def kill(run):
    """Make a run look like one that was killed between steps 20 and 40."""
    (run / 'DONE').unlink()
    shutil.rmtree(run / 'checkpoints' / 'step-00000040')
    (run / 'loss.png').unlink()
    lines = (run / 'metrics.jsonl').read_text(encoding='utf-8').splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)['step'] <= 25]
    (run / 'metrics.jsonl').write_text(''.join(kept), encoding='utf-8')


def make(old):
    folder = old.folder
    prepare(old)
    for name, flags in RUNS.items():
        old('train.py', 'settings.py', f'--out_dir=runs/{name}', *flags)
        kill(folder / 'runs' / name)
    talks = ('--out_dir=data/talks', '--tokenizer=runs/modern', '--block_size=64')
    old('data/chat/prepare.py', 'talks.jsonl', *talks)
    old.python_with('-m', 'checkpoint', 'export', 'runs/modern', 'export')
    (folder / 'prompts.txt').write_text('the cat\na mat\nthe dog\nrain\nnoon\n', encoding='utf-8')
    old.python_with('-c', KILLED, old.clone / 'sample.py', *BATCH, *GREEDY, status=130)
    with (folder / 'answers.jsonl.part').open('a', encoding='utf-8') as part:
        part.write('{"line": 4, "prom')  # a line that a kill cut off


def expect(old):
    """The old code's results from its own folder; `old` runs in a copy."""
    names = [f'runs/{name}' for name in RUNS]
    folders = [*names, 'export']
    lines = old.python_with('-c', LOGITS, *folders).splitlines()
    expected = {'logits': dict(zip(folders, map(json.loads, lines), strict=True))}
    write = ('sample.py', PROMPT, *GREEDY)
    expected['text'] = {name: old(*write, f'--out_dir={name}') for name in folders[:-1]}
    expected['text']['export'] = old(*write, '--init_from=export')
    old('sample.py', *BATCH, *GREEDY)
    answers = (old.folder / 'answers.jsonl').read_text(encoding='utf-8').splitlines()
    expected['answers'] = [json.loads(line) for line in answers]
    expected['losses'] = {}
    for name, flags in NEW_RUNS.items():
        old('train.py', 'settings.py', f'--out_dir=new/{name}', *flags)
        expected['losses'][name] = old.losses(f'new/{name}')
    for name in names:
        old('train.py', f'{name}/config.py', *RESUME)
        losses = old.losses(name)
        expected['losses'][name] = {
            key: {step: loss for step, loss in each.items() if step > 20}
            for key, each in losses.items()
        }
    return expected


def main(clone, python):
    with tempfile.TemporaryDirectory() as scratch:
        folder, copy = Path(scratch) / 'made', Path(scratch) / 'copy'
        folder.mkdir()
        (folder / 'settings.py').write_text(SETTINGS, encoding='utf-8')
        make(Old(clone, python, folder))
        shutil.copytree(folder, copy)
        expected = expect(Old(clone, python, copy))
        text = json.dumps(expected, indent=1) + '\n'
        (folder / 'expected.json').write_text(text, encoding='utf-8')
        unneeded = shutil.ignore_patterns('.*', '*.lock', '__pycache__')
        shutil.rmtree(MADE, ignore_errors=True)
        shutil.copytree(folder, MADE, ignore=unneeded)


if __name__ == '__main__':
    main(*sys.argv[1:])
