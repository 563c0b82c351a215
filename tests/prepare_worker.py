"""Prepares a cache in child processes, each killed once it has finished one more shard.

    python tests/prepare_worker.py MODEL PAIRS OUTPUT LOG

Forks, so that everything is imported once; the parent itself computes nothing.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import caches
import torch

from dde_fast import prepare
from dde_fast.models import Encoders

KILLS = 5


def child(model: str, pairs: str, output: Path, log: Path) -> None:
    """Prepare, noting each shard that is encoded."""
    torch.set_num_threads(1)
    encode = prepare.Preparation._encode

    def noting(self, unit, *args):
        with open(log, "a") as file:
            file.write(f"{os.getpid()} {unit.name}\n")
        time.sleep(0.03)  # so that its parent has the time to choose its moment
        return encode(self, unit, *args)

    prepare.Preparation._encode = noting
    encoders = Encoders.load(model, torch.device("cpu"))
    caches.prepare(encoders, Path(pairs), output, shard_size=1)


def finished(output: Path) -> set[str]:
    return {path.name for path in output.glob("*-*.safetensors")}


def main(model: str, pairs: str, output: str, log: str) -> None:
    """Kill, kill, …, let live; print what was seen."""
    output, log = Path(output), Path(log)
    counts, twice = [], []
    for kill in range(KILLS + 1):
        before, seen = finished(output), log.read_text().splitlines() if log.exists() else []
        process = os.fork()
        if process == 0:
            try:
                child(model, pairs, output, log)
            except BaseException as error:
                print(error, file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        if kill < KILLS:
            while len(finished(output)) <= len(before):
                assert os.waitpid(process, os.WNOHANG) == (0, 0), "it ended before it was killed"
                time.sleep(0.0005)
            time.sleep(0.003 * kill)  # some way into the next one
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            counts.append(len(finished(output)))
        else:
            assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
        again = [line.split()[1] for line in log.read_text().splitlines()[len(seen) :]]
        twice += sorted(before & set(again))
    print(json.dumps({"finished": counts, "twice": twice}))


if __name__ == "__main__":
    main(*sys.argv[1:])
