"""Reference scores: computed once, stored beside their pairs, read instead of running the model."""

import json
import shlex
import shutil
from pathlib import Path

import caches
import pytest
import torch
from safetensors.torch import load_file
from train_runs import BF16, STEPS, Folder, fails, stage

from dde_fast import config, models, noise, prepare
from dde_fast.cache import Cache
from dde_fast.deepspeed_config import read_engine_config
from dde_fast.inputs import read_inputs
from dde_fast.objectives import OBJECTIVES
from dde_fast.reference_scores import ReferenceScores

pytestmark = pytest.mark.usefixtures("one_thread")
SEEN = ["--timestep_high", "800", "--caption_dropout", "0.3"]
"""What decides what a pair sees, as in `Folder.args`."""
OTHERS = [
    name
    for name, row in OBJECTIVES.items()
    if name != "dde" and row.needs_reference and not row.online
]


def flags(folder: Folder, *more: object) -> list[str]:
    """Of `python -m dde_fast.prepare` for the cache of these tests."""
    common = ["--model", str(folder.model), "--output", str(folder.path / "cache")]
    return [*common, *map(str, more)]


def compute(folder: Folder, draws: int, *more: object) -> None:
    prepare.main(flags(folder, "--reference_scores", draws, "--score_batch", 5, *SEEN, *more))


