"""How a UNet should be run on this GPU: memory order, attention kernel, torch.compile, CUDA graphs.

    python benchmarks/unet_levers.py sd15 --output benchmarks/results/unet-levers-sd15.json

Forward and backward of a policy, and forward of a reference, of the published architecture with random
weights in bf16, one way after the other on the same inputs, each beside the default in the same
minutes: the default is measured before and after each. A way that cannot run here says why, also where
it needs more memory than there is. The result is written after each way, what matters most first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from conftest import commit, launches, peak_extra_bytes
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from full_size import machine
from memory_table import SHAPES
from published import make_unet, small_unet
from step_costs import matrix_product, rounded, timed
from step_limits import PAIRS
from torch import Tensor

from dde_fast.attention import KERNELS, use_attention
from dde_fast.compilation import COMPILE, GRAPHS, CompileTime
from dde_fast.config import TrainConfig
from dde_fast.flops import flops_per_pair
from dde_fast.memory_order import memory_order, use_memory_order
from dde_fast.shards import write_file

BLOCKS = (BasicTransformerBlock, ResnetBlock2D)


def compile_blocks(unet: UNet2DConditionModel) -> None:
    for module in unet.modules():
        if isinstance(module, BLOCKS):
            module.compile(dynamic=False)


@dataclass(frozen=True)
class Way:
    """To run a UNet."""

    compile: Callable[[UNet2DConditionModel], None] | None = None
    """In place; none: eager."""
    channels_last: bool = False
    attention: str = "sdpa"
    """Of `dde_fast.attention.ATTENTION`."""


ATTENTION = {f"{name} attention": Way(attention=name) for name in KERNELS}
WAYS = {
    "compiled, regional": Way(COMPILE["regional"]),
    "compiled, whole, CUDA graphs": Way(COMPILE["graphs"]),
    "compiled, whole": Way(COMPILE["whole"]),
    **ATTENTION,
    "channels_last": Way(channels_last=True),
    "compiled, whole, channels_last": Way(COMPILE["whole"], channels_last=True),
    "compiled, with ResNets": Way(compile_blocks),
}
"""Beside the default: eager, PyTorch's choice of attention, default memory order."""
SHORT = {
    "sd15": list(WAYS),
    "sdxl": ["compiled, regional", *ATTENTION, "channels_last", "compiled, whole, CUDA graphs"],
}
"""Unless others are asked for: SDXL takes minutes to compile whole, so it is once and last."""


class Model:
    """A UNet and inputs for it; `train` and `infer` are what is measured."""

    def __init__(self, name: str, pairs: int, small: bool, device: torch.device):
        torch.manual_seed(0)
        shapes = SHAPES[name] | ({"latent": (4, 8, 8)} if small else {})
        changes = small_unet(name) if small else {}
        with device:
            self.unet = make_unet(name, **changes).to(torch.bfloat16).train()
        self.flops = flops_per_pair(self.unet, **shapes, reference=False) * pairs
        samples = 2 * pairs

        def normal(*shape: int) -> Tensor:
            return torch.randn(samples, *shape, dtype=torch.bfloat16, device=device)

        self.options: dict = {"return_dict": False}
        if shapes["pooled"] is not None:
            added = {"text_embeds": normal(shapes["pooled"]), "time_ids": normal(6).float()}
            self.options["added_cond_kwargs"] = added
        timesteps = torch.randint(0, 1000, (samples,), device=device)
        self.inputs = [normal(*shapes["latent"]), timesteps, normal(*shapes["embedding"])]
        self.slope = normal(*shapes["latent"])
        self.eager = self.unet.forward

    def forward(self) -> Tensor:
        return self.unet(*self.inputs, **self.options)[0]

    def train(self) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        self.forward().backward(self.slope)
        self.unet.zero_grad(set_to_none=False)  # as an engine's, where the next step finds it

    @torch.no_grad()
    def infer(self) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return self.forward()

    @contextlib.contextmanager
    def running(self, way: Way):
        """Within, it is run in that way."""
        try:
            self.arrange(way)
            if way.compile:
                torch._dynamo.reset()
                way.compile(self.unet)
            yield
        finally:
            self.unet.forward = self.eager
            for module in self.unet.modules():
                module._compiled_call_impl = None
            self.arrange(Way())

    def arrange(self, way: Way) -> None:
        """Memory order and attention of a way."""
        for module in self.unet.modules():
            module._forward_pre_hooks.clear()
        c = TrainConfig(channels_last=way.channels_last)
        use_memory_order(self.unet, c, stage=1)  # as in bf16, which ZeRO alone trains
        self.inputs[0] = self.inputs[0].contiguous(memory_format=memory_order(c))
        use_attention(self.unet, way.attention, torch.bfloat16, self.slope.device)


