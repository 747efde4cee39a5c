"""One model, four named tasks: the sentiment of movie reviews, product reviews, tweets and newspaper editorials.

Each task has its own adapters on MiniLM's linear layers and its own head (see sentiment.py for the model and the
texts). Trained in turns in one model, the tasks do not touch each other; afterwards one batch may mix them.
"""

import copy
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

sys.path.append(str(Path(__file__).parents[1]))

import sentiment
from progress import say

import fastlora
from fastlora import tasks

BATCH, STEPS, TRAIN, TEST = 32, 60, 2000, 500
# the head's own weight is zero and stays so: what a task adds to it is the task's head
OPTIONS = {"r": 8, "lora_alpha": 16, "target_modules": r".*\.(query|key|value|dense)|head"}


def main():
    start = time.perf_counter()
    say("1. MiniLM and the texts of four domains")
    classifier, tokenizer = sentiment.load()
    check_encoder(classifier, tokenizer)
    data = {}
    for domain, rows in sentiment.rated_texts().items():
        data[domain] = [sentiment.Texts(tokenizer, part) for part in sentiment.split(rows, TRAIN, TEST)]
    print(f"   {', '.join(data)}: {TRAIN} texts each to train on, {TEST} to test, half of them positive")

    say("2. A frozen encoder: only a head for each domain")
    frozen = {domain: frozen_accuracy(classifier, *texts) for domain, texts in data.items()}

    say(f"3. Four runs of {STEPS} steps, each with a model of its own")
    alone = {domain: train_alone(classifier, domain, train) for domain, (train, _) in data.items()}

    say(f"4. One model with four tasks, in turns: {len(data)} x {STEPS} steps")
    model = train_in_turns(classifier, {domain: train for domain, (train, _) in data.items()})

    say("5. Accuracy in %, on texts of documents that were not trained on")
    compare(model, frozen, alone, {domain: test for domain, (_, test) in data.items()})

    say("6. One batch that mixes the four, and rows without a task")
    mix(model, classifier, {domain: test for domain, (_, test) in data.items()})
    print(f"\nDone in {time.perf_counter() - start:.0f} s.")


def check_encoder(classifier, tokenizer):
    """The weights are the real ones: what means the same lies close together."""
    layers, size = classifier.encoder.config.num_hidden_layers, classifier.encoder.config.hidden_size
    said = ["I enjoyed every minute of this movie.", "The film was a delight from start to finish.",
            "The central bank raised interest rates again."]  # fmt: skip
    texts = sentiment.Texts(tokenizer, [(text, 0) for text in said])
    first, same, other = functional.normalize(texts.outputs(classifier.embed))
    print(f"   {layers} layers of {size}; cosine of praise and praise {first @ same:.2f}, and news {first @ other:.2f}")
    assert (layers, size) == (6, 384) and first @ same > first @ other + 0.3, "this is not MiniLM"


def frozen_accuracy(classifier, train, test):
    """The accuracy of a linear head, trained to the end on features that are computed once."""
    torch.manual_seed(0)
    head = nn.Linear(classifier.head.in_features, 2)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    features = train.outputs(classifier.embed)
    for _ in range(300):
        optimizer.zero_grad()
        functional.cross_entropy(head(features), train.labels).backward()
        optimizer.step()
    return test.accuracy(lambda ids, mask: head(classifier.embed(ids, mask)))


def losses(model, batches, **chosen):
    for ids, mask, labels in batches:
        yield functional.cross_entropy(model(ids, mask, **chosen), labels)


def train_alone(classifier, domain, train):
    """A model with plain LoRA for one domain."""
    print(f"   {domain}", flush=True)
    torch.manual_seed(0)
    model = fastlora.inject(copy.deepcopy(classifier), **OPTIONS)
    sentiment.fit(sentiment.trained(model), losses(model, train.batches(BATCH, STEPS)), STEPS)
    return model


def train_in_turns(classifier, texts):
    """A model with a task for each domain; step by step each has its turn, with the batches of its run alone."""
    model = tasks.Model(copy.deepcopy(classifier), **OPTIONS)
    for domain in texts:
        torch.manual_seed(0)
        model.add_task(domain)
    runs = [losses(model, train.batches(BATCH, STEPS), task=domain) for domain, train in texts.items()]
    in_turns = (next(run) for _ in range(STEPS) for run in runs)
    sentiment.fit(sentiment.trained(model), in_turns, len(runs) * STEPS, turns=len(runs))
    return model


def compare(model, frozen, alone, tests):
    """The table; a task is what its run alone is, as the others' steps leave its parameters as they were."""
    found, differences = {"a head on the frozen encoder": frozen, "four runs": {}, "four tasks of one model": {}}, []
    for domain, test in tests.items():
        logits = [test.outputs(alone[domain]), test.outputs(lambda *x, task=domain: model(*x, task=task))]
        for row, out in zip(list(found)[1:], logits, strict=True):
            found[row][domain] = 100 * (out.argmax(1) == test.labels).float().mean().item()
        differences.append((logits[0] - logits[1]).abs().max().item())
    print(f"   {'':30}" + "".join(f"{domain:>12}" for domain in tests) + f"{'mean':>12}")
    means = {}
    for row, values in found.items():
        means[row] = sum(values.values()) / len(values)
        print(f"   {row:30}" + "".join(f"{values[domain]:12.1f}" for domain in tests) + f"{means[row]:12.1f}")
    print(f"   largest difference of an output between a task and its run alone: {max(differences):.1e}")
    head, four_runs, four_tasks = means.values()
    assert four_tasks > head + 2, "the tasks are hardly better than a frozen encoder"
    assert abs(four_tasks - four_runs) < 1, "training in turns is not what training alone is"


def mix(model, classifier, tests):
    """Rows of four tasks in a single forward against a forward for each task, and no task against the plain model."""
    batches = [test.batch(range(8)) for test in tests.values()]
    width = max(ids.shape[1] for ids, _, _ in batches)
    ids, mask = (torch.cat([functional.pad(batch[i], (0, width - batch[i].shape[1])) for batch in batches])
                 for i in (0, 1))  # fmt: skip
    rows = [[domain] for domain in tests for _ in range(8)]
    with torch.no_grad():
        mixed = model(ids, mask, tasks=rows)
        apart = torch.cat([model(*batch[:2], task=domain) for domain, batch in zip(tests, batches, strict=True)])
        others = model(ids, mask, tasks=rows[8:] + rows[:8])
        plain = model.model.embed(ids, mask)
        with model.task([[], ["tweets"]] * 16):
            half = model.model.embed(ids, mask)
        base = classifier.embed(ids, mask)
    difference, swapped = (mixed - apart).abs().max().item(), (others - apart).abs().max().item()
    print(f"   {len(rows)} rows: largest difference from a forward for each task {difference:.1e} "
          f"(with the tasks of other domains: {swapped:.1f})")  # fmt: skip
    left_alone = max((plain - base).abs().max().item(), (half[::2] - base[::2]).abs().max().item())
    print(f"   rows without a task: largest difference from the plain encoder {left_alone:.1e}")
    assert difference < 1e-3 < swapped, "a row of the mixed batch got another task's output"
    assert left_alone < 1e-4, "a row without a task is not the plain encoder's"


if __name__ == "__main__":
    main()
