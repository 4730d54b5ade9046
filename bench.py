"""
Benchmark this machine and this model against other implementations; print a table, write JSON.

$ python bench.py                                     # GPT-2 124M: several minutes
$ python bench.py --quick                             # a small model: a minute
$ python bench.py --only=decode --rows=1,16 --arch=modern
$ python bench.py train_shakespeare_char_cpu --vocab_size=65 --only=training --nanogpt=../nanoGPT
$ python bench.py --only=quality --out_dir=out/mine   # its perplexity in 32, 16 and 8 bits
$ python bench.py --only=data --text=corpus/          # tokenizers on your own files, and reading
$ python bench.py --only=training --profile           # the slowest operators, and a trace
$ python bench.py --only=rl --n_layer=6 --n_head=6 --n_embd=384  # compared with TRL
$ python bench.py --only=saving,processes             # the cost of checkpoints and of two processes
$ python bench.py --only=pieces                       # parts written out here, and torch's
$ python bench.py --only=grammar --rows=16            # what structured output adds to a step
$ python bench.py --only=speculation                  # guesses on texts that repeat themselves
$ python bench.py --only=scaling --dataset=pydocs     # the runs behind config/auto.py
$ python bench.py --only=rivals --dataset=mine --minutes=4  # config/auto.py and other shapes
$ python bench.py --serve --block_size=1024           # api.py under load, and transformers
$ python bench.py --task=lambada,cbt --out_dir=gpt2   # benchmark tasks, with GPT-2's scores
$ python bench.py --task=core --out_dir=gpt2          # DCLM's CORE, as nanochat reports it
$ python bench.py --compare=out/a,out/b               # plot the losses of runs into runs.png
$ python bench.py --report=out/a,out/b                # losses, settings, samples ... in report.html

Each implementation that is compared runs in its own process, with the same weights. Measurements
are interleaved: a round measures every implementation once, so that a machine's changing speed
favors none. Figures are medians over the rounds, with the lowest and the highest. A ratio of two
is printed only if both did the same amount of work with the same result, where there is one to
compare: the loss before training, a prompt's logits, tokens in float32.
"""

import importlib.metadata
import sys

from flatgpt.errors import UserError, check_range, one_line_errors

if __name__ == '__main__':
    one_line_errors()  # also for Ctrl-C during the slow imports below

import torch

from configurator import configure
from flatgpt.benchmarks.baselines import SMALL
from flatgpt.benchmarks.core import score_core
from flatgpt.benchmarks.data import bench_data
from flatgpt.benchmarks.decoding import (
    bench_generation,
    bench_quality,
    bench_startup,
    choose_formats,
)
from flatgpt.benchmarks.grammar import bench_grammar
from flatgpt.benchmarks.load_test import bench_serving
from flatgpt.benchmarks.machine import measure_machine
from flatgpt.benchmarks.pieces import bench_pieces
from flatgpt.benchmarks.report import Report, print_row
from flatgpt.benchmarks.run_report import write_report
from flatgpt.benchmarks.scaling import bench_rivals, bench_scaling
from flatgpt.benchmarks.speculation import bench_speculation
from flatgpt.benchmarks.training import bench_processes, bench_rl, bench_saving, bench_training
from flatgpt.benchmarks.validate import (
    check_benchmark_settings,
    check_memory,
    check_modes,
    check_used,
    check_writable,
    compared_runs,
    requested_benchmarks,
)
from flatgpt.runtime import Runtime, pick_device, pick_dtype
from flatgpt.training import metrics
from sample import load

