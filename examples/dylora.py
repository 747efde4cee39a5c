"""One DyLoRA run against eight LoRA runs: how good is each rank, and what did the search for one cost?

MiniLM learns the sentiment of movie reviews (see sentiment.py). DyLoRA trains the ranks 1 to 8 at once, by drawing a
rank for each step; the alternative is a run for each rank. `python examples/dylora.py [PLOT.png]`

How much less time the one run takes is mostly a choice of steps: here it has twice those of a single run. Its ranks are
trained without freezing; the paper's recipe (`dynamic.sample(..., frozen=True)` with `dynamic.hold_frozen_rows`) did
worse in as many steps.
"""

import copy
import sys
import time
from pathlib import Path

import matplotlib
import torch
from torch.nn import functional

sys.path.append(str(Path(__file__).parents[1]))

import sentiment
from progress import say

import fastlora
from fastlora import dynamic

matplotlib.use("Agg")
from matplotlib import pyplot

RANK, ALPHA, BATCH, STEPS, DYNAMIC_STEPS = 8, 8, 32, 60, 120
TARGETS = ["query", "key", "value", "dense"]
TOLERANCE = 0.5


def main():
    start = time.perf_counter()
    say("1. MiniLM and the movie reviews")
    classifier, tokenizer = sentiment.load()
    rows = sentiment.rated_texts()["movies"]
    parts = sentiment.split(rows, 4000, 600, 1000)
    train, held_out, test = (sentiment.Texts(tokenizer, part) for part in parts)
    print(f"   {len(train)} texts to train on, {len(held_out)} to choose a rank by, {len(test)} to test")

    say(f"2. One DyLoRA run of {DYNAMIC_STEPS} steps: each draws a rank from 1 to {RANK}")
    model = adapted(classifier, RANK, dynamic=True)
    dynamic_seconds = fit(model, train, DYNAMIC_STEPS, lambda step: dynamic.sample(model, step))
    chosen = dynamic.evaluate_ranks(model, held_out.accuracy, TOLERANCE)
    values = dynamic.evaluate_ranks(model, test.accuracy).values

    say(f"3. {RANK} LoRA runs of {STEPS} steps")
    separate, seconds = {}, []
    for rank in range(1, RANK + 1):
        print(f"   rank {rank}", flush=True)
        single = adapted(classifier, rank)
        seconds.append(fit(single, train, STEPS))
        separate[rank] = test.accuracy(single)

    say("4. Accuracy in %, on the same texts")
    show(values, separate, dynamic_seconds, seconds)
    print(f"   smallest rank within {TOLERANCE} points of DyLoRA's best, on the texts to choose by: {chosen.rank}")
    check_cut(model, test)
    plot(values, separate, dynamic_seconds, sum(seconds))
    print(f"\nDone in {time.perf_counter() - start:.0f} s.")


def adapted(classifier, rank, **options):
    """A copy of the classifier with adapters of this rank, at scale ALPHA / rank, and a head that learns."""
    torch.manual_seed(0)
    model = copy.deepcopy(classifier)
    fastlora.inject(model, r=rank, lora_alpha=ALPHA, target_modules=TARGETS, **options)
    model.head.requires_grad_(True)
    return model


def fit(model, train, steps, before_step=lambda step: None):
    def losses():
        for step, (ids, mask, labels) in enumerate(train.batches(BATCH, steps)):
            before_step(step)
            yield functional.cross_entropy(model(ids, mask), labels)

    return sentiment.fit(sentiment.trained(model), losses(), steps)


def show(dynamic_values, separate, dynamic_seconds, seconds):
    print(f"   {'rank':24}" + "".join(f"{rank:7}" for rank in separate) + "   training")
    for name, values, spent in (
        ("one DyLoRA run", dynamic_values, dynamic_seconds),
        (f"{RANK} LoRA runs", separate, sum(seconds)),
    ):
        print(f"   {name:24}" + "".join(f"{value:7.1f}" for value in values.values()) + f"{spent:9.1f} s")
    gap = sum(dynamic_values.values()) / RANK - sum(separate.values()) / RANK
    less = sum(seconds) / dynamic_seconds
    print(f"   {DYNAMIC_STEPS} steps against {RANK} x {STEPS}: {less:.1f} times less training; mean {gap:+.1f} points")
    assert min(dynamic_values.values()) > 70, "a rank of the DyLoRA run has learned little"
    assert gap > -3, "DyLoRA's ranks are worse than those trained one by one"


def check_cut(model, test):
    """What is cut out at a rank is plain LoRA with the same outputs."""
    ids, mask, _ = test.batch(range(BATCH))
    for rank in (1, RANK // 2, RANK):
        cut = dynamic.truncate(model, rank)
        with torch.no_grad(), dynamic.model_rank(model, rank):
            difference = (cut(ids, mask) - model(ids, mask)).abs().max().item()
        print(f"   truncate(model, {rank}): largest difference of an output {difference:.1e}")
        assert difference < 1e-4, "the cut model computes something else"


def plot(dynamic_values, separate, dynamic_seconds, seconds):
    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.plot(separate.keys(), separate.values(), "o-", label=f"{RANK} LoRA runs, {seconds:.0f} s")
    axes.plot(dynamic_values.keys(), dynamic_values.values(), "s-", label=f"one DyLoRA run, {dynamic_seconds:.0f} s")
    axes.set(xlabel="rank", ylabel="accuracy on held-out movie reviews, %", title="MiniLM: every rank of one run")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else sentiment.CACHE / "dylora.png"
    figure.savefig(file, dpi=120)
    print(f"   plot: {file}")


if __name__ == "__main__":
    main()
