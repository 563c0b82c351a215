"""It survives: each test injects a fault into a run on one or two ranks and looks at what is left."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from train_runs import HALF, ROOT, STEPS, Folder, environment, fails, stage
from variants import distance, weights

from dde_fast import checkpoint, config, inputs
from dde_fast.checkpoint_files import without_pickle

STAGES = range(4)
QUARTER = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2}
EMA = {"ema_decay": 0.5}
PLAIN_ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "eps": 1e-4, "fused": False}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Folder:
    """One rank, then two, then one again; the later ones continue what the earlier ones began."""
    folder = Folder(tmp_path_factory.mktemp("faults"))
    args, half = folder.args, stage(1, **HALF)
    alone = [
        {"args": args("pruned", save_every=1, keep=2)},
        {"args": args("skipped_json", ds=stage(0, **PLAIN_ADAM), **EMA), "poison": [0, 2, 2]},
    ]
    # the ranks' shares of a step are two micro-batches
    split = args("interrupted", ds=stage(2, **QUARTER))
    offline = args("offline", ds=stage(2, **QUARTER))
    # where rounding is not magnified: by Adam's steps in the weights, by DDE's k² in the losses
    slowly = {"learning_rate": 1e-4, "timestep_high": 400}
    full = args("full", ds=half, save_every=2, **slowly)
    diverged = args("diverged", ds=half, steps=50, max_skipped=3)
    pair = [
        {"args": args("whole", ds=stage(2, **QUARTER))},
        {"args": split, "interrupt": [1, 4]},
        {"args": [*split, "--resume", "auto"]},
        {"args": offline, "unplug": [1, 5], "exit": 2},
        {"args": [*offline, "--resume", "auto"]},
        {"args": diverged, "poison": [1, 2, 49], "exit": 2},
        {"args": full, "full": [1, 4, 350_000], "exit": 2},
        {"args": [*full, "--resume", "auto"]},
    ]
    again = []
    for n in STAGES:  # 3 last: DeepSpeed then replaces torch's linear for the rest of the process
        one, two = stage(n), stage(n, **HALF)
        begun = [folder.path / f"{m}{n}/checkpoints/step-00000003" for m in ("one", "two")]
        alone.append({"args": args(f"one{n}", ds=one, save_every=3, **slowly)})
        alone.append(
            {"args": args(f"skipped{n}", ds=one, save_every=1, keep=0, **EMA), "poison": [0, 2, 2]}
        )
        pair.append({"args": args(f"two{n}", ds=two, save_every=3, **slowly)})
        pair.append({"args": args(f"grown{n}", ds=two, resume=begun[0], **slowly)})
        pair.append({"args": args(f"skipped_pair{n}", ds=two), "poison": [1, 2, 2]})
        again.append({"args": args(f"shrunk{n}", ds=one, resume=begun[1], **slowly)})
    for kind, step in (("flip", 5), ("pickle", 6)):
        damaged = folder.path / f"pruned/checkpoints/step-{step:08d}"
        again.append({"args": args(kind, resume=damaged), kind: [str(damaged)], "exit": 2})
    folder.work(alone, 1, "alone")
    folder.work(pair, 2, "pair")
    folder.work(again[-2:] + again[:-2], 1, "again")
    return folder


def log(folder: Folder, name: str) -> str:
    return (folder.path / f"{name}.0.log").read_text()


def kept(folder: Folder, name: str) -> list[int]:
    """Steps of a run's checkpoints, which are all complete."""
    tags = sorted((folder.path / name / "checkpoints").glob("step-*"))
    assert all(checkpoint.is_complete(tag) for tag in tags)
    return [int(tag.name.removeprefix("step-")) for tag in tags]


def finite_losses(folder: Folder, name: str) -> torch.Tensor:
    losses = [record["loss"] for record in folder.metrics(name)]
    return torch.tensor([loss for loss in losses if loss is not None])


