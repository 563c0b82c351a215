"""Build of the package. Metadata is in pyproject.toml; the compiled extension is built here.

Two libraries against LibTorch's stable ABI, loaded by dde_fast/compiled.py: the CPU one wherever
a C++ compiler works, the CUDA one where nvcc is and torch is a CUDA build. DDE_FAST_CUDA=0 leaves
CUDA out, DDE_FAST_CUDA=1 asks for it: against a torch without CUDA too, and then not building it is
an error. What else cannot be built is left out with a warning, and `python -m dde_fast` says what is
missing and what is used instead.
"""

import hashlib
import importlib.util
import os
import platform
import runpy
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC, OBJECTS = Path("csrc"), Path("build/objects")
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
COMMON = ["-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000"]  # torch 2.10
HOST = [*COMMON, "-O3", "-fPIC", "-fvisibility=hidden", "-Wall"]
# no contraction but where the source asks for it: the bits do not depend on the compiler's choice
LOOPS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-Wno-psabi"]
LOOPS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # false, in GCC's own AVX-512 header
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
ISAS = {"baseline": (16, [])}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS |= {"avx2": (32, AVX2), "avx512": (64, AVX512)}
    ISAS |= {"avx512bf16": (64, [*AVX512, "-mavx512bf16"])}
ARCHS = (80, 90, 100)


def find_torch() -> Path | None:
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def find_nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    path = os.pathsep.join([*(f"{home}/bin" for home in homes), os.environ.get("PATH", "")])
    return shutil.which("nvcc", path=path)


def cpu_commands(torch: Path) -> list[list[str]]:
    """One command per object, without its output."""
    include = [f"-I{torch}/include"]
    names = ("library", "preference_cpu", "noise_cpu", "ratios_cpu", "ddim_cpu")
    commands = [[*COMPILER, *HOST, *include, f"{CSRC}/{name}.cpp"] for name in names]
    for isa, (vector, flags) in ISAS.items():
        macros = [f"-DDDE_FAST_ISA={isa}", f"-DDDE_FAST_VECTOR={vector}"]
        for name in ("preference_loops", "noise_loops", "ddim_loops"):
            commands.append([*COMPILER, *HOST, *LOOPS, *flags, *macros, f"{CSRC}/{name}.cpp"])
    return commands


def cuda_commands(torch: Path, nvcc: str, archs: tuple[int, ...] = ARCHS) -> list[list[str]]:
    """Machine code for each architecture that this nvcc knows, PTX of the last for later ones."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    archs = [arch for arch in archs if f"compute_{arch}\n" in known]
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes += [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]
    flags = [*COMMON, "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA", f"-isystem={torch}/include"]  # fmt: skip
    flags += ["-Werror=all-warnings", "-Xptxas=-v", "--threads=0", *codes]
    # noise and samples without contraction: the CPU's bits
    exact = ["-fmad=false"]
    extra = {"preference_cuda": [], "preference_cluster": [], "ratios_cuda": []}
    extra |= {"noise_cuda": exact, "ddim_cuda": exact}
    return [[nvcc, *flags, *extra[name], f"{CSRC}/{name}.cu"] for name in extra]


def compile_object(command: list[str]) -> Path:
    """Run a command unless its object is newer than every source; the name holds the options."""
    digest = hashlib.sha256("\0".join(command).encode()).hexdigest()[:16]
    target = OBJECTS / f"{Path(command[-1]).stem}-{digest}.o"
    newest = max(path.stat().st_mtime for path in CSRC.iterdir())
    if not target.exists() or target.stat().st_mtime < newest:
        OBJECTS.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.o")
        call([*command, "-c", "-o", str(partial)])
        partial.replace(target)  # a build killed midway leaves no half object
    return target


def call(command: list[str]) -> None:
    try:
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except OSError as error:
        raise CompileError(str(error)) from error
    if result.returncode:
        raise CompileError(f"{shlex.join(command)}\n{result.stdout}")


class BuildLibraries(build_ext):
    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        if torch is None:
            raise CompileError("torch is not there: install it first, then this package with --no-build-isolation")  # fmt: skip
        cuda = ext.name.endswith("_cuda")
        if cuda and find_nvcc() is None:
            raise CompileError("nvcc is not there: looked in CUDA_HOME, CUDA_PATH and PATH")
        commands = cuda_commands(torch, find_nvcc()) if cuda else cpu_commands(torch)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_object, commands))
        libraries = ["torch_cpu"]
        if cuda and (torch / "lib/libtorch_cuda.so").exists():
            libraries.append("torch_cuda")
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        link = [find_nvcc()] if cuda else COMPILER
        call([*link, "-shared", "-o", str(output), *map(str, objects), f"-L{torch}/lib", *(f"-l{name}" for name in libraries)])  # fmt: skip


def libraries() -> list[Extension]:
    wanted, torch = os.environ.get("DDE_FAST_CUDA", ""), find_torch()
    has_cuda = torch is not None and bool(runpy.run_path(f"{torch}/version.py").get("cuda"))
    optional = {"_cpu": True}
    if wanted == "1" or (wanted != "0" and has_cuda and find_nvcc()):
        optional["_cuda"] = wanted != "1"
    return [
        Extension(f"dde_fast.{name}", sources=[], py_limited_api=True, optional=may_fail)
        for name, may_fail in optional.items()
    ]


if __name__ == "__main__":
    setup(
        ext_modules=libraries(),
        cmdclass={"build_ext": BuildLibraries},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
