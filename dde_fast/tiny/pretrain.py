"""Pretrain the tiny Stable Diffusion in `model/`: autoencoder, tokenizer, text encoder and UNet,
from `art.parquet`.

    python pretrain.py --stage vae --threads 1
    python pretrain.py --stage unet --threads 1
    python pretrain.py --stage names --threads 1

Every image is 32 x 32 on white, a latent is [4, 8, 8]. Captions are the emoji's name in words or
just "face"; drawings are line art 40 %, flat colour 30 % and noto 30 % of the time, so the base model
often draws line art. Every stage is seeded: same seed, same versions and same thread count give the
same weights. Took 624 s (vae), 943 s (unet) and 751 s (names) of CPU time on one of 2 cores.
"""

import argparse
import io
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

HERE = Path(__file__).parent
DESIGNER_SHARE = {"line": 0.4, "flat": 0.3, "noto": 0.3}
"""How often each designer is drawn during pretraining."""
PLAIN_CAPTION, DROP_SHARE = "face", 0.1
LATENT_SCALE = 0.18215
"""SD 1.5's scaling factor; the autoencoder is rescaled after training so that it is right here
too."""
TEXT_WIDTH, TEXT_LENGTH, VOCABULARY = 96, 16, 1000


class Plan(NamedTuple):
    """One stage of UNet training."""

    fresh: bool
    """Start from new weights, or from the pipeline that the stage before saved."""
    plain_share: float
    """How often the caption is just "face"."""
    learning_rate: float
    schedule: int
    """Steps of the cosine."""
    steps: int
    """Steps taken: stopping before the cosine ends leaves the next stage something to move."""
    seed: int


PLAN = {
    "unet": Plan(True, 0.5, 1e-3, 3600, 3000, 0),
    "names": Plan(False, 0.2, 8e-4, 2400, 2400, 1),
}
"""First what faces look like, then, with names in most captions, which face is asked for."""


def base_art() -> tuple[torch.Tensor, list[str], list[str]]:
    """The base designers' drawings: images [N, 3, 32, 32] in [-1, 1], names, designers."""
    table = pq.read_table(HERE / "art.parquet", filters=[("role", "=", "base")]).to_pylist()
    pixels = [np.asarray(Image.open(io.BytesIO(row["png"])).convert("RGB")) for row in table]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, [row["name"] for row in table], [row["designer"] for row in table]


def cosine(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train_vae(args: argparse.Namespace) -> None:
    """Train the autoencoder (f = 4, 4 channels) on shifted and tinted drawings; L1 + L2 + 1e-4
    KL."""
    images, _, designers = base_art()
    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=32,
        scaling_factor=LATENT_SCALE,
    )
    vae.to(memory_format=torch.channels_last)
    print(
        f"autoencoder: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters",
        flush=True,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1.5e-3, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: cosine(s, args.vae_steps, 100)
    )
    share = torch.tensor([DESIGNER_SHARE[d] for d in designers])
    start = time.process_time()
    for step in range(args.vae_steps):
        pick = torch.multinomial(share, args.vae_batch, replacement=True, generator=generator)
        batch = images[pick]
        if step < 0.8 * args.vae_steps:
            batch = shift_and_tint(batch, generator)
        posterior = vae.encode(batch.contiguous(memory_format=torch.channels_last)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        out = vae.decode(posterior.mean + posterior.std * noise).sample
        error = out - batch
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        loss = error.square().mean() + 0.3 * error.abs().mean() + 1e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == args.vae_steps - 1:
            mse = error.square().mean().item() / 4
            cpu = time.process_time() - start
            print(
                f"vae step {step} psnr {-10 * math.log10(mse):.2f} dB kl {kl:.2f} cpu {cpu:.0f} s",
                flush=True,
            )
    vae.eval().requires_grad_(False)
    fold_statistics(vae, images, share)
    recon = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    mse = (recon - images).square().mean(dim=(1, 2, 3)) / 4
    for designer in DESIGNER_SHARE:
        mine = torch.tensor([d == designer for d in designers])
        print(f"reconstruction, {designer}: {-10 * mse[mine].log10().mean():.2f} dB", flush=True)
    vae.half().save_pretrained(args.output / "vae")
    forget_folder(args.output)


def forget_folder(folder: Path) -> None:
    """Drop from the saved configs where on this machine their weights were loaded from."""
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def shift_and_tint(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift whole batches by up to 2 px and scale each image's colour channels by up to 10 % below
    white."""
    dy, dx = torch.randint(0, 5, (2,), generator=generator).tolist()
    padded = F.pad(images, (2, 2, 2, 2), value=1.0)[:, :, dy : dy + 32, dx : dx + 32]
    tint = 1 - 0.1 * torch.rand(len(images), 3, 1, 1, generator=generator)
    return (padded + 1) * tint - 1


def fold_statistics(vae: AutoencoderKL, images: torch.Tensor, share: torch.Tensor) -> None:
    """Make latents zero-mean with unit std per channel after `scaling_factor`, by changing the 1x1
    convolutions only.

    Exact: `quant_conv` and `post_quant_conv` have no padding, so decode(encode(x)) stays what it
    was.
    """
    mean = vae.encode(images).latent_dist.mean
    weight = (share / share.sum())[:, None, None, None]
    centre = (weight * mean).sum(0).mean(dim=(1, 2))  # [4]
    spread = (weight * (mean - centre[:, None, None]).square()).sum(0).mean(dim=(1, 2)).sqrt()
    gain = 1 / (spread * LATENT_SCALE)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:4] *= gain[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - centre) * gain
    quant.bias[4:] += 2 * gain.log()
    post.bias += post.weight[:, :, 0, 0] @ centre
    post.weight /= gain[None, :, None, None]


def train_tokenizer(names: list[str], folder: Path) -> CLIPTokenizer:
    """Byte-pair encoding of the captions, in CLIP's format: [<|startoftext|>, tokens,
    <|endoftext|>...]."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), byte_level])
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(sorted(set(names)) + [PLAIN_CAPTION], trainer)
    state = json.loads(bpe.to_str())["model"]
    vocabulary = dict(state["vocab"])
    for character in pre_tokenizers.ByteLevel.alphabet():
        vocabulary.setdefault(f"{character}</w>", len(vocabulary))
    merges = [tuple(m) for m in state["merges"]]
    tokenizer = CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        model_max_length=TEXT_LENGTH,
        bos_token=special[0],
        eos_token=special[1],
        unk_token=special[1],
        pad_token=special[1],
    )
    tokenizer.save_pretrained(folder)
    # the two files that CLIPTokenizer read before tokenizer.json
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP's text model, 2 layers of width 96."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """A UNet of two resolutions (8 x 8 and 4 x 4), cross attention in both."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 112),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def scheduler_config() -> dict:
    """SD 1.5's noise schedule."""
    return {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "steps_offset": 1,
    }