# -----------------------------------------------------------------------------
# benchmarks
# '': training,prefill,decode,quality,data,startup; also rl,saving,processes,pieces,grammar,
# speculation,scaling,rivals
only = ''
quick = False  # fewer rounds and, unless a shape is given, a small model
rounds = 5  # repetitions: each implementation is measured once per round
nanogpt: str | None = None  # folder of a nanoGPT checkout to compare with
serve = False  # load-test api.py instead of these benchmarks
profile = False  # measure flatGPT once under torch's profiler, and write the trace
json = 'bench.json'  # output file with all figures
compare: str | None = None  # run directories 'a,b': plot their losses into runs.png instead
report: str | None = None  # run directories 'a,b': write report.html about them instead
start: str | None = None  # report: the prompt of its samples, or the message to a chat model
# training
steps = 3  # training steps per round
optimizer = 'adamw'  # or 'muon'
batch_size = 4  # sequences per step
dropout = 0.0  # probability of dropping an activation
compile: bool | str = 'auto'  # torch.compile; 'auto': on CUDA, as in a long run of train.py
# prefill and decoding
rows = '1,8,32'  # batch sizes, in sequences
prompt_tokens = 64  # tokens in each prompt
new_tokens = 64  # tokens generated after each prompt
formats = 'auto'  # of the weights, such as float32,bfloat16,int8; 'auto': those that are fast here
# serving
clients = 16  # concurrent clients; each sends its next request when the previous one is complete
serve_format = 'auto'  # number format of the weights; 'auto': bfloat16 if the hardware has it
# quality (perplexity in each format), and tasks (instead of benchmarks)
out_dir: str | None = None  # a run directory, gpt2, owner/name on the Hub, or a model folder
dataset: str | None = None  # of quality; None: that of the run
task = ''  # core; lambada,hellaswag,wikitext2,wikitext103,cbt,blimp and others of the harness
core_data: str | None = None  # task=core: its data, a folder or zip file; None: downloaded once
limit: int | None = None  # tasks: use only this many examples of each, the first; None: all
init_from = 'resume'  # tasks, without out_dir: 'resume' (the newest run in out/), or as out_dir
checkpoint: str | None = None  # of out_dir: None or 'best' (lowest validation loss), 'last', a path
tokenizer: str | None = None  # tasks: tokenizer for a model without one
quantize: str | None = None  # tasks: 'int8' for the scores of the quantized model
# scaling (also uses dataset, a list 'a,b', and seed) and rivals
max_tokens = 1_500_000.0  # scaling: train the models of the grid up to this many tokens
minutes = 4.0  # rivals: 1, 4 or 15
# data
text: str | None = None  # a folder of text; None: the source of Python's library and packages
text_bytes = 60_000_000  # maximum bytes of text to use
# model; the defaults are GPT-2 124M
arch = 'gpt2'  # or 'modern'
block_size = 256  # context length in tokens
vocab_size = 50304  # tokens in the vocabulary
n_layer = 12  # number of blocks
n_head = 12  # attention heads per block
n_embd = 768  # width of the embeddings
n_kv_head: int | None = None  # heads of keys and values, with arch='modern'; None: n_head
bias = False  # biases in linear layers and LayerNorm
# machine
device = 'auto'  # 'cpu', 'mps', 'cuda', 'cuda:1' ...; 'auto': a GPU if there is one
dtype = 'auto'  # 'float32', 'bfloat16' or 'float16'; 'auto': the fastest, but float32 for tasks
seed = 1337  # seed of weights, batches and prompts
# -----------------------------------------------------------------------------

BENCHMARKS = {  # in this order
    'training': bench_training,
    'prefill': bench_generation,
    'decode': bench_generation,
    'quality': bench_quality,
    'data': bench_data,
    'startup': bench_startup,
    'rl': bench_rl,
    'saving': bench_saving,
    'processes': bench_processes,
    'pieces': bench_pieces,
    'grammar': bench_grammar,
    'speculation': bench_speculation,
    'scaling': bench_scaling,
    'rivals': bench_rivals,
}
# only when `only` names them
EXTRA_BENCHMARKS = (
    'rl', 'saving', 'processes', 'pieces', 'grammar', 'speculation', 'scaling', 'rivals',
)  # fmt: skip
QUICK = {**SMALL, 'rounds': 3, 'rows': '1,8', 'text_bytes': 5_000_000}


def read_settings(argv: list[str]) -> dict:
    """The settings; with --quick, QUICK instead of the defaults."""
    given: dict[str, str] = {}
    settings = configure(globals(), argv, given=given)
    if settings['quick']:
        settings |= {name: value for name, value in QUICK.items() if name not in given}
    return settings


def run_benchmarks(settings: dict) -> None:
    """Run the benchmarks, or the load test of api.py."""
    names = requested_benchmarks(settings, [*BENCHMARKS], EXTRA_BENCHMARKS)
    check_used(settings, names)
    check_benchmark_settings(settings, names)
    check_writable(settings)
    device = pick_device(settings['device'])
    runtime = Runtime(device, pick_dtype(settings['dtype'], device, training=True))
    settings = {**settings, 'device': device, **choose_formats(settings, device)}
    check_memory(settings, runtime, names)
    report = Report(settings, measure_machine(runtime))
    settings['benchmarks'] = names
    functions = [bench_serving] if settings['serve'] else [BENCHMARKS[name] for name in names]
    print_row('benchmark', 'variant', 'tokens/s, median (low to high)', '')
    try:
        for bench in dict.fromkeys(functions):  # prefill and decoding share theirs
            bench(settings, runtime, report)
    finally:  # keep what was measured before an error
        report.write()


def bench_tasks(settings: dict) -> None:
    """Score a model on CORE, or on tasks of lm-evaluation-harness."""
    check_range(1, None, settings, 'limit')
    check_used(settings, ['task', *(['core'] if settings['task'] == 'core' else [])])
    check_writable(settings)
    versions = {'torch': torch.__version__}
    if settings['task'] == 'core':
        score = score_core
    else:
        try:
            from flatgpt.benchmarks.lm_eval import score_tasks as score
        except ModuleNotFoundError as error:
            text = f'task={settings["task"]}: needs pip install "lm_eval>=0.4.13"'
            raise UserError(text) from error
        versions['lm_eval'] = importlib.metadata.version('lm_eval')
    report = Report(settings, {'device': pick_device(settings['device']), **versions})
    try:
        score(settings, report.entries, load)
    finally:
        if report.entries:
            report.write()


def main(settings: dict) -> None:
    check_modes(settings)
    if settings['compare'] is not None:
        print(metrics.draw_runs(compared_runs(settings, 'compare'), 'runs.png'))
    elif settings['report'] is not None:
        print(write_report(settings, compared_runs(settings, 'report'), load))
    elif settings['task']:
        bench_tasks(settings)
    else:
        run_benchmarks(settings)


if __name__ == '__main__':
    main(read_settings(sys.argv[1:]))
