"""LoraHub: experts for three domains, composed for a fourth from 5, 10 and 50 of its texts.

Six LoRA experts on MiniLM's linear layers rate the sentiment of movie reviews, product reviews and editorials, all
with the same frozen head (see sentiment.py for the model and the texts). For tweets nothing is trained but six
numbers, one an expert, by LoraHub's search without gradients or by gradients, on a few tweets. Against it: the encoder
as it is, the expert that is best on the few tweets, the experts' average, and LoRA trained on the few tweets.
"""

import copy
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional

sys.path.append(str(Path(__file__).parents[1]))

import sentiment
from progress import progress, say

import fastlora
from fastlora.compose import merge_composed, search

TARGET, EXPERTS, TRAIN, STEPS, BATCH, TEST = "tweets", 2, 480, 30, 16, 300
# of the few texts the first tokens are read
SHOTS, DRAWS, LENGTH = (5, 10, 50), 2, 20
OPTIONS = {"r": 8, "lora_alpha": 16, "target_modules": r"encoder\..*\.(query|key|value|dense)"}
# the candidates that are evaluated; the first is nevergrad's, eight in a forward
SEARCHES = {
    "LoraHub, evolution": {"steps": 48, "population": 8},
    "LoraHub, gradients": {"steps": 12, "method": "gradient"},
    "weighted sum, gradients": {"steps": 12, "method": "gradient", "mode": "sum"},
}


def main():
    start = time.perf_counter()
    say("1. MiniLM and the texts of four domains")
    classifier, tokenizer = sentiment.load()
    rated = sentiment.rated_texts()
    split = sentiment.split(rated.pop(TARGET), *[max(SHOTS)] * DRAWS, TEST)
    *draws, test = (sentiment.Texts(tokenizer, part) for part in split)
    parts = {f"{domain} {i + 1}": sentiment.Texts(tokenizer, part) for domain, rows in rated.items()
             for i, part in enumerate(sentiment.split(rows, *[TRAIN] * EXPERTS))}  # fmt: skip
    print(f"   {len(parts)} x {TRAIN} texts of {', '.join(rated)} to train on; {TEST} {TARGET} to test")

    say("2. A head for the three domains, on the frozen encoder")
    train_head(classifier, parts.values())

    say(f"3. {len(parts)} experts of {STEPS} steps each")
    experts = {}
    for name, texts in parts.items():
        experts[name] = train(classifier, texts.batches(BATCH, STEPS), 2e-3)
        progress(len(experts), len(parts), name)

    say(f"4. Weights for {TARGET}: {DRAWS} draws of {', '.join(map(str, SHOTS))} texts")
    found = {(name, shots): [] for shots in SHOTS for name in methods()}
    for i, texts in enumerate(draws):
        for j, shots in enumerate(SHOTS):
            for name, choice in choices(classifier, experts, texts, shots, seed=i):
                found[name, shots].append(choice)
            progress(i * len(SHOTS) + j + 1, DRAWS * len(SHOTS), f"draw {i + 1}, {shots} texts")

    say(f"5. Accuracy in % on {TEST} {TARGET}, the mean of the draws")
    compare(classifier, experts, found, test)
    print(f"\nDone in {time.perf_counter() - start:.0f} s.")


def train_head(classifier, texts):
    """A linear head, trained to the end on features that are computed once, and frozen."""
    features = torch.cat([part.outputs(classifier.embed) for part in texts])
    labels = torch.cat([part.labels for part in texts])
    head = classifier.head.requires_grad_()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        functional.cross_entropy(head(features), labels).backward()
        optimizer.step()
    head.requires_grad_(False)


def train(classifier, batches, lr):
    """The adapter's tensors by name, with lora_alpha / r in lora_B."""
    torch.manual_seed(0)
    model = fastlora.inject(copy.deepcopy(classifier), **OPTIONS)
    optimizer = torch.optim.AdamW(sentiment.trained(model), lr=lr, weight_decay=0.0)
    for ids, mask, labels in batches:
        functional.cross_entropy(model(ids, mask), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    scale = OPTIONS["lora_alpha"] / OPTIONS["r"]
    tensors = fastlora.lora_state_dict(model)
    return {key: tensor.clone() * (scale if key.endswith("lora_B") else 1) for key, tensor in tensors.items()}


def methods():
    return ["the best single expert", *SEARCHES, "LoRA on the few texts"]


def row_losses(outputs, inputs):
    return functional.cross_entropy(outputs, inputs["labels"], reduction="none")


def choices(classifier, experts, texts, shots, seed):
    """(method, (adapters, weights, mode)) for a few texts: the test's are not looked at."""
    ids, mask, labels = texts.batch(range(shots))
    inputs = {"ids": ids[:, :LENGTH], "mask": mask[:, :LENGTH], "labels": labels}
    losses = {}
    for name, expert in experts.items():
        with torch.no_grad():
            outputs = composed(classifier, {name: expert}, [1.0])(inputs["ids"], inputs["mask"])
        losses[name] = row_losses(outputs, inputs).mean().item()
    best = min(losses, key=losses.get)
    yield "the best single expert", ({best: experts[best]}, [1.0], "lorahub")
    for name, options in SEARCHES.items():
        made = search(classifier, experts, inputs, row_losses, seed=seed, batch_size=10, **options)
        yield name, (experts, made.weights.tolist(), options.get("mode", "lorahub"))
    batches = [tuple(inputs[key][i::4] for key in ("ids", "mask", "labels")) for _ in range(8) for i in range(4)]
    yield "LoRA on the few texts", ({"own": train(classifier, batches, 1e-3)}, [1.0], "lorahub")


def composed(classifier, experts, weights, mode="lorahub"):
    return merge_composed(copy.deepcopy(classifier), experts, weights, mode)


def compare(classifier, experts, found, test):
    """The table; the test's texts are looked at here for the first time."""
    share = [1 / len(experts)] * len(experts)
    fixed = {"the frozen encoder": classifier, "the experts' average": composed(classifier, experts, share, "sum")}
    print(f"   {'':26}" + "".join(f"{f'{shots} texts':>12}" for shots in SHOTS))
    means = {}
    for name, model in fixed.items():
        means[name] = [test.accuracy(model)] * len(SHOTS)
    for name in methods():
        means[name] = []
        for shots in SHOTS:
            each = [test.accuracy(composed(classifier, *choice)) for choice in found[name, shots]]
            means[name].append(sum(each) / len(each))
    for name, values in means.items():
        print(f"   {name:26}" + "".join(f"{value:12.1f}" for value in values))
    winner = [max(means, key=lambda name: means[name][i]) for i in range(len(SHOTS))]
    print("   best: " + "; ".join(f"{name} with {shots}" for name, shots in zip(winner, SHOTS, strict=True)))
    plain = means["the frozen encoder"][-1]
    assert max(means[name][-1] for name in SEARCHES) > plain - 2, "the composition is worse than no adapter"


if __name__ == "__main__":
    main()
