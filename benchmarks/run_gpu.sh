#!/usr/bin/env bash
# Build, whole test suite and every benchmark on a GPU machine, in one command:
#
#     benchmarks/run_gpu.sh OUT
#
# Uses the python3 on PATH with the torch it holds (nothing is downloaded). OUT gets tests/ (a log and
# an XML per file), benchmarks.log, benchmarks.json, train-step-*.json and about.txt. Exit status: 0 if all of it passed.
set -uo pipefail
out=$(mkdir -p "${1:?where to write the results}" && cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
status=0

python3 setup.py build_ext --inplace >"$out/build.log" 2>&1 || { status=1; tail "$out/build.log"; }
{ python3 -m dde_fast; nvidia-smi; } >"$out/about.txt" 2>&1 || status=1
cat "$out/about.txt"

# benchmarks first: they are what cannot be had elsewhere, should time run out
python3 -m pytest benchmarks/ --benchmark-only --benchmark-json="$out/benchmarks.json" \
    --benchmark-columns=median,iqr,rounds -q 2>&1 | tee "$out/benchmarks.log" | tail -n 5
status=$((status | PIPESTATUS[0]))
for case in embedded sd15 sdxl "sd15 --compile regional" "sdxl --compile regional" "sd15 --compile whole"; do
    name="train-step-${case// --compile /-}"
    # shellcheck disable=SC2086  # a case with its flags
    python3 benchmarks/bench_train_step.py $case --output "$out/$name.json" \
        >"$out/$name.log" 2>&1 || { status=1; tail -n 3 "$out/$name.log"; }
done
# then the tests, a file per process: most of them wait for processes and compilers of their own
mkdir -p "$out/tests"
ls tests/test_*.py | OMP_NUM_THREADS=2 xargs -P 6 -I{} sh -c \
    'python3 -m pytest --junitxml="$1/$(basename "$2" .py).xml" --durations=3 -q "$2" \
     >"$1/$(basename "$2" .py).log" 2>&1' _ "$out/tests" {} || status=1
grep -hE "^(FAILED|ERROR)|(passed|failed|error).* in " "$out"/tests/*.log
exit $status
