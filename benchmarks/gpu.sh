#!/usr/bin/env bash
# On a machine with one CUDA GPU, from the root of a clone, with nothing to download:
#
#   benchmarks/gpu.sh OUT [SECONDS]
#
# Compiling is most of the work. So at first, at the same time and in at most half of the SECONDS (520), the native
# library is built (with csrc/cuda where nvcc is), tests/gpu run, and the benchmarks run untimed, which leaves their
# kernels in the caches of Triton and inductor. Then the GPU is left to one process at a time: the benchmarks, what
# matters most first, and with the time that is left the sweep over tile sizes. What was measured when a step's time is
# up is kept. OUT gets a log of each step, results/benchmarks.json, tune.json, and README.md with tables and plots. What
# fails, is stopped (124), or has no time left is told at the end, and doesn't stop the rest.
set -uo pipefail
set -m # background steps would ignore the interrupt that ends them
out=${1:?usage: benchmarks/gpu.sh OUT [SECONDS]}
seconds=${2:-520}
mkdir -p "$out/results"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TORCHINDUCTOR_COMPILE_THREADS=1 # each process is one of many
python=${PYTHON:-python3}
cores=$(nproc)
failed=$out/failed.txt # a file: steps in the background have no other way to tell
: >"$failed"

step() { # name seconds command...
    local name=$1 left=$((end - SECONDS))
    local limit=$(($2 < left ? $2 : left))
    shift 2
    if ((limit < 2)); then
        echo "$name (no time left)" >>"$failed"
        return
    fi
    # Interrupted, pytest writes what it has.
    timeout --signal=INT --kill-after=10 "$limit" "$@" >"$out/$name.txt" 2>&1 || echo "$name ($?)" >>"$failed"
    echo "== $name, done after $SECONDS s in all: $*"
    tail -n 5 "$out/$name.txt"
}

run_tests() { # name seconds arguments of pytest...
    step "$1" "$2" "$python" -m pytest -q -p no:cacheprovider "${workers[@]}" "${@:3}"
}

build() {
    local cuda=0
    command -v nvcc >/dev/null && compgen -G "csrc/cuda/*.cu" >/dev/null && cuda=1
    step build 150 env DPDIFF_BUILD_CUDA=$cuda "$python" setup.py -q build_ext --inplace
    if ((cuda)) && ! compgen -G "dpdiff_kernels/_C*.so" >/dev/null; then
        step build_cpu 60 "$python" setup.py -q build_ext --inplace
    elif ((cuda)); then # what the tests that began before it was built have skipped
        run_tests tests_cuda 60 tests/gpu/test_sinkhorn.py -k cuda
    fi
}

suites=(benchmarks/ops/bench_{attention,sinkhorn,nearest}.py benchmarks/model benchmarks/ops/bench_scaling.py)
workers=()
"$python" -c "import xdist" 2>/dev/null && workers=(-n $(((cores + 1) / 2)) --dist worksteal)

end=$((seconds / 2))
build &
run_tests tests 200 tests/gpu &
run_tests warm_up 200 "${suites[@]}" --device cuda --benchmark-disable -k "not reference" &
if command -v compute-sanitizer >/dev/null; then # every instruction is checked: one small case of each kernel
    step sanitize 120 compute-sanitizer --target-processes all --error-exitcode 3 "$python" -m pytest \
        tests/gpu/test_nearest.py -q -p no:cacheprovider -k "equal_prototypes or values_and_gradients or statistics" &
fi
wait

end=$((seconds - 15)) # which the report has
export PYTEST_TIMEOUT=80 # seconds of one contender, where pytest-timeout is installed
step benchmarks 270 "$python" -m pytest "${suites[@]}" -q -p no:cacheprovider --device cuda --budget 0.05 \
    --benchmark-columns=median,iqr --results "$out/results/benchmarks.json"
half=$(((end - SECONDS - 20) / 2)) # to compile ahead, and to time
half=$((half < 0 ? 0 : half > 80 ? 80 : half))
step tune 200 "$python" -m benchmarks.tune --processes "$cores" --seconds "$half" --json "$out/tune.json"
end=$seconds
step report 25 "$python" -m benchmarks.report "$out"/results/*.json --page "$out/README.md"

if [[ -s $failed ]]; then
    echo "failed: $(paste -sd ' ' "$failed")"
    exit 1
fi
