"""Compile every kernel for sm_80 and sm_90 without a GPU and read what costs speed: registers, spills, shared memory.

    python tests/kernels/aot.py             print the table
    python tests/kernels/aot.py --check     fail where a figure is worse than kernels/resources.json says
    python tests/kernels/aot.py --record    write this Triton version's figures there and in kernels/README.md

What is compiled is what the launchers launch: they run on meta tensors and the launches are caught on their way.
"""

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora.kernels import dropout as dropout_module
from fastlora.kernels import expand, linear, routed, shrink, tile

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "kernels" / "resources.json"
README = ROOT / "kernels" / "README.md"
MARKS = ("<!-- resources -->", "<!-- end of resources -->")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
VERSION = ".".join(triton.__version__.split(".")[:2])
SHARED_LIMIT = {80: 166912, 90: 232448}
# The exit status of --check under a Triton version that nobody recorded.
UNRECORDED = 3
# What must not grow, and what must not shrink: the wgmma groups in flight in the K loop, and the asynchronous copies,
# TMA's apart; all fall to nothing, without an error, when a change undoes the pipelining.
COSTS = ("registers", "spills", "shared")
GAINS = ("wait", "copies", "tma")
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}


def calls():
    """name → a function that launches; shapes are those of a 4096 × 4096 layer unless the name says otherwise."""

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    scaling, seed = torch.tensor(2.0), meta(dtype=torch.int64)

    def forward(M, K=4096, N=4096, R=16, dtype=torch.bfloat16, adapters=None, gates=False, dora=False, p=0.0):
        a, b = meta(R, K, dtype=adapters or dtype), meta(N, R, dtype=adapters or dtype)
        g = meta(M, R, dtype=torch.float32) if gates else None
        c, bias = (meta(N, dtype=torch.float32), meta(N, dtype=dtype)) if dora else (None, None)
        x, w = meta(M, K, dtype=dtype), meta(N, K, dtype=dtype)
        return linear.lora_linear_forward(x, w, [a], [b], scaling, bias, g, [], c, p, seed if p else None)

    def gated(M, ranks, E):
        z, b, g = meta(M, sum(ranks), dtype=fp32), meta(4096, sum(ranks)), meta(M, E, dtype=fp32)
        return expand.lora_expand_backward(
            meta(M, 4096), z, [b], scaling, g, ranks, [], None, [True, True, False, True]
        )

    def backward(M, K=4096, N=4096, R=16, dtype=torch.bfloat16, adapters=None, gates=False, p=0.0):
        a, b = meta(R, K, dtype=adapters or dtype), meta(N, R, dtype=adapters or dtype)
        g = meta(M, R, dtype=torch.float32) if gates else None
        x, w, dy = meta(M, K, dtype=dtype), meta(N, K, dtype=dtype), meta(M, N, dtype=dtype)
        z, needs = meta(M, R, dtype=torch.float32), [True, False, True, True, False, False, False, False]
        s = seed if p else None
        return linear.lora_linear_backward(dy, x, w, [a], [b], scaling, g, [], None, p, s, z, None, needs)

    def expanded(M, dtype=torch.bfloat16):
        y, z, b = meta(M, 4096, dtype=dtype), meta(M, 16, dtype=torch.float32), meta(4096, 16, dtype=dtype)
        return expand.lora_expand(y, z, [b], scaling, None, [], [], None)

    def embedded(M, R=16, dtype=torch.bfloat16, adapters=None, gates=False):
        g, ids = meta(M, R, dtype=fp32) if gates else None, meta(M, dtype=torch.int64)
        a, b = meta(R, 50257, dtype=adapters or dtype), meta(4096, R, dtype=adapters or dtype)
        return expand.lora_expand(meta(M, 4096, dtype=dtype), a.t(), [b], scaling, g, [], [], ids)

    def routing(T, most=2, slices=(), dtype=torch.bfloat16, bias=False, K=4096, N=4096):
        i32, (x, w) = torch.int32, (meta(T, K, dtype=dtype), meta(N, K, dtype=dtype))
        lists = [meta(T + 1, dtype=i32), meta(T, dtype=i32), meta(T, dtype=torch.int64), meta(T, 3, dtype=i32), None]
        a, b = meta(9, max(len(slices), 1), 8, K, dtype=dtype), meta(9, 8, N, dtype=dtype)
        pages = [a, b, meta(4, most, dtype=i32), meta(4, dtype=i32), meta(4, dtype=torch.float32), meta(4, dtype=i32)]
        gates, bias = meta(T, dtype=torch.float32), meta(N, dtype=dtype) if bias else None
        return routed.lora_routed_forward(x, w, [], [], scaling, bias, lists, gates, [], slices, pages)

    def tma(call, *args, **options):
        tile.FORM = "tma"
        try:
            call(*args, **options)
        finally:
            tile.FORM = ""

    fp32 = torch.float32
    return {
        "forward M=8192": lambda: forward(8192),
        "forward M=8192 R=64 gates fp32-adapters": lambda: forward(8192, R=64, gates=True, adapters=fp32),
        "forward M=8192 R=256": lambda: forward(8192, R=256),
        "forward M=8192 dropout": lambda: forward(8192, p=0.1),
        "forward M=8192 fp16 bias c": lambda: forward(8192, dtype=torch.float16, dora=True),
        "forward M=512 fp32": lambda: forward(512, dtype=fp32),
        "forward M=512 odd K N": lambda: forward(512, K=4095, N=4001, R=3, p=0.1),
        "forward M=512": lambda: forward(512),
        "forward M=64": lambda: forward(64),
        "forward M=16": lambda: forward(16),
        "forward M=64 R=32 gates fp32-adapters": lambda: forward(64, R=32, gates=True, adapters=fp32),
        "forward M=16 odd K N": lambda: forward(16, K=4095, N=4001, R=3),
        "forward M=16 fp32": lambda: forward(16, dtype=fp32),
        "forward M=1 R=1 dropout": lambda: forward(1, R=1, p=0.1),
        "backward M=8192": lambda: backward(8192),
        "backward M=8192 dropout": lambda: backward(8192, p=0.1),
        "backward M=8192 R=64 gates fp32-adapters": lambda: backward(8192, R=64, gates=True, adapters=fp32),
        "backward M=512 fp32 dropout": lambda: backward(512, dtype=fp32, p=0.1),
        "backward M=512": lambda: backward(512),
        "backward M=16": lambda: backward(16),
        "backward M=1 R=1 dropout": lambda: backward(1, R=1, p=0.1),
        "tma forward M=8192": lambda: tma(forward, 8192),
        "tma forward M=8192 R=64 gates fp32-adapters": lambda: tma(forward, 8192, R=64, gates=True, adapters=fp32),
        "tma forward M=8192 R=64 gates": lambda: tma(forward, 8192, R=64, gates=True),
        "tma forward M=8192 fp16 bias c": lambda: tma(forward, 8192, dtype=torch.float16, dora=True),
        "tma forward M=500 off the grid": lambda: tma(forward, 500, K=4088, N=4008, R=3),
        "tma backward M=8192": lambda: tma(backward, 8192),
        "tma backward M=8192 R=64 gates fp32-adapters": lambda: tma(backward, 8192, R=64, gates=True, adapters=fp32),
        "tma backward M=512": lambda: tma(backward, 512),
        "expand M=8192": lambda: expanded(8192),
        "expand M=16 fp32": lambda: expanded(16, fp32),
        "embedding M=8192": lambda: embedded(8192),
        "embedding M=8192 R=64 gates fp32-adapters": lambda: embedded(8192, R=64, gates=True, adapters=fp32),
        "embedding M=16 fp32": lambda: embedded(16, dtype=fp32),
        "gates M=8192": lambda: gated(8192, [16], 1),
        "gates M=8192 E=8": lambda: gated(8192, [16] * 8, 8),
        "gates M=16 E=8": lambda: gated(16, [16] * 8, 8),
        "gates M=16 of rank rows": lambda: gated(16, [1] * 16, 16),
        "shrink_backward M=8192 dropout": lambda: shrink.lora_shrink_backward(
            meta(8192, 16, dtype=fp32), meta(8192, 4096), [meta(16, 4096)], 0.1, seed, [True, True]
        ),
        "routed T=128": lambda: routing(128),
        "routed T=128 R=64 slices bias": lambda: routing(128, 8, (2048, 1024, 1024), bias=True),
        "routed T=128 fp32": lambda: routing(128, dtype=fp32),
        "routed T=128 odd K N": lambda: routing(128, 1, K=4095, N=4001),
        "routed T=8": lambda: routing(8),
        "routed T=8 R=64 slices bias": lambda: routing(8, 8, (2048, 1024, 1024), bias=True),
        "routed T=8 fp32": lambda: routing(8, dtype=fp32),
        "dropout": lambda: dropout_module.lora_dropout(meta(8192, 4096), 0.1, seed),
        "dropout fp32": lambda: dropout_module.lora_dropout(meta(8192, 4096, dtype=fp32), 0.1, seed),
    }  # fmt: skip


