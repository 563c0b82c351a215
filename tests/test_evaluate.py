"""Evaluation: equal models tie, noise depends on (seed, sample) alone, statistics, command line."""

import json
import math

import numpy as np
import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from dde_fast import embedded, evaluate

CPU = torch.device("cpu")
QUICK = ["--samples", "6", "--steps", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def pipeline():
    return evaluate.load_pipeline("embedded", "embedded", CPU)


@pytest.fixture(scope="module")
def changed_unet(tmp_path_factory):
    """A UNet directory whose weights are not the base's."""
    unet = evaluate.load_pipeline("embedded", "embedded", CPU).unet
    with torch.no_grad():
        unet.conv_out.bias += 0.3
    folder = tmp_path_factory.mktemp("run") / "unet"
    unet.save_pretrained(folder)
    return folder


def run(tmp_path, *args: str) -> dict:
    evaluate.main([*QUICK, "--output", str(tmp_path / "out"), *args])
    return json.loads((tmp_path / "out" / "evaluation.json").read_text())


def test_identical_models_tie_exactly(tmp_path, capsys):
    every = ["human_score", "colourfulness", "prompt_match", "distinct"]
    result = run(tmp_path, "--aligned", "copy=embedded", "--rewards", *every)
    assert list(result["results"]["copy"]) == every
    for name in every[:3]:
        entry = result["results"]["copy"][name]
        assert (entry["win"], entry["tie"], entry["lose"]) == (0.0, 1.0, 0.0)
        assert entry["difference"] == 0.0 and entry["interval"] == [0.0, 0.0]
        assert entry["mean"] == result["results"]["base"][name]["mean"]
    assert result["results"]["copy"]["distinct"]["difference"] == 0.0
    assert result["models"]["base"]["sha256"] == result["models"]["copy"]["sha256"]
    assert result["options"]["seed"] == 0 and result["versions"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert "0/100/0" in printed and str(tmp_path / "out" / "grid.png") in printed
    with Image.open(tmp_path / "out" / "grid.png") as picture:
        assert picture.height > 2 * 96 and picture.convert("L").getextrema() == (0, 255)


def test_a_unet_directory_replaces_the_bases_unet(tmp_path, changed_unet):
    result = run(
        tmp_path, "--aligned", f"sft={changed_unet}", "same=embedded", "--prompts", "style"
    )
    hashes = {name: model["sha256"] for name, model in result["models"].items()}
    assert hashes["same"] == hashes["base"] != hashes["sft"]
    assert result["results"]["same"]["colourfulness"]["tie"] == 1.0
    entry = result["results"]["sft"]["colourfulness"]
    assert entry["tie"] == 0.0 and entry["win"] + entry["lose"] == 1.0
    low, high = entry["interval"]
    assert low < entry["difference"] < high
    base = result["results"]["base"]["colourfulness"]["mean"]
    assert entry["mean"] - base == pytest.approx(entry["difference"], abs=1e-3)


def test_pickled_weights_are_refused(tmp_path, changed_unet):
    unet = UNet2DConditionModel.from_pretrained(changed_unet)
    unet.save_pretrained(tmp_path / "unet", safe_serialization=False)
    assert list((tmp_path / "unet").glob("*.bin"))
    with pytest.raises(OSError, match="safetensors"):
        evaluate.load_pipeline("embedded", str(tmp_path / "unet"), CPU)


def test_images_depend_on_seed_and_index_not_on_the_batch(pipeline):
    prompts = ["face", "crying face", "pouting face", "face", "winking face"]

    def sample(seed, batch, chosen=prompts):
        return evaluate.sample(pipeline, chosen, seed=seed, steps=3, guidance=2.0, batch=batch)

    whole = sample(5, 5)
    assert whole.shape == (5, 3, 32, 32) and whole.min() >= 0 and whole.max() <= 1
    assert torch.equal(whole, sample(5, 5))
    assert torch.allclose(whole, sample(5, 2), atol=1e-4)
    assert torch.allclose(whole[:2], sample(5, 5, prompts[:2]), atol=1e-4)
    assert (whole - sample(6, 5)).abs().mean() > 0.01
    assert (whole[0] - whole[3]).abs().mean() > 0.01  # same prompt, other index


def test_sdxl_is_sampled_and_a_unet_put_into_it(tmp_path):
    model = tiny.make_sdxl_model(tmp_path / "model")
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    with torch.no_grad():
        unet.conv_out.bias += 0.3
    unet.save_pretrained(tmp_path / "unet")
    images = []
    for name in ("model", "unet"):
        pipeline = evaluate.load_pipeline(str(model), str(tmp_path / name), CPU)
        prompts = ["happy", "sad", "happy"]
        images.append(evaluate.sample(pipeline, prompts, seed=1, steps=2, guidance=2.0, batch=2))
    assert images[0].shape == (3, 3, 8, 8)
    assert not torch.equal(images[0][0], images[0][2])
    assert (images[0] - images[1]).abs().max() > 1e-3


def test_the_sampler_is_plain_ddim(pipeline):
    """The images are those of DDIM written out: x̂₀, then the step to the next ᾱ, with guidance."""
    steps, guidance = 3, 2.0
    got = evaluate.sample(
        pipeline, ["winking face"], seed=1, steps=steps, guidance=guidance, batch=1
    )
    x = evaluate.pair_noise((4, 8, 8), seed=1, pair_ids=torch.tensor([0]), draw=0)
    ids = pipeline.tokenizer(
        ["", "winking face"], padding="max_length", return_tensors="pt"
    ).input_ids
    alphas = pipeline.scheduler.alphas_cumprod
    with torch.no_grad():
        hidden = pipeline.text_encoder(ids).last_hidden_state
        for i in reversed(range(steps)):
            t = 1000 // steps * i + 1
            plain, prompted = pipeline.unet(torch.cat([x, x]), t, hidden).sample.chunk(2)
            eps = plain + guidance * (prompted - plain)
            before = alphas[max(t - 1000 // steps, 0)]
            x0 = (x - (1 - alphas[t]).sqrt() * eps) / alphas[t].sqrt()
            x = before.sqrt() * x0 + (1 - before).sqrt() * eps
        image = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample
    assert torch.allclose(got, (image / 2 + 0.5).clamp(0, 1), atol=1e-3)


def test_comparison_by_hand():
    result = evaluate.compare(np.array([1.0, 2, 3, 4]), np.array([1.0, 1, 5, 3]), seed=0)
    assert (result["win"], result["tie"], result["lose"]) == (0.5, 0.25, 0.25)
    assert result["difference"] == 0.0
    assert result["interval"][0] < 0 < result["interval"][1]


def test_bootstrap_interval_is_seeded_and_agrees_with_the_normal_one():
    differences = np.random.default_rng(3).normal(0.2, 1.0, 400)
    low, high = evaluate.bootstrap_interval(differences, seed=7)
    assert (low, high) == evaluate.bootstrap_interval(differences, seed=7)
    assert (low, high) != evaluate.bootstrap_interval(differences, seed=8)
    half = 1.96 * differences.std() / math.sqrt(400)
    assert low == pytest.approx(differences.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(differences.mean() + half, abs=0.05 * half)
    assert evaluate.bootstrap_interval(np.full(9, 0.25), seed=0) == (0.25, 0.25)


def test_prompts_of_a_file_go_round(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("crying face\n\n  nerd face \n", encoding="utf-8")
    assert evaluate.read_prompts(str(path), 5) == ["crying face", "nerd face"] * 2 + ["crying face"]


def test_style_is_sampled_on_held_out_names_only():
    asked = evaluate.read_prompts("style", 62)
    assert set(asked) == set(embedded.style_names("test"))
    assert all(asked.count(name) == 2 for name in asked)


@pytest.mark.parametrize(
    "args,message",
    [
        (["--sampels", "5"], "sampels"),
        (["--samples", "many"], "samples"),
        (["--samples", "1"], "samples: expected at least 2, got 1"),
        (["--guidance", "0.5"], "guidance: expected at least 1, got 0.5"),
        (
            ["--base", "nowhere"],
            'base: expected "embedded" or the directory of a diffusers pipeline, got',
        ),
        (["--aligned", "runs/dde"], "aligned: expected NAME=PATH, got 'runs/dde'"),
        (["--aligned", "base=embedded"], "none of them base"),
        (["--aligned", "dde=nowhere"], 'aligned: expected "embedded" or the directory'),
        (["--rewards", "beauty"], "rewards: expected some of human_score"),
        (
            ["--prompts", "nowhere.txt", "--rewards", "distinct"],
            "prompts: expected faces, style or",
        ),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_wrong_input_gives_one_line_and_exit_2(args, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*args, "--output", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.err.startswith("dde_fast: error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert captured.out == "" and not (tmp_path / "out").exists()


def test_a_prompt_the_judge_does_not_know_fails_before_sampling(tmp_path, capsys, monkeypatch):
    path = tmp_path / "prompts.txt"
    path.write_text("a red bicycle\n")
    monkeypatch.setattr(evaluate, "sample", lambda *a, **k: pytest.fail("sampled"))
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--prompts", str(path), "--rewards", "prompt_match"])
    assert stop.value.code == 2 and "a red bicycle" in capsys.readouterr().err
