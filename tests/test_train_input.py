"""The trainer and bad input: one clear line, exit code 2, nothing lost."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import caches
import diffusers
import pytest
import tiny
import torch
from train_runs import ROOT, Folder, environment, fails, free_port, stage

from dde_fast import checkpoint, train
from dde_fast.models import Encoders


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Folder:
    return Folder(tmp_path_factory.mktemp("train"))


def deepspeed(folder: Folder, *args: str) -> subprocess.CompletedProcess:
    # what `deepspeed` runs; that script lies elsewhere where packages are carried in a folder
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", free_port()]
    command += [str(ROOT / "dde_fast/train.py"), "--deepspeed_config", str(ROOT / "ds.json"), *args]
    return subprocess.run(
        command,
        env=environment(gpu=True),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder.path,
    )


def test_the_deepspeed_launcher_runs_the_embedded_default(folder):
    done = deepspeed(folder, "--steps", "2", "--log_every", "1")
    assert done.returncode == 0, done.stderr[-4000:]
    run = folder.path / "outputs/faces-dde"
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["loss"] == pytest.approx(0.693147, abs=1e-6)
    unet = diffusers.UNet2DConditionModel.from_pretrained(run / "unet")
    assert sum(p.numel() for p in unet.parameters()) > 1e6


def test_bad_input_through_the_launcher_is_one_line_and_exit_2(folder):
    done = deepspeed(folder, "--stepz", "2")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "dde_fast" in line]
    assert lines == [
        "dde_fast: error: command line: Unrecognized options: --stepz, 2; --help lists every flag"
    ]


def drop_column(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "jpg_1"} for row in rows]


def all_ties(rows: list[dict]) -> list[dict]:
    return [row | {"label_0": 0.5, "label_1": 0.5} for row in rows]


BAD = {
    "unknown flag": (["--stepz", "3"], "Unrecognized options: --stepz"),
    "no number": (["--steps", "many"], "--steps"),
    "no value": (["--steps"], "--steps"),
    "unknown preset": (["--preset", "cats"], "preset: expected one of"),
    "unknown objective": (["--objective", "ppo"], "objective: expected one of"),
    "no steps": (["--steps", "0"], "steps: expected at least 1, got 0"),
    "negative rate": (["--learning_rate", "-1"], "learning_rate: expected"),
    "empty range": (["--timestep_low", "9", "--timestep_high", "9"], "timestep_high: expected"),
    "range too long": (["--timestep_high", "1001"], "expected 0 <= low < high <= 1000"),
    "smoothing and hinge": (["--link", "hinge", "--label_smoothing", "0.1"], "label_smoothing:"),
    "unknown link": (["--link", "tanh"], "link: expected one of"),
    "sft with a link": (["--objective", "sft", "--link", "ipo"], "link: objective 'sft'"),
    "nothing kept": (["--keep", "-1"], "keep: expected 0 (all) or a number of checkpoints, got -1"),
    "no patience": (["--max_skipped", "0"], "max_skipped: expected at least 1, got 0"),
    "no multiple": (["--max_winner_error", "1"], "max_winner_error: expected above 1, got 1.0"),
    "unknown backend": (["--backend", "tpu"], "backend: expected one of"),
    "GPUs, no plan": (["--plan_gpus", "2"], "plan_gpus: expected none without --plan, got 2"),
    "GiB, no plan": (
        ["--plan_memory", "24"],
        "plan_memory: expected none without --plan, got 24.0",
    ),
    "no such pairs": (
        ["--pairs", "nowhere.parquet"],
        "got 'nowhere.parquet', where there is nothing",
    ),
    "no such model": (["--model", "nowhere/at/all"], "model: expected a diffusers directory"),
    "no such file": (["--model", "away.safetensors"], "model: expected a .safetensors file"),
    "no such block": (
        ["--checkpoint_blocks", "mid_block,down_blocks.9"],
        "checkpoint_blocks: expected some of down_blocks.0,down_blocks.1,mid_block,up_blocks.0,",
    ),
    "no such attention": (["--attention", "paged"], "attention: expected one of"),
    "no such json": (["--deepspeed_config", "no.json"], "deepspeed_config: expected a readable"),
    "no such held-out pairs": (
        ["--validation_pairs", "away.parquet"],
        "validation_pairs: expected",
    ),
    "held-out pairs never": (["--validation_every", "0"], "validation_every: expected at least 1"),
    "grids of nothing": (
        ["--grid_every", "2"],
        "grid_prompts: expected faces, style, a file of prompts",
    ),
    "too many images": (["--grid_images", "17"], "grid_images: expected 1 to 16, got 17"),
    "weak guidance": (["--grid_guidance", "0.5"], "grid_guidance: expected at least 1, got 0.5"),
    "no peak": (["--peak_tflops", "-1"], "peak_tflops: expected 0"),
    "nothing to resume": (["--resume", "latest"], "resume: expected a complete checkpoint"),
    "no such checkpoint": (["--resume", "away/step-00000001"], "resume: expected a complete"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_flags_are_one_line_and_exit_2(folder, capfd, name):
    flags, message = BAD[name]
    assert message in fails(folder.args("bad") + flags, capfd)
    assert not (folder.path / "bad").exists()


def test_a_missing_package_is_one_line_and_exit_2(folder, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = fails([*folder.args("bad"), "--wandb_project", "faces"], capfd)
    assert "wandb_project: expected the package wandb (pip install wandb)" in message
    assert not (folder.path / "bad").exists()


BAD_JSON = {
    "unknown key": ({"zero_optimisation": {"stage": 1}}, "['zero_optimisation']"),
    "bf16 stage 0": ({"bf16": {"enabled": True}}, "expected 1, 2 or 3 with 16 bits"),
    "batches": ({"train_batch_size": 5}, "train_batch_size: expected"),
    "norm off": ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, "grad_norm: exp"),
    "unchecked": ({"bf16": {"check_grad_overflow": False}}, "bf16.check_grad_overflow: expected"),
    "its checkpoints": ({"checkpoint": {"load_universal": True}}, "['checkpoint']"),
    "no stage": ({"zero_optimization": {"stage": 4}}, "expected 0 to 3, got 4"),
    "auto": ({"optimizer": {"type": "SGD", "params": {"momentum": "auto"}}}, "params.momentum"),
    "no such optimizer": (
        {"optimizer": {"type": "AdamV"}},
        "optimizer.type: expected an optimizer",
    ),
    "no optimizer": ({"optimizer": {"type": "lr_scheduler"}}, "optimizer.type: expected an"),
}


@pytest.mark.parametrize("name", list(BAD_JSON))
def test_bad_json_is_one_line_and_exit_2(folder, capfd, name):
    ds, message = BAD_JSON[name]
    assert message in fails(folder.args("bad", ds=ds), capfd)


def test_what_deepspeed_refuses_is_one_line_and_exit_2(folder):
    ds = stage(1, **{"fp16": {"enabled": False, "loss_skale": 0}})
    command = [sys.executable, "-m", "dde_fast.train", *folder.args("bad", ds=ds)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("dde_fast: error: deepspeed_config: ")
    assert "loss_skale" in done.stderr


def test_broken_files_are_one_line_and_exit_2(folder, capfd):
    broken = folder.path / "broken"
    broken.write_text("{not json")
    assert "deepspeed_config: expected JSON" in fails(
        [*folder.args("bad"), "--deepspeed_config", str(broken)], capfd
    )
    assert "/broken', which is none of them" in fails(
        [*folder.args("bad"), "--pairs", str(broken)], capfd
    )
    half = folder.path / "half.parquet"
    half.write_bytes(folder.pairs.read_bytes()[:-100])
    assert "pairs: expected a parquet file" in fails(
        [*folder.args("bad"), "--pairs", str(half)], capfd
    )
    missing = tiny.write_pairs(folder.path / "missing.parquet", drop_column(tiny.rows()))
    assert "without ['jpg_1']" in fails([*folder.args("bad"), "--pairs", str(missing)], capfd)
    ties = tiny.write_pairs(folder.path / "ties.parquet", all_ties(tiny.rows()))
    assert "12 tied" in fails([*folder.args("bad"), "--pairs", str(ties)], capfd)


@pytest.fixture(scope="module")
def cache(folder) -> Path:
    encoders = Encoders.load(str(folder.model), torch.device("cpu"))
    return caches.prepare(encoders, folder.pairs, folder.path / "cache")


def test_a_cache_is_for_the_model_that_made_it(folder, cache, capfd):
    other = tiny.make_model(folder.path / "other_model", seed=1)
    assert "pairs: expected a cache made with the model's own" in fails(
        folder.args("bad", pairs=cache, model=other), capfd
    )


def test_a_damaged_cache_is_one_line_and_exit_2(folder, cache, tmp_path, capfd):
    damaged = shutil.copytree(cache, tmp_path / "cache")
    (damaged / "images-00000.safetensors").unlink()
    assert "cache: expected images-00000.safetensors of" in fails(
        folder.args("bad", pairs=damaged), capfd
    )
    (damaged / "manifest.json").write_text("{")
    assert "cache: expected a manifest in" in fails(folder.args("bad", pairs=damaged), capfd)


def test_a_cache_from_afar_needs_room_or_blocks(folder, cache, capfd, monkeypatch):
    monkeypatch.setenv("DDE_FAST_CACHE", str(folder.path / "fetched"))
    url, most = cache.as_uri(), max(path.stat().st_size for path in cache.iterdir())
    flags = {"pairs": url, "cache_gib": most / 2**30}
    assert "shuffle_block: expected above 0 for a cache of" in fails(
        folder.args("bad", **flags), capfd
    )
    flags["cache_gib"] /= 2
    assert "cache_gib: expected at least" in fails(folder.args("bad", **flags), capfd)


def test_what_a_run_began_to_encode_is_no_run(folder, tmp_path, capfd):
    """Killed before its first step, a run is started again by the same command."""
    (tmp_path / "run/cache").mkdir(parents=True)
    stop = "--objective", "ppo"
    assert "objective" in fails([*folder.args("again", tmp_path / "run"), *stop], capfd)
    args = folder.args("again", tmp_path / "run", pairs="nowhere.parquet")
    assert "pairs: expected" in fails(args, capfd)  # and not: output
    (tmp_path / "run/config.json.0a1b2c3d.partial").touch()  # killed at its first file
    assert "pairs: expected" in fails(args, capfd)
    (tmp_path / "run/metrics.jsonl").touch()
    assert "output: expected a new or empty directory" in fails(args, capfd)


def test_only_one_process_of_a_machine_speaks(folder, capfd, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        train.main(folder.args("bad", steps=0))
    assert stop.value.code == 2
    assert capfd.readouterr().err == ""


def test_settings_newer_than_a_checkpoint_were_at_their_defaults():
    """A run of an older version goes on; what it did not have cannot be added to it."""
    start = checkpoint.Checkpoint(Path("step-1"), 1, 16, 1, 0, {"beta": 50.0})
    defaults = {"beta": 1.0, "compile": ""}
    checkpoint.check_continues(start, {"beta": 50.0, "compile": ""}, defaults)
    with pytest.raises(ValueError, match="resume: compile: expected '' .* got 'whole'"):
        checkpoint.check_continues(start, {"beta": 50.0, "compile": "whole"}, defaults)
    with pytest.raises(ValueError, match="resume: beta: expected 50.0 .* got 1.0"):
        checkpoint.check_continues(start, {"beta": 1.0, "compile": ""}, defaults)


@pytest.mark.parametrize("damage", ["marker", "file", "size", "content", "json"])
def test_an_incomplete_checkpoint_is_not_taken(tmp_path, damage):
    for step in (1, 2):
        path = tmp_path / f"step-{step:08d}"
        path.mkdir()
        (path / "weights").write_bytes(b"1234")
        state = {"step": step, "position": 4 * step, "world_size": 1, "skipped": 0, "identity": {}}
        (path / "state.json").write_text(json.dumps(state))
        contents = checkpoint._contents(path)
        (path / checkpoint.MARKER).write_text(json.dumps(contents))
    assert checkpoint.find("latest", tmp_path)[0].step == 2
    newest = tmp_path / "step-00000002"
    if damage == "marker":
        (newest / checkpoint.MARKER).unlink()
    elif damage == "file":
        (newest / "weights").unlink()
    elif damage == "size":
        (newest / "weights").write_bytes(b"12")
    elif damage == "content":
        (newest / "weights").write_bytes(b"1235")
    else:
        (newest / checkpoint.MARKER).write_text("{")
    found, torn = checkpoint.find("latest", tmp_path)
    assert found.step == 1 and torn == ["step-00000002"]
    with pytest.raises(ValueError, match="only torn ones"):
        checkpoint.find(str(newest), tmp_path)


def test_saving_again_after_a_kill_leaves_nothing_of_it(tmp_path, monkeypatch):
    """Killed at any moment: a torn folder, or a file of no name yet."""
    alone = SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: 1, barrier=lambda: None)
    monkeypatch.setattr(checkpoint, "dist", alone)
    monkeypatch.setattr(checkpoint, "collect_errors", lambda *args: None)
    monkeypatch.setattr(checkpoint.Failures, "of_all_ranks", lambda self: [])
    engine = SimpleNamespace(save_checkpoint=lambda path, tag, **_: (Path(path) / tag).mkdir())

    def save(step: int) -> None:
        numbers = {"step": step, "position": 4 * step, "identity": {}}
        checkpoint.save(engine, torch.nn.Linear(1, 1), tmp_path, **numbers)

    save(1)
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / "step-00000002/weights").touch()
    (tmp_path / "latest.0a1b2c3d.partial").touch()
    save(2)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step-00000001", "step-00000002", "latest"}
    assert (tmp_path / "latest").read_text() == "step-00000002"
    assert checkpoint.find("latest", tmp_path)[0].step == 2
    assert not (tmp_path / "step-00000002/weights").exists()
