"""Two network namespaces as two nodes, one rank each, against two ranks on one node.

    python tests/two_nodes.py --out benchmarks/results/two-nodes.json        (Linux, as root)

The namespaces share nothing but a virtual cable and the file system; torchrun in each meets the
other over it, and so does the deepspeed launcher without ssh. Both must give the trajectory of two
local ranks.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from train_runs import HALF, ROOT, Folder, commit, environment, stage, wait_for

NODES, ADDRESSES = ("dde-node-0", "dde-node-1"), ("10.213.7.1", "10.213.7.2")
SCRIPT, PORT = str(ROOT / "dde_fast/train.py"), "29512"
DEEPSPEED = str(Path(sys.executable).parent / "deepspeed")


@contextlib.contextmanager
def two_nodes():
    """Two namespaces, joined by a virtual cable."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    try:
        for node in NODES:
            ip("netns", "add", node)
            ip("-n", node, "link", "set", "lo", "up")
        ip(
            "link",
            "add",
            "dde0",
            "netns",
            NODES[0],
            "type",
            "veth",
            "peer",
            "dde1",
            "netns",
            NODES[1],
        )
        for i, (node, address) in enumerate(zip(NODES, ADDRESSES, strict=True)):
            ip("-n", node, "addr", "add", f"{address}/24", "dev", f"dde{i}")
            ip("-n", node, "link", "set", f"dde{i}", "up")
        yield
    finally:
        for node in NODES:
            subprocess.run(["ip", "netns", "del", node], check=False)


def run(commands: list[list[str]], where: Path) -> None:
    """Run one command per node at once, or one on this machine."""
    processes = []
    for i, command in enumerate(commands):
        more = {}
        if len(commands) > 1:
            command = ["ip", "netns", "exec", NODES[i], *command]
            more = {"GLOO_SOCKET_IFNAME": f"dde{i}"}
        log = open(where / f"{len(commands)}-{i}.log", "w+")
        processes.append(
            (subprocess.Popen(command, env=environment(**more), stdout=log, stderr=log), log)
        )
    wait_for(processes, timeout=600)


def torchrun(rank: int, args: list[str]) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank"]
    command += [str(rank), "--nproc_per_node", "1"]
    return [*command, "--master_addr", ADDRESSES[0], "--master_port", PORT, SCRIPT, *args]


def deepspeed(rank: int, args: list[str], hostfile: Path) -> list[str]:
    command = [DEEPSPEED, "--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(rank)]
    return [*command, "--master_addr", ADDRESSES[0], "--master_port", PORT, SCRIPT, *args]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 2, 3])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place, two_nodes():
        folder = Folder(Path(place))
        hostfile = folder.path / "hostfile"
        hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
        for n in options.stages:
            ds = stage(n, **HALF)
            local = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
            local += ["--master_port", PORT, SCRIPT, *folder.args(f"local{n}", ds=ds)]
            run([local], folder.path)
            row = {"zero_stage": n}
            for name, launch in (
                ("torchrun", torchrun),
                ("deepspeed --no_ssh", lambda *a: deepspeed(*a, hostfile)),
            ):
                args = folder.args(f"{name.split()[0]}{n}", ds=ds)
                run([launch(0, args), launch(1, args)], folder.path)
                found, local = (f"{name.split()[0]}{n}", f"local{n}")
                ahead = (folder.losses(found) - folder.losses(local)).abs().max()
                row[name] = {
                    "largest_loss_difference": float(ahead),
                    "weights_relative_difference": folder.distance(found, local),
                }
            rows.append(row)
            print(row, flush=True)
    result = {"commit": commit(), "kernel": os.uname().release, "runs": rows}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    numbers = [
        x for row in rows for name in row if name != "zero_stage" for x in row[name].values()
    ]
    sys.exit(max(numbers) > 2e-7)


if __name__ == "__main__":
    main()
