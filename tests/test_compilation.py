"""Runs through torch.compile: the eager run's, compiled in its first step and never again."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from train_runs import BF16, OBJECTIVE_STEPS, Folder, fails, stage
from variants import distance, same_run, weights

from dde_fast.compilation import check_compile, eagerly, use_compile
from dde_fast.config import TrainConfig

LORA = {"lora_rank": 2, "ema_decay": 0.5, "learning_rate": 1e-2}
ONLINE = {"objective": "tailorpo-g", "reward": "colourfulness", "sampling_steps": 3, "beta": 20.0}
ONLINE |= {"reward_target": 150.0, "reward_step": 2e-3}
OFFLINE = ("pairs", "caption_dropout", "timestep_high")


def watching(folder: Folder) -> dict:
    """Flags of what looks at a run with shapes of its own: 3 held-out pairs, batches of 2 prompts."""
    (folder.path / "prompts.txt").write_text("sad\nhappy\n")
    pairs = tiny.write_pairs(folder.path / "held_out.parquet", tiny.rows(20)[17:])
    flags = {"validation_pairs": pairs, "validation_every": 2, "grid_every": 2, "grid_images": 2}
    return flags | {"grid_prompts": folder.path / "prompts.txt", "grid_steps": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Folder:
    folder = Folder(tmp_path_factory.mktemp("compilation"))
    jobs = []

    def run(name: str, *more: str, backend="aot_eager", without=(), **flags) -> None:
        """Once eagerly, once through the compiler's front without its code."""
        for kind in ("", flags.pop("compile")):
            given = folder.args(f"{name}{'_compiled' * bool(kind)}", compile=kind, **flags)
            parts = zip(given[::2], given[1::2], strict=True)
            args = [part for pair in parts if pair[0][2:] not in without for part in pair]
            jobs.append({"args": [*args, *more], "backend": [backend], "steady": []})

    short = {"steps": OBJECTIVE_STEPS, "ds": stage(2)}
    run("lora", compile="regional", **short, **LORA)
    run("whole", "--gradient_checkpointing", compile="whole", backend="eager", **short)
    run("bf16", compile="regional", **short | {"ds": stage(1, **BF16)})
    (folder.path / "words.txt").write_text("happy\nsad\ncat\n")
    online = {**short, **ONLINE, "prompts": folder.path / "words.txt"}
    run("online", compile="regional", without=OFFLINE, **online)

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


@pytest.mark.parametrize("name", ["lora", "whole", "online"])
def test_it_goes_with_everything_else(runs, name):
    losses = runs.losses(f"{name}_compiled")
    assert (losses - runs.losses(name)).abs().max() < 1e-5
    for kind in ("lora", "lora_ema") if name == "lora" else ():
        found, expected = (weights(runs, run, kind) for run in (f"{name}_compiled", name))
        assert distance(found, expected) < 5e-3


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
        ({"compile": "whole"}, 3, "compile: expected whole weights .* ZeRO stage 3"),
        ({"compile": "regional", "shard_reference": True}, 1, "with shard_reference"),
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
