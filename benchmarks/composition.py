"""LoraHub's search on MiniLM with 20 trained modules: candidates a second, and the time to an objective.

python -m benchmarks.composition [--quick] writes results/<machine>-composition.csv. The original is lorahub.get_score
on a PEFT model where `lorahub` and what it imports (datasets, pandas) are installed, else the same steps.
"""

import argparse
import copy
import csv
import statistics
import sys
import time
import warnings
from pathlib import Path

import nevergrad as ng
import numpy
import peft
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import fastlora
from fastlora.compose import default_l1_regularization, merge_composed, search

from . import machine

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import sentiment  # noqa: E402

R, MODULES, SHOTS, TOKENS, STEPS = 16, 20, 5, 16, 40
# the optimizer for populations was chosen on others
SEEDS = range(10, 15)
TARGETS = r"encoder\..*\.(query|key|value|dense)"
TRAINING = {"steps": 20, "batch": 16, "texts": 320}
# what is searched with until the original's objective is reached, or so many candidates are evaluated
SEARCHES = {
    "one at a time": {"steps": 40},
    "population 8": {"steps": 320, "population": 8},
    "gradient": {"steps": 80, "method": "gradient"},
}
COLUMNS = ("case", "method", "seed", "value", "candidates_per_s", "seconds", "objective", "evaluations", "reached",
           "device", "cpu", "threads", "allocator", "fastlora_cpu", "commit", "python", "torch", "loralib", "peft",
           "transformers", "triton", "nevergrad", "original")  # fmt: skip


