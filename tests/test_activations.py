"""What is counted on the meta device against what autograd keeps, allocates and computes."""

import functools
import itertools

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from variants import same_run

from dde_fast import lora
from dde_fast.activations import Activations, blocks_of, count, recompute, recomputed_blocks
from dde_fast.config import TrainConfig

SMALL = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
}
UNETS = {
    "sd": {**SMALL, "layers_per_block": 2},
    "sdxl": SMALL
    | {
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 12 + 6 * 8,
    },
}
BLOCKS = ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1")
CHOICES = ((), *((name,) for name in BLOCKS), ("down_blocks.1", "up_blocks.0"), BLOCKS)


def unet_of(name: str, dtype=torch.float32, rank: int = 0, device="cpu") -> UNet2DConditionModel:
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**UNETS[name])
        if rank:
            lora.add_adapters(unet, TrainConfig(lora_rank=rank))
    return unet.to(dtype).train()


def inputs_of(name: str, dtype=torch.float32, samples: int = 2, device="cpu") -> tuple[tuple, dict]:
    torch.manual_seed(1)
    with torch.device(device):
        inputs = torch.randn(samples, 4, 8, 8), torch.randn(samples, 8, 16)
        times = torch.arange(samples) * 100
        pooled, ids = torch.randn(samples, 12), torch.ones(samples, 6)
    added = {"text_embeds": pooled.to(dtype), "time_ids": ids} if name == "sdxl" else None
    conditions = {"added_cond_kwargs": added, "return_dict": False}
    return (inputs[0].to(dtype), times, inputs[1].to(dtype)), conditions


@functools.cache
def counted(name: str, dtype=torch.float32, rank: int = 0, attention="sdpa") -> Activations:
    pooled = 12 if name == "sdxl" else None
    unet = unet_of(name, dtype, rank, "meta")
    shapes = {"latent": (4, 8, 8), "embedding": (8, 16), "pooled": pooled}
    return count(unet, **shapes, attention=attention)


def kept(unet: UNet2DConditionModel, inputs: tuple, conditions: dict) -> int:
    """Bytes of the storages that autograd saves in a real forward, parameters left out."""
    own = {value.untyped_storage().data_ptr() for value in unet.parameters()}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        prediction = unet(*inputs, **conditions)[0]
    assert prediction.requires_grad
    return sum(size for place, size in sizes.items() if place not in own)


@pytest.mark.parametrize("names", CHOICES, ids=",".join)
@pytest.mark.parametrize("name", UNETS)
def test_what_is_kept_is_what_autograd_saves(name, names):
    unet = unet_of(name)
    recompute(unet, names)
    inputs, conditions = inputs_of(name)
    measured = kept(unet, inputs, conditions) / 2
    assert counted(name).held(names) == pytest.approx(measured, rel=0.005)


@pytest.mark.parametrize(
    ("dtype", "rank", "attention"),
    [(torch.bfloat16, 0, "sdpa"), (torch.float32, 2, "sdpa"), (torch.float32, 0, "eager")],
)
@pytest.mark.parametrize("names", [(), ("down_blocks.0",), BLOCKS], ids=len)
def test_in_another_dtype_with_adapters_and_with_all_weights_of_attention(
    dtype, rank, attention, names
):
    unet = unet_of("sdxl", dtype, rank)
    if attention == "eager":
        unet.set_attn_processor(AttnProcessor())
    recompute(unet, names)
    measured = kept(unet, *inputs_of("sdxl", dtype)) / 2
    assert counted("sdxl", dtype, rank, attention).held(names) == pytest.approx(measured, rel=0.01)


def test_attention_by_its_definition_keeps_more_than_by_a_fused_kernel():
    assert counted("sdxl", attention="eager").held() > 1.05 * counted("sdxl").held()


@pytest.mark.parametrize("names", CHOICES, ids=",".join)
@pytest.mark.parametrize("name", UNETS)
def test_recomputed_operations_are_those_that_recomputing_adds(name, names):
    totals = []
    for some in ((), names):
        unet = unet_of(name, device="meta")
        recompute(unet, some)
        inputs, conditions = inputs_of(name, device="meta")
        with FlopCounterMode(display=False) as counter:
            unet(*inputs, **conditions)[0].sum().backward()
        totals.append(counter.get_total_flops())
    assert 2 * counted(name).operations(names) == totals[1] - totals[0]