def seconds(call: Callable[[], object], rounds: int) -> list[float]:
    """Of each call, the device's work included."""
    return [timed(call)[0] for _ in range(rounds)]


def look(model: Model, way: Way, rounds: int) -> dict:
    """Times, memory, launches; what it computes beside the default."""
    expected = model.infer().float().clone()
    before = [seconds(call, rounds) for call in (model.train, model.infer)]
    with model.running(way):
        compiling = CompileTime()
        for _ in range(3):  # compiled, and captured
            model.train()
            got = model.infer().float().clone()
        found = {"compile_seconds": compiling.lately()} if way.compile else {}
        train, infer = (seconds(call, rounds) for call in (model.train, model.infer))
        if way.compile is not COMPILE["graphs"]:  # whose memory is no call's, but theirs throughout
            found["step_GiB"] = peak_extra_bytes(model.train) / 2**30
        if torch.cuda.is_available():
            found["launches"] = launches(model.train)
    model.train()
    after = [seconds(call, rounds) for call in (model.train, model.infer)]
    default = [statistics.median(a + b) for a, b in zip(before, after, strict=True)]
    found["train_seconds"], found["infer_seconds"] = map(statistics.median, (train, infer))
    found["times_default"] = default[0] / found["train_seconds"]
    found["times_default_infer"] = default[1] / found["infer_seconds"]
    found["TFLOPs"] = model.flops / found["train_seconds"] / 1e12
    found["difference"] = ((got - expected).norm() / expected.norm()).item()
    return found


def measure(
    name: str, rounds: int, small: bool, ways: dict[str, Way], write: Callable[[dict], None]
) -> None:
    """Measure one UNet, and write what there is after each way."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pairs = 1 if small else PAIRS[name]
    torch._dynamo.config.recompile_limit = GRAPHS
    model = Model(name, pairs, small, device)
    for _ in range(3):
        model.train()
    product, operations = matrix_product(torch.bfloat16, device, small)
    rate = operations / statistics.median(seconds(product, 10))
    result = {"model": name, "pairs": pairs, "dtype": "bfloat16", "rounds": rounds}
    result |= {
        "matrix_TFLOPs": rate / 1e12,
        "machine": machine() | {"commit": commit()},
        "rows": [],
    }
    for title, way in {"default": Way(), **ways}.items():
        try:
            row = look(model, way, rounds)
        except Exception as error:  # whatever a kernel, a compiler or the memory says
            row = {"failed": str(error).strip().split("\n")[0][:200]}
        result["rows"].append({"name": title} | row)
        print(result["rows"][-1], flush=True)
        write(rounded(result))


def main() -> None:
    """Measure one UNet and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("unet", choices=PAIRS)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--ways", nargs="+", choices=WAYS)
    parser.add_argument("--small", action="store_true", help="a tiny model, for a test")
    args = parser.parse_args()
    ways = {name: WAYS[name] for name in args.ways or SHORT[args.unet]}
    args.output.parent.mkdir(parents=True, exist_ok=True)

    def write(result: dict) -> None:
        write_file(args.output, (json.dumps(result, indent=1) + "\n").encode())

    measure(args.unet, args.rounds, args.small, ways, write)


if __name__ == "__main__":
    main()
