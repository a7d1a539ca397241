#!/usr/bin/env bash
# On a machine with one CUDA GPU, from the root of a clone, with nothing to download:
#
#   benchmarks/gpu.sh OUT
#
# Builds the native library (with csrc/cuda where nvcc is), runs tests/gpu, then the benchmarks of operators and models,
# each interrupted after a time of its own, under 9 minutes in all (pytest then keeps what it has). What fails is told at the end, and doesn't stop the rest. OUT
# gets limits.txt, build.txt, tests.txt, ops.txt, ops.json, model.txt and model.json.
set -uo pipefail
out=${1:?usage: benchmarks/gpu.sh OUT}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
failed=()

step() { # name seconds command...
    local name=$1 seconds=$2
    shift 2
    echo "== $name: $*"
    timeout --signal=INT --kill-after=10 "$seconds" "$@" >"$out/$name.txt" 2>&1 || failed+=("$name ($?)")
    tail -n 5 "$out/$name.txt"
}

build_cuda=0
command -v nvcc >/dev/null && compgen -G "csrc/cuda/*.cu" >/dev/null && build_cuda=1
step build 120 env DPDIFF_BUILD_CUDA=$build_cuda "$python" setup.py -q build_ext --inplace
step limits 30 "$python" -m benchmarks.limits --device cuda
step tests 120 "$python" -m pytest tests/gpu -q -p no:cacheprovider
step ops 170 "$python" -m pytest benchmarks/ops -q --device cuda --budget 0.2 --benchmark-columns=median,iqr --results "$out/ops.json"
step model 60 "$python" -m pytest benchmarks/model -q --device cuda --budget 0.2 --benchmark-columns=median,iqr --results "$out/model.json"

if ((${#failed[@]})); then
    echo "failed: ${failed[*]}"
    exit 1
fi
