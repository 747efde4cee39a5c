"""Build of the package; everything that is not code is in pyproject.toml.

`fastlora._C` is optional: without torch, without a compiler or after a failed build the package installs without it and
says so. FASTLORA_REQUIRE_EXT=1 turns that into an error.

Beside it, `fastlora/_cuda.so`: the kernels of tests/cuda/kernels, for GPUs, without torch. It is made where nvcc and an
NVIDIA driver are, or by FASTLORA_CUDA=1 on a machine without a GPU; FASTLORA_CUDA=0 leaves it out. It is optional as
well, unless both variables are 1. `python setup.py build_cuda` makes it alone.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Command, Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

REQUIRED = os.environ.get("FASTLORA_REQUIRE_EXT") == "1"
HEADERS = sorted(glob("csrc/**/*.h", recursive=True))
# packages whose source lies elsewhere
PLACES = {"fastlora.kernels": "kernels/triton", "fastlora.serve": "examples/serve"}
CUDA_FOLDER = "tests/cuda/kernels"
CUDA = sorted(glob(f"{CUDA_FOLDER}/*"))
CUDA_LIBRARY, CUDA_ARCHITECTURES = "_cuda.so", (80, 90)
X86 = platform.machine().lower() in ("x86_64", "amd64")


def file_flags(source):
    """The compiler flags that a source states for itself, on a line '// flags: -mavx2 -mfma' near its top."""
    head = "".join(Path(source).read_text().splitlines(keepends=True)[:12])
    stated = re.search(r"^//\s*flags:(.*)$", head, re.MULTILINE)
    return stated[1].split() if stated else []


def is_current(target):
    """Whether an object is newer than every file that it was made from, which the compiler listed beside it."""
    listed = Path(target).with_suffix(".d")
    if not (os.path.exists(target) and listed.exists()):
        return False
    files = ["setup.py", *listed.read_text().replace("\\\n", " ").split(":", 1)[1].split()]
    return all(os.path.exists(f) and os.path.getmtime(f) < os.path.getmtime(target) for f in files)


def sources():
    found = sorted(glob("csrc/**/*.cpp", recursive=True))
    return [s for s in found if X86 or not any(f.startswith("-m") for f in file_flags(s))]


def extension():
    """The extension, or None: where torch cannot be imported (it says so), and under FASTLORA_NO_EXT=1."""
    if os.environ.get("FASTLORA_NO_EXT") == "1":
        return None
    try:
        import torch
        from torch.utils import cpp_extension
    except Exception as error:
        if REQUIRED:
            raise
        print(f"fastlora: building without fastlora._C: torch cannot be imported here ({error})")
        return None
    # gcc's own AVX-512 headers warn of themselves
    flags = "-O3 -std=c++20 -fopenmp -fvisibility=hidden -g0 -Wall -Wno-uninitialized -Wno-maybe-uninitialized"
    torch_headers = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    return Extension(
        "fastlora._C",
        sources(),
        depends=[*HEADERS, *CUDA, "setup.py"],
        include_dirs=["csrc"],
        library_dirs=cpp_extension.library_paths(),
        libraries=["c10", "torch_cpu", "torch", "torch_python"],
        define_macros=[("FASTLORA_TORCH_VERSION", f'"{torch.__version__}"'), ("TORCH_EXTENSION_NAME", "_C")],
        extra_compile_args=[*flags.split(), *torch_headers],
        extra_link_args=["-fopenmp"],
        language="c++",
        optional=not REQUIRED,
    )


class BuildExt(build_ext):
    """Compiles the files in parallel, each with its own flags, and only those that changed."""

    def finalize_options(self):
        super().finalize_options()
        # Not pip's throw-away folder: a second build of any kind finds the objects of the first.
        self.build_temp = os.path.join("build", f"objects-{sys.implementation.cache_tag}-{TORCH_TAG}")

    def run(self):
        super().run()
        if ext:
            build_cuda(Path("fastlora") if self.inplace else Path(self.build_lib, "fastlora"))

    def build_extension(self, ext):
        self.compiler.compile = self.compile_all
        try:
            super().build_extension(ext)
        except Exception as error:
            if REQUIRED:
                raise
            print(f"fastlora: installing without fastlora._C: the build failed: {error}")
            # An older binary must not be taken for the result of this build.
            for stale in [self.get_ext_fullpath(ext.name), *glob("fastlora/_C.*")]:
                Path(stale).unlink(missing_ok=True)

    def compile_all(self, files, output_dir=None, macros=None, include_dirs=None, debug=0, extra_postargs=None, **_):
        compiler = type(self.compiler)

        def compile_one(source):
            target = self.compiler.object_filenames([source], output_dir=output_dir)[0]
            if is_current(target):
                return target
            flags = [*(extra_postargs or []), *file_flags(source), "-MMD"]
            compiler.compile(self.compiler, [source], output_dir, macros, include_dirs, debug, None, flags)
            return target

        workers = int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count() or 1
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(compile_one, files))


class NoCuda(Exception):
    """Why there is no library of CUDA kernels."""


def run(*command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        raise NoCuda(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}")
    return done.stdout


def find_nvcc():
    """(nvcc, the architectures to compile for, its version)"""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    places = [*(os.path.join(home, "bin") for home in homes), *os.get_exec_path(), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
    if not nvcc:
        raise NoCuda("there is no nvcc in CUDA_HOME, PATH or /usr/local/cuda")
    known = run(nvcc, "--list-gpu-arch").split()
    found = [arch for arch in CUDA_ARCHITECTURES if f"compute_{arch}" in known]
    if CUDA_ARCHITECTURES[0] not in found:
        raise NoCuda(f"{nvcc} does not compile for sm_{CUDA_ARCHITECTURES[0]}")
    version = re.search(r"release ([\d.]+)", run(nvcc, "--version"))
    return nvcc, found, version[1] if version else "unknown"


def compile_cuda(target):
    """Compile what changed, and link it with a CUDA runtime of its own, which no other library sees."""
    nvcc, found, version = find_nvcc()
    objects = Path("build", f"objects-cuda-{version}")
    objects.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC", f"-gencode=arch=compute_{found[-1]},code=compute_{found[-1]}"]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in found]

    def compile_one(source):
        made = objects / f"{Path(source).stem}.o"
        if not is_current(made):
            run(nvcc, *flags, "-MD", "-MF", made.with_suffix(".d"), "-c", source, "-o", made)
        return made

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count() or 1) as pool:
        made = list(pool.map(compile_one, (source for source in CUDA if source.endswith(".cu"))))
    linked = objects / CUDA_LIBRARY
    if not (linked.exists() and all(os.path.getmtime(f) < os.path.getmtime(linked) for f in [*made, CUDA_FOLDER])):
        run(nvcc, "-shared", "-cudart=static", *made, "-o", linked)
    target.parent.mkdir(parents=True, exist_ok=True)
    # through another name: a process that has the old one loaded keeps it
    shutil.copy(linked, beside := target.with_suffix(".new"))
    beside.replace(target)


def build_cuda(folder):
    """The library in a folder, or a sentence why not."""
    target, asked = folder / CUDA_LIBRARY, os.environ.get("FASTLORA_CUDA", "")
    try:
        if asked == "0" or not (asked or os.path.exists("/dev/nvidiactl") or shutil.which("nvidia-smi")):
            raise NoCuda("FASTLORA_CUDA=0" if asked else "no NVIDIA driver is here; FASTLORA_CUDA=1 builds it anyway")
        compile_cuda(target)
    except (NoCuda, OSError) as error:
        if REQUIRED and asked == "1":
            raise SystemExit(f"fastlora: fastlora/{CUDA_LIBRARY} cannot be built: {error}") from None
        print(f"fastlora: installing without fastlora/{CUDA_LIBRARY}, the kernels of tests/cuda/kernels: {error}")
        # An older one must not be taken for the result of this build.
        target.unlink(missing_ok=True)


class BuildCuda(Command):
    """Make the library of CUDA kernels, in fastlora/ or in a folder."""

    user_options = [("folder=", None, "where to put it")]

    def initialize_options(self):
        self.folder = "fastlora"

    def finalize_options(self):
        self.folder = Path(self.folder)

    def run(self):
        build_cuda(self.folder)


ext = extension()
TORCH_TAG = dict(ext.define_macros)["FASTLORA_TORCH_VERSION"].strip('"') if ext else "none"
setup(
    packages=[*find_packages(include=["fastlora", "fastlora.*"]), *PLACES],
    package_dir=PLACES,
    ext_modules=[ext] if ext else [],
    cmdclass={"build_ext": BuildExt, "build_cuda": BuildCuda},
)
