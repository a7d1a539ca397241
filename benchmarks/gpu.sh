#!/usr/bin/env bash
# On a machine with one CUDA GPU, from the root of a clone, with nothing to download:
#
#   benchmarks/gpu.sh OUT
#
# Builds the native library (with csrc/cuda where nvcc is), runs tests/gpu, the benchmarks of operators and models, and
# the sweep over tile sizes, each stopped after a time of its own, under 9 minutes in all; what was measured by then is
# kept. OUT gets a log of each step, results/*.json, tune.json, and README.md with tables and plots. What fails is told at
# the end, and doesn't stop the rest. "dpdiff" is Triton's implementation, which has to be asked for.
set -uo pipefail
out=${1:?usage: benchmarks/gpu.sh OUT}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1
python=${PYTHON:-python3}
failed=()

step() { # name seconds command...
    local name=$1 seconds=$2
    shift 2
    echo "== $name: $*"
    # Interrupted, pytest writes what it has.
    timeout --signal=INT --kill-after=10 "$seconds" "$@" >"$out/$name.txt" 2>&1 || failed+=("$name ($?)")
    tail -n 5 "$out/$name.txt"
}

build_cuda=0
command -v nvcc >/dev/null && compgen -G "csrc/cuda/*.cu" >/dev/null && build_cuda=1
step build 100 env DPDIFF_BUILD_CUDA=$build_cuda "$python" setup.py -q build_ext --inplace
if ((build_cuda)) && ! compgen -G "dpdiff_kernels/_C*.so" >/dev/null; then
    step build_cpu 25 "$python" setup.py -q build_ext --inplace
fi
step tests 95 "$python" -m pytest tests/gpu -q -p no:cacheprovider
if command -v compute-sanitizer >/dev/null; then # every instruction is checked: one small case of each kernel
    step sanitize 30 compute-sanitizer --target-processes all --error-exitcode 3 "$python" -m pytest tests/gpu/test_nearest.py \
        -q -p no:cacheprovider -k "equal_prototypes or values_and_gradients or statistics"
fi
export DPDIFF_BACKEND=triton
mkdir -p "$out/results"
bench() { # suite seconds
    step "$(basename "$1")" "$2" "$python" -m pytest "benchmarks/$1" -q -p no:cacheprovider --device cuda --budget 0.1 \
        --benchmark-columns=median,iqr --results "$out/results/$(basename "$1" .py).json"
}
bench ops/bench_attention.py 60
bench ops/bench_nearest.py 45
bench ops/bench_sinkhorn.py 45
bench ops/bench_scaling.py 20
bench model 30
step tune 60 "$python" -m benchmarks.tune --seconds 40 --json "$out/tune.json"
step report 25 "$python" -m benchmarks.report "$out"/results/*.json --page "$out/README.md"

if ((${#failed[@]})); then
    echo "failed: ${failed[*]}"
    exit 1
fi
