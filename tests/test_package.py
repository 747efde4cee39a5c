"""Building and installing: with what is there, and without torch or a compiler."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

import fastlora
from fastlora import backends, cli

ROOT = Path(__file__).parents[1]
COPIED = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "fastlora", "kernels", "csrc", "examples/serve",
          "tests/cuda/kernels")  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A clean copy of what a source distribution holds."""
    folder = tmp_path_factory.mktemp("source")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def wheel(source, out, **variables):
    """(result of pip wheel, names in the wheel)"""
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", out, source]
    environment = {**os.environ, "FASTLORA_REQUIRE_EXT": "", **variables}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    built = list(Path(out).glob("*.whl"))
    return done, zipfile.ZipFile(built[0]).namelist() if built else []


@pytest.fixture(scope="module")
def without_torch(source, tmp_path_factory):
    """A wheel built where torch cannot be imported, as in an isolated build."""
    hidden = tmp_path_factory.mktemp("hidden")
    (hidden / "torch.py").write_text("raise ImportError('no torch in this build')")
    out = tmp_path_factory.mktemp("wheel")
    done, names = wheel(source, out, PYTHONPATH=str(hidden))
    assert done.returncode == 0, done.stdout
    assert "torch cannot be imported here (no torch in this build)" in done.stdout
    return out, names


def test_wheel_without_torch(without_torch):
    names = without_torch[1]
    assert {"fastlora/__init__.py", "fastlora/py.typed", "fastlora/kernels/linear.py"} <= set(names)
    assert {"fastlora/serve/pool.py", "fastlora/serve/page.html"} <= set(names)
    assert not [n for n in names if "/_C." in n or n.startswith(("tests", "benchmarks", "csrc", "kernels", "examples"))]


