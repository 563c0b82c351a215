#!/usr/bin/env bash
# What a GPU machine is for, in one command:
#
#     MINUTES=12 PARTS="build cuda kernels tests levers steps" benchmarks/run_gpu.sh OUT
#
# Uses the python3 on PATH with the packages it holds (nothing is downloaded). PARTS are done in that
# order, all of them unless given, which takes half an hour; `tests` alone MINUTES=10, `levers` 6, `steps` 9.
# Each command has a budget, and what earlier ones left of theirs; what is cut off, failed or skipped is said, and stands in
# OUT/not-done.txt. OUT gets kernels-*.json, tuned-*.json, unet-levers-*.json, train-step-*.json (scaling-sd15.json
# where there are several GPUs), and logs.tar.gz: these again and a log of everything. Each call its own.
# DDE_FAST_COMMIT names the commit of a tree without .git. Exit status: 0 if all of it ran and passed.
set -uo pipefail
out=$(mkdir -p "${1:?where to write the results}/logs/tests" && cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 out
parts=${PARTS:-build cuda kernels tests levers steps}
for name in $parts; do
    case $name in build | cuda | kernels | tests | levers | steps) ;; *) echo "no such part: $name"; exit 2 ;; esac
done
missing=$(python3 -c 'from importlib.util import find_spec
names = "torch triton diffusers deepspeed transformers pytest pytest_benchmark".split()
print(*(name for name in names if find_spec(name) is None))') || exit 2
if [ -n "$missing" ]; then echo "not installed: $missing"; exit 2; fi
end=$((SECONDS + 60 * ${MINUTES:-12})) due=$SECONDS status=0
: >"$out/not-done.txt"

wanted() { [[ " $parts " == *" $1 "* ]]; }

not_done() { echo "$*" | tee -a "$out/not-done.txt"; status=1; }

# part NAME SECONDS COMMAND…: within its budget, what the ones before left, and the whole
part() {
    local name=$1 budget began=$SECONDS code
    due=$((due + $2))
    budget=$(((due < end ? due : end) - SECONDS))
    shift 2
    if [ "$budget" -lt 20 ]; then not_done "skipped, no time left: $name"; return; fi
    : >"$out/logs/$name.log"
    timeout --kill-after=10 "$budget" "$@" >>"$out/logs/$name.log" 2>&1  # what else opens it appends too
    code=$?
    case $code in
        0) echo "$name: done in $((SECONDS - began)) s" ;;
        124 | 137) not_done "cut off after $budget s: $name" ;;
        *) not_done "failed ($code): $name"; tail -n 5 "$out/logs/$name.log" ;;
    esac
}

# rows NAME OP SECONDS BATCHES WHICH: a file each, as it is written at the end; fewer and shorter rows than a CPU's
rows() {
    part "$1-$2" "$3" env BENCH_BATCHES="$4" BENCH_SECONDS=0.05 python3 -m pytest \
        "benchmarks/bench_$2.py" -k "$5" --benchmark-only -q -s \
        --benchmark-columns=median,iqr,rounds --benchmark-json="$out/$1-$2.json"
}

kernels() { rows kernels "$1" "$2" "1 16 128" "not sd3"; }

# Triton's again, tuned; the log holds rows for dde_fast/triton_configs.py
tuned() { DDE_FAST_AUTOTUNE=1 rows tuned "$1" "$2" 16 "triton and warm and not sd3"; }

# script NAME SECONDS COMMAND…: a benchmark that writes NAME.json
script() {
    local name=$1 seconds=$2
    shift 2
    part "$name" "$seconds" python3 "$@" --output "$out/$name.json"
}

# a file per process: most of the tests wait for processes and compilers of their own
tests() {
    ls tests/test_*.py | OMP_NUM_THREADS=2 xargs -P 6 -I{} sh -c 'name=$(basename "$1" .py)
        python3 -m pytest --junitxml="$out/logs/tests/$name.xml" --durations=3 -q "$1" \
            >"$out/logs/tests/$name.log" 2>&1' _ {}
}
export -f tests

if wanted build; then
    part build 170 env DDE_FAST_CUDA=1 python3 setup.py build_ext --inplace
    part built 30 python3 -c 'import sys; from dde_fast import compiled; sys.exit(compiled.why_not("cuda"))'
    part about 30 sh -c 'python3 -m dde_fast; nvidia-smi'
    cat "$out/logs/about.log" 2>/dev/null
fi
# each test said as it ends, in case of a cut; pytest is content even if it skips every one
passed() {
    part "$1" "$2" bash -o pipefail -c \
        "python3 -m pytest tests/test_$1.py -v --tb=short -rs $3 | tee -a /dev/stderr | grep ' passed'"
}
if wanted cuda; then
    passed cuda 75 -x  # after a bad address all others would fail as well
    passed cuda_ops 45 ""
fi
if wanted kernels; then
    kernels noise 40; kernels ddim 40; kernels loss 110
    tuned noise 25; tuned ddim 25; tuned loss 40
fi
wanted tests && part tests 600 bash -c tests
if wanted levers; then
    script unet-levers-sd15 200 benchmarks/unet_levers.py sd15
    script unet-levers-sdxl 160 benchmarks/unet_levers.py sdxl
fi
if wanted steps; then
    step=benchmarks/bench_train_step.py
    script train-step-sd15 90 $step sd15 --rounds 4
    script train-step-sdxl 140 $step sdxl --rounds 4
    script train-step-sd15-regional 100 $step sd15 --compile regional --rounds 4
    script train-step-sdxl-regional 160 $step sdxl --compile regional --rounds 4
    script train-step-embedded 40 $step embedded --rounds 10
    [ "$(python3 -c 'import torch; print(torch.cuda.device_count())')" -lt 2 ] ||
        script scaling-sd15 120 benchmarks/scaling.py sd15 --rounds 4
fi
grep -hE "^(FAILED|ERROR)|(passed|failed|error).* in " "$out"/logs/tests/*.log 2>/dev/null
cat "$out/not-done.txt"
(cd "$out" && tar -czf logs.tar.gz logs not-done.txt $(ls -- *.json 2>/dev/null) && rm -r logs)
exit $status
