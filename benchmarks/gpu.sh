#!/usr/bin/env bash
# Build, test and time everything on a machine with an NVIDIA GPU, in under ten minutes and without a network:
#
#     benchmarks/gpu.sh OUT
#
# Needs Python with torch (CUDA), Triton, pytest, setuptools and a C++ compiler; transformers, peft and loralib are
# compared with where they are installed (wheels in wheels/ are installed first). Every step has a time limit, none stops
# the next. OUT gets steps.csv (step, exit status, seconds), one log a step, linear-native.csv and linear-triton.csv.
set -u
[ $# -eq 1 ] || { echo "usage: $0 OUT" >&2; exit 2; }
cd "$(dirname "$0")/.." || exit 2
mkdir -p "$1" && OUT=$(cd "$1" && pwd) || exit 2
export OUT PYTHON=${PYTHON:-python3} PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# The tests fill fresh memory with NaN through torch's deterministic mode, in which cuBLAS wants this.
export CUBLAS_WORKSPACE_CONFIG=:4096:8
echo "step,status,seconds" >"$OUT/steps.csv"
failed=0

# step NAME SECONDS COMMAND: runs it, its output in NAME.log, a line in steps.csv.
step() {
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    timeout --kill-after=5 "$limit" bash -c "$*" >"$OUT/$name.log" 2>&1
    status=$?
    [ $status -eq 0 ] || failed=1
    echo "$name,$status,$((SECONDS - start))" | tee -a "$OUT/steps.csv"
}

step facts 20 '
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
    git rev-parse HEAD; git status --short
    $PYTHON -c "import sys, torch, triton; print(sys.version, torch.__version__, torch.version.cuda, triton.__version__)"'

step build 130 '
    for wheel in wheels/*.whl; do [ -e "$wheel" ] && $PYTHON -m pip install --no-index --no-deps "$wheel"; done
    export FASTLORA_REQUIRE_EXT=1 MAX_JOBS=$(nproc)
    $PYTHON -m pip install --no-index --no-build-isolation --no-deps -e . || $PYTHON setup.py build_ext --inplace
    $PYTHON -c "import fastlora, fastlora.kernels; from fastlora import _C; print(_C)"'

# One process a file: most of the time goes into compiling the kernels, on the host.
step kernels 120 '
    cd tests/kernels && logs=$(mktemp -d) && status=0 && pids=()
    for file in check_*.py; do
        $PYTHON -m pytest -q -p no:cacheprovider --tb=short "$file" >"$logs/$file.log" 2>&1 & pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || status=1; done
    cat "$logs"/*.log; exit $status'

step native 165 '$PYTHON -m benchmarks.run --op linear --device cuda --only 4096x4096 --out "$OUT/linear-native.csv"'
step triton 155 'FASTLORA_BACKEND=triton \
    $PYTHON -m benchmarks.run --op linear --device cuda --only 4096x4096 --out "$OUT/linear-triton.csv"'
exit $failed
