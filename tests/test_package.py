"""Installing, importing, the README, and what is shipped."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from dde_fast import backends, compiled

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def run(*args, **kwargs):
    return subprocess.run(args, capture_output=True, text=True, **kwargs)


def test_import_is_light():
    """Under 0.5 s beyond torch (best of three), and none of the heavy libraries."""
    code = (
        "import torch, time, sys; start = time.perf_counter(); import dde_fast; "
        "print(time.perf_counter() - start); "
        "heavy = {'triton', 'diffusers', 'transformers', 'deepspeed', 'torch._dynamo'}; "
        "heavy &= set(sys.modules); "
        "import importlib.util; print(sorted(heavy - set(sys.argv[1:])))"
    )
    # torch itself may import some of them
    with_torch = run(sys.executable, "-c", "import torch, sys; print(*sys.modules)").stdout.split()
    outs = [run(sys.executable, "-c", code, *with_torch).stdout.split("\n") for _ in range(3)]
    assert min(float(out[0]) for out in outs) < 0.5
    assert outs[0][1] == "[]"


def test_import_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch, dde_fast; "
        "from dde_fast import ops; "
        "loss = dde_fast.PreferenceLoss(alphas_cumprod=torch.linspace(0.9, 0.1, 10)); "
        "x = torch.ones(2, 3); print(loss(x, x, x, torch.tensor([4])).loss.item())"
    )
    out = run(sys.executable, "-c", code)
    assert out.returncode == 0, out.stderr
    assert float(out.stdout) == pytest.approx(0.6931472)


def test_main_says_what_is_used_and_why():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = run(sys.executable, "-m", "dde_fast", env=env)
    assert out.returncode == 0, out.stderr
    assert f"torch        {torch.__version__}" in out.stdout
    built = backends.why_not("cpp", torch.device("cpu")) is None
    assert f"backend {'cpp' if built else 'reference'}\n" in out.stdout
    line = f"available, {compiled.isa()}" if built else backends.why_not("cpp", torch.device("cpu"))
    assert f"cpp          {line}" in out.stdout
    assert "triton has no kernels for cpu tensors" in out.stdout


def test_readme_snippets_run():
    """In order, in one namespace that holds what a trainer has at that point."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    names = {
        "model_pred": torch.randn(4, 4, 8, 8, requires_grad=True),
        "ref_pred": torch.randn(4, 4, 8, 8),
        "target": torch.randn(4, 4, 8, 8),
        "latents": torch.randn(4, 4, 8, 8),
        "timesteps": torch.tensor([10, 700]),
        "pair_ids": torch.tensor([0, 1]),
        "noise_scheduler": scheduler,
        "beta": 5000.0,
    }
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["model_pred"].grad.abs().sum() > 0
    assert names["noisy"].shape == (4, 4, 8, 8)
    # latents elsewhere than the scheduler's table, as a GPU's are
    elsewhere = {name: names[name].to("meta") for name in ("latents", "timesteps", "pair_ids")}
    exec(compile(blocks[2], "README.md", "exec"), names | elsewhere)
    # "the same numbers with diffusion-dpo"
    same = names["PreferenceLoss"].from_scheduler(scheduler, "diffusion-dpo", beta=5000.0)
    out = same(*(names[n] for n in ("model_pred", "ref_pred", "target", "timesteps")))
    torch.testing.assert_close(out.loss, names["loss"], rtol=1e-4, atol=1e-4)


def test_readme_commands_exist():
    """Every make target, script, module and flag that the README's shell blocks name."""
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", shell, re.M):
        assert re.search(rf"^{target}:", makefile, re.M)
    for script in re.findall(r"\S+\.(?:py|json)\b", shell):
        assert (ROOT / script).is_file(), script
    for module in sorted(set(re.findall(r"-m (\S+)", shell))):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file()
        help_text = run(sys.executable, "-m", module, "--help").stdout
        for line in shell.splitlines():
            if f"-m {module}" in line:
                for flag in re.findall(r"--[\w-]+", line):
                    assert flag.replace("_", "-") in help_text, flag


def test_readme_flags_exist():
    """Every flag in its prose and commands is a field, or another program's."""
    from dde_fast.config import TrainConfig
    from dde_fast.evaluate import Evaluation
    from dde_fast.prepare import PrepareConfig
    from dde_fast.report import Report

    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][\w-]*)", README)}
    kinds = (TrainConfig, PrepareConfig, Evaluation, Report)
    fields = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    slurm = {"nodes", "ntasks_per_node", "gpus_per_node", "requeue", "signal"}
    assert flags - fields == slurm | {
        "nproc_per_node",
        "no_build_isolation",
        "benchmark_only",
        "help",
    }


def test_readme_tree_is_the_tree():
    listed = set(re.findall(r"^\| `(dde_fast/\w+\.py)`", README, re.M))
    there = {f"dde_fast/{p.name}" for p in (ROOT / "dde_fast").glob("*.py")}
    assert listed == there - {"dde_fast/__init__.py"}


def test_readme_results_are_the_committed_ones():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from results_table import render

    block = re.search(r"<!-- results -->\n(.*?)<!-- /results -->", README, re.S).group(1)
    assert "|" in block and block == render(ROOT / "benchmarks" / "results")


def sources() -> list[str]:
    """Files of the checkout, or of a copy without .git, but those that git ignores."""
    if (ROOT / ".git").exists():
        listed = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT)
        return listed.stdout.splitlines()
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    paths = [path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()]
    return [
        path.as_posix()
        for path in paths
        if not any(fnmatch(part, name) for part in path.parts for name in ignored)
    ]


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """sdist and wheel of a copy, so that nothing is written into the tree."""
    work = tmp_path_factory.mktemp("build")
    for name in sources():
        target = work / "src" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    code = (
        "import setuptools.build_meta as b; print(b.build_sdist('../out'), b.build_wheel('../out'))"
    )
    out = run(sys.executable, "-c", code, cwd=work / "src")
    assert out.returncode == 0, out.stderr[-2000:]
    return work / "out"


def test_sdist_and_wheel_hold_everything(archives):
    with tarfile.open(next(archives.glob("*.tar.gz"))) as sdist:
        in_sdist = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    with zipfile.ZipFile(next(archives.glob("*.whl"))) as wheel:
        in_wheel = set(wheel.namelist())
        metadata = wheel.read(next(n for n in in_wheel if n.endswith("METADATA"))).decode()
    package = [name for name in sources() if name.startswith("dde_fast/")]
    assert len(package) > 60
    for name in package:
        assert name in in_sdist and name in in_wheel, name
    assert {"README.md", "LICENSE", "pyproject.toml"} <= in_sdist
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: <3.14,>=3.10" in metadata


def test_no_source_file_is_long():
    for name in sources():
        if name.endswith((".py", ".cpp", ".cu", ".cuh", ".h")):
            lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
            assert lines <= 400, f"{name}: {lines} lines"


def test_default_deepspeed_config_is_json():
    assert json.loads((ROOT / "ds.json").read_text(encoding="utf-8"))["gradient_clipping"] > 0
