"""Runs through torch.compile: the eager run's, compiled in its first step and never again."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_forward import batch_of, forward_of
from test_waits import STOP, PlainEngine
from train_runs import BF16, HALF, OBJECTIVE_STEPS, Folder, fails, stage
from variants import distance, same_run, weights

from dde_fast import train
from dde_fast.compilation import check_compile, check_graphs, eagerly, use_compile
from dde_fast.config import TrainConfig
from dde_fast.deepspeed_config import complete
from dde_fast.metrics import Meter
from dde_fast.optimizer_step import Skips

LORA = {"lora_rank": 2, "ema_decay": 0.5, "learning_rate": 1e-2}
ONLINE = {"objective": "tailorpo-g", "reward": "colourfulness", "sampling_steps": 3, "beta": 20.0}
ONLINE |= {"reward_target": 150.0, "reward_step": 2e-3}
GATHERING = {"stage": 3, "stage3_param_persistence_threshold": 0}
"""ZeRO-3 that lets go of small weights, too."""
OFFLINE = ("pairs", "caption_dropout", "timestep_high")


def watching(folder: Folder) -> dict:
    """Flags of what looks at a run with shapes of its own: 3 held-out pairs, batches of 2 prompts."""
    (folder.path / "prompts.txt").write_text("sad\nhappy\n")
    pairs = tiny.write_pairs(folder.path / "held_out.parquet", tiny.rows(20)[17:])
    flags = {"validation_pairs": pairs, "validation_every": 2, "grid_every": 2, "grid_images": 2}
    return flags | {"grid_prompts": folder.path / "prompts.txt", "grid_steps": 1}


def without(names: tuple[str, ...], args: list[str]) -> list[str]:
    """A command line of flags with a value each, some left out."""
    pairs = zip(args[::2], args[1::2], strict=True)
    return [part for pair in pairs if pair[0][2:] not in names for part in pair]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Folder:
    folder = Folder(tmp_path_factory.mktemp("compilation"))
    jobs = []

    def run(name: str, *more: str, backend="aot_eager", left_out=(), **flags) -> None:
        """Once eagerly, once through the compiler's front without its code."""
        for kind in ("", flags.pop("compile")):
            given = folder.args(f"{name}{'_compiled' * bool(kind)}", compile=kind, **flags)
            args = [*without(left_out, given), *more]
            jobs.append({"args": args, "backend": [backend], "steady": []})

    short = {"steps": OBJECTIVE_STEPS, "ds": stage(2)}
    run("lora", compile="regional", **short, **LORA)
    run("whole", "--gradient_checkpointing", compile="whole", backend="eager", **short)
    run("bf16", compile="regional", **short | {"ds": stage(1, **BF16)})
    (folder.path / "words.txt").write_text("happy\nsad\ncat\n")
    online = {**short, **ONLINE, "prompts": folder.path / "words.txt"}
    run("online", compile="regional", left_out=OFFLINE, **online)

    # with the compiler's code
    regional = {"compile": "regional"}
    jobs += [
        {"args": folder.args("eager")},
        {"args": folder.args("regional", **regional), "steady": []},
        {"args": folder.args("resumed", **regional, steps=4)},
        {"args": folder.args("resumed", **regional, resume="latest")},
        {"args": folder.args("watched", **regional, **watching(folder)), "steady": []},
    ]
    folder.printed = folder.work(jobs, 1, "compilation")

    # weights shared out, by DeepSpeed, which then replaces torch's linear for the rest of a process
    jobs = []
    shared = {"compile": "regional", "steps": OBJECTIVE_STEPS}
    three = {"zero_optimization": GATHERING, **HALF}
    run("stage 3", "--gradient_checkpointing", **shared, ds=three)
    run("shared", "--shard_reference", **shared, ds=stage(2, **HALF))
    run("lora at stage 3", **shared | LORA, ds=three)
    code = folder.args("code at stage 3", ds=three, **shared)
    jobs.append({"args": code, "steady": [], "gathered": []})
    folder.work(jobs, 2, "shared out")
    return folder


