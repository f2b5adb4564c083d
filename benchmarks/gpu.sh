#!/bin/sh
# What can only be shown on a CUDA device: tests, then figures as JSON with their conditions.
# Usage: benchmarks/gpu.sh FOLDER   (under 9 minutes; PYTHON names the interpreter)
set -u
out=${1:?usage: benchmarks/gpu.sh FOLDER}
python=${PYTHON:-python3}
cd "$(dirname "$0")/.." || exit 1
mkdir -p "$out"
PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH
status=0
$python -m pytest -m gpu -q -o filterwarnings=default tests/accel tests/kernels tests/tuner || status=1
$python -m benchmarks.gpu_accel --json "$out/gpu_accel.json" || status=1
$python -m benchmarks.gpu_moe --json "$out/gpu_moe.json" || status=1
exit $status