@pytest.mark.parametrize("n", STAGES)
@pytest.mark.parametrize(("kind", "whole"), [("grown", "one"), ("shrunk", "two")])
def test_another_number_of_ranks_continues_the_run(folder, kind, whole, n):
    assert [record["step"] for record in folder.metrics(f"{kind}{n}")] == [4, 5, 6]
    ahead = folder.losses(f"{kind}{n}") - folder.losses(f"{whole}{n}")[3:]
    assert ahead.abs().max() <= 2e-7
    a, b = folder.unet(f"{kind}{n}"), folder.unet(f"{whole}{n}")
    assert max((a[key] - b[key]).abs().max() for key in a) <= 2e-7
    assert folder.distance(f"{kind}{n}", f"{whole}{n}") < 5e-3
    assert kept(folder, f"{kind}{n}") == [STEPS]
    # nothing is left of the conversion
    left = {path.name for path in (folder.path / f"{kind}{n}/checkpoints").iterdir()}
    assert left - {"zero_to_fp32.py", "zero_to_torch.py"} == {"latest", f"step-{STEPS:08d}"}


def tensors(value) -> list[torch.Tensor]:
    """All tensors in a nest of containers."""
    if isinstance(value, torch.Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value
    nest = isinstance(value, (dict, list, tuple))
    return [tensor for item in inside for tensor in tensors(item)] if nest else []


@pytest.mark.parametrize("n", STAGES)
def test_a_gradient_that_is_not_finite_moves_nothing(folder, n):
    before, after = (folder.path / f"skipped{n}/checkpoints/step-{step:08d}" for step in (2, 3))
    files = sorted(path.name for path in before.glob("*.pt"))
    with without_pickle():
        a, b = (tensors([torch.load(path / name) for name in files]) for path in (before, after))
    # the weights, both moments, average and step counts, one by one or flattened by ZeRO
    assert len(files) == (1 if n == 0 else 2) and len(a) == len(b)
    assert sum(x.numel() for x in a) > 4 * sum(x.numel() for x in folder.unet("one0").values())
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    name = "ratios.safetensors"
    assert (before / name).read_bytes() == (after / name).read_bytes()
    assert checkpoint.find(str(after), after)[0].skipped == 1


@pytest.mark.parametrize("name", ["skipped_json", *(f"skipped{n}" for n in STAGES)])
def test_a_skipped_step_is_counted_and_the_run_goes_on(folder, name):
    records, healthy = folder.metrics(name), folder.metrics("pruned")
    assert [record["skipped_steps"] for record in records] == [0, 0, 1, 1, 1, 1]
    assert records[2]["loss"] is None and records[2]["grad_norm"] is None
    assert [r["learning_rate"] for r in records] == [r["learning_rate"] for r in healthy]
    assert abs(records[3]["loss"] - healthy[3]["loss"]) > 1e-5
    # one trajectory, whoever decides: the optimizer on the device, the host, or ZeRO
    expected = finite_losses(folder, "skipped0")
    assert len(expected) == STEPS - 1
    assert (finite_losses(folder, name) - expected).abs().max() < 1e-6
    assert folder.distance(name, "skipped0") < 5e-4
    found, average = (weights(folder, run, "unet_ema") for run in (name, "skipped0"))
    start = load_file(folder.model / "unet/diffusion_pytorch_model.safetensors")
    assert distance(found, average, start) < 5e-4


@pytest.mark.parametrize("n", STAGES)
def test_a_fault_on_one_rank_skips_the_step_on_all(folder, n):
    records = folder.metrics(f"skipped_pair{n}")
    assert [record["skipped_steps"] for record in records] == [0, 0, 1, 1, 1, 1]
    healthy = finite_losses(folder, "skipped0")
    found = folder.losses(f"skipped_pair{n}")[[0, 1, 3, 4, 5]]
    assert (found - healthy).abs().max() < 1e-6
    assert folder.distance(f"skipped_pair{n}", "skipped0") < 5e-4


def test_too_many_skipped_steps_in_a_row_end_the_run_with_its_state_saved(folder):
    assert [record["skipped_steps"] for record in folder.metrics("diverged")] == [0, 0, 1, 2, 3]
    assert kept(folder, "diverged") == [5]
    saved, _ = checkpoint.find("latest", folder.path / "diverged/checkpoints")
    assert saved.skipped == 3
    assert "error: gradient: expected finite numbers, got none in the last 3" in log(folder, "pair")


def test_a_signal_is_heard_between_micro_batches(folder):
    # it came in the third step's first micro-batch, and that step is not in the state
    assert "stopped by a signal and saved" in log(folder, "pair")
    assert kept(folder, "interrupted") == [2, STEPS]
    assert torch.equal(folder.losses("interrupted"), folder.losses("whole"))
    assert folder.distance("interrupted", "whole") == 0


def test_data_that_cannot_be_read_any_more_on_one_rank_saves_the_state_of_all(folder):
    # it failed at the third step's second micro-batch
    lines = [line for line in log(folder, "pair").splitlines() if "to fetch a shard" in line]
    assert len(lines) == 1 and lines[0].startswith("dde_fast: error: pairs: expected to fetch")
    assert "stopped and saved" in lines[0] and lines[0].endswith("--resume latest")
    assert kept(folder, "offline") == [2, STEPS]
    assert torch.equal(folder.losses("offline"), folder.losses("whole"))
    assert folder.distance("offline", "whole") == 0


def test_a_full_disk_ends_the_run_with_earlier_checkpoints_whole(folder):
    lines = [line for line in log(folder, "pair").splitlines() if "expected to write" in line]
    assert len(lines) == 1 and "File too large" in lines[0]
    assert "step-00000002 is whole: make room, then continue with --resume latest" in lines[0]
    # what was written of the fourth step's was removed, and the run went on from the second's
    assert kept(folder, "full") == [2, 4, 6]
    assert torch.equal(folder.losses("full"), folder.losses("two1"))
    assert folder.distance("full", "two1") == 0


def test_only_the_newest_checkpoints_stay(folder):
    assert kept(folder, "pruned") == [5, 6]
    assert kept(folder, "skipped0") == [1, 2, 3, 4, 5, 6]
    assert kept(folder, "two0") == [3, 6]


def test_the_last_whole_checkpoint_is_never_pruned(tmp_path, folder):
    whole = folder.path / "pruned/checkpoints/step-00000006"
    for name, torn in (("step-00000001", False), ("step-00000002", True), ("step-00000009", True)):
        (tmp_path / name).mkdir()
        for file in whole.iterdir():
            if not (torn and file.name == checkpoint.MARKER):
                (tmp_path / name / file.name).write_bytes(file.read_bytes())
    newest = tmp_path / "step-00000001"
    checkpoint._prune(tmp_path, 1, newest)
    # the later ones are torn, and may be another's that is being written
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["1", "2", "9"]
    (tmp_path / "step-00000002" / checkpoint.MARKER).write_bytes(
        (newest / checkpoint.MARKER).read_bytes()
    )
    checkpoint._prune(tmp_path, 1, tmp_path / "step-00000002")
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["2", "9"]


def test_damage_that_the_marker_cannot_see_is_found_when_it_is_read(folder):
    errors = [line for line in log(folder, "again").splitlines() if "dde_fast: error" in line]
    assert len(errors) == 2 and all("resume: expected the files of" in line for line in errors)
    assert "mp_rank_00_model_states.pt (checksum)" in errors[0]
    assert "mp_rank_00_model_states.pt (pickled ['pathlib.PosixPath'])" in errors[1]


def test_auto_begins_where_there_is_nothing_and_refuses_what_is_no_run(tmp_path, folder, capfd):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("")
    flags = folder.args("auto", output=str(other), resume="auto")
    assert "output: expected a run to continue" in fails(flags, capfd)
    settings = config.parse(folder.args("auto", output=str(tmp_path / "new"), resume="auto"))
    assert inputs.place_of_run(settings) is None
    settings.output = str(folder.path / "two0")
    assert inputs.place_of_run(settings).step == STEPS


def test_runs_killed_at_random_continue_bit_for_bit(tmp_path):
    """A short version of the command in CONTRIBUTING."""
    command = [sys.executable, str(ROOT / "tests/kill_runs.py"), "--stages", "2", "--ranks", "2"]
    command += ["--kills", "4", "--steps", "10", "--out", str(tmp_path / "kill.json")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (row,) = json.loads((tmp_path / "kill.json").read_text())["runs"]
    assert row["kills"] == 4 and row["in_a_save"] > 0 and row["finished_runs"] > 0
    assert row["bit_identical"] is True


def test_sigterm_saves_and_exits_0(folder):
    args = folder.args("stopped", steps=1_000_000, log_every=1)
    command = [sys.executable, "-m", "dde_fast.train", *args]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    metrics = folder.path / "stopped/metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    assert "stopped by a signal and saved" in printed
    saved, torn = checkpoint.find("latest", folder.path / "stopped/checkpoints")
    assert saved.step >= 3 and saved.position == 4 * saved.step and not torn
    assert not (folder.path / "stopped/unet").exists()
