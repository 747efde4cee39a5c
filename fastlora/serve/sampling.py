"""How a request draws its next token, whatever else is in the batch."""

import torch


class Sampler:
    """temperature 0 takes the likeliest token; else softmax(logits / temperature) over the `top_k` likeliest, of these
    over the fewest that hold `top_p` of the probability. With a `seed` the draws are the same each time."""

    def __init__(self, device, temperature=1.0, top_p=1.0, top_k=0, seed=None):
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        # below this the logits overflow, and the likeliest token has all of the probability
        self.greedy = temperature < 1e-4 or top_k == 1
        self.generator = torch.Generator(device)
        self.generator.seed() if seed is None else self.generator.manual_seed(seed)

    def draw(self, logits):
        """One token (0-d) from logits (vocabulary,)."""
        logits, tokens = logits / self.temperature, None
        if 0 < self.top_k < len(logits):
            logits, tokens = logits.topk(self.top_k)
        elif self.top_p < 1:
            logits, tokens = logits.sort(descending=True)
        probabilities = logits.softmax(-1)
        if self.top_p < 1:
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0)
        drawn = torch.multinomial(probabilities, 1, generator=self.generator)[0]
        return drawn if tokens is None else tokens[drawn]
