#!/usr/bin/env bash
# Build, test and time everything on a machine with an NVIDIA GPU, without a network:
#
#     benchmarks/gpu.sh OUT [--only PART]...
#
# Parts, in this order: correctness (the cases of tests/cuda on the GPU, tests/kernels, and lora_linear and
# lora_shrink against float64), sanitize (compute-sanitizer on small cases, where it is found), linear, decode,
# backward, gated, routed, model. What comes before them, facts and build, is a part of each. A step that succeeded,
# except build, is not run again in the same OUT for the same commit and GPU, unless the tree has changes; and a part
# that is cut short goes on after its last case: run it as often as needed, in pieces of any length.
#
# Needs Python with torch (CUDA), nvcc, pytest, setuptools and a C++ compiler; Triton, transformers, peft and loralib
# are compared with where they are installed (wheels in wheels/ are installed first). Every step has a time limit, none
# stops the next. OUT gets steps.csv (step, exit status, seconds, commit, GPU or host), a log a step, a CSV a part, and
# the rows that docs/gpu-status.md would get, in the logs and last on the terminal.
set -u
usage() { echo "usage: $0 OUT [--only correctness|sanitize|linear|decode|backward|gated|routed|model]..." >&2; exit 2; }
[ $# -ge 1 ] || usage
cd "$(dirname "$0")/.." || exit 2
mkdir -p "$1" && OUT=$(cd "$1" && pwd) || exit 2
shift
PARTS=()
while [ $# -gt 0 ]; do
    [ "$1" = --only ] && [ $# -ge 2 ] || usage
    case $2 in
    correctness | sanitize | linear | decode | backward | gated | routed | model) PARTS+=("$2") ;;
    *) usage ;;
    esac
    shift 2
done
[ ${#PARTS[@]} -gt 0 ] || PARTS=(correctness sanitize linear decode backward gated routed model)
export OUT PYTHON=${PYTHON:-python3} PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# The tests fill fresh memory with NaN through torch's deterministic mode, in which cuBLAS wants this.
export CUBLAS_WORKSPACE_CONFIG=:4096:8
# As benchmarks/machine.py has it: '+' where the tree has changes, '?' where git does not say.
changed=$(git status --porcelain -uno 2>/dev/null) && COMMIT=$(git rev-parse --short=10 HEAD 2>/dev/null) || COMMIT='?'
! grep -q -v -E '^$|^.. (benchmarks/results/|README\.md)' <<<"$changed" || COMMIT=$COMMIT+
WHERE=$(timeout 20 nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null) || WHERE=$(uname -n)
WHERE=$(sort -u <<<"$WHERE" | tr -c 'A-Za-z0-9\n' - | paste -sd+)
[ -e "$OUT/steps.csv" ] || echo "step,status,seconds,commit,device" >"$OUT/steps.csv"
failed=0

# step NAME SECONDS COMMAND: runs it, its output in NAME.log, a line in steps.csv; not again where it succeeded.
step() {
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    case $name,$COMMIT in
    build,* | *'?' | *+) ;; # incremental; or another tree may have the same name
    *) if cut -d, -f1,2,4- "$OUT/steps.csv" | grep -q -x -F "$name,0,$COMMIT,$WHERE"; then
        echo "$name: done before"
        return
    fi ;;
    esac
    timeout --kill-after=5 "$limit" bash -c "$*" >"$OUT/$name.log" 2>&1
    status=$?
    [ $status -eq 0 ] || failed=1
    echo "$name,$status,$((SECONDS - start)),$COMMIT,$WHERE" | tee -a "$OUT/steps.csv"
}

step facts 20 '
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
    git rev-parse HEAD; git status --short
    $PYTHON -c "import sys, torch; print(sys.version, torch.__version__, torch.version.cuda)"
    nvcc --version; $PYTHON -m pip list 2>/dev/null | grep -i -E "^(triton|peft|loralib|transformers) "; true'

step build 400 '
    for wheel in wheels/*.whl; do [ -e "$wheel" ] && $PYTHON -m pip install --no-index --no-deps "$wheel"; done
    export FASTLORA_REQUIRE_EXT=1 FASTLORA_CUDA=1 MAX_JOBS=$(nproc)
    $PYTHON -m pip install --no-index --no-build-isolation --no-deps -e . || $PYTHON setup.py build_ext --inplace
    $PYTHON -m fastlora info
    $PYTHON -c "import fastlora; from fastlora import backends; assert not backends.cuda_missing()"'

# What each kernel computes, then Triton's (a process a file: most of the time goes into compiling, on the host), then
# two ops, composed and by the kernels, against float64.
correctness() {
    step cuda-cases 400 'cd tests/cuda && FASTLORA_CUDA_DEVICE=cuda $PYTHON -m pytest -q -p no:cacheprovider \
        --tb=short $(ls test_*.py | grep -v -E "test_(ptx|engine|library|glue|choice|gpu_sh)\.py")'
    step triton-cases 120 '
        cd tests/kernels && logs=$(mktemp -d) && status=0 && pids=()
        for file in check_*.py; do
            $PYTHON -m pytest -q -p no:cacheprovider --tb=short "$file" >"$logs/$file.log" 2>&1 & pids+=($!)
        done
        for pid in "${pids[@]}"; do wait "$pid" || status=1; done
        cat "$logs"/*.log; exit $status'
    step ops 200 '$PYTHON -m benchmarks.gpu_check'
}

sanitize() {
    command -v compute-sanitizer >/dev/null || { echo "sanitize: there is no compute-sanitizer"; return; }
    for tool in memcheck racecheck synccheck; do
        step "sanitize-$tool" 300 "cd tests/cuda && FASTLORA_CUDA_DEVICE=cuda \
            compute-sanitizer --tool $tool --error-exitcode 9 \
            \$PYTHON -m pytest -q -x -p no:cacheprovider --tb=short -k 'split or off or straddle or slices' \
            \$(ls test_*.py | grep -v -E 'test_(ptx|engine|library|glue|choice|gpu_sh)\.py')"
    done
}

for part in "${PARTS[@]}"; do
    case $part in
    correctness | sanitize) $part ;;
    model) step model 1200 '$PYTHON -m benchmarks.gpu model --out "$OUT/model.csv"' ;;
    *) step "$part" 400 "\$PYTHON -m benchmarks.gpu $part --out \"\$OUT/$part.csv\"" ;;
    esac
done
for part in "${PARTS[@]}"; do
    [ ! -e "$OUT/$part.log" ] || grep -E '^(\||[-+]\||csrc/cuda.h|docs/gpu-status)' "$OUT/$part.log"
done
exit $failed