def caught(arch):
    """(label, kernel, arguments, options) of every launch of every call, as on a GPU of this architecture."""
    launches = []
    tile.device_of = lambda x: tile.Device(arch, {80: 108, 90: 132}[arch])
    for name, call in calls().items():

        def catch(kernel, grid, x, *args, num_warps=4, num_stages=3, name=name, **constants):
            if name.startswith("tma") and "_tma_" not in kernel.fn.__name__:
                return
            options = dict(num_warps=num_warps, num_stages=num_stages)
            label = f"sm_{arch} {kernel.fn.__name__.strip('_').removesuffix('_kernel')}: {name.removeprefix('tma ')}"
            launches.append((label, kernel, dict(zip(kernel.arg_names, args, strict=False)) | constants, options))

        tile.launch = catch
        call()
    return launches


def source(kernel, arguments):
    """The launch's argument types, constants and alignment, specialised as Triton's launcher does."""
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>"
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value is None or kernel.params[i].is_constexpr or value == 1:
            signature[name] = "constexpr"
            constants[name] = value
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        aligned = isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0)
        if aligned and signature[name] != "constexpr":
            attributes[(i,)] = [["tt.divisibility", 16]]
    key = repr((kernel.fn.__name__, signature, constants, attributes))
    return ASTSource(kernel, signature, constants, attributes), key


