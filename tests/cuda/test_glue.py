"""What lies between the ops and the CUDA kernels (csrc/cuda.cpp), on CPU tensors: the emulator's library is the GPU."""

import os
import re
import subprocess
import sys

import harness
import pytest
import torch
from exactness import strided, transposed

from fastlora import backends, lora_expand, lora_linear, lora_norm, lora_shrink

native = backends.native()[0]
pytestmark = [
    pytest.mark.skipif(native is None, reason="fastlora._C is not built"),
    pytest.mark.skipif(harness.DEVICE != "cpu", reason="the emulator takes the GPU's place"),
]
SEED = torch.tensor(harness.SEED)


def arguments(m=20, n=40, k=72, ranks=(8,), dtype=torch.bfloat16, adapter=None, seed=0):
    """(x, w, lora_A, lora_B) of -1, 0 and 1: every sum is exact in bf16, in any order."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randint(-1, 2, shape, generator=rng).to(dtype)

    A = tuple(draw(r, k).to(adapter or dtype) for r in ranks)
    return draw(m, k), draw(n, k), A, tuple(draw(n, r).to(adapter or dtype) for r in ranks)


def result(call, *inputs, dy=None):
    """(y, gradients) of call(*inputs), where `inputs` may be lists of tensors."""
    flat = [t.detach().requires_grad_() for i in inputs for t in (i if isinstance(i, tuple) else (i,))]
    leaves = iter(flat)
    y = call(*(tuple(next(leaves) for _ in i) if isinstance(i, tuple) else next(leaves) for i in inputs))
    grads = torch.autograd.grad(y, flat, torch.ones_like(y) if dy is None else dy(y), allow_unused=True)
    return [y.detach(), *(g for g in grads if g is not None)]


def same(call, *inputs, dy=None):
    """The kernels and what runs without them agree to the bit."""
    mine = result(call, *inputs, dy=dy)
    native.pin_gpu("composed")
    theirs = result(call, *inputs, dy=dy)
    native.pin_gpu("kernels")
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


CASES = {
    "plain": {},
    "fp16": dict(dtype=torch.float16),
    "fp32 masters": dict(adapter=torch.float32),
    "two adapters": dict(ranks=(8, 3)),
    "no adapter": dict(ranks=()),
    "no rank": dict(ranks=(0,)),
    "one of each": dict(m=1, n=1, k=1, ranks=(1,)),
    "split along K": dict(m=70, k=1100),
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_linear(emulated, options):
    x, w, A, B = arguments(**options)
    several = dict(ranks=[a.shape[0] for a in A]) if len(A) > 1 else {}
    y = result(lambda x, w, A, B: lora_linear(x, w, A, B, scaling=0.5, **several), x, w, A, B)
    assert emulated() == (5 if sum(a.shape[0] for a in A) else 2), "dy is read once for t and dB"
    same(lambda x, w, A, B: lora_linear(x, w, A, B, scaling=0.5, **several), x, w, A, B)
    assert y[0].shape == (len(x), len(w))


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_dropout(emulated, p):
    """In the forward x is masked, in the backward dx."""
    x, w, A, B = arguments()
    y = result(lambda x, A: lora_linear(x, w, A, B, dropout_p=p, training=True, seed=SEED), x, A)
    assert emulated() == 5
    same(lambda x, A: lora_linear(x, w, A, B, dropout_p=p, training=True, seed=SEED), x, A)
    kept = harness.mask((1, 20 * 72), p).view(20, 72)
    z = torch.where(kept, x * (2 if p < 1 else 0), 0).float() @ A[0].float().t()
    assert torch.equal(y[0], (x.float() @ w.float().t() + z.bfloat16().float() @ B[0].float().t()).bfloat16())


def test_bias_columns_gates(emulated):
    x, w, A, B = arguments(ranks=(8, 3))
    more = dict(bias=strided(torch.arange(40).bfloat16()), column_scale=torch.full((40,), 2.0).bfloat16(), ranks=[8, 3])
    for gates in (torch.tensor([2.0, 0.5]), torch.ones(20, 2) * torch.tensor([0.5, 2.0])):
        same(lambda x, w, A, B, gates=gates: lora_linear(x, w, A, B, gates=gates, **more), x, w, A, B)
    assert emulated() == 10


@pytest.mark.parametrize("layout", [strided, transposed], ids=["strided", "transposed"])
def test_layouts(emulated, layout):
    """Of x, dy and the adapters any."""
    x, w, A, B = arguments()
    given = layout(x), w, (layout(A[0]),), (layout(B[0]),)
    same(lambda x, w, A, B: lora_linear(x, w, A, B), *given, dy=lambda y: layout(y.sign()))
    assert emulated() == 5
    same(lambda x, A: lora_linear(x.expand(2, 20, 72), w, A, B), x, A, dy=lambda y: y.new_ones(()).expand(y.shape))
    assert emulated() == 5


def test_one_row_has_any_stride(emulated):
    x, w, A, B = arguments(m=1)
    with torch.inference_mode():
        y = lora_linear(x, w, A, B)
        assert torch.equal(lora_linear(x.as_strided(x.shape, (2**31, 1)), w, A, B), y) and emulated() == 2


def test_weights_across(emulated):
    x, w, A, B = arguments()
    same(lambda x, A: lora_linear(x, transposed(w), A, B), x, A)
    assert emulated() == 5
    same(lambda x, A: lora_linear(x, strided(w), A, B), x, A)
    assert emulated() == 2, "t and dA alone"


def test_other_ops(emulated):
    x, w, A, B = arguments()
    same(lambda x, A: lora_shrink(x, A), x, A)
    assert emulated() == 3
    same(lambda x, A: lora_shrink(x, A, dropout_p=0.5, training=True, seed=SEED), x, A)
    assert emulated() == 3
    y, z = torch.zeros(20, 40).bfloat16(), torch.ones(20, 8)
    same(lambda y, z, B: lora_expand(y, z, B), y, z, B)
    assert emulated() == 2
    same(lambda z: lora_expand(y, z, B), z)
    assert emulated() == 2, "t alone"
    same(lambda B: lora_expand(y, z, B), B)
    assert emulated() == 2, "dB alone"


@pytest.mark.parametrize("gates", [None, torch.tensor([2.0, 0.5]), torch.ones(20, 2) * torch.tensor([0.5, 2.0])])
def test_expand(emulated, gates):
    """Columns of a y of any layout, which keeps its values."""
    _, _, _, B = arguments(ranks=(8, 3))
    y, z = torch.arange(20 * 50).view(20, 50).remainder(7).bfloat16(), torch.ones(20, 11)
    for layout in (torch.clone, strided, transposed):
        given, kept = layout(y), y.clone()
        same(lambda y, z, B: lora_expand(y, z, B, 0.5, gates=gates, columns=(3, 43)), given, z, B)
        assert emulated() == 2 and torch.equal(given, kept)


@pytest.mark.parametrize("gates", [None, torch.tensor([2.0, 0.5]), torch.ones(20, 2) * torch.tensor([0.5, 2.0])])
def test_embedding(emulated, gates):
    """Rows of a table, by ids of both types, into columns of a y of any layout, which keeps its values."""
    x, _, A, B = arguments(ranks=(11,), k=40)
    ids, kept = torch.arange(20) * 7 % 40, torch.cat((x, x), 1)[:, :50].clone()
    more = dict(scaling=0.5, gates=gates, ranks=[8, 3], columns=(3, 43))
    for layout, type in ((torch.clone, torch.int64), (strided, torch.int32), (transposed, torch.int64)):
        y, a, b, rows = layout(kept), layout(A[0]), layout(B[0]), ids.to(type)
        same(lambda y, a, b, rows=rows: lora_expand(y, a.t(), b, ids=rows, **more), y, a, b)
        assert emulated() == 2 and torch.equal(y, kept)
    y, rows = kept.view(4, 5, 50), ids.view(4, 5)
    same(lambda b: lora_expand(y, A[0].t(), b, columns=(3, 43), ids=rows), B[0])
    assert emulated() == 2, "the gather, and dB alone"
    for table in (A[0].float().t(), A[0].t().contiguous()):
        same(lambda table, b: lora_expand(y, table, b, columns=(3, 43), ids=rows), table, B[0])
        assert emulated() == 2, "the expand: no copy of a table is made, in no type"


@pytest.mark.parametrize("scaling", [0.5, torch.tensor([2.0, 0.5])])
def test_norm(emulated, scaling):
    """Of weights and adapters of any layout, fp32 masters among them; K is cut."""
    for layout, adapter in ((torch.clone, None), (strided, torch.float32), (transposed, None)):
        _, w, A, B = arguments(k=1100, ranks=(8, 3), adapter=adapter)
        given = layout(w), tuple(map(layout, A)), tuple(map(layout, B)), scaling
        found = lora_norm(*given)
        assert emulated() == 1
        native.pin_gpu("composed")
        torch.testing.assert_close(found, lora_norm(*given))
        native.pin_gpu("kernels")
    assert emulated() == 0 and lora_norm(w, [], []).shape == (40,) and emulated() == 1


def test_what_is_not_taken(emulated):
    for dtype in (torch.float32, torch.float64):
        same(lambda x, w, A, B: lora_linear(x, w, A, B), *arguments(dtype=dtype))
    same(lambda x, w, A, B: lora_linear(x, w, A, B), *arguments(m=0))
    assert emulated() == 0
    y = lora_linear(*arguments(n=0))
    assert y.shape == (20, 0)


@pytest.mark.parametrize("k", [72, 1100])
@pytest.mark.parametrize("gates", [None, torch.tensor([2.0, 0.5]), torch.ones(20, 2) * torch.tensor([0.5, 2.0])])
def test_decode(emulated, gates, k):
    """Few rows without gradients are one launch, which keeps no z."""
    x, w, A, B = arguments(k=k, ranks=(8, 3))
    bias, column_scale = strided(torch.arange(40).bfloat16()), torch.full((40,), 2.0)
    more = dict(bias=bias, column_scale=column_scale, ranks=[8, 3], gates=gates)
    with torch.inference_mode():
        y = lora_linear(x, w, A, B, scaling=0.5, **more)
        assert emulated() == 1
        native.pin_gpu("composed")
        assert torch.equal(y, lora_linear(x, w, A, B, scaling=0.5, **more))
        native.pin_gpu("kernels")
        lora_linear(x, transposed(w), A, B, ranks=[8, 3]), lora_linear(x.expand(4, 20, k), w, A, B, ranks=[8, 3])
        assert emulated() == 4, "w across, and more than 64 rows"


def test_blocks_of_99_kib(emulated, capability):
    """What takes more shared memory on sm_86 and its like is not asked for."""
    x, w, A, B = arguments(m=60, ranks=(56,))
    same(lambda x, A, B: lora_linear(x, w, A, B), x, A, B)
    assert emulated() == 6, "dy is read twice for t and dB"
    with torch.inference_mode():
        y = lora_linear(x, w, A, B)
        assert emulated() == 2, "no decoding of more than 48 tokens with more than 48 ranks"
        lora_linear(x[:48], w, A, B)
        assert emulated() == 1
    capability(80)
    same(lambda x, A, B: lora_linear(x, w, A, B), x, A, B)
    assert emulated() == 5
    with torch.inference_mode():
        assert torch.equal(lora_linear(x, w, A, B), y)


def test_the_same_bits_again(emulated):
    """Counters and parts of a split sum are fresh in each call."""
    torch.manual_seed(0)
    x, A = torch.randn(70, 1100).bfloat16(), (torch.randn(8, 1100).bfloat16(),)
    first = lora_shrink(x, A)
    assert torch.equal(first, lora_shrink(x, A))
    torch.testing.assert_close(first, x.float() @ A[0].float().t(), rtol=1e-4, atol=1e-3)


LAUNCHERS = re.findall(r"int (launch_\w+)\(const (\w+)\*", (harness.KERNELS / "params.h").read_text())
STUB = """#include "params.h"
extern "C" const char* fastlora_error(int status) { return status == FASTLORA_WORKSPACE ? "too small" : ""; }
extern "C" int fastlora_device(int* architecture, int* count) { return *architecture = *count = 80, 0; }
extern "C" long long fastlora_decode_counters(long long, long long) { return 1; }
extern "C" long long fastlora_shrink_backward_counters(long long, long long) { return 1; }
extern "C" long long fastlora_expand_backward_workspace(const Expand_backwardParams*, long long*) { return 0; }
extern "C" void emulate_buffer(const char*, size_t, int, int) {}
""" + "".join(f'extern "C" int {name}(const {p}*, void*) {{ return FASTLORA_WORKSPACE; }}\n' for name, p in LAUNCHERS)
COUNTERS = 'extern "C" long long fastlora_shrink_counters(long long, long long) { return 1; }\n'


@pytest.fixture
def library(tmp_path):
    """Loads a library made of some C++."""

    def load(text):
        source, made = tmp_path / "stub.cpp", tmp_path / f"stub{len(list(tmp_path.iterdir()))}.so"
        source.write_text("#include <cstddef>\n" + text)
        subprocess.run(["g++", "-shared", "-fPIC", f"-I{harness.KERNELS}", source, "-o", made], check=True)
        return native.load_cuda(str(made))

    yield load
    native.load_cuda("/nowhere")
    native.pin_gpu("")


def test_a_refusal_is_an_error(library):
    assert library(STUB + COUNTERS) == ""
    native.pin_gpu("kernels")
    with pytest.raises(RuntimeError, match="a CUDA kernel refused: too small"):
        lora_linear(*arguments())


def test_no_device_is_an_error_where_the_kernels_are_pinned(library):
    without = STUB.replace("return *architecture = *count = 80, 0;", "return FASTLORA_NO_DEVICE;")
    assert library(without + COUNTERS) == ""
    lora_linear(*arguments())
    native.pin_gpu("kernels")
    with pytest.raises(RuntimeError, match="FASTLORA_GPU=kernels"):
        lora_linear(*arguments())


def test_an_incomplete_library_is_not_used(library):
    assert "fastlora_shrink_counters" in library(STUB)
    native.pin_gpu("kernels")
    x, w, A, B = arguments()
    assert torch.equal(lora_linear(x, w, A, B), result(lambda x: lora_linear(x, w, A, B), x)[0])


OWN = [
    ("linear", "values_and_gradients and float16", 50),
    ("routed", "(test_pages or test_dora) and bfloat16 and not False", 13),
]


@pytest.mark.parametrize("file, choice, least", OWN)
def test_the_ops_own_tests(file, choice, least):
    """Values and gradients of the op's every case, by the error rule, in a process whose GPU is the emulator."""
    library = str(harness.build("plain"))
    env = {**os.environ, "FASTLORA_CUDA_LIBRARY": library, "FASTLORA_GPU": "kernels", "OMP_NUM_THREADS": "1"}
    count = "import ctypes, pytest, sys; failed = pytest.main(sys.argv[2:]); "
    count += "print('launches:', ctypes.CDLL(sys.argv[1]).emulate_launches()); sys.exit(failed)"
    command = [sys.executable, "-c", count, library, "-q", "-x", "-p", "no:cacheprovider", "-k", f"native and {choice}"]
    command += [harness.ROOT / f"tests/ops/test_{file}.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=harness.ROOT)
    passed, launches = (int(re.search(said, done.stdout, re.M)[1]) for said in (r"^(\d+) passed", r"^launches: (\d+)"))
    assert done.returncode == 0 and passed >= least and launches >= 2 * passed, done.stdout[-4000:]
