"""What a measurement has to say about where it was made."""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def facts(device):
    """The columns that are the same for every row of a run."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_model(),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "allocator": allocator(),
        "fastlora_cpu": os.environ.get("FASTLORA_CPU", ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("triton", "loralib", "peft", "transformers")},
        "commit": commit(),
    }


def cpu_model():
    """The kernel's name of the CPU with family and model, since virtual machines often say no more than the brand."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    found = {k: v.strip() for k, v in re.findall(r"^(model name|cpu family|model)\s*:(.*)$", text, re.MULTILINE)}
    return f"{found.get('model name', '?')} (family {found.get('cpu family', '?')} model {found.get('model', '?')})"


def allocator():
    """The malloc that the process runs with: large results come from it and its page faults are part of every time."""
    maps = Path("/proc/self/maps")
    loaded = maps.read_text() if maps.exists() else ""
    named = re.search(r"(jemalloc|tcmalloc|mimalloc)", loaded)
    return named[1] if named else "-".join(platform.libc_ver())


def commit():
    """The commit, with '+' where the tree has changes that are not in it."""
    try:
        sha = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "?"
    written_by_runs = ("benchmarks/results/", "README.md")
    changed = [line for line in dirty.stdout.splitlines() if not line[3:].startswith(written_by_runs)]
    return sha.stdout.strip() + ("+" if changed else "")


def slug(text):
    """A file name for a device."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