def figures(compiled):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = [subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
                for option in ("--dump-resource-usage", "--dump-sass")]  # fmt: skip
    ptx = compiled.asm["ptx"]
    # In SASS too: ptxas waits for each wgmma, whatever the PTX says, where it cannot prove its accumulator untouched.
    waits = [re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx), re.findall(r"gsb\d, 0x(\d+)", dump[1])]
    matrix = sorted(set(re.findall(r"(?:wgmma\.mma_async|mma)\.sync\.aligned\.(m\d+n\d+k\d+)", ptx)))
    return {
        "registers": int(re.search(r"REG:(\d+)", dump[0])[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", dump[1])),
        "shared": compiled.metadata.shared,
        "wait": min(max(map(int, found), default=0) for found in waits),
        "copies": len(re.findall(r"cp\.async\.c[ag]", ptx)),
        "tma": len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        "mma": " ".join(matrix),
        "launch": f"w{compiled.metadata.num_warps} s{compiled.metadata.num_stages}",
    }


def measure(arch):
    """label → figures; a kernel that several calls launch alike is compiled once."""
    table, seen = {}, set()
    for label, kernel, arguments, options in caught(arch):
        src, key = source(kernel, arguments)
        if (key, str(options)) in seen:
            continue
        seen.add((key, str(options)))
        table[label] = figures(triton.compile(src, target=GPUTarget("cuda", arch, 32), options=options))
    return table


def complaints(table, recorded):
    """Sentences for what is worse than recorded, or cannot run at all."""
    found = [f"{label}: is recorded, but not launched" for label in recorded.keys() - table.keys()]
    for label, now in table.items():
        arch = int(label[3:5])
        if now["shared"] > SHARED_LIMIT[arch]:
            found.append(f"{label}: {now['shared']} bytes of shared memory, sm_{arch} has {SHARED_LIMIT[arch]}")
        # two loads a stage and the store
        if "product_tma" in label and (now["spills"] or not now["wait"] or now["tma"] <= 2 * int(now["launch"][-1])):
            found.append(f"{label}: spills, nothing in flight, or no TMA: {now}")
        then = recorded.get(label)
        if then is None:
            found.append(f"{label}: is not in {RECORD.name}: python tests/kernels/aot.py --record")
            continue
        found += [f"{label}: {cost} {then[cost]} -> {now[cost]}" for cost in COSTS if now[cost] > then[cost]]
        found += [f"{label}: {gain} {then[gain]} -> {now[gain]}" for gain in GAINS if now[gain] < then.get(gain, 0)]
    return found


def write_table(every):
    """The README's table: registers · spills · shared KiB · wait, for each Triton version."""
    versions = sorted(every)
    lines = ["| launch | " + " | ".join(f"Triton {v}" for v in versions) + " |", "|" + "---|" * (1 + len(versions))]
    for label in sorted(set().union(*every.values())):
        cells = [every[v].get(label) for v in versions]
        cells = [c and f"{c['registers']} · {c['spills']} · {c['shared'] // 1024} · {c['wait']}" or "" for c in cells]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    head, _, rest = README.read_text().partition(MARKS[0])
    tail = rest.partition(MARKS[1])[2]
    README.write_text(f"{head}{MARKS[0]}\n" + "\n".join(lines) + f"\n{MARKS[1]}{tail}")


def record(every):
    """One line a launch; a count of TMA copies only where there are some."""
    parts = []
    for version, table in sorted(every.items()):
        kept = {label: {k: v for k, v in row.items() if v or k != "tma"} for label, row in sorted(table.items())}
        rows = ",\n".join(f"  {json.dumps(label)}: {json.dumps(row)}" for label, row in kept.items())
        parts.append(f' "{version}": {{\n{rows}\n }}')
    RECORD.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    write_table(every)


def main(arguments):
    every = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if "--check" in arguments and VERSION not in every:
        print(f"Triton {VERSION} is not in {RECORD.name}: python tests/kernels/aot.py --record")
        return UNRECORDED
    with ProcessPoolExecutor(2) as pool:
        table = {label: row for part in pool.map(measure, (80, 90)) for label, row in part.items()}
    for label, row in table.items():
        print(f"{label:72} " + "  ".join(f"{k}={v}" for k, v in row.items()))
    if "--record" in arguments:
        record({**every, VERSION: table})
    found = complaints(table, every[VERSION]) if "--check" in arguments else []
    print("\n".join(found))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
