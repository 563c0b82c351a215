"""Compile every Triton kernel ahead of time for GPUs that are not here; print what came out.

Run by test_triton.py in a process without TRITON_INTERPRET, for the targets (sm_90, gfx942, …) in
its arguments. One JSON line per kernel and target: widths of the global accesses in the assembly
(bits per thread and instruction), what was spilled to memory, shared memory, float64 instructions.
"""

import contextlib
import io
import json
import re
import sys

import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from dde_fast import triton_configs, triton_noise, triton_ratios, triton_sampling
from dde_fast import triton_kernels as kernels


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
        },
    )
    pointers = ("p_loss", "p_logits", "p_policy_error", "p_reference_error", "p_margin")
    scalars = {"beta": "fp64", "lose_weight": "fp64", "label_smoothing": "fp64"}
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
        },
    )

    noise = {
        "p_timesteps": "*i64",
        "p_alphas_cumprod": "*fp64" if dtype == "fp64" else "*fp32",
        **dict.fromkeys(("p_pair_ids", "p_draws"), "*i64"),
        **dict.fromkeys(("seed_low", "seed_high"), "i64"),
        **dict.fromkeys(("pairs", "N", "space", "num_timesteps"), "i32"),
    }
    # contiguous, noise alone, and channels_last from channels_last
    for only, last in ((False, False), (True, False), (False, True)):
        yield (
            triton_noise.add_noise_kernel,
            {**dict.fromkeys(("p_latents", "p_noisy", "p_noise"), f"*{dtype}"), **noise},
            {
                "HALVES": last,
                "ONLY_NOISE": only,
                "CHANNELS": 4,
                "LATENTS_LAST": last,
                "OUT_LAST": last,
                "TILES": last,
            },
        )
    yield from step_cases(dtype, accumulate)


def step_cases(dtype: str, accumulate: str):
    coefficients = {"p_coefficients": "*fp32"}
    counts = dict.fromkeys(("batch", "candidates", "N"), "i32")
    latents = ("p_prediction", "p_sample", "p_given", "p_next", "p_gradient", "p_grad_next")
    forward = {**dict.fromkeys(latents[:4], f"*{dtype}"), "p_partial": f"*{accumulate}"}
    constants = {"PREDICTION": 0}
    yield (
        triton_sampling.ddim_step_kernel,
        {**forward, **coefficients, **counts},
        {"MAKE": True, **constants},
    )
    yield (
        triton_sampling.ddim_step_backward_kernel,
        {
            **dict.fromkeys((*latents[:2], *latents[3:]), f"*{dtype}"),
            "p_grad_log_prob": f"*{accumulate}",
            **coefficients,
            **counts,
        },
        {
            "HAS_NEXT": True,
            "HAS_LOG_PROB": True,
            **constants,
            "DTYPE": tl.float64 if dtype == "fp64" else tl.float32,
        },
    )


def table_cases():
    """Kernels whose types do not depend on the predictions'."""
    for wide in ("fp32", "fp64"):
        yield (
            triton_sampling.ddim_density_kernel,
            {
                **dict.fromkeys(("p_partial", "p_log_prob"), f"*{wide}"),
                "p_coefficients": "*fp32",
                **dict.fromkeys(("batch", "N", "blocks"), "i32"),
            },
            {},
        )
    yield (
        triton_noise.pair_uniform_kernel,
        {
            **dict.fromkeys(("p_pair_ids", "p_draws"), "*i64"),
            **dict.fromkeys(("block", "seed_low", "seed_high"), "i64"),
            "p_out": "*fp32",
            "pairs": "i32",
        },
        {},
    )
    yield (
        triton_ratios.observe_ratios_kernel,
        {
            "p_sums": "*fp64",
            **dict.fromkeys(("p_policy_error", "p_reference_error", "p_scale"), "*fp32"),
            "p_timesteps": "*i64",
            **dict.fromkeys(("pairs", "num_timesteps"), "i32"),
        },
        {},
    )
    yield (
        triton_ratios.update_ratios_kernel,
        {
            **dict.fromkeys(("p_ratios", "p_margins"), "*fp32"),
            "p_sums": "*fp64",
            "rate": "fp64",
            "num_timesteps": "i32",
        },
        {},
    )


def ptx_widths(ptx: str, access: str) -> list[int]:
    """Bits per instruction of every global load or store ("ld" or "st") in the PTX."""
    found = re.findall(rf"{access}\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.b(\d+)\b", ptx)
    return sorted(int(vector or 1) * int(bits) for vector, bits in found)


def amd_widths(assembly: str, access: str) -> list[int]:
    """The same of AMD's assembly, by "load" or "store"."""
    instruction = rf"\b(?:global|buffer|flat)_{access}_[us]?(dword|short|byte)(?:x(\d))?"
    bits = {"dword": 32, "short": 16, "byte": 8}
    return sorted(bits[u] * int(count or 1) for u, count in re.findall(instruction, assembly))


