"""What is for a machine with a GPU, without one: programs on the emulator, the script with a Python that pretends."""

import importlib
import os
import subprocess
import sys

import harness
import pytest

from fastlora import backends

pytestmark = [
    pytest.mark.skipif(backends.native()[0] is None, reason="fastlora._C is not built"),
    pytest.mark.skipif(harness.DEVICE != "cpu", reason="the emulator takes the GPU's place"),
]


def program(*arguments):
    env = {**os.environ, "FASTLORA_CUDA_LIBRARY": str(harness.build("plain")), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *map(str, arguments), "--device", "cpu"]
    return subprocess.run(command, cwd=harness.ROOT, env=env, capture_output=True, text=True)


def test_the_check_of_the_ops():
    done = program("benchmarks.gpu_check")
    assert "comparisons, all accurate" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize("part", ["linear", "decode", "backward", "gated", "routed"])
def test_a_part(part, tmp_path):
    """Every method but what needs a GPU or takes long, on tiny sizes; each is compared with the truth."""
    out = tmp_path / "out.csv"
    options = ["--tiny", "--seconds", "0.01", "--out", out, "--without", "compile", "peft"]
    done = program("benchmarks.gpu", part, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    skipped = {line.split(": without ")[1].split(":")[0] for line in done.stdout.splitlines() if ": without " in line}
    allowed = {"fastlora_triton", "peft_bf16"} | ({"fastlora_kernels"} if part == "routed" else set())
    assert "fastlora_triton" in skipped <= allowed
    assert f"| gpu/{part}/64x40/bf16/m5/r8" in done.stdout and "docs/gpu-status" not in done.stdout


@pytest.mark.slow
def test_a_model(tmp_path):
    pytest.importorskip("transformers")
    options = ["--tiny", "--seconds", "0.01", "--out", tmp_path / "out.csv", "--without", "peft", "peft_bf16"]
    done = program("benchmarks.gpu", "model", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "gpu/tiny/training" in done.stdout and "gpu/tiny/decode" in done.stdout and "fastlora_kernels" in done.stdout


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(harness.ROOT)
    return importlib.import_module("benchmarks.gpu")


def row(case, method, us):
    return {"case": case, "method": method, "p50_us": us, "vs_base": us / 10, "peak_mb": 0, "dropped": 0}


def test_the_rows_for_the_status(gpu):
    """The kernels must beat the composed form in every shape of as many rows."""
    cases = [("gpu/linear/64x64/bf16/m1024/r16", 9, 10), ("gpu/linear/64x64/bf16/m8192/r16", 9, 10)]
    cases += [("gpu/linear/64x32/bf16/m1024/r16", 11, 10)]
    times = [(name, m, us) for name, k, c in cases for m, us in (("base", 8), ("fastlora", c), ("fastlora_kernels", k))]
    rows = [row(*time) for time in times]
    said = gpu.patch("linear", rows, "abc", 90).splitlines()
    assert said[0].startswith("-| `lora_linear_forward` | native, CUDA C++") and said[0].endswith(
        "never run on a GPU |"
    )
    assert said[1] == "+" + said[0][1:].replace("never run on a GPU", "sm_90, 8192 to 8192 rows, abc")
    assert said[2:] == ["csrc/cuda.h: lora_linear_forward: 90, 8192, 8192"]
    slow = [row(name, m, 99 if "kernels" in m else us) for name, m, us in times]
    assert "sm_90, not faster, abc |" in gpu.patch("linear", slow, "abc", 90)
    assert "nothing to change" in gpu.patch("linear", rows[:2], "abc", 90)
    table = gpu.show(rows)
    assert table.splitlines()[0] == "| case | base, µs | fastlora | fastlora_kernels |" and "| 1.00 | 0.90 |" in table


def test_a_measured_case_is_not_measured_again(gpu, monkeypatch, tmp_path):
    measured, facts = [], {"device": "a GPU", "commit": "abc"}

    def measure(case, device, methods, seconds):
        measured.append(case.name)
        return [row(case.name, "base", 1.0)]

    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr(gpu.machine, "facts", lambda device: facts)
    arguments = ["decode", "--device", "cpu", "--out", str(tmp_path / "out.csv")]
    gpu.main(arguments)
    first = list(measured)
    gpu.main(arguments)
    assert measured == first and len(first) == 10
    facts["commit"] = "abd"
    gpu.main(arguments)
    assert measured == 2 * first


PYTHON = """#!/bin/sh
echo "$@" >>{log}
case "$*" in *"gpu decode"*) echo "| decode | 1 |"; exit {status} ;; esac
"""


def script(tmp_path, *arguments, status=0):
    """(the process, {step: its status}, what Python was called with)"""
    log, python = tmp_path / "log", tmp_path / "python"
    python.write_text(PYTHON.format(log=log, status=status))
    python.chmod(0o755)
    log.write_text("")
    out = tmp_path / "out"
    command = ["bash", harness.ROOT / "benchmarks" / "gpu.sh", out, *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True)
    steps = (out / "steps.csv").read_text().splitlines()[1:] if (out / "steps.csv").exists() else []
    return done, {line.split(",")[0]: line.split(",")[1] for line in steps}, log.read_text()


def test_the_script(tmp_path):
    done, steps, calls = script(tmp_path, "--only", "decode", "--only", "model", status=1)
    assert done.returncode == 1 and steps == {"facts": "0", "build": "0", "decode": "1", "model": "0"}
    assert "-m benchmarks.gpu model" in calls and "-m pytest" not in calls
    done, steps, calls = script(tmp_path, "--only", "decode", "--only", "model")
    assert done.returncode == 0 and steps["decode"] == "0" and "build: done before" in done.stdout
    assert "-m benchmarks.gpu decode" in calls and "gpu model" not in calls, "what failed again, and nothing else"
    assert done.stdout.rstrip().endswith("| decode | 1 |")


def test_all_parts_of_the_script(tmp_path):
    done, steps, calls = script(tmp_path)
    assert done.returncode == 0, done.stdout
    assert list(steps)[:5] == ["facts", "build", "cuda-cases", "triton-cases", "ops"]
    assert list(steps)[-6:] == ["linear", "decode", "backward", "gated", "routed", "model"]
    assert "test_linear.py" in calls and "test_glue.py" not in calls and "check_linear.py" in calls
    assert "-m benchmarks.gpu_check" in calls


@pytest.mark.parametrize("arguments", [["--only"], ["--only", "nothing"], ["linear"]])
def test_usage(tmp_path, arguments):
    assert script(tmp_path, *arguments)[0].returncode == 2
