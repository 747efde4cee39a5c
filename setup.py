"""Build of the package; everything that is not code is in pyproject.toml.

`fastlora._C` is optional: without torch, without a compiler or after a failed build the package installs without it and
says so. FASTLORA_REQUIRE_EXT=1 turns that into an error.
"""

import os
import platform
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

REQUIRED = os.environ.get("FASTLORA_REQUIRE_EXT") == "1"
HEADERS = sorted(glob("csrc/**/*.h", recursive=True))
# packages whose source lies elsewhere
PLACES = {"fastlora.kernels": "kernels/triton", "fastlora.serve": "examples/serve"}
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
        depends=[*HEADERS, "setup.py"],
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


ext = extension()
TORCH_TAG = dict(ext.define_macros)["FASTLORA_TORCH_VERSION"].strip('"') if ext else "none"
setup(
    packages=[*find_packages(include=["fastlora", "fastlora.*"]), *PLACES],
    package_dir=PLACES,
    ext_modules=[ext] if ext else [],
    cmdclass={"build_ext": BuildExt},
)
