"""Online objectives, a step at a time: against the same written out, UNet calls counted."""

import copy
import functools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch.distributions import Normal
from torch.nn.functional import logsigmoid

from dde_fast import models, noise, rewards
from dde_fast.config import TrainConfig
from dde_fast.objectives import OBJECTIVES
from dde_fast.online import FORWARDS, ranked
from dde_fast.prompt_stream import PromptBatch
from dde_fast.rewards import REWARDS, Reward
from dde_fast.scorer import Scorer
from dde_fast.trajectories import DDIMSteps

BETA, SEED = 20.0, 5
CAPTIONS, IDS, EPOCHS = ["happy", "sad"], [4, 1], [0, 2]


@pytest.fixture(scope="module", autouse=True)
def one_thread_for_all(one_thread):
    yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("online")
    tiny.make_model(path / "to_one")
    tiny.make_sdxl_model(path / "sdxl", force_zeros_for_empty_prompt=True)
    for name, make in (("sd", tiny.make_model), ("v", tiny.make_v_model)):
        settings = make(path / name) / "scheduler/scheduler_config.json"
        last = {"set_alpha_to_one": False}  # as Stable Diffusion's: the last step has noise, too
        settings.write_text(json.dumps(json.loads(settings.read_text()) | last))
    return path


def brightness(images, prompts):
    """Differentiable; differs between images and prompts."""
    weight = torch.tensor([1.0 + len(p) for p in prompts], device=images.device)
    return weight * (images[:, 0] * images[:, 1]).flatten(1).mean(1)


class Toy(Scorer):
    """A function as a reward."""

    def __init__(self, function):
        super().__init__()
        self.each = function


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """Rewards that need no weights."""
    for name, score, smooth in (
        ("brightness", brightness, True),
        ("equal", lambda images, prompts: images.flatten(1).sum(1) * 0 + 3, True),
    ):
        row = Reward(lambda _, score=score: Toy(score), smooth, "image", name)
        monkeypatch.setitem(REWARDS, name, row)
    rewards.load_reward.cache_clear()
    monkeypatch.setattr(models.Encoders, "load", LOAD_ENCODERS)


LOAD_ENCODERS = functools.cache(models.Encoders.load)


class Counted:
    """A UNet that notes the samples of each call, and whether it is for a gradient of weights."""

    def __init__(self, unet):
        self.unet, self.config, self.calls = unet, unet.config, []

    def __call__(self, sample, *args, **kwargs):
        kind = "training" if torch.is_grad_enabled() and not sample.requires_grad else "sampling"
        kind = "guidance" if sample.requires_grad else kind
        self.calls.append((kind, len(sample)))
        return self.unet(sample, *args, **kwargs)


class Engine(Counted):
    """As DeepSpeed's: called for training, its module without."""

    @property
    def module(self):
        return self


def forward_of(model, objective="tailorpo", reward="brightness", **fields):
    """The forward of two trajectories whose policy differs from the reference."""
    fields = {"sampling_steps": 3, "guidance_scale": 2.0} | fields
    c = TrainConfig(
        model=str(model), objective=objective, reward=reward, beta=BETA, seed=SEED, **fields
    )
    steps = DDIMSteps(models.load_scheduler(c.model), c.sampling_steps)
    policy, reference = (copy.deepcopy(unet_of(model)) for _ in range(2))
    reference.requires_grad_(False)
    torch.manual_seed(3)
    with torch.no_grad():
        for value in policy.parameters():
            value += 0.02 * torch.randn_like(value)
    loss_fn = steps.loss(objective, beta=BETA)
    precision, inputs = SimpleNamespace(dtype=torch.float32), SimpleNamespace(steps=steps)
    return FORWARDS[objective](c, precision, inputs, Engine(policy), Counted(reference), loss_fn)


def batch_of(step: int = 0, rows: slice = slice(None)) -> PromptBatch:
    ids, epochs = torch.tensor(IDS)[rows], torch.tensor(EPOCHS)[rows]
    return PromptBatch(CAPTIONS[rows], ids, epochs, step)


@functools.cache
def unet_of(model):
    return models.load_unet(str(model))


@functools.cache
def pipeline_of(model):
    return DiffusionPipeline.from_pretrained(model, safety_checker=None)