def place(folder: Folder, dtype: str = "float32") -> Path:
    """The folder of the scores in this dtype."""
    found = [
        path.parent
        for path in (folder.path / "cache").glob("reference-*/settings.json")
        if json.loads(path.read_text())["dtype"] == dtype
    ]
    assert len(found) == 1
    return found[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve pairs, their scores at two draws in float32 and bfloat16, and runs with and without."""
    folder = Folder(tmp_path_factory.mktemp("scores"))
    prepare.main(flags(folder, "--pairs", folder.pairs, "--dtype", "float32", "--shard_size", 1))
    compute(folder, 2)
    compute(folder, 2, "--precision", "bfloat16")
    scored = {"pairs": folder.path / "cache", "reference_scores": 2}
    held_out = {
        "validation_pairs": folder.pairs,
        "validation_split": "train",
        "validation_limit": 5,
    }
    jobs = [{"args": folder.args("run", **(scored | {"reference_scores": 0}), **held_out)}]
    syncs = str(folder.path / "syncs.json")
    jobs += [{"args": folder.args("read", **scored), "no_reference": True, "count_syncs": syncs}]
    jobs += [{"args": folder.args("watched", **scored, **held_out)}]
    jobs += [{"args": folder.args("one_draw", **scored | {"reference_scores": 1})}]
    own = folder.path / "discounted/cache"  # whose timesteps want scores of their own
    shutil.copytree(scored["pairs"], own)
    more = ["--model", str(folder.model), "--output", str(own), "--reference_scores", "1"]
    prepare.main([*more, "--objective", "discounted", *SEEN])
    for objective in OTHERS:
        both = {"objective": objective, "steps": 2}
        both["pairs"] = own if objective == "discounted" else scored["pairs"]
        jobs += [{"args": folder.args(f"run-{objective}", **both)}]
        args = folder.args(f"read-{objective}", reference_scores=1, **both)
        jobs += [{"args": args, "no_reference": True}]
    begun = folder.args("resumed", **scored | {"steps": 4})
    jobs += [{"args": begun}, {"args": folder.args("resumed", **scored, resume="latest")}]
    lora = {"lora_rank": 2, "steps": 2}
    jobs += [{"args": folder.args("run-lora", pairs=scored["pairs"], **lora)}]
    jobs += [{"args": folder.args("read-lora", **scored, **lora), "no_reference": True}]
    half = {"ds": stage(2, **BF16), "steps": 2}
    jobs += [{"args": folder.args("run-bf16", pairs=scored["pairs"], **half)}]
    jobs += [{"args": folder.args("read-bf16", **scored, **half)}]
    folder.work(jobs, 1, "scores")
    return folder


def read(folder: Folder, dtype: str = "float32") -> torch.Tensor:
    """float32 [K, pairs, 2]."""
    cache, path = Cache(folder.path / "cache"), place(folder, dtype)
    settings = json.loads((path / "settings.json").read_text())
    return ReferenceScores.open(cache, settings, 2).errors


def test_they_are_the_references_errors(folder):
    """Written out in float64, pair by pair and draw by draw."""
    cache, unet = Cache(folder.path / "cache"), models.load_unet(folder.model).double()
    alphas, found = models.load_scheduler(folder.model).alphas_cumprod.double(), read(folder)
    probabilities = (torch.arange(1000) < 800).double()
    dropped = 0
    for draw in (0, 1):
        for row, pair in enumerate(cache.pair_ids):
            key = {"seed": 0, "pair_ids": pair[None], "draw": draw}
            no_caption = noise.pair_uniform(noise.CAPTION_DROPOUT, **key) <= 0.3
            dropped += int(no_caption)
            rows = caches.stored(cache, torch.tensor([row]), no_caption)
            eps, *samples = noise.pair_noise((3, 4, 4, 4), **key)[0].double()
            t = noise.sample_timesteps(probabilities, **key)
            for half in (0, 1):
                latent = rows.mean[half] + rows.std[half] * samples[half]
                noisy = alphas[t].sqrt() * latent + (1 - alphas[t]).sqrt() * eps
                prediction = unet(noisy[None], t, rows.embeddings.double()).sample[0]
                error = (prediction - eps).square().mean()
                assert found[draw, row, half] == pytest.approx(float(error.detach()), rel=2e-5)
    assert 0 < dropped < 24 and len(found.unique()) == 48


def test_files_lie_in_blocks_and_are_not_made_again(folder):
    """Two blocks of eight and four pairs for each draw; a missing one alone is computed."""
    files = sorted(place(folder).glob("draw-*"))
    names = [f"draw-{draw:03d}-{block:05d}.safetensors" for draw in (0, 1) for block in (0, 1)]
    assert [path.name for path in files] == names
    before, expected = (
        {path: path.stat().st_mtime_ns for path in files},
        load_file(files[3])["errors"].clone(),
    )
    files[3].unlink()
    compute(folder, 2, "--shard", "0/2")  # the files 0 and 2, which are there
    assert not files[3].exists()
    compute(folder, 2, "--shard", "1/2")
    assert torch.equal(load_file(files[3])["errors"], expected)
    assert all(path.stat().st_mtime_ns == before[path] for path in files[:3])


def test_training_on_them_is_training_with_the_reference(folder):
    """Two epochs, two draws: the reference would see the same; it is not loaded."""
    assert (folder.losses("read") - folder.losses("run")).abs().max() < 1e-6
    assert folder.distance("read", "run") < 5e-4
    torch.testing.assert_close(folder.ratios("read"), folder.ratios("run"), rtol=1e-4, atol=1e-10)
    for objective in OTHERS:
        a, b = (folder.losses(f"{kind}-{objective}") for kind in ("read", "run"))
        assert (a - b).abs().max() < 1e-6
    assert (folder.losses("read-lora") - folder.losses("run-lora")).abs().max() < 1e-6


def test_the_host_waits_for_nothing_but_the_log(folder):
    counts = json.loads((folder.path / "syncs.json").read_text())
    assert counts["control"] == 1 and counts["steps"][1:-1] == [1] * (STEPS - 2)


def test_draws_are_cycled_through(folder):
    """One draw: the second epoch sees the first one's noises again."""
    difference = (folder.losses("one_draw") - folder.losses("run")).abs()
    assert difference[:3].max() < 1e-6 and difference[3:].min() > 1e-5


def test_resuming_on_them_is_exact(folder):
    assert torch.equal(folder.losses("resumed"), folder.losses("read"))
    assert folder.distance("resumed", "read") == 0


def test_held_out_pairs_are_looked_at_without_a_reference_in_memory(folder):
    """Its errors on them are computed once, at the beginning."""
    ran, watched = (folder.metrics(name)[-1]["validation"] for name in ("run", "watched"))
    for name in ("loss", "reference_win_error", "policy_win_error", "logit"):
        assert watched[name] == pytest.approx(ran[name], rel=1e-4, abs=1e-6)
    assert folder.distance("watched", "read") == 0


def test_in_bfloat16_they_differ_by_the_forwards_rounding(folder):
    """The same kernel on other batch sizes; fp32 sums of a bf16 forward, so no more than its noise."""
    single, half = read(folder), read(folder, "bfloat16")
    assert 0 < ((half - single) / single).abs().max() < 0.05
    assert (folder.losses("read-bf16") - folder.losses("run-bf16")).abs().max() < 1e-2


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"reference_scores": 3}, "reference_scores: expected at most the 2 whole draws"),
        ({"seed": 1}, "seed 0 instead of 1"),
        ({"timestep_high": 700}, "timestep_high 800 instead of 700"),
        ({"objective": "discounted"}, "timesteps 'uniform' instead of 'discounted'"),
        ({"caption_dropout": 0.1}, "caption_dropout 0.3 instead of 0.1"),
        ({"objective": "sft"}, "reference_scores: expected 0 for sft"),
    ],
)
def test_scores_of_another_training_are_refused(folder, capfd, more, expected):
    given = {"pairs": folder.path / "cache", "reference_scores": 2} | more
    assert expected in fails(folder.args("refused", **given), capfd)
    assert not (folder.path / "refused").exists()


