"""What is for a machine with a GPU, without one: programs on the emulator, the script with a Python that pretends."""

import importlib
import os
import subprocess
import sys

import harness
import pytest
import torch

from fastlora import backends

pytestmark = [
    pytest.mark.skipif(backends.native()[0] is None, reason="fastlora._C is not built"),
    pytest.mark.skipif(harness.DEVICE != "cpu", reason="the emulator takes the GPU's place"),
]


def program(*arguments):
    env = {**os.environ, "FASTLORA_CUDA_LIBRARY": str(harness.build("plain")), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *map(str, arguments), "--device", "cpu"]
    return subprocess.run(command, cwd=harness.ROOT, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_the_check_of_the_ops():
    done = program("benchmarks.gpu_check")
    assert "comparisons, all accurate" in done.stdout, done.stderr[-3000:]


LATER = [pytest.param(part, marks=pytest.mark.slow) for part in ("linear", "decode", "gated", "routed")]


@pytest.mark.parametrize("part", ["backward", *LATER])
def test_a_part(part, tmp_path):
    """Every method but what needs a GPU or takes long, on tiny sizes; each is compared with the truth."""
    out = tmp_path / "out.csv"
    options = ["--tiny", "--seconds", "0.01", "--out", out, "--without", "compile", "peft"]
    done = program("benchmarks.gpu", part, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    skipped = {line.split(": without ")[1].split(":")[0] for line in done.stdout.splitlines() if ": without " in line}
    assert "fastlora_triton" in skipped <= {"fastlora_triton", "fastlora_triton_tma", "peft_bf16"}
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
    names = [name for name, _, _ in cases]
    said = gpu.patch("linear", rows, names, "abc", 90).splitlines()
    assert said[0].startswith("-| `lora_linear_forward` | native, CUDA C++") and said[0].endswith(
        "never run on a GPU |"
    )
    assert said[1] == "+" + said[0][1:].replace("never run on a GPU", "sm_90, 8192 to 8192 rows, abc")
    assert said[2:] == ["csrc/cuda.h: lora_linear_forward: 90, 8192, 8192"]
    slow = [row(name, m, 99 if "kernels" in m else us) for name, m, us in times]
    slow = gpu.patch("linear", slow, names, "abc", 90)
    assert "<!-- lora_linear_forward, CUDA C++, part linear: run, not faster, sm_90, abc -->" in slow
    assert "\n" not in slow and slow.startswith("docs/gpu-status.md: no row changes"), "the script prints it"
    part = gpu.patch("linear", rows, [*names, "gpu/linear/1x1/bf16/m1024/r16"], "abc", 90)
    assert "nothing to change" in part and "+|" not in part, "the part is not complete"
    assert "no row speaks of this part" in gpu.patch("model", rows, names, "abc", 90)
    table = gpu.show(rows)
    assert table.splitlines()[0] == "| case | base, µs | fastlora | fastlora_kernels |" and "| 1.00 | 0.90 |" in table


def test_the_rows_are_a_run_without_gaps(gpu, monkeypatch, tmp_path):
    """Slower at 16 rows: 1 row is left out of 64 to 256. A row that has a result gets the new one."""
    times = {1: 9, 16: 11, 64: 9, 256: 9}
    names = [f"gpu/decode/64x64/bf16/m{m}/r16" for m in times]
    rows = [row(name, "fastlora_kernels", us) for name, us in zip(names, times.values(), strict=True)]
    rows += [row(name, "fastlora", 10) for name in names]
    status = "| `lora_linear_forward` | native, CUDA C++ | `k` | emulated | {} |"
    (tmp_path / "status.md").write_text(status.format("sm_80, 1 to 4096 rows, aaa"))
    monkeypatch.setattr(gpu, "STATUS", tmp_path / "status.md")
    said = gpu.patch("decode", rows, names, "abc", 90).splitlines()
    assert said[1] == "+" + status.format("sm_90, 64 to 256 rows, abc")
    assert said[2] == "csrc/cuda.h: lora_linear_forward: 90, 64, 256"


def test_without_the_base(gpu):
    """No ratios over it, and no failure."""
    case = gpu.gpu_layers.GpuCase("decode", 5, 64, 40, 8)
    rows = gpu.measure(case, "cpu", ["fastlora", "addmm"], 0.01)
    assert [(r["vs_base"], type(r["vs_fastlora"])) for r in rows] == [("", float)] * 2
    assert gpu.show(rows).splitlines()[-1] == f"| {case.name} |  |  |  |"
    assert case.name in gpu.table.line(case.name, rows)


def test_a_wrong_gradient_is_refused(gpu):
    layers = gpu.gpu_layers
    given = [torch.randn(s) for s in ((5, 8), (6, 8), (1, 4, 8), (1, 6, 4))]
    a, b = (t[0].clone().requires_grad_() for t in given[2:])

    def layer(x):
        return x @ given[1].T + x @ a.T @ b.T

    layers._check("addmm", layer, *given, None, [a, b], torch.randn(5, 6))
    a.register_hook(lambda grad: 2 * grad)
    layers._check("addmm", layer, *given, None)
    with pytest.raises(SystemExit, match="addmm is off by"):
        layers._check("addmm", layer, *given, None, [a, b], torch.randn(5, 6))


def test_triton_is_pinned_without_the_extension(gpu, monkeypatch):
    monkeypatch.setattr(backends, "native", lambda: (None, "not built"))
    assert gpu.gpu_layers.pinned("fastlora_triton", lambda: backends._pinned) == "triton"


def test_the_check_of_the_ops_runs_decode(gpu):
    """Under inference_mode y of few tokens takes one launch, of many two; z takes one."""
    check, library = importlib.import_module("benchmarks.gpu_check"), harness.build("plain")
    native, count = backends.native()[0], harness.Library(library).library.emulate_launches
    assert native.load_cuda(str(library)) == ""
    native.pin_gpu("kernels")
    try:
        for m, launches in ((20, 2), (70, 3)):
            given, before = check._draw((m, 64, 40, 8), torch.bfloat16, False, "cpu"), count()
            check._inference(given, 0.0, None)
            assert count() - before == launches
    finally:
        native.pin_gpu("")
        native.load_cuda("/nowhere")


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
    shown = []
    monkeypatch.setattr(gpu, "show", shown.extend)
    monkeypatch.setattr(gpu, "measure", lambda *a: [*measure(*a), row("gpu/of/another", "base", 1.0)])
    rows = gpu.table.read(arguments[-1])
    gpu.table.update(arguments[-1], [{**rows[0], "method": "fastlora_kernels"}])
    gpu.main(arguments)
    assert measured == 2 * first
    assert [(r["case"], r["method"]) for r in shown] == [(name, "base") for name in first], "of this commit alone"


PYTHON = """#!/bin/sh
echo "$@" >>{log}
case "$*" in *"gpu decode"*) echo "| decode | 1 |"; exit {status} ;; esac
"""


# What git and nvidia-smi say, and not what they would say here.
TOOLS = {
    "git": """case $1 in rev-parse) echo abcdef;; status) printf '%s' "$CHANGED"; exit "$NO_GIT";; esac""",
    "nvidia-smi": 'echo "$GPU"',
}


def script(tmp_path, *arguments, status=0, changed="", no_git=0, gpu="a GPU"):
    """(the process, {step: its status}, what Python was called with)"""
    log, python = tmp_path / "log", tmp_path / "python"
    python.write_text(PYTHON.format(log=log, status=status))
    python.chmod(0o755)
    log.write_text("")
    for name, text in TOOLS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    out = tmp_path / "out"
    command = ["bash", harness.ROOT / "benchmarks" / "gpu.sh", out, *arguments]
    env = {**os.environ, "PYTHON": str(python), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    env |= {"CHANGED": changed, "NO_GIT": str(no_git), "GPU": gpu}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    steps = (out / "steps.csv").read_text().splitlines()[1:] if (out / "steps.csv").exists() else []
    return done, {line.split(",")[0]: line.split(",")[1] for line in steps}, log.read_text()


def test_the_script(tmp_path):
    done, steps, calls = script(tmp_path, "--only", "decode", "--only", "model", status=1)
    assert done.returncode == 1 and steps == {"facts": "0", "build": "0", "decode": "1", "model": "0"}
    assert "-m benchmarks.gpu model" in calls and "-m pytest" not in calls
    done, steps, calls = script(tmp_path, "--only", "decode", "--only", "model")
    assert done.returncode == 0 and steps["decode"] == "0" and "facts: done before" in done.stdout
    assert "build: done before" not in done.stdout and "fastlora info" in calls, "the build is incremental"
    assert "-m benchmarks.gpu decode" in calls and "gpu model" not in calls, "what failed again, and nothing else"
    assert done.stdout.rstrip().endswith("| decode | 1 |")


def test_what_was_done_elsewhere_is_done_again(tmp_path):
    def skipped(**state):
        return "decode: done before" in script(tmp_path, "--only", "decode", **state)[0].stdout

    for state in ({"changed": " M csrc/cuda.cpp"}, {"no_git": 1}, {"gpu": "another"}, {}):
        assert not skipped(**state)
        assert skipped(**state) == ("changed" not in state and "no_git" not in state)
    assert skipped(changed=" M README.md") and skipped(gpu="another")
    steps = (tmp_path / "out" / "steps.csv").read_text()
    assert ",abcdef+,a-GPU\n" in steps and ",?,a-GPU\n" in steps and ",abcdef,another\n" in steps


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
