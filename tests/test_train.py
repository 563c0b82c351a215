"""The trainer, whole: configurations that must give one trajectory are compared with each other.

One process trains with one rank in every way, another two with two ranks; the tests look at what
the runs left behind.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import pytest
import tiny
import torch
from safetensors.torch import load_file

from dde_fast import checkpoint, train
from dde_fast.objectives import OBJECTIVES

ROOT = Path(__file__).parent.parent
STEPS = 6
OBJECTIVE_STEPS = 2


def environment(**more: str) -> dict[str, str]:
    """One thread per rank; no launcher's variables; the package from here."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in launcher}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | more


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


class Folder:
    """The inputs and the runs of these tests."""

    def __init__(self, path: Path):
        self.path = path
        self.model = tiny.make_model(path / "model")
        self.pairs = tiny.write_pairs(path / "train.parquet", tiny.rows())

    def args(self, name: str, output: str = "", ds: dict | None = None, **flags) -> list[str]:
        """Flags of a run called `name`."""
        ds_path = tiny.write_ds(self.path / f"{name}.json", **(ds or {}))
        flags = {
            "model": self.model,
            "pairs": self.pairs,
            "deepspeed_config": ds_path,
            "output": self.path / (output or name),
            "steps": STEPS,
            "log_every": 1,
            "save_every": 0,
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "beta": 1.0,
            "caption_dropout": 0.3,
            "timestep_high": 800,
            "adam_eps": 1e-4,
            **flags,
        }
        return [part for key, value in flags.items() for part in (f"--{key}", str(value))]

    def work(self, jobs: list[dict], ranks: int, name: str) -> str:
        """Run jobs in `ranks` processes; what rank 0 printed."""
        path = self.path / f"{name}.jobs"
        path.write_text(json.dumps(jobs))
        port, processes = free_port(), []
        for rank in range(ranks):
            variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            log = open(self.path / f"{name}.{rank}.log", "w+")
            command = [sys.executable, str(ROOT / "tests/train_worker.py"), str(path)]
            process = subprocess.Popen(
                command, env=environment(**variables), stdout=log, stderr=log, text=True
            )
            processes.append((process, log))
        try:
            for process, log in processes:
                code = process.wait(timeout=400)
                log.seek(0)
                assert code == 0, log.read()[-4000:]
        finally:
            for process, _ in processes:
                process.kill()
        return (self.path / f"{name}.0.log").read_text()

    def losses(self, name: str) -> torch.Tensor:
        return torch.tensor([record["loss"] for record in self.metrics(name)])

    def metrics(self, name: str) -> list[dict]:
        lines = (self.path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def unet(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.path / name / "unet/diffusion_pytorch_model.safetensors")

    def ratios(self, name: str) -> torch.Tensor:
        path = self.path / name / f"checkpoints/step-{STEPS:08d}/ratios.safetensors"
        path = path if path.exists() else self.path / name / "ratios.safetensors"
        return load_file(path)["ratios"]

    def distance(self, a: str, b: str) -> float:
        """Largest difference of two trained UNets, relative to what training changed."""
        start = load_file(self.model / "unet/diffusion_pytorch_model.safetensors")
        a, b = self.unet(a), self.unet(b)
        assert a.keys() == b.keys() == start.keys()
        moved = max((a[key] - start[key]).abs().max() for key in a)
        assert moved > 1e-5
        return float(max((a[key] - b[key]).abs().max() for key in a) / moved)


def stage(number: int, **more) -> dict:
    return {"zero_optimization": {"stage": number}, **more}


BF16 = {"bf16": {"enabled": True}}
HALF = {"train_micro_batch_size_per_gpu": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Folder:
    return Folder(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def alone(folder) -> Folder:
    """Everything that one rank can be asked to do."""
    v_model = tiny.make_model(folder.path / "v_model", "v_prediction")
    x_model = tiny.make_model(folder.path / "x_model", "sample")
    adamw = {
        "type": "AdamW",
        "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto"),
    }
    torn = folder.path / "zero1_resumed/checkpoints/step-00000004/mp_rank_00_model_states.pt"
    jobs = [
        {"args": folder.args("plain"), "plain": True},
        {"args": folder.args("plain_v", model=v_model), "plain": True},
        {"args": folder.args("plain_x", model=x_model), "plain": True},
        {"args": folder.args("v", model=v_model)},
        {"args": folder.args("x", model=x_model)},
        {"args": [*folder.args("checkpointing", ds=stage(1)), "--gradient_checkpointing"]},
        {"args": folder.args("split", ds=stage(1, **HALF, gradient_accumulation_steps=2))},
        {"args": folder.args("json", ds=stage(1, optimizer=adamw))},
        {"args": folder.args("syncs", log_every=3), "count_syncs": str(folder.path / "syncs.json")},
    ]
    for name in OBJECTIVES:
        jobs.append({"args": folder.args(name, objective=name, steps=OBJECTIVE_STEPS)})
    # stage 3 comes last: DeepSpeed then replaces torch's linear for the rest of the process
    for n in range(4):
        jobs.append({"args": folder.args(f"zero{n}", ds=stage(n))})
        if n > 0:
            half = stage(n, **BF16)
            sft = {"objective": "sft", "steps": OBJECTIVE_STEPS}
            jobs.append({"args": folder.args(f"bf16_{n}", ds=half)})
            jobs.append({"args": folder.args(f"bf16_sft_{n}", ds=half, **sft)})
        first = folder.args(f"zero{n}_resumed", ds=stage(n), steps=4, save_every=2)
        again = folder.args(f"zero{n}_resumed", ds=stage(n), resume="latest")
        # stage 1 loses its newest checkpoint and has to go back one more
        jobs += [{"args": first}, {"args": again} | ({"tear": str(torn)} if n == 1 else {})]
    folder.printed = folder.work(jobs, 1, "alone")
    return folder


@pytest.fixture(scope="module")
def pair(folder, alone) -> Folder:
    """Two ranks."""
    jobs = [{"args": folder.args(f"two{n}", ds=stage(n, **HALF))} for n in (0, 2, 3)]
    stopped = folder.args("two_stopped", ds=stage(2, **HALF))
    jobs += [{"args": stopped, "stop": [1, 3]}, {"args": [*stopped, "--resume", "latest"]}]
    begun_alone = folder.path / "zero0_resumed/checkpoints/step-00000004"
    jobs.append({"args": folder.args("grown", ds=stage(0, **HALF), resume=begun_alone)})
    folder.work(jobs, 2, "pair")
    return folder


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3"])
def test_every_zero_stage_is_the_plain_loop(alone, name):
    assert (alone.losses(name) - alone.losses("plain")).abs().max() < 1e-6
    assert alone.distance(name, "plain") < 5e-4
    torch.testing.assert_close(alone.ratios(name), alone.ratios("plain"), rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("name", ["v", "x"])
def test_other_prediction_types_are_the_plain_loop(alone, name):
    assert (alone.losses(name) - alone.losses(f"plain_{name}")).abs().max() < 1e-6
    assert alone.distance(name, f"plain_{name}") < 5e-4


def test_training_moves_the_loss(alone):
    losses = alone.losses("plain")
    assert losses[0] == pytest.approx(0.693147, abs=1e-6)  # policy equals reference
    assert (losses[1:] - losses[0]).abs().min() > 1e-5


def test_gradient_checkpointing_changes_nothing(alone):
    assert (alone.losses("checkpointing") - alone.losses("zero1")).abs().max() < 1e-6
    assert alone.distance("checkpointing", "zero1") < 5e-4


def test_accumulation_is_a_larger_batch(alone):
    assert (alone.losses("split") - alone.losses("zero1")).abs().max() < 1e-6
    assert alone.distance("split", "zero1") < 5e-4
    torch.testing.assert_close(alone.ratios("split"), alone.ratios("zero1"), rtol=1e-4, atol=1e-10)


def test_an_optimizer_of_the_json_is_filled_in(alone):
    assert torch.equal(alone.losses("json"), alone.losses("zero1"))
    assert alone.distance("json", "zero1") == 0


@pytest.mark.parametrize("n", [1, 2, 3])
def test_bf16_stays_near_fp32(alone, n):
    preference = alone.losses(f"bf16_{n}")
    assert preference[0] == pytest.approx(0.693147, abs=1e-6)  # both models round alike
    assert (preference - alone.losses("plain")).abs().max() < 0.02
    torch.testing.assert_close(
        alone.losses(f"bf16_sft_{n}"), alone.losses("sft"), rtol=5e-3, atol=0
    )
    start = load_file(alone.model / "unet/diffusion_pytorch_model.safetensors")
    exact, rounded = alone.unet("sft"), alone.unet(f"bf16_sft_{n}")
    moves = [torch.cat([(w[k] - start[k]).flatten() for k in start]) for w in (exact, rounded)]
    assert torch.cosine_similarity(*moves, dim=0) > 0.97
    assert all(value.dtype == torch.float32 for value in rounded.values())
    # exact fp32 masters, not weights rounded to 16 bits
    assert any((value != value.bfloat16().float()).any() for value in rounded.values())


@pytest.mark.parametrize("n", range(4))
def test_resumed_is_uninterrupted_bit_for_bit(alone, n):
    expected, resumed = alone.metrics(f"zero{n}"), alone.metrics(f"zero{n}_resumed")
    assert [record["step"] for record in resumed] == list(range(1, STEPS + 1))
    for a, b in zip(expected, resumed, strict=True):
        for key in a.keys() - {"pairs_per_second", "memory_gib"}:
            assert a[key] == b[key], (a["step"], key)
    assert alone.distance(f"zero{n}", f"zero{n}_resumed") == 0
    assert torch.equal(alone.ratios(f"zero{n}"), alone.ratios(f"zero{n}_resumed"))
    assert alone.ratios(f"zero{n}").any()


def test_a_torn_checkpoint_is_skipped_and_named(alone):
    assert "skipped step-00000004, which is torn; continuing from step-00000002" in alone.printed
    latest = alone.path / "zero1_resumed/checkpoints/latest"
    assert latest.read_text() == f"step-{STEPS:08d}"


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_every_objective_trains(alone, name):
    records = alone.metrics(name)
    assert len(records) == OBJECTIVE_STEPS
    assert ("implicit_accuracy" in records[0]) == OBJECTIVES[name].needs_reference
    assert all(record["grad_norm"] > 0 for record in records)
    start = load_file(alone.model / "unet/diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(value, start[key]) for key, value in alone.unet(name).items())


def test_the_host_never_waits_between_log_points(alone):
    counts = json.loads((alone.path / "syncs.json").read_text())
    assert counts["control"] == 1
    start, *steps = counts["steps"]  # the first includes loading everything
    assert start > 0
    assert steps == [0, 1, 0, 0, steps[-1]]  # logged after steps 3 and 6, and saved then


def test_a_run_leaves_everything_it_promises(alone):
    run = alone.path / "zero1"
    unet = diffusers.UNet2DConditionModel.from_pretrained(run / "unet")
    assert unet.dtype == torch.float32
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(alone.model, unet=unet)
    image = pipeline("happy", num_inference_steps=1, height=8, width=8, output_type="np").images
    assert image.shape == (1, 8, 8, 3)
    settings = json.loads((run / "config.json").read_text())
    assert settings["config"]["beta"] == 1.0 and settings["deepspeed"]["train_batch_size"] == 4
    assert list((run / "tensorboard").glob("events*"))
    expected = "step loss implicit_accuracy logit margin policy_win_error policy_lose_error "
    expected += "reference_win_error reference_lose_error grad_norm learning_rate "
    expected += "pairs_per_second memory_gib"
    record = alone.metrics("zero1")[-1]
    assert list(record) == expected.split()
    assert record["learning_rate"] == 1e-3
    assert alone.metrics("zero1")[0]["learning_rate"] == 5e-4  # half of a warm-up of 2
    for name in ("zero1", "zero2", "zero3"):
        assert alone.metrics(name)[2]["grad_norm"] == pytest.approx(
            alone.metrics("zero0")[2]["grad_norm"], rel=1e-4
        )


@pytest.mark.parametrize("n", [0, 2, 3])
def test_two_ranks_are_one(alone, pair, n):
    assert (pair.losses(f"two{n}") - alone.losses(f"zero{n}")).abs().max() < 1e-6
    assert pair.distance(f"two{n}", f"zero{n}") < 5e-4
    torch.testing.assert_close(pair.ratios(f"two{n}"), pair.ratios("zero0"), rtol=1e-4, atol=1e-10)


def test_a_signal_to_one_rank_stops_all_and_resumes(alone, pair):
    log = (pair.path / "pair.0.log").read_text()
    assert "stopped by a signal and saved" in log and "step-00000004" in log
    assert [record["step"] for record in pair.metrics("two_stopped")] == list(range(1, STEPS + 1))
    assert pair.distance("two_stopped", "two2") < 5e-4
    assert (pair.losses("two_stopped") - pair.losses("two2")).abs().max() < 1e-6


def test_stage_0_resumes_on_more_ranks(alone, pair):
    assert [record["step"] for record in pair.metrics("grown")] == [5, 6]
    assert (pair.losses("grown") - alone.losses("zero0")[4:]).abs().max() < 1e-6
    assert pair.distance("grown", "zero0") < 5e-4


def test_torchrun_runs_the_script_on_two_ranks(alone):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", free_port(), str(ROOT / "dde_fast/train.py")]
    command += alone.args("torchrun", ds=stage(1, **HALF))
    subprocess.run(command, env=environment(), check=True, timeout=300, cwd=alone.path)
    assert (alone.losses("torchrun") - alone.losses("zero1")).abs().max() < 1e-6
    assert alone.distance("torchrun", "zero1") < 5e-4


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


def deepspeed(folder: Folder, *args: str) -> subprocess.CompletedProcess:
    command = [str(Path(sys.executable).parent / "deepspeed"), "--master_port", free_port()]
    command += [str(ROOT / "dde_fast/train.py"), "--deepspeed_config", str(ROOT / "ds.json"), *args]
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=300, cwd=folder.path
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
    "unknown backend": (["--backend", "tpu"], "backend: expected one of"),
    "no such pairs": (["--pairs", "nowhere.parquet"], "pairs: expected a parquet file or a folder"),
    "no such model": (["--model", "nowhere/at/all"], "model: expected a diffusers directory"),
    "no such json": (["--deepspeed_config", "no.json"], "deepspeed_config: expected a readable"),
    "nothing to resume": (["--resume", "latest"], "resume: expected a complete checkpoint"),
    "no such checkpoint": (["--resume", "away/step-00000001"], "resume: expected a complete"),
}


def fails(args: list[str], capfd) -> str:
    """The one line of stderr of a run that must end with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        train.main(args)
    assert stop.value.code == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("dde_fast: error: ")
    return lines[0]


@pytest.mark.parametrize("name", list(BAD))
def test_bad_flags_are_one_line_and_exit_2(folder, capfd, name):
    flags, message = BAD[name]
    assert message in fails(folder.args("bad") + flags, capfd)
    assert not (folder.path / "bad").exists()


BAD_JSON = {
    "unknown key": ({"zero_optimisation": {"stage": 1}}, "['zero_optimisation']"),
    "bf16 stage 0": ({"bf16": {"enabled": True}}, "expected 1, 2 or 3 with 16 bits"),
    "batches": ({"train_batch_size": 5}, "train_batch_size: expected"),
    "no stage": ({"zero_optimization": {"stage": 4}}, "expected 0 to 3, got 4"),
    "auto": ({"optimizer": {"type": "SGD", "params": {"momentum": "auto"}}}, "params.momentum"),
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
    assert "pairs: expected a parquet file" in fails(
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


def test_only_the_same_run_continues(alone, capfd, monkeypatch):
    def resume(**flags):
        ds = stage(1) if "ds" not in flags else flags.pop("ds")
        return fails(alone.args("other", "zero1", ds=ds, resume="latest", **flags), capfd)

    assert "output: expected a new or empty directory" in fails(alone.args("zero1"), capfd)
    assert "resume: objective: expected 'dde'" in resume(objective="dde-single")
    assert "resume: seed: expected 0" in resume(seed=1)
    other = tiny.make_model(alone.path / "other_model", seed=1)
    assert "resume: model: expected 'weights " in resume(model=other)
    fewer = tiny.write_pairs(alone.path / "fewer.parquet", tiny.rows()[:9])
    assert "resume: pairs: expected 'content " in resume(pairs=fewer)
    assert "ZeRO stage: expected 1" in resume(ds=stage(2))
    assert "pairs per optimizer step: expected 4" in resume(ds=stage(1, **HALF))
    assert "steps: expected at least the 6 done, got 5" in resume(steps=5)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "resume: expected 1 ranks" in resume(ds=stage(1, **HALF))


def test_only_one_process_of_a_machine_speaks(folder, capfd, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        train.main(folder.args("bad", steps=0))
    assert stop.value.code == 2
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("damage", ["marker", "file", "size", "json"])
def test_an_incomplete_checkpoint_is_not_taken(tmp_path, damage):
    for step in (1, 2):
        path = tmp_path / f"step-{step:08d}"
        path.mkdir()
        (path / "weights").write_bytes(b"1234")
        state = {"step": step, "position": 4 * step, "world_size": 1, "identity": {}}
        (path / "state.json").write_text(json.dumps(state))
        sizes = {file.name: file.stat().st_size for file in path.iterdir()}
        (path / checkpoint.MARKER).write_text(json.dumps(sizes))
    assert checkpoint.find("latest", tmp_path)[0].step == 2
    newest = tmp_path / "step-00000002"
    if damage == "marker":
        (newest / checkpoint.MARKER).unlink()
    elif damage == "file":
        (newest / "weights").unlink()
    elif damage == "size":
        (newest / "weights").write_bytes(b"12")
    else:
        (newest / checkpoint.MARKER).write_text("{")
    found, torn = checkpoint.find("latest", tmp_path)
    assert found.step == 1 and torn == ["step-00000002"]
    with pytest.raises(ValueError, match="only torn ones"):
        checkpoint.find(str(newest), tmp_path)
