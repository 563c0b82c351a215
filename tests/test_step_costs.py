"""What is measured of a training step, on steps that cost what they say."""

import itertools
import json
import sys
import time
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from train_runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
own = sys.modules.pop("conftest", None)  # the benchmarks import theirs by that name
import bench_train_step as bench  # noqa: E402  (a script's folder)
import published_step  # noqa: E402
import step_costs  # noqa: E402

if own is not None:
    sys.modules["conftest"] = own

from dde_fast import levers  # noqa: E402
from dde_fast.shards import write_file  # noqa: E402


def variant(name: str, step, source=None, optimizer=None) -> step_costs.Variant:
    """A step on a model that has nothing to recompute."""
    unet = torch.nn.Linear(8, 4)
    unet.is_gradient_checkpointing = False
    optimizer = optimizer or torch.optim.AdamW(unet.parameters())
    return step_costs.Variant(name, step, source or SimpleNamespace(waited=0.0), unet, optimizer)


def test_a_prefetching_loader_meets_no_end_of_the_set(tmp_path, monkeypatch):
    """At the end of an epoch a DataLoader has nothing ready: sixteen pairs would make that happen in
    every second batch of the published structure."""
    table = pa.Table.from_pylist([{"caption": f"{i}", "label_0": 1.0} for i in range(16)])
    pq.write_table(table, tmp_path / "pairs.parquet")
    pictures = published_step.Pictures(tmp_path / "pairs.parquet", 8, [])
    assert len(pictures) >= 10**5
    monkeypatch.setattr(pictures, "_pixels", lambda data: torch.zeros(3, 8, 8))
    for row in pictures.rows:
        row |= {"jpg_0": b"", "jpg_1": b""}
    assert pictures[len(pictures) - 1]["pixels"].shape == (2, 3, 8, 8)
    loader = torch.utils.data.DataLoader(pictures, batch_size=8, shuffle=True)
    assert len(list(itertools.islice(loader, 5))) == 5


def test_on_a_gpu_what_cuda_warns_of_is_counted(monkeypatch):
    """Also where the same line waits again, and neither other warnings nor the mode's own."""
    modes = []

    def mode(name: str) -> None:
        modes.append(name)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

    def step() -> None:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("another", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", mode)
    assert step_costs.host_reads(step, set()) == 3
    assert modes == ["warn", "default"]


def test_the_first_step_is_not_counted():
    """An engine reads more in it than in any other."""
    reads = iter([7, *[1] * 9])

    def step() -> None:
        for _ in range(next(reads)):
            torch.ones(()).item()

    row = step_costs.inspect(variant("a", step), {"reference": 0, "encoders": 0}, set())
    assert row["host_reads"] == 1


def test_state_is_counted_once_per_storage():
    """The weights lie in the flat buffer of their group, as DeepSpeed has it."""
    unet, flat = torch.nn.Linear(8, 4), torch.zeros(36)
    unet.weight.data, unet.bias.data = flat[:32].view(4, 8), flat[32:]
    master = torch.nn.Parameter(torch.zeros(36, dtype=torch.float64))
    inner = torch.optim.AdamW([master])
    inner.state[master] = {"step": torch.zeros(()), "exp_avg": torch.zeros(36)}
    wrapper = SimpleNamespace(optimizer=inner, groups_flat=[flat], master=[master], hooks=[print])
    wrapper.gradients = {"first": [torch.zeros(10), None]}
    wrapper.gradients["again"] = wrapper.gradients
    expected = 4 * 36 + 8 * 36 + 4 + 4 * 36 + 4 * 10
    assert step_costs.state_bytes(unet, wrapper) == expected
    plain = torch.optim.AdamW(unet.parameters())
    assert step_costs.state_bytes(unet, plain) == 4 * 36


def test_waits_are_those_of_steps_that_follow_each_other():
    """What is ready before the first of them hides how slow the data is."""
    source, ready = SimpleNamespace(waited=0.0), iter([True] * 2 + [False] * 4)

    def step() -> None:
        time.sleep(0.01)
        if not next(ready):
            began = time.perf_counter()
            time.sleep(0.01)
            source.waited += time.perf_counter() - began

    share = step_costs.data_wait(variant("a", step, source), steps=4, accumulation=2)
    assert share == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize(("gpu", "times"), [(False, 1), (True, 10)])
def test_a_gpu_multiplies_several_times_per_timing(monkeypatch, gpu, times):
    called = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    turns = step_costs.take_turns([variant("a", lambda: None)], 1, lambda: called.append(1))
    _, products = next(turns)
    assert len(called) == 1 + times and len(products) == 1


def test_what_does_not_fit_a_gpu_costs_no_other_row(tmp_path, capsys):
    """One variant that never fits, one that no longer does when others have their moments."""
    steps, written = itertools.count(), []

    def never() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nSee documentation")

    def later() -> None:
        if next(steps) == 5:  # of which looking takes four
            raise RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")

    def broken() -> None:
        raise RuntimeError("a fault of another kind")

    names = {"published structure": never, "later": later, "a lever": lambda: None}
    variants = [variant(name, step) for name, step in names.items()]
    variants[0].optimizer.state["weight"] = {"step": torch.zeros(())}  # as far as it came
    frozen = {"reference": 0, "encoders": 0}
    rows = bench.look(variants, frozen, {"case": "sdxl"}, written.append)
    assert rows[0] is None and not variants[0].optimizer.state
    assert [len(result["rows"]) for result in written] == [0, 1, 2]
    assert written[-1]["failed"] == {"published structure": "CUDA out of memory."}
    about = {"pairs": 4, "micro_batches": 2}
    product = (lambda: np.ones(9).sum(), 9)
    bench.follow(variants, rows, [3, 2, 2], about, 3, product, 1, written.append)
    assert written[-1]["failed"].keys() == {"published structure", "later"}
    (row,) = written[-1]["rows"]
    assert row["name"] == "a lever" and row["pairs_per_s"] > 0 and "times_published" not in row
    assert "later: CUBLAS_STATUS_ALLOC_FAILED" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="another kind"):
        step_costs.within_memory(variant("broken", broken), broken)
    with pytest.raises(SystemExit, match="no step fits"):
        bench.look([variant("a", never)], frozen, {}, written.append)


