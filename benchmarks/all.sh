#!/usr/bin/env bash
# Everything that speed depends on, measured in one command: bash benchmarks/all.sh [--dry-run]
# On a GPU also the tests that need one, and the whole of `report`, whose runs/report/timing.csv is the result.
# Without a GPU, scripts/on_gpu.py is tried in miniature, so that it runs as it is when there is one.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
cuda=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))')
if [ "$cuda" = 1 ]; then
  "$python" -m pytest -q tests/test_step.py
fi
for benchmark in augment train_step scaling; do
  "$python" -m "benchmarks.$benchmark" "$@"
done
if [ "${1:-}" = --dry-run ]; then
  run=$(mktemp -d)
  trap 'rm -rf "$run"' EXIT
  "$python" -m cifar_lib train --recipe report --run "$run/report" --epochs 1 --train-size 256 --set watch_test=false
  cat "$run/report/timing.csv"
elif [ "$cuda" = 1 ]; then
  "$python" -m cifar_lib train --recipe report --run runs/report
fi
if [ "$cuda" = 0 ]; then
  "$python" -m scripts.on_gpu --dry-run
fi
