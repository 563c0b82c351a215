#!/usr/bin/env bash
# What a GPU machine is for, in one command:
#
#     MINUTES=9 PARTS="build cuda kernels tests levers steps" benchmarks/run_gpu.sh OUT
#
# Uses the python3 on PATH with the packages it holds (nothing is downloaded). PARTS are done in that
# order, all of them unless given, and end within MINUTES, 0 to 9, as some machines kill a command after
# ten: "build cuda kernels", `tests`, `levers` and `steps` are a call and an OUT each. On a machine that
# begins bare the later ones need `build` too, or dde_fast/_c*.so out of the first one's logs.tar.gz.
# SDXL's two policies take about 95 GB: `steps` needs a card of 140 GB, one of 80 GB lacks their rows.
# Each command has a budget, and what earlier ones left of theirs; what is cut off, failed or skipped is said, and stands in
# OUT/not-done.txt. OUT gets kernels-*.json, tuned-*.json, unet-levers-*.json, train-step-*.json (scaling-sd15.json
# where there are several GPUs, and time), and logs.tar.gz: these again, the libraries and a log of everything.
# DDE_FAST_COMMIT names the commit of a tree without .git. Exit status: 0 if all of it ran and passed, 2 if
# it could not begin.
set -uo pipefail
shopt -s nullglob
out=$(mkdir -p "${1:?where to write the results}/logs/tests" && cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 out
parts=${PARTS:-build cuda kernels tests levers steps} minutes=${MINUTES:-9} status=0

refuse() { echo "$*"; exit 2; }

for name in $parts; do
    case $name in build | cuda | kernels | tests | levers | steps) ;; *) refuse "no such part: $name" ;; esac
done
case $minutes in [0-9]) ;; *) refuse "MINUTES: expected a whole number from 0 to 9, got $minutes" ;; esac
[ -n "${DDE_FAST_COMMIT:-}" ] || git rev-parse HEAD >/dev/null 2>&1 ||
    refuse "the commit is not known: git does not say it, nor DDE_FAST_COMMIT"
missing=$(python3 - 2>&1 >/dev/null <<'END'
import importlib, sys
names = "torch triton diffusers transformers deepspeed tyro emoji_sentiment pytest pytest_benchmark"
faults = []
for name in (*names.split(), "dde_fast.train"):
    try:
        importlib.import_module(name)
    except Exception as error:
        faults.append(f"{name} ({error})".replace("\n", " "))
if "torch" in sys.modules and not sys.modules["torch"].cuda.is_available():
    faults.append("a GPU that torch sees")
sys.exit(f"missing: {', '.join(faults)}" if faults else None)
END
) || refuse "$(grep "^missing: " <<<"$missing" || echo "$missing")"
end=$((60 * minutes)) due=$SECONDS
: >"$out/not-done.txt"

wanted() { [[ " $parts " == *" $1 "* ]]; }

not_done() { echo "$*" | tee -a "$out/not-done.txt"; status=1; }

finish() {
    local results=("$out"/*.json)
    grep -rhE --include="*.log" "^(FAILED|ERROR)|(passed|failed|error).* in " "$out/logs/tests"
    cat "$out/not-done.txt"
    tar -czf "$out/logs.tar.gz" dde_fast/_c*.so -C "$out" logs not-done.txt "${results[@]##*/}" &&
        rm -r "$out/logs"
    exit "$1"
}

# part NAME SECONDS COMMAND…: within its budget, what the ones before left, and the whole
part() {
    local name=$1 budget began=$SECONDS code
    due=$((due + $2))
    budget=$(((due < end ? due : end) - SECONDS))
    shift 2
    if [ "$budget" -lt 20 ]; then not_done "skipped, no time left: $name"; return 0; fi
    export stop_at=$(($(date +%s) + budget - 15))
    : >"$out/logs/$name.log"  # what else opens it appends too
    # pytest writes what it has when it is interrupted
    timeout --signal=INT --kill-after=10 "$budget" "$@" >>"$out/logs/$name.log" 2>&1
    code=$?
    case $code in
        0) echo "$name: done in $((SECONDS - began)) s" ;;
        124 | 137) not_done "cut off after $budget s: $name" ;;
        *) not_done "failed ($code): $name"; tail -n 5 "$out/logs/$name.log" ;;
    esac
    return $code
}

