"""Many adapters in one batch: a layer, the pool's memory, an engine and a training step, against PEFT and the base.

python -m benchmarks.serving [--only PART] writes results/<machine>-serving.csv and its picture.
"""

import argparse
import contextlib
import csv
import functools
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import peft
import torch
from torch import nn

from fastlora import serve
from fastlora.nn.switch import selected
from fastlora.serve.batch import Batch
from fastlora.serve.engine import Engine
from fastlora.serve.pages import pages_for

from . import machine, models, steps
from .cases import DTYPES
from .clock import time_cpu

ROOT = Path(__file__).parents[1]
SIZE, RANKS = 1024, (4, 8, 16, 32, 4, 8, 16, 32)
TESTS = (
    "tests/ops/test_routed.py",
    "tests/serve/test_pool.py",
    "tests/serve/test_attach.py",
    "tests/serve/test_engine.py",
)
BARS = {
    ("layer fp32", "peft / fastlora"): (">=", 1.8), ("layer bf16", "peft / fastlora"): (">=", 3.5),
    **{(f"layer {d}", "fastlora / base"): ("<=", 1.4) for d in DTYPES},
    **{(f"layer {d}", "base rows / base"): ("<=", 1.05) for d in DTYPES},
    ("pool", "pages / slots of the highest rank"): ("<=", 0.25),
    ("engine", "8 adapters / base"): (">=", 0.75), ("engine", "8 adapters / peft"): (">=", 3.0),
    ("training", "one after the other / together"): (">=", 1.5), ("training", "peft / together"): (">=", 1.5),
}  # fmt: skip


