"""The original single-file layout of a Stable Diffusion, written from its diffusers pipeline."""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
VAE = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP = {
    "encoder.layers": "transformer.resblocks",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "fc1": "c_fc",
    "fc2": "c_proj",
    "self_attn": "attn",
}


def _replace(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        name = re.sub(rf"(^|\.){re.escape(old)}(?=\.|$)", rf"\g<1>{new}", name)
    return name


def unet_name(name: str, names: set[str], layers: int) -> str:
    """A UNet's blocks are numbered through, a down- or upsampler being one, or a part of one."""
    match = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
    if match is None:
        return _replace(_replace(name, UNET), RESNET if "resnets" in name else {})
    way, block, kind, layer, rest = match.groups()
    number = int(block) * (layers + 1) + (layers if "samplers" in kind else int(layer))
    if kind == "resnets":
        rest = _replace(rest, RESNET)
    if way == "down":
        place = 1 if kind == "attentions" else 0
        return f"input_blocks.{1 + number}.{place}.{_replace(rest, {'conv': 'op'})}"
    attends = any(other.startswith(f"up_blocks.{block}.attentions") for other in names)
    place = {"resnets": 0, "attentions": 1, "upsamplers": 1 + attends}[kind]
    return f"output_blocks.{number}.{place}.{rest}"


def vae_name(name: str, blocks: int) -> str:
    """A VAE's decoder counts its blocks from the last."""
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    for i in range(blocks):
        up = f"up.{blocks - 1 - i}"
        name = re.sub(rf"up_blocks\.{i}\.resnets\.(\d+)", rf"{up}.block.\1", name)
        name = name.replace(f"up_blocks.{i}.upsamplers.0", f"{up}.upsample")
    return _replace(name, VAE)


def clip(encoder: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """OpenAI's CLIP: names as in transformers, below `text_model`."""
    state = encoder.state_dict().items()
    return {f"{prefix}text_model.{k.removeprefix('text_model.')}": v for k, v in state}


def open_clip(encoder: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """OpenCLIP: queries, keys and values in one matrix; the projection transposed."""
    state = {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items()}
    out = {}
    for name, value in state.items():
        if name == "text_projection.weight":
            out[f"{prefix}text_projection"] = value.T.contiguous()
        elif re.search(r"\.[kv]_proj\.", name):
            continue
        elif ".q_proj." in name:
            merged = torch.cat([state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
            place, kind = _replace(name, OPEN_CLIP).split(".q_proj.")
            out[f"{prefix}{place}.in_proj_{kind}"] = merged
        else:
            out[prefix + _replace(name, OPEN_CLIP)] = value
    return out


def write(pipeline, path: Path) -> Path:
    """Write a pipeline's weights as one file, in float16 as such files are."""
    unet, vae = pipeline.unet.state_dict(), pipeline.vae.state_dict()
    layers = pipeline.unet.config.layers_per_block
    blocks = len(pipeline.vae.config.block_out_channels)
    state = {f"model.diffusion_model.{unet_name(k, set(unet), layers)}": v for k, v in unet.items()}
    for name, value in vae.items():
        if re.search(r"attentions.*(to_[qkv]|to_out\.0)\.weight", name):
            value = value[:, :, None, None]  # linear layers were 1 x 1 convolutions
        state[f"first_stage_model.{vae_name(name, blocks)}"] = value
    if "text_encoder_2" in pipeline.components:
        state |= clip(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
        state |= open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    elif pipeline.unet.config.use_linear_projection:  # SD 2.x
        state |= open_clip(pipeline.text_encoder, "cond_stage_model.model.")
    else:
        state |= clip(pipeline.text_encoder, "cond_stage_model.transformer.")
    save_file({name: value.half().contiguous() for name, value in state.items()}, path)
    return path
