"""X-LoRA on a causal language model: three experts on SmolLM2-135M-Instruct, and generation with a KV cache.

The experts are LoRA on all linear layers, trained on the standard library's docstrings, on movie reviews and on
newspaper editorials (docstrings.py, sentiment.py). The classifier learns on blocks of all three to gate them for each
token. Then the mixture continues a text twice, with and without the cache.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))

import docstrings
import sentiment
from progress import say

import fastlora
from benchmarks import models
from fastlora import mixture

STEPS, MIXED_STEPS, BATCH, LENGTH, HELD_OUT, NEW = 15, 15, 4, 64, 12, 48
PROMPT = 'def sort_lines(text, reverse=False):\n    """'


def main():
    start = time.perf_counter()
    torch.manual_seed(0)
    say("1. SmolLM2-135M-Instruct and blocks of three kinds of text")
    model, tokenizer = models.load()
    data = {"docstrings": docstrings.token_blocks(tokenizer, LENGTH)}
    rated = sentiment.rated_texts()
    for domain in ("movies", "editorials"):
        data[domain] = split(rated[domain], tokenizer)
    data = {name: (train, held_out[:HELD_OUT]) for name, (train, held_out) in data.items()}
    print(f"   {', '.join(data)}: {STEPS * BATCH} blocks of {LENGTH} tokens to train on, {HELD_OUT} held out")

    with tempfile.TemporaryDirectory() as root:
        say(f"2. Three experts of {STEPS} steps each")
        folders = {name: train_expert(model, name, train, Path(root, name)) for name, (train, _) in data.items()}
        say(f"3. The mixture: {MIXED_STEPS} steps on blocks of all three, the experts frozen")
        mixed = torch.cat([train[STEPS * BATCH :][: MIXED_STEPS * BATCH // 3] for train, _ in data.values()])
        mixed = mixed[torch.randperm(len(mixed))]
        config = mixture.xLoRAConfig(layerwise_scalings=True)
        model = mixture.add_xlora_to_model(models.twin(model), config, folders, False)
    model.print_trainable_parameters()
    fit(model, mixed, MIXED_STEPS, lr=3e-3)

    say("4. Loss for a token of blocks that were not trained on")
    compare(model.eval(), {name: held_out for name, (_, held_out) in data.items()})

    say(f"5. {NEW} tokens more, with the KV cache and without")
    generate(model, tokenizer)
    print(f"\nDone in {time.perf_counter() - start:.0f} s.")


def split(rows, tokenizer):
    """(training, held-out) blocks of a domain's texts, whose last fifth of documents is held out."""
    documents = list(dict.fromkeys(document for document, _, _ in rows))
    last = set(documents[len(documents) * 4 // 5 :])
    parts = [text for document, _, text in rows if document not in last], [t for d, _, t in rows if d in last]
    ids = [tokenizer(" ".join(part), verbose=False)["input_ids"] for part in parts]
    return tuple(torch.tensor(row[: len(row) // LENGTH * LENGTH]).view(-1, LENGTH) for row in ids)


def fit(model, blocks, steps, lr):
    optimizer = torch.optim.AdamW(sentiment.trained(model), lr=lr, weight_decay=0.0)
    start, first = time.perf_counter(), None
    for step in range(steps):
        batch = blocks[step * BATCH :][:BATCH]
        loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        first = first or loss.item()
    print(f"   loss {first:.2f} -> {loss.item():.2f}, {(time.perf_counter() - start) / steps:.1f} s/step", flush=True)


def train_expert(model, name, blocks, folder):
    print(f"   {name}", flush=True)
    expert = fastlora.inject(models.twin(model), r=8, lora_alpha=16)
    fit(expert.train(), blocks, STEPS, lr=1e-3)
    fastlora.save_adapter(expert, folder)
    return folder


@torch.no_grad()
def compare(model, tests):
    """The table: a row for each way to use the experts, a column for each kind of text."""
    names, n = model.expert_names, len(model.expert_names)
    ways = {"SmolLM2": [0.0] * n}
    ways |= {f"the expert of {name}": [float(i == j) for j in range(n)] for i, name in enumerate(names)}
    ways |= {"the average of the experts": [1 / n] * n, "the mixture": None}
    print(f"   {'':30}" + "".join(f"{name:>12}" for name in tests) + f"{'mean':>12}")
    means = {}
    for way, gates in ways.items():
        losses = []
        for blocks in tests.values():
            if gates:
                model.set_scalings_with_lifetime(torch.tensor(gates).expand(len(blocks), -1), 1)
            losses.append(model(blocks, labels=blocks, use_cache=False).loss.item())
        means[way] = sum(losses) / len(losses)
        print(f"   {way:30}" + "".join(f"{loss:12.3f}" for loss in losses) + f"{means[way]:12.3f}", flush=True)
    assert means["the mixture"] < means["SmolLM2"] - 0.05, "the mixture is hardly better than the plain model"


@torch.no_grad()
def generate(model, tokenizer):
    ids, found = tokenizer(PROMPT, return_tensors="pt"), {}
    for use_cache in (True, False):
        start = time.perf_counter()
        tokens = model.generate(**ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, use_cache=use_cache)
        found[use_cache] = tokens, time.perf_counter() - start
    print("   " + tokenizer.decode(found[True][0][0], skip_special_tokens=True).replace("\n", "\n   "))
    (cached, fast), (uncached, slow) = found[True], found[False]
    same = (cached == uncached).all().item()
    print(f"   with the cache {fast:.1f} s, without {slow:.1f} s; the same tokens: {'yes' if same else 'no'}")
    assert same, "the cache changes what is generated"


if __name__ == "__main__":
    main()
