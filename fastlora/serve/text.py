"""A request's text, as it grows token by token."""

LOST = "\ufffd"


class Text:
    """Turns tokens into text piece by piece: characters come whole, and nothing is shown of a stop string.

    `add(token)` returns what may be shown; `stopped` says whether a stop string was met; `end()` returns the rest.
    """

    def __init__(self, tokenizer, stops=()):
        self.decode, self.stops = tokenizer.decode, stops
        self.tokens, self.stopped = 0, False
        # the tokens since the last whole word: `seen` of them are part of `pending` or were shown
        self.window, self.seen, self.pending = [], 0, ""

    def add(self, token):
        self.tokens += 1
        self.window.append(token)
        before, now = self._decoded(self.window[: self.seen]), self._decoded(self.window)
        if not now.endswith(LOST):
            self.pending += now[len(before) :]
            # one earlier piece stays: decoders treat the first token of a text apart
            self.window, self.seen = self.window[self.seen :], len(self.window) - self.seen
        found = [i for i in (self.pending.find(stop) for stop in self.stops) if i >= 0]
        if found:
            self.stopped = True
            return self._shown(min(found))
        held = (k for stop in self.stops for k in range(1, len(stop)) if self.pending.endswith(stop[:k]))
        return self._shown(len(self.pending) - max(held, default=0))

    def end(self):
        """What was held back, once no more tokens come."""
        if self.stopped:
            return ""
        before, now = self._decoded(self.window[: self.seen]), self._decoded(self.window)
        self.pending += now[len(before) :]
        return self._shown(len(self.pending))

    def _decoded(self, tokens):
        return self.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _shown(self, length):
        shown, self.pending = self.pending[:length], self.pending[length:]
        return shown
