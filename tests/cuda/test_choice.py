"""Which form runs on a GPU, and how it is said: explain, info, docs/gpu-status.md."""

import os
import re
import subprocess
import sys

import harness
import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastlora
from fastlora import backends, lora_linear

native = backends.native()[0]
pytestmark = pytest.mark.skipif(native is None, reason="fastlora._C is not built")


def status(ran_on=90, rows=(1, 4096)):
    return ("lora_shrink", "shrink_kernel", ran_on, *rows)


@pytest.mark.parametrize(
    "row, sizes, half, architecture, form, why",
    [
        (status(), [64, 32], True, 90, "", ""),
        (status(), [4096, 32], True, 90, "", ""),
        (status(), [4097, 32], True, 90, "", "faster on sm_90 for 1 to 4096 rows"),
        (status(rows=(65, 4096)), [64, 32], True, 90, "", "faster on sm_90 for 65 to 4096 rows"),
        (status(), [64, 32], True, 80, "", "faster on sm_90"),
        (status(ran_on=0), [64, 32], True, 90, "", "shrink_kernel: never run on a GPU"),
        (status(ran_on=0), [64, 32], True, 90, "kernels", ""),
        (status(ran_on=0), [9999, 32], True, 80, "kernels", ""),
        (status(), [64, 32], True, 90, "composed", "FASTLORA_GPU=composed"),
        (status(), [64, 32], False, 90, "kernels", "take bf16 and fp16"),
        (status(), [64, 32], True, 75, "kernels", "sm_80 or later"),
        (status(), [64, 2**31], True, 90, "kernels", "below 2^31"),
    ],
)
def test_choice(row, sizes, half, architecture, form, why):
    said = native.cuda_objection(row, sizes, half, architecture, form)
    assert said == why == "" or (why and why in said)


def test_statuses_are_those_of_the_documentation():
    """docs/gpu-status.md has the rows of csrc/cuda.h, and says of each that it never ran, or where."""
    text = (harness.ROOT / "docs" / "gpu-status.md").read_text()
    found = re.findall(r"^\| `(\w+)` \| native, CUDA C\+\+ \| (.*?) \| .*? \| (.*?) \|$", text, re.M)
    said = [(op, kernels.replace("`", ""), seen) for op, kernels, seen in found]
    rows = native.cuda_statuses()
    assert [row[:2] for row in said] == [row[:2] for row in rows] and rows
    for (_, _, seen), (_, _, ran_on, first, last) in zip(said, rows, strict=True):
        assert seen == "never run on a GPU" if not ran_on else f"sm_{ran_on}, {first} to {last} rows" in seen


def test_the_default_is_composed():
    assert not any(ran_on for _, _, ran_on, _, _ in native.cuda_statuses()), "measured? then say so here"


def test_a_wrong_form():
    with pytest.raises(ValueError, match="FASTLORA_GPU: got 'fast', expected composed or kernels"):
        native.pin_gpu("fast")


def explained(monkeypatch, missing, form, m=4, steps=(64, 1)):
    """What explain says of a call on a GPU, which is a fake one; `steps`: strides of the weight."""
    monkeypatch.setattr(backends, "cuda_missing", lambda: missing)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    real = backends.objection
    monkeypatch.setattr(backends, "objection", lambda op, b, *a: "not here" if b == "triton" else real(op, b, *a))
    native.pin_gpu(form)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            options = dict(dtype=torch.bfloat16, device="cuda")
            x, A, B = (torch.empty(shape, **options) for shape in ((m, 64), (8, 64), (32, 8)))
            return str(fastlora.explain(lora_linear, x, torch.empty_strided((32, 64), steps, **options), A, B))
    finally:
        native.pin_gpu("")


@pytest.mark.parametrize(
    "missing, form, sentence",
    [
        ("it was not built", "", "native: composed of ATen calls; it was not built"),
        (None, "", "or shrink_kernel, linear_kernel: never run on a GPU"),
        (None, "composed", "native: composed of ATen calls; FASTLORA_GPU=composed"),
        (None, "kernels", "native: CUDA C++: decode_kernel"),
    ],
)
def test_explain_says_which_form_and_why(monkeypatch, missing, form, sentence):
    said = explained(monkeypatch, missing, form)
    assert said.startswith("lora_linear: native\n") and sentence in said


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(steps=(1, 32)), "native: CUDA C++"),
        (dict(steps=(128, 2)), "composed of ATen calls; weight: neither rows nor columns lie together"),
        (dict(m=0), "composed of ATen calls; x is empty"),
    ],
)
def test_explain_knows_the_layouts(monkeypatch, options, sentence):
    assert sentence in explained(monkeypatch, None, "kernels", **options)


def test_explain_knows_which_adapters_a_route_may_have():
    x, A, B, table = torch.ones(4, 64), torch.ones(1, 1, 8, 64), torch.ones(1, 8, 32), torch.zeros(1, 1)

    def said(adapters, *pages):
        return backends._lies_otherwise("lora_routed_forward", x, [x, x, adapters, *[None] * 7, pages])

    assert said([], A, B, table) is None
    across, sliced = B.transpose(1, 2), A.expand(1, 9, 8, 64)
    for given in ((A.double(), B, table), (A, across, table), (A, B, table[:, :0]), (sliced, B, table), ()):
        assert "pages of x's type" in said([], *given)
    assert "pages of x's type" in said([A], A, B, table)


def test_explain_on_a_cpu_says_nothing_of_it():
    x, w, A, B = (torch.ones(s, dtype=torch.bfloat16) for s in ((4, 64), (32, 64), (8, 64), (32, 8)))
    assert "composed of ATen" not in str(fastlora.explain(lora_linear, x, w, A, B))


@pytest.mark.parametrize(
    "library, sentence",
    [
        ("", "there; FASTLORA_GPU="),
        ("/nowhere/_cuda.so", "_cuda.so was not built; on a machine with nvcc: FASTLORA_CUDA=1 python -m"),
        (__file__, "invalid ELF header"),
    ],
)
def test_info(library, sentence):
    env = {**os.environ, "FASTLORA_CUDA_LIBRARY": library or str(harness.build("plain")), "FASTLORA_GPU": ""}
    command = [sys.executable, "-m", "fastlora", "info"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=harness.ROOT)
    line = next(line for line in done.stdout.splitlines() if line.startswith("CUDA C++"))
    assert done.returncode == 0 and sentence in line, done.stderr
