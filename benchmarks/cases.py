"""What is measured: data only. A case is one shape of one op, in one direction; a method is one way to compute it."""

from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LinearCase:
    """One layer: x (m, k), W (n, k), an adapter of rank r."""

    mode: str  # forward, or training = forward + backward
    m: int
    k: int
    n: int
    dtype: str
    r: int = 16

    @property
    def name(self):
        return f"linear/{self.mode}/{self.k}x{self.n}/{self.dtype}/m{self.m}/r{self.r}"


@dataclass(frozen=True)
class DecodeCase:
    """One decoding step of SmolLM2-135M with adapters on all its linear layers, after a prompt of `past` tokens."""

    batch: int
    dtype: str
    past: int = 64
    r: int = 16

    @property
    def name(self):
        return f"smollm2/decode/{self.dtype}/b{self.batch}/r{self.r}"


@dataclass(frozen=True)
class LayerCase:
    """A layer of another kind, r = 8, fp32, with m rows of x: see `variants` for its sizes."""

    op: str  # merged, embedding or tasks
    mode: str
    m: int
    dtype: str = "fp32"

    @property
    def name(self):
        return f"{self.op}/{self.mode}/m{self.m}"


@dataclass(frozen=True)
class MixtureCase:
    """Eight experts of rank 16: one gated layer (1024, 1024), or a Llama of 4 layers, 512 wide, with m tokens."""

    op: str  # gated (a layer), xlora (a model's forward) or generate (64 tokens after m)
    mode: str
    m: int
    dtype: str = "fp32"

    @property
    def name(self):
        return f"mixture/{self.op}/{self.mode}/{self.dtype}/m{self.m}"


_MIXTURES = [
    *(MixtureCase("gated", "forward", m, dtype) for m in (1, 256) for dtype in DTYPES),
    *(MixtureCase("gated", "training", 256, dtype) for dtype in DTYPES),
    MixtureCase("xlora", "forward", 256),
    MixtureCase("generate", "forward", 256),
]
_LAYERS = {
    "merged": [("training", m) for m in (1, 64, 512)],
    "embedding": [("training", 4096)],
    "tasks": [(mode, m) for mode in ("forward", "training") for m in (1, 256)],
}
_CPU_M = (1, 4, 16, 64, 256, 1024)
_CPU_SHAPES = ((576, 1536), (1024, 1024), (4096, 4096))
_CUDA_M = (1, 16, 64, 1024, 8192)
_CUDA_SHAPES = ((1024, 1024), (4096, 4096), (4096, 14336), (14336, 4096))


def cases(op, device):
    """The grid of one op on one kind of device."""
    if op in _LAYERS:
        return [LayerCase(op, mode, m) for mode, m in _LAYERS[op]]
    if op == "mixture":
        return _MIXTURES
    if op == "smollm2":
        return [DecodeCase(batch, dtype) for dtype in DTYPES for batch in (1, 4)]
    sizes, shapes = (_CPU_M, _CPU_SHAPES) if device == "cpu" else (_CUDA_M, _CUDA_SHAPES)
    dtypes = DTYPES if device == "cpu" else ("bf16",)
    return [
        LinearCase(mode, m, k, n, dtype)
        for mode in ("forward", "training")
        for dtype in dtypes
        for k, n in shapes
        for m in sizes
    ]


def methods(case):
    """Names of the methods that a case compares; the first is what all ratios are taken over.

    `fastlora` and `peft` are what `inject` and PEFT make by default, fp32 adapters; `_bf16` have the base's dtype.
    """
    half = case.dtype == "bf16"
    if isinstance(case, LayerCase):
        # eight tasks at once stand beside one
        return ["base", "fastlora", "fastlora_8" if case.op == "tasks" else "loralib"]
    if isinstance(case, MixtureCase):
        return ["base", "fastlora", "peft"]
    if isinstance(case, DecodeCase):
        return ["base", "fastlora", "loralib", "peft"]
    return [
        "base",
        "fastlora",
        *(["fastlora_bf16"] if half else []),
        "loralib",
        "peft",
        *(["peft_bf16"] if half else []),
        "addmm",
        "compile",
    ]


# The tests that must pass before an op is timed.
GATES = {
    "linear": ("tests/ops/test_linear.py", "tests/ops/test_cpu_forms.py"),
    "merged": ("tests/ops/test_linear.py", "tests/nn/test_merged.py"),
    "embedding": ("tests/ops/test_contract.py", "tests/nn/test_embedding.py"),
    "tasks": ("tests/ops/test_linear.py", "tests/tasks/test_model.py"),
    "mixture": ("tests/ops/test_linear.py", "tests/mixture"),
    "smollm2": ("tests/ops/test_linear.py", "tests/nn/test_linear.py", "tests/test_model.py"),
}
OPS = tuple(GATES)
