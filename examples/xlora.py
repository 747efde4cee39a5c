"""X-LoRA: four experts of one domain each, gated for each token and layer by a classifier, on texts of all four.

Each expert is LoRA on MiniLM's linear layers, for the sentiment of movie reviews, product reviews, tweets or
editorials, all with the same frozen head (see sentiment.py for the model and the texts). The mixture is told of no
text which domain it is from. Optional argument: where the picture of the gates goes (PNG).
"""

import copy
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional

sys.path.append(str(Path(__file__).parents[1]))

import sentiment
from progress import say

import fastlora
from fastlora import mixture

TRAIN, TEST, BATCH, STEPS, MIXED_STEPS = 1400, 320, 32, 40, 50
OPTIONS = {"r": 8, "lora_alpha": 16, "target_modules": r".*\.(query|key|value|dense)"}


def main(picture=None):
    start = time.perf_counter()
    say("1. MiniLM and the texts of four domains")
    classifier, tokenizer = sentiment.load()
    parts = {domain: sentiment.split(rows, TRAIN, TRAIN // 4, TEST) for domain, rows in sentiment.rated_texts().items()}
    data = {domain: [sentiment.Texts(tokenizer, part) for part in each] for domain, each in parts.items()}
    mixed = sentiment.Texts(tokenizer, [pair for _, part, _ in parts.values() for pair in part])
    print(f"   {', '.join(data)}: {TRAIN} texts each for an expert, {TRAIN // 4} for the mixture, {TEST} to test")

    say("2. One head for all, on the frozen encoder")
    train_head(classifier, [train for train, _, _ in data.values()])

    with tempfile.TemporaryDirectory() as root:
        say(f"3. Four experts of {STEPS} steps each")
        folders = {}
        for domain, (train, _, _) in data.items():
            print(f"   {domain}", flush=True)
            folders[domain] = train_expert(classifier, train, Path(root, domain))

        say(f"4. The mixture: {MIXED_STEPS} steps on texts of all domains, the experts frozen")
        model = copy.deepcopy(classifier)
        config = mixture.xLoRAConfig(layerwise_scalings=True, xlora_depth=1)
        model.encoder = mixture.add_xlora_to_model(model.encoder, config, folders, False)
        model.encoder.print_trainable_parameters()
        losses = (functional.cross_entropy(model(*x), y) for *x, y in mixed.batches(BATCH, MIXED_STEPS))
        sentiment.fit(model.encoder.xlora_classifier.parameters(), losses, MIXED_STEPS, lr=1e-2)

        say("5. Accuracy in %, on texts of documents that were not trained on")
        model.eval()
        compare(model, classifier, {domain: test for domain, (_, _, test) in data.items()})

        say("6. The gates, and the mixture saved and loaded")
        gates = mean_gates(model, {domain: test for domain, (_, _, test) in data.items()})
        if picture:
            draw(gates, picture)
            print(f"   {picture}: each expert's mean gate by domain and layer")
        check_saved(model, classifier, Path(root, "mixture"), data[next(iter(data))][2])
    print(f"\nDone in {time.perf_counter() - start:.0f} s.")


def train_head(classifier, parts):
    """Fit the head on the plain encoder's features of all texts."""
    features = torch.cat([texts.outputs(classifier.embed) for texts in parts])
    labels = torch.cat([texts.labels for texts in parts])
    classifier.head.requires_grad_(True)
    optimizer = torch.optim.AdamW(classifier.head.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        functional.cross_entropy(classifier.head(features), labels).backward()
        optimizer.step()
    classifier.head.requires_grad_(False)


def train_expert(classifier, texts, folder):
    """An adapter for one domain, written as a folder in PEFT's format."""
    torch.manual_seed(0)
    model = copy.deepcopy(classifier)
    fastlora.inject(model.encoder, **OPTIONS)
    losses = (functional.cross_entropy(model(*x), y) for *x, y in texts.batches(BATCH, STEPS))
    sentiment.fit(sentiment.trained(model), losses, STEPS)
    fastlora.save_adapter(model.encoder, folder)
    return folder


def fixed(model, gates):
    """The model as a function of a batch, its gates fixed to these."""

    def run(ids, mask):
        model.encoder.set_scalings_with_lifetime(torch.tensor(gates).expand(len(ids), -1), 1)
        return model(ids, mask)

    return run


def compare(model, classifier, tests):
    """The table: a row for each way to use the experts, a column for each domain."""
    ways = {"the encoder without experts": classifier}
    names = model.encoder.expert_names
    for i, name in enumerate(names):
        ways[f"the expert of {name}"] = fixed(model, [float(i == j) for j in range(len(names))])
    ways |= {"the average of the experts": fixed(model, [1 / len(names)] * len(names)), "the mixture": model}
    print(f"   {'':30}" + "".join(f"{domain:>12}" for domain in tests) + f"{'mean':>12}")
    means, own = {}, []
    for way, function in ways.items():
        values = [test.accuracy(function) for test in tests.values()]
        own += [value for domain, value in zip(tests, values, strict=True) if way == f"the expert of {domain}"]
        means[way] = sum(values) / len(values)
        print(f"   {way:30}" + "".join(f"{v:12.1f}" for v in values) + f"{means[way]:12.1f}")
    print(f"   {'each domain with its own expert':30}{'':{12 * len(tests) - 1}}{sum(own) / len(own):12.1f}")
    assert means["the mixture"] > means["the encoder without experts"] + 1, "the mixture is hardly better than nothing"


@torch.no_grad()
def mean_gates(model, tests):
    """(domains, layers, experts): the mean over a domain's tokens."""
    found = []
    for test in tests.values():
        ids, mask, _ = test.batch(range(100))
        model(ids, mask)
        found.append(model.encoder.get_latest_scalings()[mask.bool()].mean(0))
    for domain, gates in zip(tests, found, strict=True):
        shares = "  ".join(f"{n} {g:.2f}" for n, g in zip(model.encoder.expert_names, gates.mean(0), strict=True))
        print(f"   texts of {domain:12} gates of {shares}")
    return torch.stack(found)


def draw(gates, path):
    """A heat map for each domain: experts by layers."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = list(sentiment.DOMAINS)
    figure, axes = pyplot.subplots(len(names), 1, figsize=(10, 7), sharex=True, layout="constrained")
    for axis, name, each in zip(axes, names, gates, strict=True):
        image = axis.imshow(each.T, aspect="auto", cmap="viridis", vmin=gates.min(), vmax=gates.max())
        axis.set_yticks(range(len(names)), names)
        axis.set_title(f"texts of {name}", fontsize=10)
    axes[-1].set_xlabel("adapted layer, in the model's order")
    figure.colorbar(image, ax=axes, label="mean gate of the expert")
    figure.savefig(path, dpi=120)


def check_saved(model, classifier, folder, test):
    model.encoder.save_pretrained(folder)
    again = copy.deepcopy(classifier)
    again.encoder = mixture.from_pretrained(folder, again.encoder, None, False, "cpu")
    ids, mask, _ = test.batch(range(20))
    with torch.no_grad():
        difference = (again.eval()(ids, mask) - model(ids, mask)).abs().max().item()
    print(f"   saved and loaded: largest difference of an output {difference:.1e}")
    assert difference < 1e-5, "the loaded mixture is another"


if __name__ == "__main__":
    main(*sys.argv[1:2])