def test_info_without_extension_names_the_build_command(without_torch, tmp_path):
    zipfile.ZipFile(next(without_torch[0].glob("*.whl"))).extractall(tmp_path)
    # an editable installation would lend its _C to this copy
    code = """import sys
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
from fastlora.cli import main
sys.exit(main(["info"]))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"in {tmp_path}" in done.stdout
    assert "python -m fastlora build" in done.stdout and "--no-build-isolation" in done.stdout


def test_without_compiler(source, tmp_path):
    done, names = wheel(source, tmp_path, CC="false", CXX="false")
    assert done.returncode == 0, done.stdout
    assert "fastlora: installing without fastlora._C: the build failed" in done.stdout
    assert "fastlora/__init__.py" in names and not [n for n in names if "/_C." in n]


def test_required_extension(source, tmp_path):
    done, names = wheel(source, tmp_path, CC="false", CXX="false", FASTLORA_REQUIRE_EXT="1")
    assert done.returncode != 0 and not names


NVCC = """#!/bin/sh
case "$*" in
*--list-gpu-arch*) echo "compute_75 {archs}" ;;
*--version*) echo "release 1.2, V1.2.3" ;;
*) {compile} ;;
esac
"""
COMPILES = 'while [ "$1" != -o ]; do shift; done; echo made >"$2"'


def build_cuda(tmp_path, archs="compute_80 compute_90", compile=COMPILES, **variables):
    """(output, status, the library) of a build in a fresh copy of the sources, by an nvcc that only says it is one."""
    for name in ("setup.py", "kernels", "tests/cuda/kernels"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(NVCC.format(archs=archs, compile=compile))
    nvcc.chmod(0o755)
    environment = {**os.environ, "CUDA_HOME": str(tmp_path), "FASTLORA_NO_EXT": "1", "FASTLORA_REQUIRE_EXT": ""}
    command, environment = [sys.executable, "setup.py", "-q", "build_cuda"], environment | variables
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    return done.stdout + done.stderr, done.returncode, tmp_path / "fastlora" / "_cuda.so"


def test_cuda_library(tmp_path):
    said, status, library = build_cuda(tmp_path, FASTLORA_CUDA="1")
    assert status == 0 and library.read_text() == "made\n", said
    made = {path.stem for path in (tmp_path / "build").rglob("*.o")}
    assert made == {path.stem for path in (ROOT / "tests/cuda/kernels").glob("*.cu")} != set()


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"FASTLORA_CUDA": "0"}, "FASTLORA_CUDA=0"),
        ({"FASTLORA_CUDA": "", "PATH": "/nowhere"}, "no NVIDIA driver is here"),
        ({"archs": "compute_90"}, "does not compile for sm_80"),
        ({"compile": "echo 42 errors; exit 1"}, "42 errors"),
    ],
)
@pytest.mark.parametrize("required", ["", "1"])
def test_no_cuda_library(tmp_path, options, sentence, required):
    """It is said, an older library is removed, and it is an error only where both variables ask for it."""
    if options.get("FASTLORA_CUDA") == "" and Path("/dev/nvidiactl").exists():
        pytest.skip("there is a driver")
    (tmp_path / "fastlora").mkdir()
    (tmp_path / "fastlora" / "_cuda.so").touch()
    options = {"FASTLORA_CUDA": "1", "FASTLORA_REQUIRE_EXT": required, **options}
    said, status, library = build_cuda(tmp_path, **options)
    assert sentence in said
    failed = bool(required) and options["FASTLORA_CUDA"] == "1"
    assert (status != 0) == failed and library.exists() == failed


def test_cuda_library_in_the_wheel(source, tmp_path):
    """Where the extension is built or fails to; without either there is no caller."""
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(NVCC.format(archs="compute_80", compile=COMPILES))
    nvcc.chmod(0o755)
    done, names = wheel(source, tmp_path, CC="false", CXX="false", CUDA_HOME=str(tmp_path), FASTLORA_CUDA="1")
    assert done.returncode == 0 and "fastlora/_cuda.so" in names, done.stdout


def test_version():
    assert metadata.version("fastlora-kernels") == fastlora.__version__
    assert f"## {fastlora.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_requirements():
    text = (ROOT / "pyproject.toml").read_text()
    build = re.search(r"^requires = (\[.*\])$", text, re.MULTILINE)[1]
    assert "setuptools" in build and "torch" not in build
    assert '"torch>=2.11,<2.16"' in text
    assert (Path(fastlora.__file__).parent / "py.typed").exists()


def test_extension_of_another_torch_objects(monkeypatch):
    module, missing = backends.native()
    assert missing is None, missing
    assert module.torch_version() == torch.__version__
    monkeypatch.setattr(torch, "__version__", "2.0.0")
    objection = backends.native.__wrapped__()[1]
    assert "2.0.0" in objection and torch.version.__version__.partition("+")[0] in objection
    assert "python -m fastlora build" in objection


def test_info(capsys):
    assert cli.main(["info"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["fastlora"].startswith(fastlora.__version__)
    assert lines["torch"].startswith(torch.__version__)
    assert lines["_C"] == f"built for torch {torch.__version__}"
    assert lines["CPU"].split()[0] in ("portable", "avx2", "avx512", "avx512_bf16", "amx", "composed")
    assert set(lines) == {"fastlora", "python", "torch", "_C", "CPU", "Triton", "CUDA"}


def test_build_needs_a_source_folder(tmp_path, capsys):
    assert cli.main(["build", str(tmp_path)]) == 1
    assert "python -m fastlora build FOLDER" in capsys.readouterr().out


def test_build_runs_in_the_installed_folder(monkeypatch):
    ran = []

    def run(command, **options):
        ran.append((command, options))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(cli.subprocess, "run", run)
    monkeypatch.setattr(cli, "_installed_from", lambda: (ROOT, True))
    assert cli.main(["build"]) == 0
    monkeypatch.setattr(cli, "_installed_from", lambda: (ROOT, False))
    assert cli.main(["build"]) == 0
    (inplace, options), (installed, _) = ran
    assert inplace[1:] == ["setup.py", "build_ext", "--inplace"] and options["cwd"] == ROOT
    assert options["env"]["FASTLORA_REQUIRE_EXT"] == "1"
    assert "--no-build-isolation" in installed and installed[-1] == "."
