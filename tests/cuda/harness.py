"""Builds the CUDA kernels, with g++ against the emulator or with nvcc, and calls their launchers on torch tensors.

The structs and enums are read from params.h. With FASTLORA_CUDA_DEVICE=cuda the tests of the kernels run their
cases on a GPU.
"""

import contextlib
import ctypes
import hashlib
import mmap
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch

from fastlora.ops.dropout import dropout_mask, philox

ROOT = Path(__file__).parents[2]
# Mutants of the kernels lie elsewhere.
KERNELS = Path(os.environ.get("FASTLORA_CUDA_KERNELS", Path(__file__).with_name("kernels")))
EMULATOR = Path(__file__).parent / "emulate"
CACHE, KEPT = ROOT / "build" / "cuda", 200  # files
# More than a wrong row or column jumps over.
GUARD = 1 << 13
NO_RESERVE = 0x4000  # Linux' MAP_NORESERVE, which Python has since 3.13
COMMON = ["-std=c++17", "-g", "-fPIC", "-mf16c", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
# "cuda" runs the same cases on a GPU, in the library that nvcc makes for it.
DEVICE = os.environ.get("FASTLORA_CUDA_DEVICE", "cpu")
SEED = 0x1234_5678_9ABC_DEF
FLAGS = {"plain": ["-O2"], "checked": ["-O1", "-fsanitize=thread"]}
MODES = list(FLAGS) if DEVICE == "cpu" else ["gpu"]
ON_THE_HOST = pytest.mark.skipif(DEVICE != "cpu", reason="the emulator has a second device")
NO_STATUS = [f"FASTLORA_{name}" for name in ("BF16", "FP16", "PARTS", "TILE", "ROUTED_TILE", "NORMS_ROWS", "CUDA")]
SCALARS = {"int": ctypes.c_int, "long long": ctypes.c_longlong, "float": ctypes.c_float}


class BuildError(Exception):
    pass


def declarations(header):
    """(enum constants, structs) of a header of plain C."""
    text = re.sub(r"\*\s*", " *", re.sub(r"//.*", "", header.read_text()))
    constants, structs = {}, {}
    for body in re.findall(r"enum \w+ \{(.*?)\}", text, re.S):
        value = -1
        for name, given in re.findall(r"(\w+)(?:\s*=\s*(\d+))?\s*(?:,|$)", body.strip()):
            value = int(given) if given else value + 1
            constants[name] = value
    for name, body in re.findall(r"struct (\w+) \{(.*?)\};", text, re.S):
        fields = []
        for line in filter(None, (part.strip() for part in body.split(";"))):
            kind, names = re.fullmatch(r"(?:const |struct )*(long long|\w+)\s+(.*)", line, re.S).groups()
            for item in names.split(","):
                star, field, length = re.fullmatch(r"\s*(\*?)\s*(\w+)(?:\[(\w+)\])?\s*", item).groups()
                base = ctypes.c_void_p if star else structs.get(kind) or SCALARS[kind]
                fields.append((field, base * int(constants.get(length, length)) if length else base))
        structs[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return constants, structs


def sources(folder, *suffixes):
    return sorted(p for p in folder.iterdir() if p.suffix in suffixes)


@cache
def forget_the_oldest():
    """Once a process: other processes may do the same."""
    with contextlib.suppress(FileNotFoundError):
        for old in sorted(CACHE.iterdir(), key=os.path.getmtime)[:-KEPT]:
            old.unlink()


def made(name, suffix, command, inputs):
    """CACHE/name-….suffix as `command` makes it, unless it is there for the same command and the same inputs."""
    # without folders: a mutant's copy of a file that it does not change is the same file
    key = repr([[Path(part).name for part in command], [(p.name, p.read_bytes()) for p in inputs]])
    output = CACHE / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}{suffix}"
    said = output.with_suffix(".txt")
    if output.exists() and said.exists():
        os.utime(output), os.utime(said)  # what is in use is not the oldest
    else:
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            unfinished = Path(folder) / output.name
            done = subprocess.run([*command, "-o", unfinished], capture_output=True, text=True)
            if done.returncode:
                raise BuildError(done.stderr[-3000:])
            said.write_text(done.stderr)
            # through a name in the same folder: whoever looks sees all of it or nothing
            beside = output.with_suffix(f".{os.getpid()}")
            shutil.copy(unfinished, beside)
            beside.replace(output)
    return output


def build(mode, kernels=KERNELS):
    """The kernels and the emulator as one library; `checked` hears of every load and store."""
    forget_the_oldest()
    headers, own = sources(EMULATOR, ".h"), sources(kernels, ".h", ".cuh")
    tests = Path(__file__).parent / "engine.cu"

    def compile(source):
        flags, includes, inputs = ["-O2"], [f"-I{EMULATOR}"], [source, *headers]
        if source.suffix == ".cu":
            flags, inputs = ["-x", "c++", "-include", "emulate.h", *FLAGS[mode]], [*inputs, *own]
            includes.append(f"-I{kernels}")
        command = ["g++", *COMMON, *flags, *includes, "-c", source]
        return made(source.stem, ".o", command, inputs)

    engine = [p for p in sources(EMULATOR, ".cpp") if mode == "checked" or p.stem != "race"]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile, [*sources(kernels, ".cu"), tests, *engine]))
    return made(f"host-{mode}", ".so", ["g++", "-shared", *objects], objects)


