"""The embedded default: drawings, preference sets, the tiny pipeline, licences and sizes."""

import hashlib
import io
import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dde_fast import embedded

COLUMNS = {
    "are_different": bool,
    "best_image_uid": str,
    "caption": str,
    "has_label": bool,
    "image_0_uid": str,
    "image_1_uid": str,
    "jpg_0": bytes,
    "jpg_1": bytes,
    "label_0": float,
    "label_1": float,
    "model_0": str,
    "model_1": str,
    "ranking_id": int,
    "user_id": int,
    "num_example_per_prompt": int,
}


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DDE_FAST_CACHE", str(tmp_path / "cache"))


def decode(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def winner_loser(row: dict) -> tuple[str, str]:
    uids = (row["image_0_uid"], row["image_1_uid"])
    return uids if row["label_0"] == 1 else uids[::-1]


def test_sizes_are_under_the_limits():
    model = sum(p.stat().st_size for p in embedded.model_path().rglob("*") if p.is_file())
    images = sum(len(row["png"]) for row in embedded.art())
    judge = (embedded.TINY / "judge.safetensors").stat().st_size
    assert model < 10_000_000
    assert judge < 1_000_000
    assert images < 6_000_000
    assert (embedded.TINY / "art.parquet").stat().st_size < 6_000_000


def test_licences_and_sources_are_shipped():
    sources = (embedded.TINY / "SOURCES.md").read_text()
    for owner in ("Microsoft", "Google", "emoji-sentiment", "MIT", "Apache-2.0"):
        assert owner in sources
    texts = {p.name: p.read_text() for p in (embedded.TINY / "LICENSES").iterdir()}
    assert "Permission is hereby granted, free of charge" in texts["MIT-fluent-emoji.txt"]
    assert "Copyright (c) Microsoft Corporation" in texts["MIT-fluent-emoji.txt"]
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in texts["Apache-2.0.txt"]


def test_art_holds_what_the_roles_say():
    rows = embedded.art()
    by_role = {role: [r for r in rows if r["role"] == role] for role in ("base", "judge", "other")}
    assert sum(map(len, by_role.values())) == len(rows)
    names = {r["name"] for r in by_role["base"]}
    assert len(names) >= 100 and "grinning face" in names
    for designer in ("flat", "noto", "line"):
        assert {r["name"] for r in by_role["base"] if r["designer"] == designer} == names
    assert {r["name"] for r in by_role["judge"]} == names
    assert not {r["name"] for r in by_role["other"]} & names
    for row in rows:
        side = 32 if row["role"] == "base" else 64
        assert decode(row["png"]).shape == (side, side, 3)
    grinning = {r["codepoint"] for r in rows if r["name"] == "grinning face"}
    assert grinning == {"1f600"}


def test_judge_never_sees_the_bases_art():
    rows = embedded.art()
    base = {r["designer"] for r in rows if r["role"] == "base"}
    assert not base & {r["designer"] for r in rows if r["role"] != "base"}
    small = {
        hashlib.sha256(decode(r["png"]).tobytes()).digest() for r in rows if r["role"] == "base"
    }
    for row in rows:
        if row["role"] != "base":
            image = Image.open(io.BytesIO(row["png"])).resize((32, 32), Image.Resampling.BOX)
            assert hashlib.sha256(np.asarray(image).tobytes()).digest() not in small


@pytest.mark.parametrize("name", embedded.SETS)
@pytest.mark.parametrize("split", embedded.SPLITS)
def test_pairs_have_pick_a_pic_columns(name, split):
    rows = pq.read_table(embedded.pairs_path(name, split)).to_pylist()
    assert len(rows) >= 30
    for row in rows:
        assert {k: type(v) for k, v in row.items()} == COLUMNS
        assert {row["label_0"], row["label_1"]} == {0.0, 1.0}
        assert row["jpg_0"] != row["jpg_1"]
        assert row["best_image_uid"] == winner_loser(row)[0]
        assert row["image_0_uid"].split("-")[0] == row["model_0"]
    art = {
        f"{r['designer']}-{r['codepoint']}": r["png"] for r in embedded.art() if r["role"] == "base"
    }
    assert all(
        art[r["image_0_uid"]] == r["jpg_0"] and art[r["image_1_uid"]] == r["jpg_1"] for r in rows
    )
    first = sum(row["label_0"] for row in rows) / len(rows)
    assert abs(first - 0.5) < 3.3 * 0.5 / math.sqrt(len(rows))  # the winner's slot is a fair coin


def test_every_faces_pair_is_two_standard_errors_apart():
    ranking = embedded.sentiment()
    seen = {split: set() for split in embedded.SPLITS}
    for split in embedded.SPLITS:
        for row in pq.read_table(embedded.pairs_path("faces", split)).to_pylist():
            assert row["caption"] == "face"
            assert row["model_0"] == row["model_1"]
            winner, loser = (ranking[uid.split("-")[1]] for uid in winner_loser(row))
            assert winner.tweets >= 20 and loser.tweets >= 20
            error = math.sqrt(winner.standard_error**2 + loser.standard_error**2)
            assert winner.score - loser.score > 2 * error
            seen[split].add(frozenset(uid.split("-")[1] for uid in winner_loser(row)))
    assert not seen["train"] & seen["test"]
    assert 0.05 < len(seen["test"]) / len(seen["train"] | seen["test"]) < 0.15


def test_sentiment_is_the_rankings_own():
    joy = embedded.sentiment()["1f602"]  # 14,622 tweets in Emoji Sentiment Ranking 1.0
    assert joy.tweets == 14622
    assert joy.score == pytest.approx((6845 - 3614) / 14622)
    outcomes = np.repeat([-1.0, 0.0, 1.0], [3614, 4163, 6845])
    assert joy.standard_error == pytest.approx(outcomes.std() / math.sqrt(14622))


def test_style_pairs_prefer_flat_and_hold_names_out():
    names = {}
    for split in embedded.SPLITS:
        rows = pq.read_table(embedded.pairs_path("style", split)).to_pylist()
        names[split] = {row["caption"] for row in rows}
        for row in rows:
            winner, loser = winner_loser(row)
            assert winner.split("-")[0] == "flat" and loser.split("-")[0] == "line"
            assert winner.split("-")[1] == loser.split("-")[1]
    assert not names["train"] & names["test"]
    assert set(embedded.prompts("style")) == names["test"]
    assert len(names["train"]) + len(names["test"]) == 102 and len(names["test"]) == 31


def test_pairs_are_written_once_and_the_same_everywhere(tmp_path, monkeypatch):
    first = embedded.pairs_path("style", "train")
    stamp = first.stat().st_mtime_ns
    assert embedded.pairs_path("style", "train") == first and first.stat().st_mtime_ns == stamp
    monkeypatch.setenv("DDE_FAST_CACHE", str(tmp_path / "elsewhere"))
    second = embedded.pairs_path("style", "train")
    assert second != first and second.read_bytes() == first.read_bytes()
    assert not list(tmp_path.rglob("*.partial"))
    monkeypatch.setattr(embedded, "_FORMAT", 99)
    assert embedded.pairs_path("style", "train").name != second.name


def test_a_failed_write_leaves_nothing(monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(embedded.pq, "write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        embedded.pairs_path("style", "test")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_missing_sentiment_package_is_named(monkeypatch):
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install dde-fast\[demo\]"):
        embedded.pairs_path("faces", "train")
    assert embedded.pairs_path("style", "train").is_file()


def test_unknown_set_and_split_are_named():
    with pytest.raises(ValueError, match="name: expected one of faces, style, got 'cats'"):
        embedded.pairs_path("cats", "train")
    with pytest.raises(ValueError, match="split: expected one of train, test, got 'dev'"):
        embedded.pairs_path("faces", "dev")


def test_pipeline_loads_and_follows_its_prompt():
    from diffusers import StableDiffusionPipeline

    from dde_fast.rewards import load_reward

    pipeline = StableDiffusionPipeline.from_pretrained(embedded.model_path()).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    names = embedded.prompts("style")
    latents = torch.randn(len(names), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = pipeline(
        names, latents=latents, num_inference_steps=10, guidance_scale=2.0, output_type="pt"
    ).images
    assert images.shape == (31, 3, 32, 32) and torch.isfinite(images).all()
    assert images.flatten(1).std(dim=1).min() > 0.1  # a drawing, not a blank
    match = load_reward("prompt_match")
    assert match(images, ["face"] * 31).mean() > 0.9
    assert match(images, names).mean() > 0.25
    assert match(images, names[1:] + names[:1]).mean() < 0.05


def test_autoencoder_keeps_the_drawings():
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(embedded.model_path(), subfolder="vae").float()
    rows = [r for r in embedded.art() if r["role"] == "base"]
    images = (
        torch.from_numpy(np.stack([decode(r["png"]) for r in rows])).permute(0, 3, 1, 2) / 127.5 - 1
    )
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
        recon = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)
    assert latents.shape[1:] == (4, 8, 8)
    assert abs(latents.mean()) < 0.2 and 0.8 < latents.std() < 1.2
    mse = (recon - images).square().mean(dim=(1, 2, 3)) / 4
    assert -10 * mse.log10().mean() > 26  # dB


def test_no_config_tells_where_it_was_made():
    for path in embedded.model_path().glob("*/*.json"):
        assert "_name_or_path" not in json.loads(path.read_text(encoding="utf-8")), path
