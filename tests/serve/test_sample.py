"""Draws against what vLLM documents, written out for small vocabularies."""

import math

import pytest
import torch

from fastlora.serve.sample import Draws

LOGITS = torch.tensor([2.0, 1.0, 0.5, -0.5, -1.0])


def draws(prompt=(), seed=0, **options):
    return Draws(list(prompt), torch.Generator().manual_seed(seed), **options)


def often(draw, logits=LOGITS, count=4000):
    """How often each token is drawn."""
    return torch.bincount(torch.stack([draw(logits)[0] for _ in range(count)]), minlength=len(logits)) / count


def test_frequencies_are_the_probabilities():
    torch.testing.assert_close(often(draws()), LOGITS.softmax(-1), atol=0.03, rtol=0)
    torch.testing.assert_close(often(draws(temperature=2.0)), (LOGITS / 2).softmax(-1), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.7}, [0, 1]),
        ({"min_p": 0.3}, [0, 1]),
        ({"min_p": math.exp(-1.6)}, [0, 1, 2]),
        # before top_p: of the three that min_p leaves, two have 0.8
        ({"min_p": math.exp(-1.6), "top_p": 0.8}, [0, 1]),
        # after the temperature
        ({"min_p": 0.3, "temperature": 2.0}, [0, 1, 2]),
        # top_k before top_p: of the two left, the first has 0.73
        ({"top_k": 2, "top_p": 0.7}, [0]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
    ],
)
def test_what_is_left(options, left):
    expected = torch.zeros(5)
    expected[left] = (LOGITS[left] / options.get("temperature", 1.0)).softmax(-1)
    torch.testing.assert_close(often(draws(**options)), expected, atol=0.03, rtol=0)


def test_penalties_in_vllms_order():
    """Greedy on logits that tell the order apart: bias, then repetition, then frequency and presence."""
    # the bias first: 1 + 0.5 = 1.5, and divided by 2 it is no more than 1; added last it would be 1.1
    draw = draws(prompt=[0], temperature=0, logit_bias={0: 0.4}, repetition_penalty=2.0)
    assert draw(torch.tensor([1.2, 1.0]))[0] == 1
    # the repetition penalty before the others: 3 / 2 - 1 = 0.5, not (3 - 1) / 2 = 1
    draw = draws(prompt=[0], temperature=0, repetition_penalty=2.0, frequency_penalty=1.0)
    assert draw(torch.tensor([3.0, 0.7]))[0] == 0, "what is in the prompt alone was not drawn yet"
    assert draw(torch.tensor([3.0, 0.7]))[0] == 1
    # a negative logit is multiplied
    draw = draws(prompt=[0], temperature=0, repetition_penalty=2.0)
    assert draw(torch.tensor([-1.0, -1.5]))[0] == 1


def test_counts_are_of_drawn_tokens():
    logits = torch.tensor([3.0, 2.0, 0.5])
    frequency = draws(prompt=[0, 0, 0], temperature=0, frequency_penalty=0.6)
    assert [int(frequency(logits)[0]) for _ in range(5)] == [0, 0, 1, 0, 1]
    presence = draws(prompt=[0, 0, 0], temperature=0, presence_penalty=1.2)
    assert [int(presence(logits)[0]) for _ in range(3)] == [0, 1, 0]
    assert logits.tolist() == [3.0, 2.0, 0.5], "the logits stay as they came"
    encouraged = draws(temperature=0, presence_penalty=-2.0)
    assert [int(encouraged(logits)[0]) for _ in range(3)] == [0, 0, 0]


def test_log_probabilities_are_of_the_logits_as_they_came():
    assert draws()(LOGITS)[1] is None
    draw = draws(temperature=0, logit_bias={4: 100.0}, logprobs=2)
    token, (values, tokens) = draw(LOGITS)
    assert token == 4 and tokens.tolist() == [4, 0, 1]
    torch.testing.assert_close(values, LOGITS.log_softmax(-1)[[4, 0, 1]])
    assert draws(logprobs=20)(LOGITS)[1][1].shape == (6,) and draws(logprobs=0)(LOGITS)[1][1].shape == (1,)


def test_seeds_decide():
    def some(seed, **options):
        draw = draws(seed=seed, **options)
        return [int(draw(LOGITS)[0]) for _ in range(20)]

    assert some(1) == some(1) != some(2)
    assert some(1, logprobs=3) == some(1) == some(1, min_p=0.0, repetition_penalty=1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "options", [{}, *({name: 0.5} for name in ("top_p", "min_p", "presence_penalty")), {"top_k": 2}]
)
def test_numbers_that_overflow_raise_nothing(bad, options):
    for logits in (torch.full((5,), bad), torch.tensor([1.0, bad, 0.0, bad, 2.0])):
        assert 0 <= draws(**options)(logits)[0] < 5
