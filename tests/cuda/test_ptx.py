"""What nvcc makes of the kernels: the half of tile.cuh that no host runs, and the resources of each. Needs no GPU.

python tests/cuda/test_ptx.py --record    writes the resources into resources.json and kernels/README.md
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib import import_module
from pathlib import Path

import harness
import pytest

NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(not NVCC, reason="no nvcc")
ARCHITECTURES = (80, 90)
OPS = [source.stem for source in sorted(harness.KERNELS.glob("*.cu"))]
RECORD, README = Path(__file__).with_name("resources.json"), harness.ROOT / "kernels" / "README.md"
MARKS = "<!-- cuda resources -->", "<!-- end of cuda resources -->"
COSTS = ("registers", "stack", "spills", "shared")
# What a thread loads from `in` goes through a wrapper to `out`: where it ends up shows the order of the operands.
PROBE = """
#include "tile.cuh"
#define PROBE(name) extern "C" __global__ void name(uint32_t* out, const uint32_t* in, float* d)
__shared__ unsigned char s[256];
template <class T> DEVICE void product(const uint32_t* in, float* d) {
  uint32_t a[4] = {in[0], in[1], in[2], in[3]};
  float acc[4] = {d[0], d[1], d[2], d[3]};
  mma(acc, a, in[4], in[5], T{});
  for (int i = 0; i < 4; i++) d[i] = acc[i];
}
PROBE(mma_bf16) { product<bf16>(in, d); }
PROBE(mma_f16) { product<fp16>(in, d); }
PROBE(matrix) { uint32_t r[4]; ldmatrix(r, s); for (int i = 0; i < 4; i++) out[i] = r[i]; }
PROBE(matrix_trans) { uint32_t r[4]; ldmatrix_trans(r, s); for (int i = 0; i < 4; i++) out[i] = r[i]; }
PROBE(copy) { copy_async(s, in, 6); copy_async_commit(); copy_async_wait<2>(); }
"""


def nvcc(*arguments):
    done = subprocess.run(
        [NVCC, "-std=c++17", "-O3", f"-I{harness.KERNELS}", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@cache
def probes(arch):
    """name → the PTX of each probe."""
    with tempfile.TemporaryDirectory() as folder:
        source, ptx = Path(folder) / "probe.cu", Path(folder) / "probe.ptx"
        source.write_text(PROBE)
        nvcc(f"-arch=compute_{arch}", "-ptx", source, "-o", ptx)
        return dict(re.findall(r"\.entry (\w+)\((.*?)\n}", ptx.read_text(), re.S))


def origin(body):
    """register → byte offset that it was loaded from; then also what was stored where."""
    offset = {}
    for kind, registers in re.findall(r"(ld|st)\.global[\w.:]*\s+(.*?);", body):
        address = re.search(r"\[%rd\d+(?:\+(\d+))?\]", registers)
        names = re.findall(r"%[rf]\d+", re.sub(r"\[.*?\]", "", registers))
        for i, name in enumerate(names):
            offset[kind, name] = int(address[1] or 0) + 4 * i
    return offset


def operands(body, mnemonic):
    """The operands of the one instruction `mnemonic`: register lists and single operands, in their order."""
    found = re.findall(re.escape(mnemonic) + r"\s+([^;]*);", body)
    assert len(found) == 1, f"{mnemonic}: {len(found)} in the PTX"
    lists = re.findall(r"\{(.*?)\}|(\[[^]]*\]|[^,{}\[\]\s]+)", found[0])
    return [tuple(x.strip() for x in group.split(",")) if group else one for group, one in lists]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_mma(arch, kind):
    """d, a, b, c: a is in[0..3], b is in[4..5], and c is d, which goes back to where it came from."""
    body = probes(arch)[f"mma_{kind}"]
    d, a, b, c = operands(body, f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32")
    at = origin(body)
    assert [at["ld", r] for r in a] == [0, 4, 8, 12] and [at["ld", r] for r in b] == [16, 20]
    assert [at["ld", r] for r in c] == [0, 4, 8, 12] == [at["st", r] for r in d]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name, suffix", [("matrix", ""), ("matrix_trans", ".trans")])
def test_ldmatrix(arch, name, suffix):
    body = probes(arch)[name]
    registers, address = operands(body, f"ldmatrix.sync.aligned.m8n8.x4{suffix}.shared.b16")
    assert [origin(body)["st", r] for r in registers] == [0, 4, 8, 12] and address.startswith("[")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_copies(arch):
    """Target, source, 16, and how many of the 16 bytes are read; committed, then waited for."""
    body = probes(arch)["copy"]
    given = operands(body, "cp.async.cg.shared.global")
    assert len(given) == 4
    to, source, size, count = given
    moved = dict(re.findall(r"mov\.[bu]32\s+(%r\d+), (\w+);", body))
    assert moved.get(to[1:-1], to[1:-1]) == "s" and "%rd" in source
    assert size == "16" and moved.get(count, count) == "6"
    order = [body.index(i) for i in ("cp.async.cg", "cp.async.commit_group;", "cp.async.wait_group 2;")]
    assert order == sorted(order)


@pytest.mark.parametrize(
    "op, loads, stores",
    [("expand", 14, 4), ("gather", 12, 4), ("norms", 8, 0), ("routed_shrink", 6, 0), ("routed_expand", 21, 4)],
)
def test_chunks_are_moved_at_once(op, loads, stores):
    """Where direct.cuh means an access of 16 bytes, nvcc makes one: not eight of two bytes."""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / f"{op}.ptx"
        nvcc("-arch=compute_80", "-ptx", harness.KERNELS / f"{op}.cu", "-o", ptx)
        bodies = re.findall(r"\.entry \w+\((.*?)\n}", ptx.read_text(), re.S)
    found = [tuple(body.count(f"{kind}.global.v4.u32") for kind in ("ld", "st")) for body in bodies]
    assert found == [(loads, stores)] * 2


def resources():
    """{sm_80: {kernel: costs}, …} as ptxas reports them; dynamic shared memory is what the launchers ask for."""
    found, dynamic = {}, {}
    for op in OPS:
        module = import_module(f"test_{op}")
        module.Problem(module.SMALLEST).run(harness.library("plain"), 0)
        dynamic[f"{op}_kernel"] = harness.library("plain").library.emulate_shared()
    for arch in ARCHITECTURES:
        text = "".join(o.with_suffix(".txt").read_text() for o in harness.compile_for_gpu(arch).values())
        for entry in text.split("Compiling entry function '")[1:]:
            name, arguments = re.search(r"\d([a-z_]+_kernel)I(\w+?)E+v", entry).groups()
            half = "fp16" if "__half" in arguments else "bf16"
            spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
            shared = re.search(r"(\d+) bytes smem", entry)
            found.setdefault(f"sm_{arch}", {})[f"{name} {half}{' transposed' * ('Lb1' in arguments)}"] = {
                "registers": int(re.search(r"Used (\d+) registers", entry)[1]),
                "stack": int(spills[1]),
                "spills": int(spills[2]) + int(spills[3]),
                "shared": dynamic[name] + (int(shared[1]) if shared else 0),
            }
    return found


def test_resources():
    """No figure is worse than the one recorded, and there are the same kernels."""
    recorded, found = json.loads(RECORD.read_text()), resources()
    worse = [
        f"{arch} {kernel}: {cost} {found[arch][kernel][cost]}, recorded {figures[cost]}"
        for arch, kernels in recorded.items()
        for kernel, figures in kernels.items()
        for cost in COSTS
        if found[arch][kernel][cost] > figures[cost]
    ]
    assert not worse, worse
    assert {a: set(k) for a, k in found.items()} == {a: set(k) for a, k in recorded.items()}


def test_a_library_for_gpus_loads_without_one():
    """The launchers return "no CUDA device" here, whatever they are given, and do not crash."""
    library = harness.Library(harness.build_for_gpu(90))
    none = library.constants["FASTLORA_NO_DEVICE"]
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU")
    for name in OPS:
        params = library.structs[f"{name.capitalize()}Params"]()
        for given in (params, None):
            status = library.library[f"launch_{name}"](harness.reference(given), None)
            assert status == none, library.sentence(status)
    assert "no CUDA device" in library.sentence(none)


def record():
    found = resources()
    RECORD.write_text(json.dumps(found, indent=1) + "\n")
    rows = ["| kernel | sm_80 | sm_90 |", "|---|---|---|"]
    for kernel in sorted(found["sm_80"]):
        cells = (" · ".join(str(found[arch][kernel][c]) for c in COSTS) for arch in found)
        rows.append(f"| {kernel} | {' | '.join(cells)} |")
    before, rest = README.read_text().split(MARKS[0])
    README.write_text("\n".join([before + MARKS[0], *rows, MARKS[1] + rest.split(MARKS[1])[1]]))


if __name__ == "__main__" and sys.argv[1:] == ["--record"]:
    record()