def modules():
    """(the classifier with a head for all domains, its tokenizer, {name: folder} of modules, unseen texts)."""
    classifier, tokenizer = sentiment.load()
    parts, texts = {}, []
    for domain, rows in sentiment.rated_texts().items():
        *trained, unseen = sentiment.split(rows, *[TRAINING["texts"]] * (MODULES // 4), 100)
        parts |= {f"{domain}{i}": part for i, part in enumerate(trained)}
        texts.append(unseen)
    cache = sentiment.CACHE / "composition"
    head = cache / "head.pt"
    if not head.exists():
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(_trained_head(classifier, tokenizer, [pair for part in parts.values() for pair in part]), head)
    classifier.head.load_state_dict(torch.load(head))
    folders = {name: cache / f"{name}-r{R}" for name in parts}
    for name, folder in folders.items():
        if not (folder / "adapter_config.json").exists():
            print(f"   {name}", flush=True)
            fastlora.save_adapter(_trained(classifier, tokenizer, parts[name]), folder)
    return classifier, tokenizer, folders, texts


def _trained_head(classifier, tokenizer, pairs):
    texts = sentiment.Texts(tokenizer, pairs[:: max(1, len(pairs) // 2000)])
    features, head = texts.outputs(classifier.embed), copy.deepcopy(classifier.head).requires_grad_()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(head(features), texts.labels).backward()
        optimizer.step()
    return head.state_dict()


def _trained(classifier, tokenizer, pairs):
    torch.manual_seed(0)
    model = fastlora.inject(copy.deepcopy(classifier), R, 2 * R, target_modules=TARGETS)
    batches = sentiment.Texts(tokenizer, pairs).batches(TRAINING["batch"], TRAINING["steps"])
    losses = (F.cross_entropy(model(ids, mask), labels) for ids, mask, labels in batches)
    sentiment.fit(sentiment.trained(model), losses, TRAINING["steps"], lr=1e-3)
    return model


def shots(tokenizer, texts, seed):
    """Five texts of 16 tokens of a domain; the domains take turns."""
    pairs = texts[seed % len(texts)]
    pairs = pairs[seed * SHOTS : (seed + 1) * SHOTS]
    ids = tokenizer([text for text, _ in pairs], truncation=True, max_length=TOKENS, padding="max_length",
                    return_tensors="pt")  # fmt: skip
    labels = torch.tensor([label for _, label in pairs])
    return {"ids": ids["input_ids"], "mask": ids["attention_mask"], "labels": labels}


def row_losses(outputs, inputs):
    return F.cross_entropy(outputs, inputs["labels"], reduction="none")


class Original:
    """The original's procedure: the state dicts are summed, key by key, and set in a PEFT model at each candidate."""

    def __init__(self, classifier, folders):
        base = copy.deepcopy(classifier)
        names = list(folders)
        self.model = peft.PeftModel.from_pretrained(base, folders[names[0]]).eval()
        self.cache = {}
        for name, folder in folders.items():
            tensors = load_file(folder / "adapter_model.safetensors")
            self.cache[name] = {key: tensor.clone() for key, tensor in tensors.items()}
        try:
            from lorahub.algorithm import get_score

            self.get_score, self.source = get_score, "lorahub"
        except ImportError:
            self.get_score, self.source = self._get_score, "its steps"

    def _get_score(self, weights, model, cache, example_dataset, batch_size, get_loss, get_regular):
        names = list(cache)
        state = {key: weights[0] * cache[names[0]][key] for key in cache[names[0]]}
        for weight, name in zip(weights[1:], names[1:], strict=True):
            for key in state:
                state[key] = state[key] + weight * cache[name][key]
        peft.set_peft_model_state_dict(model, state)
        return get_loss(example_dataset, model, batch_size) + get_regular(weights)

    def learn(self, inputs, seed):
        """(best objective, seconds) of `lorahub_learning`'s loop."""
        numpy.random.seed(seed)
        space = ng.p.Array(init=[0] * MODULES, lower=[-1.5] * MODULES, upper=[1.5] * MODULES)
        optimizer = ng.optimizers.NGOpt(parametrization=space, budget=STEPS)
        best, start = float("inf"), time.perf_counter()

        def score(weights):
            nonlocal best
            value = self.get_score(weights, self.model, self.cache, inputs, None, _loss, default_l1_regularization)
            best = min(best, value)
            return value

        optimizer.minimize(score)
        return best, time.perf_counter() - start


def _loss(inputs, model, batch_size):
    with torch.no_grad():
        return float(row_losses(model(inputs["ids"], inputs["mask"]), inputs).mean())


def check_same(classifier, folders, inputs, original):
    """The original's objective of a candidate is a merged model's here."""
    weights = torch.linspace(-1, 1, MODULES).tolist()
    there = original.get_score(weights, original.model, original.cache, inputs, None, _loss, default_l1_regularization)
    here = _loss(inputs, merge_composed(copy.deepcopy(classifier), folders, weights), None)
    here += default_l1_regularization(weights)
    if abs(there - here) > 1e-3 * here:
        raise SystemExit(f"the original's objective is {there}, here it is {here}")


def rates(classifier, folders, inputs):
    """{method: candidates a second} over 40 candidates, nevergrad's own time included; the best of five runs each."""
    original, found = Original(classifier, folders), {}
    check_same(classifier, folders, inputs, original)
    for _ in range(5):
        seconds = {"original": original.learn(inputs, 0)[1]}
        for population in (1, 8):
            made = search(classifier, folders, inputs, row_losses, steps=STEPS, population=population)
            seconds[f"population {population}"] = made.seconds
        found = {name: max(STEPS / of, found.get(name, 0)) for name, of in seconds.items()}
    return found


def until(classifier, folders, inputs, seed, original):
    """{method: row}: the original's 40 candidates, and when each search is as good."""
    target, seconds = original.learn(inputs, seed)
    found = {"original": {"seconds": seconds, "objective": target, "evaluations": STEPS, "reached": seconds}}
    for name, options in SEARCHES.items():
        made = search(classifier, folders, inputs, row_losses, seed=seed, **options)
        # 1e-4: the same sums in another order
        reached = [at for _, at, best in made.history if best <= target + 1e-4]
        found[name] = {"seconds": made.seconds, "objective": made.objective, "evaluations": made.evaluations,
                       "reached": reached[0] if reached else float("inf")}  # fmt: skip
    return found


def show(rows):
    """The table of objective and time, medians over the seeds, and how much sooner a search is as good."""
    heads = f"{'objective':>10}{'candidates':>12}{'seconds':>9}{'as the original after':>23}"
    print(f"   {'median of the seeds':24}{heads}")
    for method in dict.fromkeys(row["method"] for row in rows):
        each = [row for row in rows if row["method"] == method]
        objective, count, seconds, reached = (
            statistics.median(row[column] for row in each) for column in ("objective", "evaluations", "seconds",
                                                                          "reached"))  # fmt: skip
        print(f"   {method:24}{objective:10.4f}{count:12.0f}{seconds:9.2f}{reached:21.2f} s")
    print(f"   the original's time over that of the best search: {sooner(rows):.1f}, the median of the seeds")


def sooner(rows):
    ratios = []
    for seed in {row["seed"] for row in rows}:
        times = {row["method"]: row["reached"] for row in rows if row["seed"] == seed}
        ratios.append(times.pop("original") / min(times["population 8"], times["gradient"]))
    return statistics.median(ratios)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed")
    seeds = SEEDS[:1] if parser.parse_args().quick else SEEDS
    warnings.filterwarnings("ignore", message="COBYLA")
    print(f"1. {MODULES} modules of rank {R} on MiniLM's linear layers", flush=True)
    classifier, tokenizer, folders, texts = modules()
    print(f"2. Candidates a second: {SHOTS} texts of {TOKENS} tokens, {STEPS} candidates", flush=True)
    speeds = rates(classifier, folders, shots(tokenizer, texts, SEEDS[0]))
    for name, rate in speeds.items():
        print(f"   {name:24}{rate:8.1f}", flush=True)
    print(f"3. Time to the objective of the original's {STEPS} candidates, {len(seeds)} seeds", flush=True)
    original, rows = Original(classifier, folders), []
    for seed in seeds:
        found = until(classifier, folders, shots(tokenizer, texts, seed), seed, original)
        rows += [{"case": "objective", "method": name, "seed": seed, **row} for name, row in found.items()]
    show(rows)
    rows.append({"case": "original over the best search", "method": "fastlora", "value": sooner(rows)})
    rows += [{"case": "rate", "method": name, "candidates_per_s": rate} for name, rate in speeds.items()]
    facts = machine.facts("cpu") | {"nevergrad": ng.__version__, "original": original.source}
    path = Path(__file__).parent / "results" / f"{machine.slug(machine.cpu_model())}-composition.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            row = {key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()}
            writer.writerow(row | facts)
    print(f"   {path}")


if __name__ == "__main__":
    main()
