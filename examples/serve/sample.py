"""How a request's tokens are drawn from its logits, whatever else is in the batch."""

import math

import torch


class Draws:
    """One request's draws, from its own logits and of its own tokens, in the order of vLLM's Sampler.

    `logit_bias` {token: number} is added; a logit x of a token that the prompt has or that was drawn becomes x / ρ if
    x > 0, else x · ρ, ρ = `repetition_penalty`; one of a token drawn n > 0 times loses `frequency_penalty` · n +
    `presence_penalty`; `temperature` divides, below 1e-4 the likeliest is drawn; others than those of probability
    ≥ `min_p` · the highest are left out, then all but the `top_k` likeliest, then all but the fewest that have `top_p`.
    `logprobs` k asks for (log softmax of the logits as they came, tokens), of the token and of the k likeliest.
    Source: vLLM 0.11, vllm/v1/sample/sampler.py; in its apply_penalties the prompt counts for ρ alone.
    """

    def __init__(self, prompt, generator, *, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, presence_penalty=0.0,
                 frequency_penalty=0.0, repetition_penalty=1.0, logit_bias=None, logprobs=None):  # fmt: skip
        self.prompt, self.generator, self.logprobs, self.drawn = prompt, generator, logprobs, None
        self.temperature, self.top_p, self.top_k, self.min_p = temperature, top_p, top_k, min_p
        self.penalties = presence_penalty, frequency_penalty, repetition_penalty
        bias = list(logit_bias or ()), list((logit_bias or {}).values())
        self.bias = [torch.tensor(part, device=generator.device) for part in bias] if logit_bias else None

    def __call__(self, logits):
        """One token (0-d) of float32 logits (vocabulary,), and None or what `logprobs` asks for."""
        presence, frequency, rho = self.penalties
        x = logits.index_add(0, *self.bias) if self.bias else logits
        if (presence, frequency, rho) != (0, 0, 1):
            if self.drawn is None:
                self.drawn, self.known = torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)
                self.known[self.prompt] = True
            x = torch.where(self.known, torch.where(x > 0, x / rho, x * rho), x)
            x = x - frequency * self.drawn - presence * (self.drawn > 0)
        token = self._draw(x)
        if self.drawn is not None:
            self.drawn[token] += 1
            self.known[token] = True
        if self.logprobs is None:
            return token, None
        values = logits.log_softmax(-1)
        tokens = torch.cat([token.view(1), values.topk(min(self.logprobs, len(logits))).indices])
        return token, (values[tokens], tokens)

    def _draw(self, logits):
        # below, they would overflow, and the likeliest has all of the probability
        if self.temperature < 1e-4 or self.top_k == 1:
            return logits.argmax()
        logits, tokens = logits / self.temperature, None
        if self.min_p > 0:
            logits = logits.masked_fill(logits < logits.max() + math.log(self.min_p), -math.inf)
        if self.top_k > 0 or self.top_p < 1:
            logits, tokens = logits.topk(min(self.top_k, len(logits)) if self.top_k > 0 else len(logits))
        p = logits.softmax(-1)
        if self.top_p < 1:
            p = p.masked_fill(p.cumsum(-1) - p >= self.top_p, 0)
        # as torch.multinomial draws, but that raises for NaN, as of weights that overflow, and would end the engine
        waits = torch.empty_like(p).exponential_(generator=self.generator)
        drawn = (p / waits.clamp_(min=torch.finfo(p.dtype).tiny)).argmax()
        return drawn if tokens is None else tokens[drawn]
