"""`python -m fastlora`: info says what runs here, build compiles fastlora._C for this torch, serve is a server."""

import argparse
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlparse

import torch

import fastlora
from fastlora import backends
from fastlora.serve.run import add_arguments, serve

DISTRIBUTION = "fastlora-kernels"


def main(argv=None):
    """Run a command; returns the process's exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastlora", description="LoRA at the speed of the base layer.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, and which back-ends this machine has")
    build = commands.add_parser("build", help="compile fastlora._C for the installed torch and install it")
    build.add_argument("source", nargs="?", type=Path, help="the source folder, where pip does not remember it")
    server = commands.add_parser("serve", help="an OpenAI-compatible server for a model and its adapters")
    add_arguments(server)
    args = parser.parse_args(argv)
    if args.command == "info":
        print("\n".join(f"{name:10} {value}" for name, value in info().items()))
        return 0
    return serve(args, server) if args.command == "serve" else build_extension(args.source)


def info():
    """{name: sentence} of the versions and of what each back-end needs."""
    module, missing = backends.native()
    forced, form, triton = os.environ.get("FASTLORA_CPU"), os.environ.get("FASTLORA_TRITON", ""), _installed("triton")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "but no GPU that torch can use"
    return {
        "fastlora": f"{fastlora.__version__} in {Path(fastlora.__file__).parent}",
        "python": sys.version.split()[0],
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "_C": missing or f"built for torch {module.torch_version()}",
        "CPU": f"{module.cpu_name()}{' (FASTLORA_CPU)' if forced else ''}" if module else "plain torch, for want of _C",
        "Triton": f"{triton.version}; FASTLORA_TRITON={form}" if triton else "not installed: pip install triton",
        "CUDA": f"{torch.version.cuda}, {gpu}" if torch.version.cuda else "this torch was built without it",
        "CUDA C++": backends.cuda_missing() or f"there; FASTLORA_GPU={os.environ.get('FASTLORA_GPU', '')}",
    }


def _installed(name):
    """What is installed under this name; None for nothing."""
    return next(iter(metadata.distributions(name=name)), None)


def build_extension(source=None):
    """Compile in the source folder and install what comes out; returns pip's or the compiler's exit status."""
    folder, editable = _installed_from()
    source = source or folder
    if source is None or not (source / "csrc").is_dir():
        print(f"fastlora: no source folder ({source}); give that of {DISTRIBUTION}: python -m fastlora build FOLDER")
        return 1
    install = "-m pip install --no-build-isolation --no-deps --force-reinstall ."
    command = [sys.executable, *("setup.py build_ext --inplace" if editable else install).split()]
    print("fastlora:", " ".join(command), f"in {source}", flush=True)
    return subprocess.run(command, cwd=source, env={**os.environ, "FASTLORA_REQUIRE_EXT": "1"}).returncode


def _installed_from():
    """(folder that pip installed from or None, whether the installation is that folder)"""
    found = _installed(DISTRIBUTION)
    recorded = json.loads(found and found.read_text("direct_url.json") or "{}")
    url = urlparse(recorded.get("url", ""))
    folder = Path(unquote(url.path)) if url.scheme == "file" else None
    return folder, recorded.get("dir_info", {}).get("editable", False)
