#!/usr/bin/env bash
# The benchmarks of a GPU: one card, under 9 minutes, no network.
#
#   benchmarks/gpu.sh [--dry]      --dry: at toy size on a CPU, with interpreted kernels
#
# Each step is a process of its own with its own time limit; it appends its result to
# runs/gpu/results.jsonl at once, so one that fails loses only itself. PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
out=runs/gpu
results=$out/results.jsonl
mkdir -p "$out"
: > "$results"
export XLA_PYTHON_CLIENT_PREALLOCATE=false

failed=0
step() {  # step SECONDS NAME [ARGUMENT...]
  local seconds=$1; shift
  if ! timeout --kill-after=5 "$seconds" "$python" -m benchmarks.gpu "$@" "--results=$results" \
      > "$out/$1.log" 2>&1; then
    printf '{"step": "%s", "failed": true, "log": "%s"}\n' "$1" "$out/$1.log" >> "$results"
    failed=1
  fi
  tail -n 1 "$results"
}

# What is most wanted comes first.
step 90 equality "$@"
step 75 pretrain_flash "$@"
step 75 pretrain_xla "$@"
step 100 pretrain_peer "$@"
step 60 score_flash "$@"
step 60 shared_flash "$@"
step 60 shared_peer "$@"
exit $failed
