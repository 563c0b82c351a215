"""The build of the compiled extension: what setup.py makes of csrc/, and what it may not hold."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from dde_fast import compiled

ROOT = Path(__file__).parents[1]
REASON = compiled.why_not("cpu")
SETUP = runpy.run_path(str(ROOT / "setup.py"))


def test_a_cuda_library_that_was_asked_for_is_built_or_an_error(monkeypatch, tmp_path):
    def optional():
        return {e.name.removeprefix("dde_fast."): e.optional for e in SETUP["libraries"]()}

    monkeypatch.setenv("DDE_FAST_CUDA", "1")
    assert optional() == {"_cpu": True, "_cuda": False}
    monkeypatch.setenv("DDE_FAST_CUDA", "0")
    assert optional() == {"_cpu": True}
    monkeypatch.delenv("DDE_FAST_CUDA")
    assert optional().get("_cuda", True)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)]
    command += ["--build-temp", str(tmp_path)]
    for wanted, code in (("1", 1), ("", 0)):
        env = {**os.environ, "DDE_FAST_CUDA": wanted, "CXX": "no-compiler"}
        result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert result.returncode == code, result.stderr
        assert ("nvcc is not there" in result.stderr) is bool(code)


@pytest.mark.skipif(SETUP["find_nvcc"]() is None, reason="nvcc is not installed")
def test_cuda_kernels_compile(tmp_path, monkeypatch):
    """Warning-free (nvcc is told to refuse any), no spills, 16-byte accesses in the fast kernels,
    and of torch only what every version that the package takes has."""
    monkeypatch.chdir(ROOT)
    commands = SETUP["cuda_commands"](SETUP["find_torch"](), SETUP["find_nvcc"]())
    running = []
    for command in commands:
        folder = tmp_path / Path(command[-1]).stem
        folder.mkdir()
        command = [*command, "-c", "-o", f"{folder}/object.o", "--keep", f"--keep-dir={folder}"]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))  # fmt: skip
    for process in running:
        log, _ = process.communicate()
        assert process.returncode == 0, log
        found = r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores"
        frames = re.findall(found, log, re.S)
        assert len({name for name, *_ in frames}) >= 2, log
        for name, frame, spilled in frames:
            # the table's one block divides in a subroutine, which on sm_80 keeps a number in memory
            assert spilled == "0" and int(frame) <= 8 * ("update_kernel" in name), (name, log)
    if shutil.which("nm"):
        for path in tmp_path.glob("*/object.o"):
            assert "aoti_torch_get_current_cuda_stream" in undefined(path)
            assert not unstable(undefined(path)), path
    steps = []
    for path in tmp_path.glob("ddim_cuda/*.ptx"):
        bodies = re.findall(r"\.entry (\w+)\((.*?)\n}\n", path.read_text(), re.S)
        steps += [body for body in bodies if "step_" in body[0]]
    assert len(steps) == 3 * 4
    for name, body in steps:
        # any of four dtypes in 16-byte pieces, fp32 in two and fp64 in four: three inputs, an output
        assert body.count("ld.global.nc.v4") >= 3 * 8, name
        assert body.count("st.global.wb.v4") == 8 and ".v2" not in body, name
    fast = []
    for path in tmp_path.glob("preference_*/*.ptx"):
        bodies = re.findall(r"\.entry (\w+)\((.*?)\n}\n", path.read_text(), re.S)
        # sm_80 has no clusters, and nothing in their kernel
        kinds = (
            "(errors|gradient)_kernel" if "_80" in path.name else "(errors|gradient|pair)_kernel"
        )
        fast += [body for body in bodies if re.search(kinds, body[0])]
    assert len(fast) >= 3 * (12 + 6) + 2 * 10
    for name, body in fast:
        assert body.count("ld.global.nc.v4") >= 4, name
        assert not re.search(r"ld\.global\.nc\.(?!v4)", body), name
        if "errors" not in name:
            assert len(re.findall(r"st\.global\.(?:wb\.)?v4\.\w?32", body)) >= 2, name
            assert not re.search(r"st\.global\.\w*\.?\w?(8|16|64)\b", body), name
        if "pair" in name:
            assert "barrier.cluster" in body and "mapa" in body, name
    scales = []
    for path in tmp_path.glob("preference_cuda/*.ptx"):
        bodies = re.findall(r"\.entry (\w+)\((.*?)\n}\n", path.read_text(), re.S)
        scales += [body for name, body in bodies if "scale_kernel" in name]
    assert len(scales) == 3 * 4
    for body in scales:  # it writes what it reads, so the read-only cache is not for it
        assert "ld.global.cg.v4" in body and "st.global.wb.v4" in body and ".nc" not in body


def undefined(path):
    """Symbols that an object or a library takes from elsewhere, without their versions."""
    command = ["nm", "--undefined-only", *(["--dynamic"] if ".so" in path.name else []), str(path)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].split("@")[0] for line in listed.splitlines()}


def unstable(symbols):
    """torch's C++ symbols, which no version promises to keep; the C shims have plain names."""
    return [name for name in symbols if re.search(r"^_Z.*(3c10|2at\d|5torch|6caffe2)", name)]


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils are not installed")
def test_one_build_serves_other_versions_of_torch():
    assert unstable(["_ZN3c106detail14torchCheckFailEPKcS2_jRKSs", "_ZNK2at10TensorBase4sizeEv"])
    for library in (ROOT / "dde_fast").glob("_c*.so"):
        symbols = undefined(library)
        assert "aoti_torch_library_init_impl" in symbols and not unstable(symbols)


@pytest.mark.skipif(REASON is not None or sysconfig.get_platform() != "linux-x86_64", reason="ELF")
def test_instruction_set_files_leak_nothing():
    """A function compiled for AVX-512 under a shared name could become the one every CPU runs."""
    objects = {}
    for command in SETUP["cpu_commands"](Path(torch.__file__).parent):
        if command[-1].endswith("_loops.cpp"):
            assembly = subprocess.run([*command, "-S", "-O1", "-o", "-"], cwd=ROOT, capture_output=True, text=True).stdout  # fmt: skip
            shared = re.findall(r"\.(?:weak|globl)\s+(_Z\w+)", assembly)
            objects[tuple(command)] = shared
    names = [name for shared in objects.values() for name in shared]
    assert len(names) == len(set(names)) == 20, names
