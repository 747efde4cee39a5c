"""The loader's own work on bytes and texts that need no network: parsing, splitting, batching, the pooled mean."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
pytest.importorskip("transformers")


@pytest.fixture
def sentiment(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("sentiment")


RAW = "1_1\t-0.9\tno picture\x85b/w.\r\n1_2\t0\ta  \u2013 title \r\n12\t2.5\t Clases de español ;)".encode()


def test_a_file_is_parsed(sentiment):
    expected = [("1", -0.9, "no picture\x85b/w."), ("1", 0.0, "a  \u2013 title"), ("12", 2.5, "Clases de español ;)")]
    assert sentiment.parse(RAW, 3) == expected
    assert sentiment.parse(RAW + b"\r\n", 3) == expected


@pytest.mark.parametrize("raw, lines", [(RAW, 4), (RAW.rpartition(b"\r")[0], 3), (RAW.replace(b"\tno", b" no"), 3)])
def test_another_file_is_refused(sentiment, raw, lines):
    with pytest.raises(ValueError, match=f"expected {lines} lines"):
        sentiment.parse(raw, lines)


def rows():
    """Forty documents of five sentences, one of which is neutral; the first sentence stands in all of them."""
    found = []
    for document in range(40):
        found.append((str(document), 1.5, "the same"))
        found += [(str(document), score, f"{document} {score}") for score in (-2.0, -0.1, 0.0, 0.4)]
    return found


def test_a_split_is_balanced_and_keeps_documents_apart(sentiment):
    train, test = sentiment.split(rows(), 20, 10)
    assert (len(train), len(test)) == (20, 10)
    for part in (train, test):
        assert sum(label for _, label in part) == len(part) // 2
        assert all(label == (text == "the same" or float(text.split()[1]) > 0) for text, label in part)
        assert not any(text.endswith(" 0.0") for text, _ in part)
    texts = [text for text, _ in train + test]
    assert len(set(texts)) == len(texts)
    of = [{text.split()[0] for text, _ in part if text != "the same"} for part in (train, test)]
    assert not of[0] & of[1]


def test_a_split_depends_on_its_seed_alone(sentiment):
    assert sentiment.split(rows(), 20, 10) == sentiment.split(rows(), 20, 10)
    assert sentiment.split(rows(), 20, 10)[1] == sentiment.split(rows(), 40, 10)[1]
    assert sentiment.split(rows(), 20, 10) != sentiment.split(rows(), 20, 10, seed=1)


def test_a_split_that_asks_too_much_is_refused(sentiment):
    with pytest.raises(ValueError, match="expected 100 each"):
        sentiment.split(rows(), 200, 10)


def tokenizer(texts, truncation, max_length):
    """One token a letter."""
    return {"input_ids": [[ord(letter) for letter in text[:max_length]] for text in texts]}


def texts(sentiment, count):
    return sentiment.Texts(tokenizer, [("a" * (1 + 7 * i % 13), i % 2) for i in range(count)])


def test_an_epoch_of_batches_holds_every_text_once(sentiment):
    data = texts(sentiment, 40)
    epochs = list(data.batches(8, 10))
    for epoch in (epochs[:5], epochs[5:]):
        lengths = sorted(n for _, mask, _ in epoch for n in mask.sum(1).tolist())
        assert lengths == sorted(map(len, data.ids))
    again = list(data.batches(8, 10))
    assert all(torch.equal(x, y) for a, b in zip(epochs, again, strict=True) for x, y in zip(a, b, strict=True))


def test_outputs_are_in_the_texts_order(sentiment):
    data = texts(sentiment, 30)
    assert data.outputs(lambda ids, mask: mask.sum(1), size=7).tolist() == list(map(len, data.ids))

    def parity(ids, mask):
        return (mask.sum(1, keepdim=True) % 2 == torch.tensor([0, 1])).float()

    right = [len(ids) % 2 == label for ids, label in zip(data.ids, data.labels.tolist(), strict=True)]
    assert 0 < sum(right) < 30
    assert data.accuracy(parity) == pytest.approx(100 * sum(right) / 30)


def test_the_mean_is_that_of_a_texts_own_tokens(sentiment):
    class Encoder(nn.Module):
        config = SimpleNamespace(hidden_size=3)

        def forward(self, ids, attention_mask):
            return SimpleNamespace(last_hidden_state=ids[..., None] * torch.tensor([1.0, 2.0, 3.0]))

    model = sentiment.Classifier(Encoder())
    ids, mask = torch.tensor([[1, 3, 9], [4, 5, 6]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert torch.equal(model.embed(ids, mask), torch.tensor([[2.0, 4.0, 6.0], [5.0, 10.0, 15.0]]))
    assert torch.equal(model(ids, mask), torch.zeros(2, 2))


def test_a_damaged_archive_is_refused(sentiment, monkeypatch, tmp_path):
    monkeypatch.setattr(sentiment, "CACHE", tmp_path)
    (tmp_path / "a.tar.gz").write_bytes(b"cut off")
    with pytest.raises(SystemExit, match="damaged"):
        sentiment.fetch("a==1", "a.tar.gz", "0" * 64)