class WrittenOut:
    """One trajectory at a time, with diffusers' parts, step and decoder."""

    def __init__(self, model, forward, count):
        self.pipeline = pipeline_of(model)
        self.scheduler = DDIMScheduler.from_config(self.pipeline.scheduler.config)
        self.scheduler.set_timesteps(count)
        self.times = self.scheduler.timesteps.tolist()
        self.forward, self.guidance = forward, forward.c.guidance_scale
        self.sdxl = hasattr(self.pipeline, "text_encoder_2")
        with torch.no_grad():
            self.encoded = [self.texts(b) for b in range(len(CAPTIONS))]

    def z(self, b, number, candidate):
        key = {"seed": SEED, "pair_ids": torch.tensor([IDS[b] + (number + 1 << 32)])}
        shape = (2, 4, 4, 4) if number else (1, 4, 4, 4)
        return noise.pair_noise(shape, **key, draw=EPOCHS[b])[:, candidate]

    def texts(self, b):
        if self.sdxl:
            encoded = self.pipeline.encode_prompt(CAPTIONS[b], do_classifier_free_guidance=True)
            return [encoded[1], encoded[0]], [encoded[3], encoded[2]]
        encoded = self.pipeline.encode_prompt(CAPTIONS[b], "cpu", 1, True)
        return [encoded[1], encoded[0]], None

    def predict(self, unet, b, x, t):
        (texts, added), outputs = self.encoded[b], []
        for k, text in enumerate(texts):
            more = {}
            if added is not None:
                ids = torch.tensor([[8.0, 8, 0, 0, 8, 8]])
                more = {"added_cond_kwargs": {"text_embeds": added[k], "time_ids": ids}}
            outputs.append(unet(x, t, text, **more).sample)
        return outputs[0] + self.guidance * (outputs[1] - outputs[0])

    def step(self, o, t, x, z):
        return self.scheduler.step(o, t, x, eta=1.0, variance_noise=z).prev_sample

    def image(self, latents):
        vae = self.pipeline.vae
        return (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)

    def score(self, b, x, i):
        policy = self.forward.engine.unet
        if i + 1 < len(self.times):
            t = self.times[i] - 1000 // len(self.times)
            o = self.predict(policy, b, x, t)
            x = self.scheduler.step(o, t, x).pred_original_sample
        return float(brightness(self.image(x), [CAPTIONS[b]]))

    def density(self, o, t, x, made):
        mean = self.step(o, t, x, torch.zeros_like(x))
        sigma = self.scheduler._get_variance(t, t - 1000 // len(self.times)) ** 0.5
        return Normal(mean.double(), sigma.double()).log_prob(made.double()).mean()

    def ratio(self, b, x, t, made):
        o, o_ref = (
            self.predict(m.unet, b, x, t) for m in (self.forward.engine, self.forward.reference)
        )
        return self.density(o, t, x, made) - self.density(o_ref.detach(), t, x, made)


@pytest.mark.parametrize("name", ["sd", "to_one", "v", "sdxl"])
def test_tailorpo_written_out(folder, name):
    """A whole trajectory: loss, gradient, rewards, and where the next step starts."""
    forward = forward_of(folder / name)
    plain = WrittenOut(folder / name, forward, 3)
    policy = forward.engine.unet
    assert forward.trained == ([0, 1, 2] if name in ("sd", "v") else [0, 1])
    xs = [plain.z(b, 0, 0) for b in range(2)]
    for i in forward.trained:
        t, losses, kept = plain.times[i], [], []
        for b, x in enumerate(xs):
            with torch.no_grad():
                o = plain.predict(policy, b, x, t)
                made = [plain.step(o, t, x, plain.z(b, i + 1, k)) for k in range(2)]
                scores = [plain.score(b, candidate, i) for candidate in made]
            win = int(scores[1] > scores[0])
            ratios = [plain.ratio(b, x, t, made[k]) for k in (win, 1 - win)]
            losses.append(-logsigmoid(BETA * (ratios[0] - ratios[1])))
            kept.append((made[win], scores[win], scores[1 - win]))
        expected = torch.stack(losses).mean()
        gradients = torch.autograd.grad(expected, list(policy.parameters()))
        out = forward(batch_of(i))
        found = torch.autograd.grad(out.loss, list(policy.parameters()))
        assert out.loss.item() == pytest.approx(expected.item(), rel=1e-4)
        assert abs(out.loss.item() - math.log(2)) > 1e-4
        scale = max(g.abs().max() for g in gradients)
        assert (
            max((a - b).abs().max() for a, b in zip(found, gradients, strict=True)) < 2e-3 * scale
        )
        xs = [x for x, _, _ in kept]
        torch.testing.assert_close(forward.sample, torch.cat(xs), rtol=1e-4, atol=1e-4)
        assert out.reward_win.tolist() == pytest.approx([w for _, w, _ in kept], rel=1e-4)
        assert out.reward_lose.tolist() == pytest.approx([lo for _, _, lo in kept], rel=1e-4)
        ended = i == forward.trained[-1]
        assert out.reward.isnan().tolist() == [not ended] * 2
        assert not ended or out.reward.equal(out.reward_win)


@pytest.mark.parametrize("name", ["sd", "to_one"])
def test_d3po_written_out(folder, name):
    forward = forward_of(folder / name, "d3po")
    plain = WrittenOut(folder / name, forward, 3)
    policy, paths, finals = forward.engine.unet, [], []
    with torch.no_grad():
        for b in range(2):
            both = []
            for k in range(2):
                path = [plain.z(b, 0, 0)]
                for i, t in enumerate(plain.times):
                    o = plain.predict(policy, b, path[-1], t)
                    path.append(plain.step(o, t, path[-1], plain.z(b, i + 1, k)))
                both.append((plain.score(b, path[-1], 2), path))
            both.sort(key=lambda scored: -scored[0])
            finals.append([score for score, _ in both])
            paths.append([path for _, path in both])
    for i in forward.trained:
        t, losses = plain.times[i], []
        for b, (win, lose) in enumerate(paths):
            ratios = [plain.ratio(b, path[i], t, path[i + 1]) for path in (win, lose)]
            losses.append(-logsigmoid(BETA * (ratios[0] - ratios[1])))
        expected = torch.stack(losses).mean()
        gradients = torch.autograd.grad(expected, list(policy.parameters()))
        out = forward(batch_of(i))
        found = torch.autograd.grad(out.loss, list(policy.parameters()))
        assert out.loss.item() == pytest.approx(expected.item(), rel=1e-4)
        scale = max(g.abs().max() for g in gradients)
        assert (
            max((a - b).abs().max() for a, b in zip(found, gradients, strict=True)) < 2e-3 * scale
        )
        assert out.reward_win.tolist() == pytest.approx([w for w, _ in finals], rel=1e-4)
        assert out.reward_lose.tolist() == pytest.approx([lo for _, lo in finals], rel=1e-4)
        assert out.reward.tolist() == pytest.approx([sum(f) / 2 for f in finals], rel=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_unet_calls_per_pair(folder, guidance):
    """TailorPO runs policy and reference once on the x_t of the pair, 2 samples where a loop over
    winners and losers runs 4; the lookahead is of both candidates. Guidance doubles each."""
    double = 2 if guidance > 1 else 1
    pair, both = 2 * double, 4 * double  # samples of two x_t, and of their two candidates
    policy = [("training", pair), ("sampling", both)] * 2 + [("training", pair)]
    guided = [("training", pair), ("sampling", both), ("guidance", pair)] * 2 + [("training", pair)]
    d3po = [("sampling", both)] * 3 + [("training", both)] * 3
    for objective, expected, reference in (
        ("tailorpo", policy, pair),
        ("tailorpo-g", guided, pair),
        ("d3po", d3po, both),
    ):
        forward = forward_of(folder / "sd", objective, guidance_scale=guidance)
        for step in range(3):
            forward(batch_of(step))
        assert forward.engine.calls == expected
        assert forward.reference.calls == [("sampling", reference)] * 3


def test_guidance_is_the_rewards_gradient(folder):
    """x⁺ - x^w against finite differences of ½(R_high - r(c, x̂_0(x)))²; weights get none."""
    fields = {"reward_target": 9.0, "reward_step": 0.5}
    forward = forward_of(folder / "sd", "tailorpo-g", **fields)
    twin = forward_of(folder / "sd", "tailorpo")
    for i in range(3):
        twin.sample = None if i == 0 else forward.sample
        twin.at = i
        batch = batch_of(i)
        forward(batch), twin(batch)
        move, before = forward.sample - twin.sample, twin.sample
        direction = torch.randn(before.shape, generator=torch.Generator().manual_seed(i))
        with torch.no_grad():
            r, up, down = (forward.rewards(i, before + h * direction) for h in (0.0, 0.02, -0.02))
        slope = (0.5 * (9 - up).square() - 0.5 * (9 - down).square()) / 0.04
        expected = -0.5 * slope
        found = (move * direction).flatten(1).sum(1)
        torch.testing.assert_close(found, expected, rtol=0.05, atol=2e-3)
        with torch.no_grad():
            assert (forward.rewards(i, before + 0.1 * move) > r).all()
    assert all(weight.grad is None for weight in forward.engine.unet.parameters())


def test_every_online_objective_has_its_forward():
    """The trainer takes those without one for objectives on pairs."""
    assert list(FORWARDS) == [name for name, row in OBJECTIVES.items() if row.online]


def test_equal_rewards_teach_nothing(folder):
    for objective in ("tailorpo", "d3po"):
        forward = forward_of(folder / "sd", objective, "equal")
        for step in range(3):
            out = forward(batch_of(step))
            assert out.logits.abs().max() == 0 and out.loss.item() == pytest.approx(math.log(2))
            assert out.per_pair()["reward_ties"].tolist() == [1, 1]
            out.loss.backward()
            size = max(w.grad.abs().max() for w in forward.engine.unet.parameters())
            # D3PO's two predictions cancel in the sum over samples, up to rounding
            assert size == 0 if objective == "tailorpo" else size < 1e-5
    assert ranked(torch.tensor([1.0, 5, 2, 1, 7, 2])).tolist() == [0, 4, 2, 0, 1, 2]


def test_a_trajectory_does_not_depend_on_its_group(folder):
    for objective in ("tailorpo", "d3po"):
        together = forward_of(folder / "sd", objective)
        alone = [forward_of(folder / "sd", objective) for _ in CAPTIONS]
        for step in range(3):
            out = together(batch_of(step))
            parts = [f(batch_of(step, slice(b, b + 1))) for b, f in enumerate(alone)]
            logits = torch.cat([part.logits for part in parts])
            torch.testing.assert_close(out.logits, logits, rtol=1e-3, atol=1e-5)
            win = torch.cat([part.reward_win for part in parts])
            torch.testing.assert_close(out.reward_win, win, rtol=1e-4, atol=1e-5)


def test_noise_differs_between_steps_candidates_prompts_and_epochs(folder):
    forward = forward_of(folder / "sd")
    seen = [forward.begin(batch_of())] + [part for i in (1, 2) for part in forward.noise(i, 2)]
    seen.append(forward.begin(replace(batch_of(), epochs=torch.tensor(EPOCHS) + 1)))
    rows = torch.cat(seen).flatten(1)
    assert len(rows) == 12
    assert (torch.corrcoef(rows) - torch.eye(12)).abs().max() < 0.6
    assert rows.std() == pytest.approx(1, abs=0.1)


def test_an_evaluation_does_not_start_from_noise_that_was_trained_on(folder):
    begun = forward_of(folder / "sd").begin(batch_of())
    key = {"seed": SEED, "pair_ids": torch.tensor(IDS), "draw": torch.tensor(EPOCHS)}
    assert (begun - noise.pair_noise(begun.shape[1:], **key)).abs().flatten(1).mean(1).min() > 0.5


def test_steps_outside_the_range_are_sampled_only(folder):
    whole, part = forward_of(folder / "sd"), forward_of(folder / "sd", timestep_high=600)
    assert whole.trained == [0, 1, 2] and part.trained == [1, 2]
    out = part(batch_of(0))
    assert part.engine.calls == [("sampling", 4), ("training", 4), ("sampling", 8)]
    plain = WrittenOut(folder / "sd", part, 3)
    with torch.no_grad():
        for b in range(2):
            x, t = plain.z(b, 0, 0), plain.times[0]
            o = plain.predict(part.engine.unet, b, x, t)
            x = plain.step(o, t, x, plain.z(b, 1, 0))
            o, made = plain.predict(part.engine.unet, b, x, plain.times[1]), []
            for k in range(2):
                made.append(plain.step(o, plain.times[1], x, plain.z(b, 2, k)))
            scores = [plain.score(b, candidate, 1) for candidate in made]
            assert out.reward_win[b].item() == pytest.approx(max(scores), rel=1e-4)
