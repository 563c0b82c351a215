"""Where the tests run: on the GPU when there is one, else on the CPU with Triton's interpreter."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # read by triton when it is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from triton.runtime import interpreter

    patch_lang_tensor = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor, *scope):
        """Before 3.7 Triton takes int() of an array of one element, which NumPy refuses from 2.4 on."""
        patch_lang_tensor(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = _patch_lang_tensor

from dde_fast import backends, compiled  # noqa: E402  (the variable comes first)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = [backend for backend in backends.BACKENDS if backends.why_not(backend, DEVICE) is None]
"""What can run here; test_loss.py insists that Triton is among them."""


def instruction_sets() -> list[str]:
    if compiled.why_not("cpu") is not None:
        return []
    found = []
    for name in ("baseline", "avx2", "avx512", "avx512bf16"):
        try:
            found.append(compiled.isa(name))
        except RuntimeError:
            pass
    compiled.isa(found[-1])
    return found


ISAS = instruction_sets()
"""What this machine has of the compiled extension's CPU loops; empty without the extension."""


@pytest.fixture(params=ISAS)
def isa(request):
    before = compiled.isa()
    yield compiled.isa(request.param)
    compiled.isa(before)


def on_all_sets_and_threads(make):
    """What `make()` returns on every instruction set with one, two and three threads."""
    threads, before = torch.get_num_threads(), compiled.isa()
    seen = []
    try:
        for name in ISAS:
            for count in (1, 2, 3):
                compiled.isa(name)
                torch.set_num_threads(count)
                seen.append(make())
    finally:
        torch.set_num_threads(threads)
        compiled.isa(before)
    return seen


@pytest.fixture(scope="session")
def variants(tmp_path_factory):
    """What one rank left of every run in `variants.py`."""
    from variants import run_alone

    return run_alone(tmp_path_factory.mktemp("variants"))


@pytest.fixture(scope="session")
def variants_of_two(variants):
    """The same of two ranks."""
    from variants import run_pair

    return run_pair(variants)


# For the tests of preparing a cache; what they need is imported where it is used.


@pytest.fixture(scope="module")
def one_thread():
    """The models are so small that threads would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    import tiny

    return tiny.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def encoders(model):
    from dde_fast.models import Encoders

    return Encoders.load(str(model), torch.device("cpu"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    import tiny

    return tiny.write_pairs(tmp_path_factory.mktemp("pairs") / "train.parquet", tiny.rows())


@pytest.fixture(scope="module")
def whole(tmp_path_factory, encoders, pairs) -> Path:
    """A finished cache of these pairs."""
    import caches

    return caches.prepare(encoders, pairs, tmp_path_factory.mktemp("whole") / "cache")


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """Names of the shards encoded from here on."""
    from dde_fast import prepare

    names: list[str] = []
    encode = prepare.Preparation._encode

    def noting(self, unit, *args):
        names.append(unit.name)
        return encode(self, unit, *args)

    monkeypatch.setattr(prepare.Preparation, "_encode", noting)
    return names
