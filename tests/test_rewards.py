"""Rewards: hand-computed values, gradients, and behaviour on real and ruined drawings."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from longhand_rewards import directional
from PIL import Image

from dde_fast import embedded, judges
from dde_fast.judges import Judge, load_judge
from dde_fast.rewards import REWARDS, load_reward, score
from dde_fast.scorer import Scorer

OWN = [name for name, row in REWARDS.items() if row.weights is None]
"""Those that come with the package."""


def drawings(designer: str) -> tuple[torch.Tensor, list[dict]]:
    rows = [r for r in embedded.art() if r["role"] == "base" and r["designer"] == designer]
    pixels = [np.asarray(Image.open(io.BytesIO(r["png"]))) for r in rows]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255, rows


def test_colourfulness_equals_the_hand_computed_value():
    # left half pure red, right half pure blue: rg = 255, 0; yb = 127.5, -255
    image = torch.zeros(1, 3, 4, 4)
    image[0, 0, :, :2] = 1
    image[0, 2, :, 2:] = 1
    spread = math.sqrt((255 / 2) ** 2 + (382.5 / 2) ** 2)
    mean = math.sqrt(127.5**2 + 63.75**2)
    score = load_reward("colourfulness")(image, ["face"])
    assert score.item() == pytest.approx(spread + 0.3 * mean, rel=1e-6)


def test_colourfulness_of_grey_is_zero_with_a_finite_gradient():
    image = torch.full((2, 3, 8, 8), 0.5, requires_grad=True)
    score = load_reward("colourfulness")(image, ["face"] * 2)
    score.sum().backward()
    assert score.tolist() == [0, 0]
    assert torch.isfinite(image.grad).all()


def test_colourfulness_separates_flat_from_line_art():
    score = load_reward("colourfulness")
    flat, line = (score(drawings(d)[0], ["face"] * 102) for d in ("flat", "line"))
    assert flat.min() > 30 and line.max() < 1


@pytest.mark.parametrize("name", OWN)
def test_the_registry_says_what_the_callable_does(name):
    row, score = REWARDS[name], load_reward(name)
    images = drawings("flat")[0][:5].clone().requires_grad_(row.differentiable)
    result = score(images, ["face"] * 5)
    assert result.shape == {"image": (5,), "set": ()}[row.per]
    assert torch.isfinite(result).all() and row.about
    assert result.requires_grad == row.differentiable
    if row.differentiable:
        result.sum().backward()
        assert torch.isfinite(images.grad).all() and images.grad.abs().max() > 0
    assert load_reward(name) is score  # loaded once


def test_readmes_table_has_every_reward():
    words = {(True, "image"): "yes", (False, "image"): "no", (False, "set"): "of a set"}
    said = {}
    for line in (Path(__file__).parent.parent / "README.md").read_text().splitlines():
        if (cells := line.split("|")) and len(cells) == 6 and cells[1].startswith(" `"):
            names, gradients = cells[1].split(","), cells[3].split(",")
            gradients = gradients * len(names) if len(gradients) == 1 else gradients
            for name, gradient in zip(names, gradients, strict=True):
                said[name.strip(" `")] = gradient.strip()
    found = {name: said[name] for name in REWARDS if name in said}
    assert found == {n: words[row.differentiable, row.per] for n, row in REWARDS.items()}


@pytest.mark.parametrize("name", ["human_score", "sentiment"])
def test_a_missing_package_names_its_extra(name, monkeypatch):
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    embedded.sentiment.cache_clear()
    with pytest.raises(ImportError, match=rf"rewards .*{name}.* pip install dde-fast\[demo\]"):
        REWARDS[name].build(None)


@pytest.mark.parametrize("designer", ["flat", "line", "noto"])
def test_human_score_of_a_real_drawing_is_its_own(designer):
    ranking = embedded.sentiment()
    images, rows = drawings(designer)
    # as line art, the angry and the pouting face are one drawing
    shared = {"angry face", "pouting face"} if designer == "line" else set()
    scored = [
        i for i, row in enumerate(rows) if row["codepoint"] in ranking and row["name"] not in shared
    ]
    assert len(scored) >= 56
    result = load_reward("human_score")(images[scored], ["face"] * len(scored))
    expected = torch.tensor([ranking[rows[i]["codepoint"]].score for i in scored])
    assert torch.allclose(result, expected)


@pytest.mark.parametrize(
    "designer,top1,top5", [("flat", 0.9, 0.97), ("line", 0.7, 0.85), ("noto", 0.6, 0.8)]
)
def test_judge_recognises_designers_it_never_saw(designer, top1, top5):
    judge, classes = load_judge()
    images, rows = drawings(designer)
    order = judge(images)[:, :-1].argsort(dim=1, descending=True)
    hit = order == torch.tensor([classes.index(r["name"]) for r in rows])[:, None]
    measured = {
        "top1": hit[:, 0].float().mean().item(),
        "top5": hit[:, :5].any(1).float().mean().item(),
    }
    assert measured["top1"] >= top1 and measured["top5"] >= top5
    reported = json.loads((embedded.TINY / "judge.json").read_text())[
        "accuracy_on_unseen_designers"
    ]
    assert measured == pytest.approx({k: reported[designer][k] for k in measured}, abs=0.011)


def test_prompt_match_prefers_the_right_prompt_and_faces_over_ruins():
    score = load_reward("prompt_match")
    images, rows = drawings("flat")
    right = score(images, [r["name"] for r in rows])
    wrong = score(images, [r["name"] for r in rows[1:] + rows[:1]])
    assert right.mean() > 0.7 and wrong.mean() < 0.05
    generator = torch.Generator().manual_seed(0)
    ruins = {
        "noise": torch.rand(64, 3, 32, 32, generator=generator),
        "blank": torch.ones(1, 3, 32, 32),
        "upside-down halves": torch.cat([images[:, :, 16:], images[:, :, :16]], 2)
        .flip(3)
        .roll(8, 3),
    }
    assert score(images, ["face"] * len(images)).mean() > 0.95
    for kind, ruined in ruins.items():
        assert score(ruined, ["face"] * len(ruined)).mean() < 0.5, kind


def test_prompt_match_names_an_unknown_prompt():
    with pytest.raises(ValueError, match="got 'a red bicycle'"):
        load_reward("prompt_match")(torch.ones(1, 3, 32, 32), ["a red bicycle"])


def test_distinct_counts_emojis_not_images():
    images, rows = drawings("noto")
    score = load_reward("distinct")
    assert score(images, ["face"] * len(images)).item() == len(rows) == 102
    assert score(images[:1].expand(7, -1, -1, -1), ["face"] * 7).item() == 1


def test_larger_images_are_judged_alike():
    images, rows = drawings("flat")
    larger = torch.nn.functional.interpolate(images, scale_factor=4, mode="nearest")
    small, large = (load_reward("distinct")(x, ["face"] * 102) for x in (images, larger))
    assert large.item() >= 0.95 * small.item()


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"images: expected float \[B, 3, H, W\], got torch.uint8"):
        load_reward("prompt_match")(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ["face"])
    with pytest.raises(ValueError, match="prompts: expected 2, one per image, got 1"):
        load_reward("prompt_match")(torch.zeros(2, 3, 32, 32), ["face"])
    with pytest.raises(ValueError, match="rewards: expected some of human_score, .* got 'beauty'"):
        load_reward("beauty")
    with pytest.raises(ValueError, match="distinct takes no weights, got 'distinct=here'"):
        load_reward("distinct=here")


def test_judge_embedding_is_a_unit_vector():
    judge = Judge(5).eval()
    feature = judge.embed(torch.rand(3, 3, 32, 32))
    assert feature.shape == (3, 128)
    assert torch.allclose(feature.norm(dim=1), torch.ones(3), atol=1e-5)


def test_sentiment_is_a_smooth_human_score():
    """On drawings that neither the judge saw: nearly the sentiment of the nearest one, but with a
    gradient that leads to a happier face."""
    scores = []
    for designer in ("flat", "line", "noto"):
        images, _ = drawings(designer)
        prompts = ["face"] * len(images)
        scores += [[load_reward(name)(images, prompts) for name in ("human_score", "sentiment")]]
    near, smooth = (torch.cat(column) for column in zip(*scores, strict=True))
    assert torch.corrcoef(torch.stack([near, smooth]))[0, 1] > 0.9
    images = drawings("flat")[0][:8].clone().requires_grad_()
    sentiment = load_reward("sentiment")
    before = sentiment(images, ["face"] * 8)
    (gradient,) = torch.autograd.grad(before.sum(), images)
    step = 0.5 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
    assert (sentiment(images + step, ["face"] * 8) > before).all()


def test_sentiment_is_the_expectation_under_the_judge():
    """Σ_i softmax(20 cos(image, drawing i)) s_i over the annotated drawings, the long way."""
    ranking, (judge, _) = embedded.sentiment(), load_judge()
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    feature = judge.embed(image)[0]
    weights, scores = [], []
    for designer in ("flat", "line", "noto"):
        for drawing, row in zip(*drawings(designer), strict=True):
            if row["codepoint"] in ranking:
                cosine = (judge.embed(drawing[None])[0] * feature).sum().item()
                weights.append(math.exp(20 * cosine))
                scores.append(ranking[row["codepoint"]].score)
    expected = sum(w * s for w, s in zip(weights, scores, strict=True)) / sum(weights)
    assert load_reward("sentiment")(image, ["face"]).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["human_score", "distinct"])
def test_batches_score_as_the_whole(name, monkeypatch):
    images, _ = drawings("noto")
    scorer, prompts = load_reward(name), ["face"] * len(images)
    whole, each, sizes = scorer(images, prompts), scorer.each, []
    monkeypatch.setattr(
        scorer, "each", lambda images, prompts: sizes.append(len(images)) or each(images, prompts)
    )
    assert torch.equal(score(scorer, images, prompts, batch=40), whole)
    assert sizes == [40, 40, 22]


@pytest.mark.parametrize("kind", [judges.HumanScore, judges.PromptMatch, judges.Colourfulness])
def test_a_scorer_follows_the_images_to_their_device(kind):
    assert kind()(torch.rand(2, 3, 16, 16, device="meta"), ["face"] * 2).device.type == "meta"


def test_a_scorer_that_gives_other_than_one_score_per_image_is_named():
    class Odd(Scorer):
        name = "odd"

        def each(self, images, prompts):
            return self.answer

    scorer, images = Odd(), torch.rand(3, 3, 4, 4)
    for answer, got in (
        (torch.ones(3, 1), r"\[3, 1\]"),
        (torch.tensor(1.0), r"\[\]"),
        (torch.ones(2), r"\[2\]"),
    ):
        scorer.answer = answer
        with pytest.raises(ValueError, match=rf"rewards: expected scores \[3\] of odd.*got {got}"):
            scorer(images, ["a"] * 3)
    scorer.per, scorer.answer = "set", torch.ones(3, 7)
    assert scorer.values(images, ["a"] * 3, None).shape == (3, 7)


def test_identity_tells_what_was_scored_with():
    first, second = (load_reward(name).identity() for name in ("sentiment", "human_score"))
    assert first["name"] == "sentiment" and first["torch"] == torch.__version__
    assert first["model"] == "judge.safetensors of dde_fast"
    assert len(first["sha256"]) == 64 and first["sha256"] == second["sha256"]
    assert first["sha256"] != load_reward("distinct").identity()["sha256"]


@pytest.mark.parametrize("name", [name for name in REWARDS if name not in OWN])
def test_weights_that_are_not_there_give_one_line(name, monkeypatch, tmp_path):
    """Without a network, without a file: what was wanted, where, and how to name a local one."""

    def offline(*args, **options):
        raise OSError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    for spec in (name, f"{name}={tmp_path / 'nothing.pt'}"):
        with pytest.raises(ValueError) as caught:
            load_reward(spec)
        message = str(caught.value)
        assert message.startswith("rewards: expected ") and "\n" not in message
        assert "name local weights by NAME=PATH" in message
    with pytest.raises(ValueError, match=f"{name} takes a hub name or path after =, got '{name}='"):
        load_reward(f"{name}=")


def test_gradients_of_the_judges_are_those_of_finite_differences():
    images = (
        0.2 + 0.6 * torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(3)).double()
    )
    for name in ("sentiment", "prompt_match", "colourfulness"):
        scorer = load_reward(name).double()
        try:
            exact, measured = directional(scorer, images, ["face"] * 2, step=1e-7)
        finally:
            scorer.float()
        assert exact == pytest.approx(measured, rel=1e-4) and abs(exact) > 1e-6, name
