"""Tensors in one buffer, and their way to a device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dde_fast.packing import ALIGNMENT, Mover, Packed, pack

CPU = torch.device("cpu")


def parts(seed: int = 0) -> dict[str, torch.Tensor | list[torch.Tensor]]:
    """Of several types, and of sizes that are no multiple of 16 bytes."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(5, 3, 3, generator=generator)
    return {
        "rows": [row.half() for row in rows],
        "numbers": torch.randint(2**40, (3,), generator=generator),
        "one": [torch.tensor(float(seed))],
        "flags": torch.rand(7, generator=generator) < 0.5,
        "columns": torch.randn(3, 5, generator=generator).T,  # not contiguous
        "none": torch.empty(0, 4),
        "last": torch.randn(2, generator=generator).bfloat16(),
    }


def check(tensors: dict[str, torch.Tensor], seed: int = 0) -> None:
    expected = parts(seed)
    assert list(tensors) == list(expected)
    for name, part in expected.items():
        part = part if isinstance(part, torch.Tensor) else torch.stack(part)
        assert tensors[name].dtype == part.dtype
        assert torch.equal(tensors[name].cpu(), part)


def test_everything_lies_in_one_buffer_at_aligned_places():
    packed = pack(parts())
    check(packed.tensors())
    base = packed.buffer.untyped_storage().data_ptr()
    for tensor in packed.tensors().values():
        assert tensor.untyped_storage().data_ptr() == base and tensor.is_contiguous()
        assert tensor.storage_offset() * tensor.element_size() % ALIGNMENT == 0


def test_rows_of_different_shapes_are_refused():
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        pack({"rows": [torch.ones(2), torch.ones(3)]})


def test_on_the_cpu_nothing_is_copied_again():
    mover, packed = Mover(CPU), pack(parts())
    received = mover.receive(mover.send(packed))
    check(received)
    assert received["rows"].data_ptr() == packed.buffer.data_ptr()
    assert not mover.pinned


class Copies(TorchDispatchMode):
    """Bytes of each copy from the CPU to another device."""

    def __init__(self):
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        copy = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if copy and out.device != CPU and args[copy_source(func)].device == CPU:
            self.bytes.append(out.nbytes)
        return out


def copy_source(func) -> int:
    """Which argument is copied."""
    return int(func is torch.ops.aten.copy_.default)


def test_one_copy_takes_everything_to_a_device():
    mover, packed = Mover(torch.device("meta")), pack(parts())
    with Copies() as copies:
        torch.ones(3).to("meta")
        received = mover.receive(mover.send(packed))
    assert copies.bytes == [12, packed.buffer.nbytes]
    assert {name: (x.shape, x.dtype) for name, x in received.items()} == {
        name: (x.shape, x.dtype) for name, x in packed.tensors().items()
    }


def test_the_thread_that_sends_works_on_the_ranks_own_device(monkeypatch):
    """A new thread begins on the first one, and would take memory there for every rank."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    mover = Mover(CPU)
    mover.begin()
    assert chosen == []
    mover.device, mover.stream = torch.device("cuda", 3), object()
    mover.begin()
    assert chosen == [torch.device("cuda", 3)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_no_buffer_is_overwritten_too_early():
    """The device is kept busy while many batches are sent, and reads each of them late."""
    mover, device = Mover(torch.device("cuda")), torch.device("cuda")
    busy = torch.randn(4096, 4096, device=device)
    found: list[dict[str, torch.Tensor]] = []
    ahead: list[Packed] = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for seed in range(50):
            ahead.append(mover.send(pack(parts(seed), pinned=mover.pinned)))
            if len(ahead) > 3:
                tensors = mover.receive(ahead.pop(0))
                busy = busy @ busy * 1e-3
                found.append({name: tensor.clone() for name, tensor in tensors.items()})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for seed, tensors in enumerate(found):
        check(tensors, seed)