def train_unet(args: argparse.Namespace) -> None:
    """Train UNet and text encoder together on the noise-prediction loss; save the averaged weights
    as a pipeline."""
    images, names, designers = base_art()
    vae = AutoencoderKL.from_pretrained(args.output / "vae").float().eval()
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
    mean, std = posterior.mean * LATENT_SCALE, posterior.std * LATENT_SCALE  # [N, 4, 8, 8]
    plan = PLAN[args.stage]
    torch.manual_seed(args.seed + plan.seed)
    generator = torch.Generator().manual_seed(args.seed + plan.seed)
    if plan.fresh:
        tokenizer = train_tokenizer(names, args.output / "tokenizer")
        text_encoder, unet = build_text_encoder(tokenizer), build_unet()
    else:
        tokenizer = CLIPTokenizer.from_pretrained(args.output / "tokenizer")
        text_encoder = CLIPTextModel.from_pretrained(args.output / "text_encoder").float().train()
        unet = UNet2DConditionModel.from_pretrained(args.output / "unet").float().train()
    for part, module in (("text encoder", text_encoder), ("UNet", unet)):
        print(
            f"{part}: {sum(p.numel() for p in module.parameters()) / 1e6:.2f} M parameters",
            flush=True,
        )
    captions = names + [PLAIN_CAPTION, ""]
    tokens = tokenizer(
        captions, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
    ).input_ids
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    averaged = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(
        parameters, lr=plan.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: cosine(s, plan.schedule, 200))
    scheduler = DDPMScheduler(**scheduler_config())
    share = torch.tensor([DESIGNER_SHARE[d] for d in designers])
    losses, start = [], time.process_time()
    for step in range(plan.steps):
        pick = torch.multinomial(share, args.unet_batch, replacement=True, generator=generator)
        draw = torch.rand(args.unet_batch, generator=generator)
        caption = torch.where(draw < plan.plain_share, len(names), pick)
        caption = torch.where(draw > 1 - DROP_SHARE, len(names) + 1, caption)
        latents = mean[pick] + std[pick] * torch.randn(mean[pick].shape, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(0, 1000, (args.unet_batch,), generator=generator)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        hidden = text_encoder(tokens[caption]).last_hidden_state  # [B, 16, 96]
        loss = F.mse_loss(unet(noisy, timesteps, hidden).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.998, (step + 1) / (step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(averaged, parameters, 1 - decay)
        losses.append(loss.item())
        if step % 100 == 0 or step == plan.steps - 1:
            cpu, recent = time.process_time() - start, sum(losses[-100:]) / len(losses[-100:])
            print(f"{args.stage} step {step} loss {recent:.4f} cpu {cpu:.0f} s", flush=True)
        if (step + 1) % args.save_every == 0 or step == plan.steps - 1:
            save_pipeline(args.output, vae, tokenizer, text_encoder, unet, averaged)


def save_pipeline(
    folder: Path, vae, tokenizer, text_encoder, unet, averaged: list[torch.Tensor]
) -> None:
    """Write the pipeline with the averaged weights in fp16, then put the training weights back."""
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, a in zip(parameters, averaged, strict=True):
            p.copy_(a)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**scheduler_config(), set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    forget_folder(folder)
    pipeline.to(torch.float32)
    with torch.no_grad():
        for p, k in zip(parameters, kept, strict=True):
            p.copy_(k)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--stage", choices=("vae", *PLAN), required=True)
    parser.add_argument("--output", type=Path, default=HERE / "model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-batch", type=int, default=16)
    parser.add_argument("--vae-steps", type=int, default=1600)
    parser.add_argument("--unet-batch", type=int, default=24)
    parser.add_argument("--save-every", type=int, default=600)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    (train_vae if args.stage == "vae" else train_unet)(args)


if __name__ == "__main__":
    main()
