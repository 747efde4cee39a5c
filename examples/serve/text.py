"""A request's text, as it grows token by token."""

LOST = "\ufffd"


class Text:
    """Tokens to text, piece by piece: characters come whole, and nothing is shown of a stop string, which ends it."""

    def __init__(self, tokenizer, stops=()):
        self.tokenizer, self.stops, self.count, self.stopped = tokenizer, stops, 0, False
        # the last tokens, of which the first `seen` are already in `pending` or shown
        self.window, self.seen, self.pending = [], 0, ""

    def add(self, token, last=False):
        """What may be shown now: of the `last` token all that was held back."""
        self.count += 1
        self.window.append(token)
        before, now = (
            self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for tokens in (self.window[: self.seen], self.window)
        )
        if last or not now.endswith(LOST):
            self.pending += now[len(before) :]
            # one earlier piece stays: decoders treat the first token of a text apart
            self.window, self.seen = self.window[self.seen :], len(self.window) - self.seen
        found = [i for i in map(self.pending.find, self.stops) if i >= 0]
        held = [k for stop in self.stops for k in range(1, len(stop)) if self.pending.endswith(stop[:k])]
        self.stopped = bool(found)
        length = min(found) if found else len(self.pending) - (0 if last else max(held, default=0))
        shown, self.pending = self.pending[:length], self.pending[length:]
        return shown