def test_a_run_that_is_cut_off_leaves_the_rounds_it_did(tmp_path):
    """After each of them there is a whole file, which is shown with a dash for the waits."""
    path, turns = tmp_path / "step.json", itertools.count()

    def step() -> None:
        if next(turns) == 2:
            raise KeyboardInterrupt

    variants = [variant("published structure", step), variant("a lever", lambda: None)]
    rows = [
        {"name": v.name, "host_reads": 1, "step_GiB": 1.0, "state_GiB": 2.0, "frozen_GiB": 0.0}
        for v in variants
    ]
    machine = {"device": "a CPU", "threads": 2, "versions": {"torch": "2"}, "commit": "c0ffee"}
    about = {"case": "embedded", "model": "embedded", "parameters": 1, "latent": [4, 8, 8]}
    about |= {"pairs": 4, "micro_batches": 2, "dtype": "float32", "machine": machine}

    def write(result: dict) -> None:
        write_file(path, json.dumps(result).encode())

    product, waits = (lambda: np.ones(9).sum(), 9), 1
    with pytest.raises(KeyboardInterrupt):
        bench.follow(variants, rows, [3, 2], about, 5, product, waits, write)
    result = levers.read(path).result
    assert result["rounds"] == 2
    assert [cells[-1] for cells in levers.cells(result)] == ["–", "–"]
    bench.follow(variants, rows, [3, 2], about, 1, product, waits, write)
    assert [row["data_wait"] for row in levers.read(path).result["rows"]] == [0, 0]


def test_a_gpu_with_room_recomputes_nothing(monkeypatch):
    args = bench.parse(["sdxl", "--output", "x", "--pairs", "3", "--attention", "flash"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for gib, checkpointing in ((79, True), (139, False)):
        found = SimpleNamespace(total_memory=gib * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, found=found: found)
        case = bench.choose(args)
        changes = {"pairs": 3, "attention": "flash", "checkpointing": checkpointing}
        assert case == replace(bench.CASES["sdxl"], **changes)