def most_alive(call) -> int:
    """Bytes allocated at once during a call on the CPU, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    total = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


@pytest.mark.parametrize("names", [(), ("up_blocks.1",), BLOCKS], ids=len)
@pytest.mark.parametrize("name", UNETS)
def test_the_peak_is_what_is_allocated(name, names):
    samples, unet = 64, unet_of(name)
    recompute(unet, names)
    for weight in unet.parameters():
        weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    inputs, conditions = inputs_of(name, samples=samples)
    measured = most_alive(lambda: unet(*inputs, **conditions)[0].sum().backward()) / samples
    # rather too much than too little
    assert 0.99 * measured < counted(name).peak(names) < 1.07 * measured


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("names", CHOICES[1:], ids=",".join)
def test_recomputing_changes_no_bit_of_a_gradient(rank, names):
    """With adapters the first block's inputs need no gradient, and its weights still get theirs."""
    unet = unet_of("sd", rank=rank)
    for key, value in unet.named_parameters():
        if ".lora_B." in key:
            torch.nn.init.normal_(value)
    gradients = []
    for some in ((), names):
        recompute(unet, some)
        inputs, conditions = inputs_of("sd")
        unet(*inputs, **conditions)[0].square().sum().backward()
        trained = [value for value in unet.parameters() if value.requires_grad]
        gradients.append([value.grad for value in trained])
        unet.zero_grad()
    assert len(gradients[0]) > 10 and all(value.abs().sum() > 0 for value in gradients[0])
    assert all(itertools.starmap(torch.equal, zip(*gradients, strict=True)))


@pytest.mark.parametrize("name", UNETS)
def test_the_choices_worth_having(name):
    one = counted(name)
    options = one.options()
    assert options[0].blocks == () and options[0].operations == 0
    costs = [(o.operations, -o.peak) for o in options]
    assert costs == sorted(costs) and len({o.peak for o in options}) == len(options) > 2
    for n in range(len(BLOCKS) + 1):
        for some in itertools.combinations(BLOCKS, n):
            price, peak = one.operations(some), one.peak(some)
            assert any(o.operations <= price and o.peak <= peak for o in options), some
    assert options[-1].peak == min(one.peak(some) for some in CHOICES)


def test_a_block_by_itself():
    one = counted("sd")
    for name in BLOCKS:
        without, with_it = one.of_block(name)
        assert 0 < with_it < without < one.held()
        assert one.held() - one.held([name]) == pytest.approx(without - with_it)
        assert 0 < one.operations([name]) < one.forward
    assert one.held(BLOCKS) < one.held() / 2


def test_blocks_by_name():
    unet = unet_of("sd", rank=2, device="meta")
    assert tuple(blocks_of(unet)) == BLOCKS
    assert recomputed_blocks(TrainConfig(), BLOCKS) == []
    assert recomputed_blocks(TrainConfig(gradient_checkpointing=True), BLOCKS) == list(BLOCKS)
    some = TrainConfig(gradient_checkpointing=True, checkpoint_blocks="up_blocks.1, mid_block")
    assert recomputed_blocks(some, BLOCKS) == ["mid_block", "up_blocks.1"]
    recompute(unet, ["mid_block", "up_blocks.1"])
    on = {n for n, m in unet.named_modules() if getattr(m, "gradient_checkpointing", False)}
    assert on == {"mid_block", "mid_block.attentions.0", "up_blocks.1"}
    wrong = TrainConfig(checkpoint_blocks="down_blocks.7,mid_block")
    with pytest.raises(
        ValueError, match=r"^checkpoint_blocks: .* down_blocks.0,.*, got 'down_blocks.7'$"
    ):
        recomputed_blocks(wrong, BLOCKS)


@pytest.mark.parametrize(
    ("name", "expected", "kinds"),
    [
        *((f"blocks{n}", f"ema{n}", ("unet", "unet_ema")) for n in (0, 2, 3)),
        ("blocks_resumed", "ema2", ("unet", "unet_ema")),
        ("lora_blocks", "lora3", ("lora",)),
    ],
)
def test_a_run_that_recomputes_some_blocks_is_the_run(variants, name, expected, kinds):
    """Under every ZeRO stage, with adapters, and when they are others after a resume."""
    same_run(variants, name, expected, *kinds)
