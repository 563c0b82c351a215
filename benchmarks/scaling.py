"""The trainer's step on one rank and on several, and what communication takes of it.

    python benchmarks/scaling.py embedded --output benchmarks/results/scaling-embedded.json

Single ranks, which know nothing of each other, and ranks that train together stand by, a process each
with an engine for each ZeRO stage, and take turns, round after round: one single alone, the singles
side by side, the ranks together. Side by side they compete for caches and memory as the ranks
together do, but send nothing. A rank has one thread on the CPU, a micro-batch of its own, and the
reference to run; the gradient is shared after every `--accumulation` micro-batches. What is sent is
counted and timed in steps of their own, where each collective is waited for; the same collectives
are then repeated with nobody late. `scaling_table.py` puts it into docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from bench_train_step import CASES, Case, configure, rounded
from conftest import commit
from full_size import machine

from dde_fast import models
from dde_fast.config import TrainConfig
from dde_fast.deepspeed_config import EngineConfig
from dde_fast.engine import launch_environment, start_process

WORKER = Path(__file__).with_name("scaling_rank.py")
COUNTED = 3
"""Steps whose collectives are timed."""


class World:
    """Ranks that train together: processes that wait for orders.

    Args:
        folder: `settings.json` and the DeepSpeed JSONs; a log per rank is left there.
        ranks: how many.
        first: device of the first, where there are several.
    """

    def __init__(self, folder: Path, ranks: int, first: int = 0):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.ranks = []
        for rank in range(ranks):
            own = {"RANK": rank, "LOCAL_RANK": first + rank, "WORLD_SIZE": ranks}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            env = os.environ | {name: str(value) for name, value in own.items()}
            log = folder / f"rank-{port}-{rank}.log"
            process = subprocess.Popen(
                [sys.executable, str(WORKER), str(folder)],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log.open("w"),
                text=True,
            )
            self.ranks.append((process, log))

    def tell(self, **order) -> None:
        """Give all of them an order."""
        for process, _ in self.ranks:
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()

    def hear(self) -> list[dict]:
        """Wait for the answer of each."""
        return [self._answer(process, log) for process, log in self.ranks]

    def _answer(self, process: subprocess.Popen, log: Path) -> dict:
        if line := process.stdout.readline():
            return json.loads(line)
        raise RuntimeError(f"a rank ended with {process.wait()}:\n{log.read_text()[-4000:]}")

    def close(self) -> None:
        """Let them end; not waited for longer than a minute."""
        for process, _ in self.ranks:
            process.stdin.close()
        for process, _ in self.ranks:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def write_settings(
    c: TrainConfig, e: EngineConfig, accumulation: int, folder: Path
) -> tuple[int, ...]:
    """What the ranks read; the ZeRO stages."""
    stages = (0, 1, 2) if e.dtype == torch.float32 else (1, 2)  # 16 bits want one of ZeRO's
    given = json.loads(Path(c.deepspeed_config).read_text())
    for stage in stages:
        zero = {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": accumulation}
        (folder / f"zero{stage}.json").write_text(json.dumps(given | zero))
    config = asdict(replace(c, reference_scores=0))
    (folder / "settings.json").write_text(json.dumps({"config": config, "stages": stages}))
    return stages


def take_turns(
    singles: list[World], together: World, stages: tuple[int, ...], rounds: int, count: int
) -> dict[int, list[tuple[float, float, float]]]:
    """Stage -> steps per second, all ranks' added: one single alone, side by side, together."""
    ways = ([singles[0]], singles, [together])
    seen: dict[int, list[tuple[float, float, float]]] = {stage: [] for stage in stages}
    for turn in range(-1, rounds):  # the first is not counted: moments, caches
        for stage in stages:
            rates = [0.0] * len(ways)
            for place in range(len(ways)):  # what comes first in a round has no advantage by it
                chosen = (place + turn) % len(ways)
                for world in ways[chosen]:
                    world.tell(do="take", stage=stage, count=count)
                for world in ways[chosen]:
                    rates[chosen] += sum(1 / answer["seconds"] for answer in world.hear())
            if turn >= 0:
                seen[stage].append(tuple(rates))
    return seen


def middle(values: list[float]) -> dict[str, float]:
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "lower_quartile": low, "upper_quartile": high}


def row(stage: int, rates: list[tuple], answers: list[dict], pairs: int) -> dict:
    """What is said of a stage; the efficiencies are ratios within a round."""
    ranks, mean = len(answers), statistics.fmean
    alone, side, together = ([pairs * rate for rate in kind] for kind in zip(*rates, strict=True))
    step = mean(answer["seconds"] for answer in answers)
    return {
        "stage": stage,
        "pairs_per_s": {
            "alone": middle(alone),
            "side_by_side": middle(side),
            "together": middle(together),
        },
        "efficiency": middle([b / (ranks * a) for a, b in zip(alone, together, strict=True)]),
        "efficiency_to_side_by_side": middle([b / a for a, b in zip(side, together, strict=True)]),
        "sent_bytes": round(answers[0]["sent"]),
        "collectives": answers[0]["calls"],
        "share_in_collectives": mean(answer["inside"] for answer in answers) / step,
        "share_sending_alone": mean(answer["alone"] for answer in answers) / step,
    }


def measure(name: str, case: Case, args: argparse.Namespace, folder: Path) -> dict:
    """The result of one case."""
    launch_environment()
    models.quiet_libraries()
    start_process()
    c, e, _ = configure(case, folder, args.small)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the ranks need it
    stages = write_settings(c, e, args.accumulation, folder)
    parameters = sum(weight.numel() for weight in models.load_unet(c.model).parameters())
    worlds = [World(folder, 1, first=rank) for rank in range(args.ranks)]
    worlds.append(World(folder, args.ranks))
    try:
        for world in worlds:
            world.hear()
        *singles, together = worlds
        seen = take_turns(singles, together, stages, args.rounds, args.steps)
        rows = []
        for stage in stages:
            together.tell(do="collectives", stage=stage, count=COUNTED)
            pairs = case.pairs * args.accumulation
            rows.append(row(stage, seen[stage], together.hear(), pairs))
    finally:
        for world in worlds:
            world.close()
    result = {
        "case": name,
        "model": case.unet or "embedded",
        "parameters": parameters,
        "latent": case.latent,
        "pairs": case.pairs,
        "accumulation": args.accumulation,
        "dtype": case.dtype,
        "ranks": args.ranks,
        "rounds": args.rounds,
        "steps": args.steps,
        "rows": rows,
        "machine": machine() | {"threads": 1, "commit": commit()},
    }
    return rounded(result)


def main() -> None:
    """Measure one case and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=max(2, torch.cuda.device_count()))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="that each takes in a round")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--small", action="store_true", help="tiny models, for a test")
    args = parser.parse_args()
    if torch.cuda.is_available() and args.ranks > torch.cuda.device_count():
        parser.error(
            f"--ranks: expected at most {torch.cuda.device_count()} GPUs, got {args.ranks}"
        )
    case = CASES[args.case]
    if args.small:
        case = replace(case, latent=8, pairs=2)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args.case, case, args, Path(folder))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    for found in result["rows"]:
        print({key: value for key, value in found.items() if key != "pairs_per_s"})
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
