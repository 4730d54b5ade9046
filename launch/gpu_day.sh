#!/usr/bin/env bash
# Every check and benchmark that needs a GPU: on one GPU, in at most nine minutes, without a network. Writes
# a table with a row for each, out/gpu_day/table.md, and continues after a failure:
#
#   bash launch/gpu_day.sh --data=DIR --nanogpt=DIR     # input.txt of Shakespeare, GPT-2's vocabulary
#   bash launch/gpu_day.sh --only=tests,decode
#
# Needs torch, transformers and numpy. PYTHON=... is the interpreter; --help lists the arguments.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" -m flatgpt.benchmarks.gpu_day "$@"