class Layer(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(SIZE, SIZE, bias=False, dtype=dtype).requires_grad_(False)

    def forward(self, x):
        return self.linear(x)


def routed(dtype, ranks, **options):
    """(the layer, its pool with adapters "0", "1", … of these ranks)"""
    model = Layer(dtype)
    pool = serve.attach(model, max_rank=256, **options)
    for i, r in enumerate(ranks):
        pool.load(str(i), factors(i, r), pin=True)
    return model.linear, pool


def factors(seed, r):
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(r, SIZE, generator=generator) / 32, torch.randn(SIZE, r, generator=generator) * 0.05
    return {"linear.lora_A": A, "linear.lora_B": B}


def call(stack, made, names, x):
    """A function that runs a layer as inside a model, where the step has set the batch."""
    layer, pool = made
    stack.enter_context(selected(pool, Batch([pool.acquire(name).entries for name in names], pool.device)))
    return lambda: layer(x)


def peft_layer(dtype, ranks):
    config = [peft.LoraConfig(r=r, lora_alpha=r, target_modules=["linear"]) for r in ranks]
    model = peft.get_peft_model(Layer(dtype), config[0], "0", autocast_adapter_dtype=False)
    for i, c in enumerate(config[1:], 1):
        model.add_adapter(str(i), c)
    layer = model.base_model.model.linear.eval()
    for i, r in enumerate(ranks):
        for name, tensor in factors(i, r).items():
            getattr(layer, name.partition(".")[2])[str(i)].weight.data = tensor.to(dtype)
    return layer


@torch.inference_mode()
def layers():
    """8 sequences of 4 tokens with 8 adapters of ranks 4 to 32: against PEFT's adapter_names, and the base."""
    for name, dtype in DTYPES.items():
        x, names = torch.randn(8, 4, SIZE, dtype=dtype), [str(i) for i in range(8)]
        theirs, base = peft_layer(dtype, RANKS), Layer(dtype).linear
        with contextlib.ExitStack() as stack:
            calls = {
                "base": functools.partial(base, x),
                "fastlora": call(stack, routed(dtype, RANKS), names, x),
                "base rows": call(stack, routed(dtype, RANKS), [None] * 8, x),
                "peft": functools.partial(theirs, x, adapter_names=names),
            }
            torch.testing.assert_close(calls["fastlora"](), calls["peft"](), rtol=5e-2, atol=5e-2)
            timing = time_cpu(calls, seconds=3.0, rounds=(7, 200))
        for pair in (("fastlora", "base"), ("base rows", "base"), ("peft", "fastlora")):
            yield row(f"layer {name}", " / ".join(pair), timing.ratio(*pair))
        for method in calls:
            yield row(f"layer {name}", f"{method}, us", 1e6 * timing.quantiles(method)[1])


@torch.inference_mode()
def sweeps():
    """128 tokens over 1 … 128 adapters, over ranks, and over 10 … 1,000 adapters loaded: time over the base."""
    x = torch.randn(128, 1, SIZE)
    base = Layer(torch.float32).linear

    def compare(what, at, ranks, names):
        with contextlib.ExitStack() as stack:
            room = max(32, sum(-(-r // 16) for r in ranks))
            ours = call(stack, routed(torch.float32, ranks, adapters=room), names, x)
            timing = time_cpu({"base": functools.partial(base, x), "fastlora": ours}, seconds=0.7)
        return row(f"sweep {what}", "fastlora / base", timing.ratio("fastlora", "base"), at)

    for n in (1, 2, 4, 8, 16, 32, 64, 128):
        yield compare("adapters in the batch, rank 16", n, [16] * n, [str(i * n // 128) for i in range(128)])
    for r in (4, 8, 16, 32, 64, 128):
        yield compare("rank, 8 adapters in the batch", r, [r] * 8, [str(i // 16) for i in range(128)])
    for n in (10, 30, 100, 300, 1000):
        yield compare("adapters loaded, 8 of rank 16 in the batch", n, [16] * n, [str(i // 16) for i in range(128)])


def memory():
    ranks = [64] * 10 + [8] * 90
    _, pool = routed(torch.float32, ranks, adapters=100)
    page = pool.arenas["linear"].page_bytes
    yield row("pool", "pages / slots of the highest rank", pool.nbytes() / (100 * pages_for(64, False) * page))


def adapters_of(model, ranks, folder):
    """Folders of PEFT adapters for SmolLM2 on all its linear layers."""
    found = []
    for i, r in enumerate(ranks):
        theirs = steps.randomize(models.adapted(model, "peft", r, r), i)
        theirs.save_pretrained(folder / str(i))
        found.append(folder / str(i))
    return found


def engines(new=64):
    """SmolLM2-135M, 8 requests at once of 64 new tokens: with 8 adapters, without, and PEFT one after the other."""
    model, tokenizer = models.load()
    prompts = [tokenizer(f"Write about the number {i} and why people like it.")["input_ids"] for i in range(8)]
    with tempfile.TemporaryDirectory() as root:
        folders = adapters_of(model, RANKS, Path(root))
        theirs = peft.PeftModel.from_pretrained(models.twin(model), folders[0], "0").eval()
        for i, folder in enumerate(folders[1:], 1):
            theirs.load_adapter(folder, str(i))
        pool = serve.attach(models.twin(model), adapters=16, max_rank=32)
        for i, folder in enumerate(folders):
            pool.load(str(i), folder)
    engine = Engine(pool.model, pool, cache_tokens=4096, batch_tokens=256)

    def together(names):
        done = [threading.Event() for _ in prompts]
        for prompt, name, event in zip(prompts, names, done, strict=True):
            engine.submit(prompt, name, lambda token, finish, event=event: finish and event.set(),
                          max_new_tokens=new, ignore_eos=True, temperature=0)  # fmt: skip
        for event in done:
            event.wait()

    def alone():
        for i, prompt in enumerate(prompts):
            theirs.set_adapter(str(i))
            theirs.generate(input_ids=torch.tensor([prompt]), max_new_tokens=new, min_new_tokens=new, do_sample=False)

    rounds = {"8 adapters": lambda: together(map(str, range(8))), "base": lambda: together([None] * 8), "peft": alone}
    yield from rates(rounds, 8 * new, "engine")
    engine.stop()


def rates(rounds, tokens, case, repeats=3):
    """Tokens a second of each, and ratios as medians of the rounds; the first round warms up."""
    seconds = {name: [] for name in rounds}
    for i in range(repeats + 1):
        for name, run in rounds.items():
            start = time.perf_counter()
            run()
            if i:
                seconds[name].append(time.perf_counter() - start)
    middle = {name: sorted(each)[len(each) // 2] for name, each in seconds.items()}
    first, *others = rounds
    for name in rounds:
        yield row(case, f"{name}, tokens/s", tokens / middle[name])
    for name in others:
        ratios = sorted(b / a for a, b in zip(seconds[first], seconds[name], strict=True))
        yield row(case, f"{first} / {name}", ratios[len(ratios) // 2])


def training():
    """A step of SmolLM2-135M, forward and backward, of 4 adapters with 32 tokens each: together, or one by one."""
    model, _ = models.load()
    ids = torch.randint(0, 1000, (4, 32), generator=torch.Generator().manual_seed(0))
    theirs = models.adapted(model, "peft", 8, 8)
    for i in range(1, 4):
        theirs.add_adapter(str(i), theirs.peft_config["default"])
    ours = models.twin(model)
    pool = serve.attach(ours, adapters=1)
    ends = list(steps.TARGETS)
    made = {str(i): pool.create(str(i), 8, 8, ends) for i in range(4)}

    def step(run, rows, parameters):
        loss = run(input_ids=ids[rows], labels=ids[rows], use_cache=False).loss
        torch.autograd.grad(loss, parameters)

    def together():
        with serve.adapters(ours, list(made)):
            step(ours, slice(0, 4), [p for parameters in made.values() for p in parameters])

    def apart():
        for i, (name, parameters) in enumerate(made.items()):
            with serve.adapters(ours, [name]):
                step(ours, slice(i, i + 1), parameters)

    def peft_apart():
        for i, name in enumerate(("default", "1", "2", "3")):
            theirs.set_adapter(name)
            step(theirs, slice(i, i + 1), [p for p in theirs.parameters() if p.requires_grad])

    timing = time_cpu({"together": together, "apart": apart, "peft": peft_apart}, seconds=12.0, rounds=(7, 12))
    yield row("training", "one after the other / together", timing.ratio("apart", "together"))
    yield row("training", "peft / together", timing.ratio("peft", "together"))
    for method in timing.seconds:
        yield row("training", f"{method}, ms", 1e3 * timing.quantiles(method)[1])


def row(case, method, value, at=""):
    bar = BARS.get((case, method))
    met = "" if bar is None else "met" if (value >= bar[1] if bar[0] == ">=" else value <= bar[1]) else "missed"
    print(f"   {case:44} {at!s:>5} {method:36} {value:10.3f}  {' '.join(map(str, bar or ()))} {met}", flush=True)
    return {"case": case, "at": at, "method": method, "value": value, "bar": " ".join(map(str, bar or ())), "met": met}


def draw(rows, out):
    """A panel for each sweep: time over the base layer's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sweeps = {}
    for r in rows:
        if r["case"].startswith("sweep "):
            sweeps.setdefault(r["case"].removeprefix("sweep "), []).append((float(r["at"]), float(r["value"])))
    figure, axes = plt.subplots(1, len(sweeps), figsize=(4.2 * len(sweeps), 3.2), sharey=True, squeeze=False)
    for axis, (title, points) in zip(axes[0], sweeps.items(), strict=True):
        axis.plot(*zip(*sorted(points), strict=True), marker="o")
        axis.set(xscale="log", xlabel=title, ylim=(0.9, 1.6))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("time over the base layer")
    figure.suptitle(f"1024 → 1024, 128 tokens, fp32, {rows[0]['device']}, {rows[0]['threads']} threads")
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)


PARTS = {"layers": layers, "sweeps": sweeps, "memory": memory, "engines": engines, "training": training}


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, help="one part; the others' rows stay")
    chosen = parser.parse_args().only
    beside = Path(sys.executable).with_name("pytest")
    if subprocess.run([beside, "-q", "-x", "-m", "not slow", *TESTS], cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
        raise SystemExit(f"nothing is timed: {' '.join(TESTS)} did not pass")
    facts = machine.facts("cpu")
    path = ROOT / "benchmarks" / "results" / f"{machine.slug(facts['device'])}-serving.csv"
    kept = []
    if path.exists():
        with open(path, newline="") as file:
            kept = list(csv.DictReader(file))
    for part in [chosen] if chosen else PARTS:
        rows = [{**r, "part": part, "value": f"{r['value']:.5g}", **facts} for r in PARTS[part]()]
        kept = [r for r in kept if r["part"] != part] + rows
        with open(path, "w", newline="") as file:
            columns = dict.fromkeys(key for r in kept for key in r)
            writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)
    draw(kept, path.with_suffix(".png"))
    print(f"   {path}")


if __name__ == "__main__":
    main()