def test_a_compiled_run_is_the_eager_one_but_for_rounding(runs):
    found = runs.losses("regional")
    assert (found - runs.losses("eager")).abs().max() < 1e-5
    assert found[0] == pytest.approx(0.693147, abs=1e-6) and found[1] != found[0]


def test_its_weights_have_the_names_of_the_eager_run(runs):
    assert 0 < runs.distance("regional", "eager") < 5e-3


def test_a_resumed_run_is_the_compiled_one_bit_for_bit(runs):
    same_run(runs, "resumed", "regional", "unet")


def test_what_looks_at_it_changes_nothing(runs):
    same_run(runs, "regional", "watched", "unet")
    assert [record["step"] for record in runs.metrics("watched") if "validation" in record] == [
        2,
        4,
        6,
    ]


def test_compiling_is_told_once(runs):
    told = {}
    for name in ("eager", "regional", "whole_compiled"):
        told[name] = [r["step"] for r in runs.metrics(name) if "compile_seconds" in r]
    assert told == {"eager": [], "regional": [1], "whole_compiled": [1]}
    seconds = runs.metrics("regional")[0]["compile_seconds"]
    assert f"torch.compile took {seconds:.1f} s of the last step" in runs.printed


@pytest.mark.parametrize(
    "name", ["lora", "whole", "online", "stage 3", "shared", "lora at stage 3"]
)
def test_it_goes_with_everything_else(runs, name):
    losses = runs.losses(f"{name}_compiled")
    assert (losses - runs.losses(name)).abs().max() < 1e-5
    for kind in ("lora", "lora_ema") if name == "lora" else ():
        found, expected = (weights(runs, run, kind) for run in (f"{name}_compiled", name))
        assert distance(found, expected) < 5e-3


def test_the_code_goes_with_weights_that_are_gathered(runs):
    """What it keeps of them, `train_worker.gathered` looks at."""
    losses = runs.losses("code at stage 3")
    assert (losses - runs.losses("stage 3")).abs().max() < 1e-5
    assert [r["step"] for r in runs.metrics("code at stage 3") if "compile_seconds" in r] == [1]


def test_16_bits(runs):
    losses = runs.losses("bf16_compiled")
    assert losses[0] == pytest.approx(0.693147, abs=1e-2)
    assert (losses - runs.losses("bf16")).abs().max() < 0.02


def test_only_a_compiled_run_continues_one(runs, capfd):
    expected = "resume: compile: expected 'regional'"
    assert expected in fails(runs.args("other", "regional", resume="latest"), capfd)


@pytest.mark.parametrize(
    ("changes", "number", "expected"),
    [
        ({"compile": "all"}, 0, "compile: expected none or one of .*regional.*, got 'all'"),
        ({"compile": "whole"}, 3, "compile: expected regional .* ZeRO stage 3, .* got 'whole'"),
        ({"compile": "whole", "shard_reference": True}, 1, "regional or none with shard_reference"),
        ({"compile": "graphs"}, 3, "compile: expected regional .* ZeRO stage 3, .* got 'graphs'"),
        ({"compile": "graphs"}, 2, "compile: expected regional or whole on cpu, .* a GPU"),
    ],
)
def test_what_cannot_be_compiled_is_refused(changes, number, expected):
    with pytest.raises(ValueError, match=expected):
        check_compile(TrainConfig(**changes), SimpleNamespace(stage=number), torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="hides the compiler for CPUs")
def test_a_machine_without_a_compiler_is_told_so():
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    ask = TrainConfig(compile="regional"), SimpleNamespace(stage=0), torch.device("cpu")
    torch._dynamo.reset()
    with fresh_cache(), config.patch({"cpp.cxx": (None, "/nowhere/g++")}):
        with pytest.raises(ValueError, match="compile: expected a machine with a .*compiler.*g++"):
            check_compile(*ask)
    torch._dynamo.reset()
    check_compile(*ask)


class Asks(torch.nn.Module):
    """Says whether it was compiled."""

    def forward(self, x):
        return x + torch.compiler.is_compiling()