def doubles(assembly: str) -> list[str]:
    """Names of the instructions that touch float64."""
    return sorted(set(re.findall(r"^\s+(\w\S*f64\S*)", assembly, re.M)))


LOGS: dict[str, str] = {}
"""What ptxas said, by the kernel's hash."""


def of_nvidia(compiled, log: str) -> dict:
    """ptxas reports a stack only where something does not stay in registers."""
    (sizes,) = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    ptx = compiled.asm["ptx"]
    return {
        "loads": ptx_widths(ptx, "ld"),
        "stores": ptx_widths(ptx, "st"),
        "spilled": sum(map(int, sizes)) + len(re.findall(r"\b(?:ld|st)\.local", ptx)),
        "doubles": doubles(ptx),
        "binary_bytes": len(compiled.asm["cubin"]),
    }


def of_amd(compiled, _: str) -> dict:
    """The private segment is what a thread keeps in memory (scratch)."""
    assembly = compiled.asm["amdgcn"]
    counted = r"\.(?:private_segment_fixed_size|[sv]gpr_spill_count): +(\d+)"
    sizes = re.findall(counted, assembly)
    assert len(sizes) == 3, sizes
    return {
        "loads": amd_widths(assembly, "load"),
        "stores": amd_widths(assembly, "store"),
        "spilled": sum(map(int, sizes)) + len(re.findall(r"\bscratch_(?:load|store)", assembly)),
        "doubles": doubles(assembly),
        "binary_bytes": len(compiled.asm["hsaco"]),
    }


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
    {"PREDICTION": 1, "MAKE": False, "HAS_LOG_PROB": False},
    {"PREDICTION": 2, "HAS_NEXT": False},
]
"""Other branches of the kernels, compiled in float32."""
WITH_VARIANTS = ("sm_90", "gfx942")
"""Targets to compile those for: one of each vendor, for time."""
WITH_CANDIDATES = ("sm_90", "fp64")
"""Target and dtype to compile for in every configuration that tuning may take: the dtype takes the
most registers and shared memory; one of each, for time."""


def target_of(name: str) -> GPUTarget:
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64)


def compile_for(target: GPUTarget, kernel, signature: dict, constexprs: dict, num_warps: int):
    names = kernel.arg_names
    for parameter in kernel.params:  # a launch makes a float fp32 unless the kernel says otherwise
        kind = signature.get(parameter.name, "")
        assert not kind.startswith("fp") or parameter.annotation_type == kind, parameter.name
    signature = {name: signature.get(name, "constexpr") for name in names}
    # what the launcher's specialisation finds for contiguous tensors and N % 16 == 0
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in ("N", "chunk")
    }
    constants = {(names.index(name),): value for name, value in constexprs.items()}
    source = ASTSource(kernel, signature, constants, attrs)
    return compile(source, target=target, options={"num_warps": num_warps})


def configurations(target: str, kernel) -> tuple[set, set]:
    """What the table gives a kernel on a target, for whatever N, and what else tuning may take."""
    name = kernel.__name__.removesuffix("_kernel")
    sizes = {row[1] for row in triton_configs.FIXED[name]}
    fixed = {triton_configs.serving(name, target, n) for n in sizes}
    tried = fixed if name in triton_configs.TUNED else ()
    return fixed, {other for config in tried for other in triton_configs.candidates(config)} - fixed


def describe(name: str, dtype: str, variant: dict, kernel, signature, constexprs, config) -> dict:
    target = target_of(name)
    (block,) = (argument for argument in kernel.arg_names if argument.startswith("BLOCK"))
    constexprs = {**constexprs, block: config.block}
    chosen = {name: variant.get(name, value) for name, value in constexprs.items()}
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled = compile_for(target, kernel, signature, chosen, config.num_warps)
    # the same kernel again, under another dtype that it does not see, comes from Triton's cache
    log = LOGS.setdefault(compiled.hash, log.getvalue())
    found = (of_nvidia if target.backend == "cuda" else of_amd)(compiled, log)
    return {
        "target": name,
        "kernel": kernel.__name__,
        "dtype": dtype,
        "variant": variant,
        "config": config,
        "shared_bytes": compiled.metadata.shared,
        **found,
    }


def main() -> None:
    knobs.nvidia.dump_ptxas_log = True
    for name in sys.argv[1:]:
        todo = [(dtype, {}) for dtype in ("bf16", "fp16", "fp32", "fp64")]
        if name in WITH_VARIANTS:
            todo += [("fp32", variant) for variant in VARIANTS]
        work = [(dtype, variant, case) for dtype, variant in todo for case in cases(dtype)]
        for dtype, variant, case in work + [("", {}, case) for case in table_cases()]:
            fixed, others = configurations(name, case[0])
            if variant or (name, dtype) != WITH_CANDIDATES:
                others = set()
            for config in fixed | others:
                row = describe(name, dtype, variant, *case, config)
                print(json.dumps({**row, "candidate": config in others}))


if __name__ == "__main__":
    main()