def compile_for_gpu(arch, kernels=KERNELS):
    """{stem: object} of the kernels as nvcc compiles them; what ptxas says of each stands beside it, in .txt."""
    target, headers = f"-gencode=arch=compute_{arch},code=sm_{arch}", sources(kernels, ".h", ".cuh")
    flags = ["-std=c++17", "-O3", target, "-Xptxas", "-v", "-Xcompiler", "-fPIC"]

    def compile(source):
        return made(f"{source.stem}-sm_{arch}", ".o", ["nvcc", *flags, "-c", source], [source, *headers])

    with ThreadPoolExecutor(2) as pool:
        files = sources(kernels, ".cu")
        return dict(zip((f.stem for f in files), pool.map(compile, files), strict=True))


def build_for_gpu(arch, kernels=KERNELS):
    """The kernels as a library for one architecture. It loads anywhere."""
    objects = list(compile_for_gpu(arch, kernels).values())
    return made(f"sm_{arch}", ".so", ["nvcc", "-shared", *objects], objects)


def reference(params):
    return None if params is None else ctypes.byref(params)


class Library:
    """The launchers, with what the emulator adds where it is in the library."""

    def __init__(self, path, header=KERNELS / "params.h"):
        self.path, self.library = path, ctypes.CDLL(str(path))
        self.constants, self.structs = declarations(header)
        self.library.fastlora_error.restype = ctypes.c_char_p
        for name in ("shrink", "decode", "shrink_backward"):
            counters = self.library[f"fastlora_{name}_counters"]
            counters.restype, counters.argtypes = ctypes.c_longlong, [ctypes.c_longlong, ctypes.c_longlong]
        self.library.fastlora_expand_backward_workspace.restype = ctypes.c_longlong
        self.emulated = hasattr(self.library, "emulate_seed")
        if self.emulated:
            self.library.emulate_seed.argtypes = [ctypes.c_uint64]
            self.library.emulate_conflicts.restype = self.library.emulate_shared.restype = ctypes.c_uint64
            self.library.emulate_buffer.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int]

    def declare(self, tensors, schedule=0):
        """Tells the emulator which memory is the device's: {name: (tensor, is written)}."""
        if not self.emulated:
            return
        self.library.emulate_seed(schedule)
        self.library.emulate_forget()
        for tensor, written in tensors.values():
            if tensor is not None and tensor.numel():
                extent = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
                self.library.emulate_buffer(tensor.data_ptr(), extent * tensor.element_size(), written, 0)

    def call(self, launcher, params):
        """The launcher's status."""
        status = getattr(self.library, launcher)(reference(params), None)
        if not self.emulated:
            torch.cuda.synchronize()
        return status

    def launch(self, launcher, params, tensors, schedule=0):
        """A launch that must succeed, without bank conflicts in ldmatrix."""
        self.declare(tensors, schedule)
        status = self.call(launcher, params)
        assert status == 0, self.sentence(status)
        assert not self.emulated or self.library.emulate_conflicts() == 0, "bank conflicts"

    def sentence(self, status):
        text = self.library.fastlora_error(status).decode()
        return re.sub(r" \[pc (0x[0-9a-f]+)\]", lambda m: f" ({self.line(m[1])})", text)

    def line(self, address):
        found = subprocess.run(["addr2line", "-i", "-e", self.path, address], capture_output=True, text=True)
        return " < ".join(os.path.basename(line) for line in found.stdout.split() if re.search(r"\.cuh?:\d", line))


@cache
def library(mode=MODES[0]):
    if mode != "gpu":
        return Library(build(mode))
    major, minor = torch.cuda.get_device_capability()
    return Library(build_for_gpu(10 * major + minor))


