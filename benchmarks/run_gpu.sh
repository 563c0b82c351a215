#!/usr/bin/env bash
# Build, every benchmark and the whole test suite on a GPU machine, in one command:
#
#     MINUTES=12 benchmarks/run_gpu.sh OUT
#
# Uses the python3 on PATH with the torch it holds (nothing is downloaded). Each part has a budget;
# what is cut off, failed or skipped is said, and stands in OUT/not-done.txt. OUT gets a log of each
# part, kernels.json, train-step-*.json, scaling-*.json (from two GPUs on), tests/ (a log and
# an XML per file). Exit status: 0 if all of it ran and passed.
set -uo pipefail
out=$(mkdir -p "${1:?where to write the results}" && cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
end=$((SECONDS + 60 * ${MINUTES:-12}))
status=0
: >"$out/not-done.txt"

not_done() { echo "$*" | tee -a "$out/not-done.txt"; status=1; }

# part NAME SECONDS COMMAND…: within its budget and what is left of the whole
part() {
    local name=$1 budget=$2 left=$((end - SECONDS)) began=$SECONDS code
    shift 2
    [ "$left" -ge "$budget" ] || budget=$left
    if [ "$budget" -lt 20 ]; then not_done "skipped, no time left: $name"; return; fi
    timeout --kill-after=10 "$budget" "$@" >"$out/$name.log" 2>&1
    code=$?
    case $code in
        0) echo "$name: done in $((SECONDS - began)) s" ;;
        124 | 137) not_done "cut off after $budget s: $name" ;;
        *) not_done "failed ($code): $name"; tail -n 5 "$out/$name.log" ;;
    esac
}

# step NAME SECONDS CASE FLAGS…
step() {
    local name=train-step-$1 budget=$2
    shift 2
    part "$name" "$budget" python3 benchmarks/bench_train_step.py "$@" --rounds 10 --output "$out/$name.json"
}

part build 120 python3 setup.py build_ext --inplace
part about 60 sh -c 'python3 -m dde_fast; nvidia-smi'
cat "$out/about.log"

# what cannot be had elsewhere comes first, should time run out
part cuda 60 python3 -m pytest tests/test_cuda.py -q
step sd15 150 sd15
step sdxl 210 sdxl
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 1 ]; then
    part scaling-sd15 120 python3 benchmarks/scaling.py sd15 --rounds 4 --output "$out/scaling-sd15.json"
else
    echo "scaling: skipped, it wants two GPUs, here is $gpus"
fi
part kernels 180 python3 -m pytest benchmarks/ --benchmark-only --benchmark-json="$out/kernels.json" \
    --benchmark-columns=median,iqr,rounds -q
step embedded 40 embedded
# then the tests, a file per process: most of them wait for processes and compilers of their own
mkdir -p "$out/tests"
tests() {
    ls tests/test_*.py | OMP_NUM_THREADS=2 xargs -P 6 -I{} sh -c \
        'python3 -m pytest --junitxml="$1/$(basename "$2" .py).xml" --durations=3 -q "$2" \
         >"$1/$(basename "$2" .py).log" 2>&1' _ "$out/tests" {}
}
export -f tests
export out
part tests 900 bash -c tests
grep -hE "^(FAILED|ERROR)|(passed|failed|error).* in " "$out"/tests/*.log
cat "$out/not-done.txt"
exit $status
