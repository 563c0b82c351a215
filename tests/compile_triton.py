"""Compile every Triton kernel ahead of time for GPUs that are not here; print what came out.

Run by test_triton.py in a process without TRITON_INTERPRET. One JSON line per kernel and target:
widths of the global accesses in the PTX (bits per thread and instruction).
"""

import json
import re
import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from dde_fast import triton_kernels as kernels
from dde_fast import triton_noise, triton_ratios


def cases(dtype: str):
    accumulate = "fp64" if dtype == "fp64" else "fp32"
    forward = dict.fromkeys(("p_policy", "p_reference", "p_target"), f"*{dtype}")
    yield (
        kernels.pair_errors_kernel,
        {**forward, "p_partial": f"*{accumulate}", "pairs": "i32", "N": "i32", "chunk": "i32"},
        {
            "CHUNKS": 16,
            "REFERENCE": 1,
            "SHARED_POLICY": False,
            "SHARED_TARGET": True,
            "BLOCK": kernels.BLOCK,
        },
    )
    pointers = ("p_loss", "p_logits", "p_policy_error", "p_reference_error", "p_margin")
    scalars = {"beta": "fp32", "lose_weight": "fp32", "label_smoothing": "fp32"}
    yield (
        kernels.pair_logits_kernel,
        {
            "p_partial": f"*{accumulate}",
            "p_cached": f"*{accumulate}",
            "p_timesteps": "*i64",
            "p_weights": "*fp32",
            "p_margins": "*fp32",
            **dict.fromkeys(pointers, f"*{accumulate}"),
            **dict.fromkeys(("pairs", "N", "num_timesteps"), "i32"),
            **scalars,
        },
        {
            "CHUNKS": 16,
            "CHUNKS_2": 16,
            "HALVES": False,
            "REFERENCE": 1,
            "LINK": kernels.LINK["sigmoid"],
            "BLOCK_B": 32,
        },
    )
    gradients = ("p_grad_loss", "p_grad_logits", "p_grad_policy_error")
    yield (
        kernels.preference_loss_backward_kernel,
        {
            **dict.fromkeys(gradients, f"*{accumulate}"),
            "p_policy": f"*{dtype}",
            "p_target": f"*{dtype}",
            "p_timesteps": "*i64",
            "p_logits": f"*{accumulate}",
            "p_weights": "*fp32",
            "p_gradient": f"*{dtype}",
            **dict.fromkeys(("pairs", "N", "num_timesteps"), "i32"),
            **scalars,
        },
        {
            "HAS_LOSS": True,
            "HAS_LOGITS": True,
            "HAS_ERROR": True,
            "SHARED_POLICY": False,
            "SHARED_TARGET": True,
            "LINK": kernels.LINK["sigmoid"],
            "BLOCK": kernels.BLOCK,
        },
    )

    noise = {
        "p_timesteps": "*i64",
        "p_alphas_cumprod": "*fp64" if dtype == "fp64" else "*fp32",
        **dict.fromkeys(("p_pair_ids", "p_draws"), "*i64"),
        **dict.fromkeys(("seed_low", "seed_high"), "i64"),
        **dict.fromkeys(("pairs", "N", "space"), "i32"),
    }
    # contiguous, noise alone, and channels_last from channels_last
    for only, last in ((False, False), (True, False), (False, True)):
        yield (
            triton_noise.add_noise_kernel,
            {**dict.fromkeys(("p_latents", "p_noisy", "p_noise"), f"*{dtype}"), **noise},
            {
                "ONLY_NOISE": only,
                "CHANNELS": 4,
                "LATENTS_LAST": last,
                "OUT_LAST": last,
                "TILES": last,
                "BLOCK": triton_noise.BLOCK,
            },
        )


def table_cases():
    """Kernels whose types do not depend on the predictions'."""
    yield (
        triton_noise.pair_uniform_kernel,
        {
            **dict.fromkeys(("p_pair_ids", "p_draws"), "*i64"),
            **dict.fromkeys(("block", "seed_low", "seed_high"), "i64"),
            "p_out": "*fp32",
            "pairs": "i32",
        },
        {"BLOCK": triton_noise.BLOCK},
    )
    yield (
        triton_ratios.observe_ratios_kernel,
        {
            "p_sums": "*fp64",
            **dict.fromkeys(("p_policy_error", "p_reference_error", "p_scale"), "*fp32"),
            "p_timesteps": "*i64",
            **dict.fromkeys(("pairs", "num_timesteps"), "i32"),
        },
        {"BLOCK_T": triton_ratios.BLOCK_T},
    )
    yield (
        triton_ratios.update_ratios_kernel,
        {
            **dict.fromkeys(("p_ratios", "p_margins"), "*fp32"),
            "p_sums": "*fp64",
            "rate": "fp32",
            "num_timesteps": "i32",
        },
        {"BLOCK_T": triton_ratios.BLOCK_T},
    )


def widths(ptx: str, access: str) -> list[int]:
    """Bits per instruction of every global load or store in the PTX."""
    found = re.findall(rf"{access}\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.b(\d+)\b", ptx)
    return sorted(int(vector or 1) * int(bits) for vector, bits in found)


VARIANTS = [
    {"REFERENCE": 0, "SHARED_TARGET": False, "LINK": 1, "CHUNKS": 1, "CHUNKS_2": 1, "BLOCK_B": 1},
    {"REFERENCE": 2, "HALVES": True, "LINK": 2, "CHUNKS": 3, "CHUNKS_2": 4, "BLOCK_B": 2},
    {"LINK": 3, "HAS_LOGITS": False, "HAS_ERROR": False},
    {
        "SHARED_POLICY": True,
        "SHARED_TARGET": False,
        "HAS_LOSS": False,
        "CHUNKS": 64,
        "CHUNKS_2": 64,
    },
]
"""Other branches of the kernels, compiled in float32."""


def compile_for(arch: int, kernel, signature: dict, constexprs: dict):
    names = kernel.arg_names
    signature = {name: signature.get(name, "constexpr") for name in names}
    # what the launcher's specialisation finds for contiguous tensors and N % 16 == 0
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in ("N", "chunk")
    }
    constants = {(names.index(name),): value for name, value in constexprs.items()}
    source = ASTSource(kernel, signature, constants, attrs)
    return compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4})


def describe(arch: int, dtype: str, variant: dict, kernel, signature: dict, constexprs: dict):
    chosen = {name: variant.get(name, value) for name, value in constexprs.items()}
    compiled = compile_for(arch, kernel, signature, chosen)
    ptx = compiled.asm["ptx"]
    return {
        "kernel": kernel.__name__,
        "dtype": dtype,
        "variant": variant,
        "loads": widths(ptx, "ld"),
        "stores": widths(ptx, "st"),
        "local": len(re.findall(r"\b(?:ld|st)\.local", ptx)),
        "shared_bytes": compiled.metadata.shared,
        "cubin_bytes": len(compiled.asm["cubin"]),
    }


def main() -> None:
    arch = int(sys.argv[1])
    todo = [(dtype, {}) for dtype in ("bf16", "fp16", "fp32", "fp64")]
    for dtype, variant in todo + [("fp32", variant) for variant in VARIANTS]:
        for case in cases(dtype):
            print(json.dumps(describe(arch, dtype, variant, *case)))
    for case in table_cases():
        print(json.dumps(describe(arch, "", {}, *case)))


if __name__ == "__main__":
    main()