def edge():
    """The p whose threshold is the lane of the first element: that one is kept, only just."""
    words = philox(torch.zeros(1, dtype=torch.int64), torch.tensor(SEED))
    return (int(words[0, 0]) & 0xFFFF) / 65536


def mask(shape, p):
    """True where the reference's dropout keeps an element."""
    return dropout_mask(shape, p, torch.tensor(SEED, device=DEVICE))


def guarded(shape, dtype, stride=None, shift=0, device=DEVICE):
    """A matrix or vector of NaN between guards, `shift` elements off a multiple of 64 bytes; rows `stride` apart."""
    stride = shape[-1] if stride is None else stride
    strides = (stride, 1)[-len(shape) :]
    size = torch.empty(0, dtype=dtype).element_size()
    extent = (sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1) * size if min(shape) else 0
    raw = torch.full((extent + 2 * GUARD + 64 + shift * size,), 0xFF, dtype=torch.uint8, device=device)
    start = GUARD + -raw.data_ptr() % 64 + shift * size
    whole = raw[start : start + -(-extent // size) * size].view(dtype)
    return whole.as_strided(shape, strides)


def draw(case, rng, *shape, dtype=None, shift=None, pad=None):
    """A guarded tensor of a case's type, shift and pad: small integers where it is exact, else normal."""
    small, wide = torch.randint(-2, 3, shape, generator=rng), torch.randn(shape, generator=rng, dtype=torch.float64)
    stride = shape[-1] + (case.pad if pad is None else pad)
    t = guarded(shape, dtype or case.dtype, stride, case.shift if shift is None else shift)
    return t.copy_(small if case.exact else wide)


def far_apart(rows, columns, dtype, stride):
    """A matrix whose rows lie gigabytes apart, in memory that is only reserved."""
    size = torch.empty(0, dtype=dtype).element_size()
    room = mmap.mmap(-1, (rows * stride + columns) * size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    return torch.frombuffer(room, dtype=dtype).as_strided((rows, columns), (stride, 1))


def outside(tensor):
    """Bytes beside a guarded tensor, and in the gaps between its rows, that are not what they were."""
    raw = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    inside = torch.zeros_like(raw, dtype=torch.bool)
    size, start = tensor.element_size(), tensor.storage_offset() * tensor.element_size()
    for row in range(tensor.shape[0] if tensor.dim() == 2 else 1):
        first = start + row * (tensor.stride(0) if tensor.dim() == 2 else 0) * size
        inside[first : first + tensor.shape[-1] * size] = True
    return int(((raw != 0xFF) & ~inside).sum())


def set_matrix(matrix, t):
    """Fills a struct Matrix."""
    matrix.data = None if t is None or not t.numel() else t.data_ptr()
    matrix.stride = 0 if t is None else t.stride(0)


def set_parts(parts, matrices, ranks, columns):
    """Fills an array of struct Part, one part after the other."""
    rank = column = 0
    for part, m, r, c in zip(parts, matrices, ranks, columns, strict=False):
        set_matrix(part.m, m)
        part.rank, part.ranks, part.column, part.columns = rank, r, column, c
        rank, column = rank + r, column + c


def refused(library, launcher, params, path, value):
    """The name of the status after one field, at `path`, is changed to a value or by a function.

    The value "foreign" is memory of the host, "elsewhere" that of another device.
    """
    *steps, last = path.split(".")
    at = params
    for step in steps:
        at = at[int(step)] if step.isdigit() else getattr(at, step)
    stranger = torch.zeros(4096, dtype=torch.bfloat16)
    if value == "elsewhere":
        library.library.emulate_buffer(stranger.data_ptr(), stranger.nbytes, 1, 1)
    value = stranger.data_ptr() if value in ("foreign", "elsewhere") else value
    setattr(at, last, value(getattr(at, last)) if callable(value) else value)
    status = library.call(launcher, params)
    return next(n for n, v in library.constants.items() if v == status and n not in NO_STATUS)


def assert_close(actual, truth, size, exact):
    """`exact`: small integers, whose sums are exact in fp32 in any order. Else one rounding, and fp32's in the sums."""
    if exact:
        wrong = actual != truth.to(actual.dtype)
    else:
        mantissa = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}[actual.dtype]
        least = torch.finfo(actual.dtype).smallest_normal
        half_ulp = 2.0 ** (truth.abs().clamp(min=least).log2().floor() - mantissa)
        wrong = ~((actual.double() - truth).abs() <= half_ulp + 3e-6 * size)
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} wrong, first at {wrong.nonzero()[0].tolist()}: "
        f"{actual[wrong][0].item()} is not {truth[wrong][0].item()}"
    )