# rows NAME OP SECONDS BATCHES WHICH: a file each, as it is written at the end; fewer and shorter rows than a CPU's
rows() {
    part "$1-$2" "$3" env BENCH_BATCHES="$4" BENCH_SECONDS=0.05 python3 -m pytest \
        "benchmarks/bench_$2.py" -k "$5" --benchmark-only -q -s \
        --benchmark-columns=median,iqr,rounds --benchmark-json="$out/$1-$2.json"
}

kernels() { rows kernels "$1" "$2" "1 16 128" "not sd3"; }

# Triton's again, tuned; the log holds rows for dde_fast/triton_configs.py
tuned() { DDE_FAST_AUTOTUNE=1 rows tuned "$1" "$2" 16 "triton and not cold and not sd3"; }

# script NAME SECONDS COMMAND…: a benchmark that writes NAME.json as it goes
script() {
    local name=$1 seconds=$2
    shift 2
    part "$name" "$seconds" python3 "$@" --output "$out/$name.json"
}

# each test said as it ends, in case of a cut; pytest is content even if it skips every one
passed() {
    part "$1" "$2" bash -o pipefail -c \
        "python3 -m pytest tests/test_$1.py -v --tb=short -rs $3 | tee -a /dev/stderr | grep ' passed'"
}

# a file per process, as most of the tests wait for processes and compilers of their own; first what
# runs otherwise on a GPU
tests() {
    ls -U tests/test_{compilation,loader,packing,waits,ops*,loss,noise,ratios,sampling*,strides,triton_configs}.py \
        tests/test_*.py | awk '!seen[$0]++' | OMP_NUM_THREADS=2 xargs -P 6 -I{} sh -c '
            name=$(basename "$1" .py) left=$((stop_at - $(date +%s)))
            if [ "$left" -lt 5 ]; then echo "no time left: $name"; exit 1; fi
            timeout --signal=INT --kill-after=5 "$left" python3 -m pytest -q "$1" --durations=3 \
                --junitxml="$out/logs/tests/$name.xml" >"$out/logs/tests/$name.log" 2>&1' _ {}
}
export -f tests

if wanted build; then
    part build 170 env DDE_FAST_CUDA=1 python3 setup.py build_ext --inplace || finish 2
    part about 30 sh -c 'python3 -m dde_fast; nvidia-smi'
    cat "$out/logs/about.log" 2>/dev/null
fi
# without them other kernels would be measured
part built 30 python3 -c 'import sys; from dde_fast import compiled; sys.exit(compiled.why_not("cuda"))' ||
    { echo "no compiled kernels: add build to PARTS, or bring dde_fast/_c*.so"; finish 2; }
if wanted cuda; then
    passed cuda 75 -x  # after a bad address all others would fail as well
    passed cuda_ops 45 ""
fi
if wanted kernels; then
    kernels noise 40; kernels ddim 40; kernels loss 160
    tuned noise 25; tuned ddim 25; tuned loss 40
fi
wanted tests && part tests 540 bash -c tests
if wanted levers; then
    script unet-levers-sd15 340 benchmarks/unet_levers.py sd15 --rounds 5
    script unet-levers-sdxl 170 benchmarks/unet_levers.py sdxl --rounds 5
fi
if wanted steps; then  # each lever by itself, and compiled at last
    step=benchmarks/bench_train_step.py
    script train-step-sd15-regional 215 $step sd15 --compile regional --rounds 4
    script train-step-sdxl-regional 265 $step sdxl --compile regional --rounds 4
    script train-step-embedded 30 $step embedded --rounds 10
    [ "$(python3 -c 'import torch; print(torch.cuda.device_count())')" -lt 2 ] ||
        script scaling-sd15 120 benchmarks/scaling.py sd15 --rounds 4
fi
finish $status