def test_eagerly_is_for_compiled_runs():
    """Within, the code is Python's own, and afterwards the compiled one again."""
    module, found = Asks(), []
    with torch.compiler.set_stance(force_backend="eager"):
        for name in ("", "whole"):
            use_compile(module, name)
            for asked in ("", "whole", ""):
                with eagerly(TrainConfig(compile=asked)):
                    found.append(module(torch.zeros(())).item())
    assert found == [0, 0, 0, 1, 0, 1]


SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
ACCUMULATED = {**HALF, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize(
    ("accumulation", "ds", "kept"),
    [
        (1, stage(0), False),
        (1, stage(1), False),
        (2, stage(0), True),
        (2, stage(1), True),
        (2, stage(2), False),
        (2, {"zero_optimization": {"stage": 2, "contiguous_gradients": False}}, True),
        (2, stage(1, **BF16), True),
        (2, stage(1, **BF16, **SUMS), False),
        (2, stage(1, bf16={"enabled": True, "immediate_grad_update": False}, **SUMS), True),
        (2, stage(2, **BF16, **SUMS), False),
    ],
)
def test_graphs_are_refused_where_they_would_overwrite_gradients(accumulation, ds, kept):
    sizes = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": accumulation}
    e = complete(sizes | ds, TrainConfig(), 1)
    check_graphs(TrainConfig(compile="whole"), e)
    with pytest.raises(ValueError, match="^compile: .* kept") if kept else nullcontext():
        check_graphs(TrainConfig(compile="graphs"), e)


def test_graphs_are_the_whole_unet_in_inductors_mode_for_them(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: asked.append((f, options)) or f)
    module = Asks()
    forward = module.forward
    use_compile(module, "graphs")
    assert asked == [(forward, {"dynamic": False, "mode": "reduce-overhead"})]


@pytest.mark.parametrize("name", ["", "whole", "graphs"])
def test_each_micro_batch_begins_a_step_of_the_graphs(tmp_path, monkeypatch, name):
    """Before the reference runs, so that its prediction outlives the policy's forward pass."""
    seen = []
    monkeypatch.setattr(
        torch.compiler, "cudagraph_mark_step_begin", lambda: seen.append("step begins")
    )
    forward = forward_of(tiny.make_model(tmp_path / "model"), timesteps=[300])
    forward.c = TrainConfig(compile=name)
    forward.reference.register_forward_hook(lambda *_: seen.append("reference"))
    forward.engine.register_forward_hook(lambda *_: seen.append("policy"))
    forward.engine, batches = PlainEngine(forward.engine), [batch_of(tiny.WIDTH, None)] * 2
    device, e = torch.device("cpu"), SimpleNamespace(accumulation=2)
    meter, skips = Meter(device, 1000), Skips(device)
    forward.engine.step = lambda: None
    assert train.take_step(forward, e, iter(batches), meter, skips, STOP)
    assert seen == [*["step begins"] * (name == "graphs"), "reference", "policy"] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    ("name", "ds", "tolerance"),
    [
        ("fp32", stage(2, **ACCUMULATED), 1e-4),
        ("bf16", stage(1, **BF16, **SUMS, **ACCUMULATED), 0.02),
        ("one micro-batch", stage(0), 1e-4),
        ("online", stage(2), 1e-3),
    ],
)
def test_on_a_gpu_graphs_change_nothing(tmp_path, name, ds, tolerance):
    """What outlives a micro-batch, gradients and what is logged, is not in the graphs' memory."""
    folder = Folder(tmp_path)
    (tmp_path / "words.txt").write_text("happy\nsad\ncat\n")
    jobs = []
    for kind in ("whole", "graphs"):
        if name == "online":
            given = {"steps": OBJECTIVE_STEPS, "prompts": tmp_path / "words.txt", **ONLINE}
            args = without(OFFLINE, folder.args(kind, ds=ds, compile=kind, **given))
        else:
            args = folder.args(kind, ds=ds, compile=kind)
        jobs.append({"args": args})
    folder.work(jobs, 1, "graphs", gpu=True)
    losses = [folder.losses(kind) for kind in ("graphs", "whole")]
    torch.testing.assert_close(*losses, rtol=tolerance, atol=tolerance)
    if name in ("fp32", "one micro-batch"):
        assert folder.distance("graphs", "whole") < 5e-3