def test_the_message_says_what_to_run(folder, capfd, tmp_path):
    """Followed to the letter, the same run starts; `discounted` has timesteps of its own."""
    shutil.copytree(folder.path / "cache", tmp_path / "cache")
    given = {"pairs": tmp_path / "cache", "reference_scores": 1, "objective": "discounted"}
    args = folder.args("discounted", **given | {"steps": 1}, ds=stage(1, **BF16))
    message = fails(args, capfd)
    start, command = message.split("; run ")
    assert "timesteps 'uniform' instead of 'discounted'" in start
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "dde_fast.prepare"]
    flags = dict(zip(words[3::2], words[4::2], strict=True))
    assert flags == {
        "--output": str(tmp_path / "cache"),
        "--model": str(folder.model),
        "--reference_scores": "1",
        "--objective": "discounted",
        "--timestep_high": "800",
        "--caption_dropout": "0.3",
        "--precision": "bfloat16",
    }
    prepare.main(words[3:])
    capfd.readouterr()  # its progress
    more = fails([*args, "--reference_scores", "3"], capfd)
    assert "expected at most the 1 whole draws" in more
    assert shlex.split(more.split("; run ")[1])[3:] == [*words[3:8], "3", *words[9:]]
    engine = read_engine_config(config.parse(args), 1)
    scores = read_inputs(config.parse(args), engine).scores
    assert scores.draws == 1 and scores.errors.shape == (1, 12, 2)


def test_scores_of_another_reference_are_refused(folder, capfd, tmp_path):
    """The same encoders, so the cache fits, and a UNet that was trained since."""
    unet = folder.path / "run/unet"
    shutil.copytree(folder.model, tmp_path / "model")
    shutil.rmtree(tmp_path / "model/unet")
    shutil.copytree(unet, tmp_path / "model/unet")
    given = {"pairs": folder.path / "cache", "reference_scores": 2, "model": tmp_path / "model"}
    assert "got scores of reference" in fails(folder.args("refused", **given), capfd)


def test_pairs_that_are_no_cache_have_no_scores(folder, capfd):
    assert "expected pairs in a prepared cache" in fails(
        folder.args("refused", reference_scores=2), capfd
    )


def test_a_damaged_file_is_named(folder, capfd):
    path = place(folder) / "draw-001-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4] + b"abcd")
    try:
        given = {"pairs": folder.path / "cache", "reference_scores": 2}
        assert path.name in fails(folder.args("refused", **given), capfd)
    finally:
        path.write_bytes(whole)


def test_scores_are_read_from_afar(folder):
    cache = Cache(f"file://{folder.path / 'cache'}", folder=folder.path / "near")
    settings = json.loads((place(folder) / "settings.json").read_text())
    assert torch.equal(ReferenceScores.open(cache, settings, 2).errors, read(folder))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            ["--reference_scores", "1", "--pairs", "style"],
            "pairs: expected none with reference_sco",
        ),
        (
            ["--caption_dropout", "0.3"],
            "caption_dropout: expected none without reference_scores, got",
        ),
    ],
)
def test_what_would_not_be_used_is_refused(capfd, tmp_path, more, expected):
    with pytest.raises(SystemExit) as stop:
        prepare.main(["--output", str(tmp_path), *more])
    assert stop.value.code == 2 and expected in capfd.readouterr().err


def test_scoring_needs_a_finished_cache_of_the_model(folder, capfd, tmp_path):
    for args, expected in (
        (["--output", str(tmp_path)], "cache: expected manifest.json"),
        (flags(folder)[2:], "pairs: expected a cache made with the model's own"),
    ):
        with pytest.raises(SystemExit) as stop:
            prepare.main([*args, "--reference_scores", "1"])
        assert stop.value.code == 2 and expected in capfd.readouterr().err
