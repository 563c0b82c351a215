"""Versions without imports, and hashes that stay what they were."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import torch
from train_runs import environment

from dde_fast import manifest, provenance, rewards, samples

RESULTS = Path(__file__).parent.parent / "benchmarks/results"


def test_versions_name_what_the_numbers_depend_on():
    found = provenance.versions()
    assert found["torch"] == torch.__version__
    for name in ("diffusers", "transformers", "deepspeed"):
        assert found[name] == importlib.metadata.version(name)
    assert ("gpu" in found) == torch.cuda.is_available()


def test_versions_without_local_labels_and_of_a_package_that_runs_from_a_folder(monkeypatch):
    """PyPI's CUDA wheels of torch are called 2.11.0, the module 2.11.0+cu130."""

    def version(name):
        if name == "dde-fast":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.11.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    for found in (provenance.versions(), manifest.versions()):
        assert found["torch"] == torch.__version__ and found["diffusers"] == "2.11.0"
    assert manifest.versions()["dde-fast"] == provenance.versions()["dde_fast"]


def test_versions_import_nothing():
    code = (
        "import sys; from dde_fast import provenance; provenance.versions(); "
        "print(sorted({'deepspeed', 'transformers', 'diffusers', 'torch._dynamo'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_package_that_is_not_there_is_left_out_and_a_gpu_named(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "no-such-package"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    found = provenance.versions()
    assert "no-such-package" not in found and found["gpu"] == "NVIDIA H200"


def test_a_hash_is_of_labels_shapes_and_bytes():
    x = torch.arange(6, dtype=torch.bfloat16)
    hashes = [
        provenance.content_hash([(label, value)], beside)
        for label, value, beside in (
            ("x", x, ""),
            ("y", x, ""),
            ("x", x.reshape(2, 3), ""),
            ("x", x + 1, ""),
            ("x", x.float(), ""),
            ("x", x, "more"),
        )
    ]
    assert len(set(hashes)) == 6 and {len(found) for found in hashes} == {64}
    strided = torch.stack([x, x], dim=1)[:, 0]
    assert provenance.content_hash([("x", strided)]) == hashes[0]
    assert provenance.content_hash([("none", torch.empty(0)), ("one", torch.tensor(3))])


def test_hashes_in_committed_results_are_those_of_today():
    """Of the embedded model, and of a scorer that has weights alone."""
    made = json.loads((RESULTS / "faces.json").read_text())
    pipeline = samples.load_pipeline("embedded", "embedded", torch.device("cpu"))
    assert samples.model_hash(pipeline) == made["models"]["base"]["sha256"]
    scorer = rewards.load_reward("prompt_match")
    assert scorer.identity()["sha256"] == made["scorers"]["prompt_match"]["sha256"]
