"""A request's text, as it grows token by token, and its tokens' log-probabilities in OpenAI's formats."""

LOST = "\ufffd"
# how byte-level vocabularies (GPT-2's, Radford et al. 2019) write bytes
SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {chr(b): b for b in SHOWN} | {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*SHOWN}))}


class Text:
    """Tokens to text, piece by piece: characters come whole, and nothing is shown of a stop string, which ends it."""

    def __init__(self, tokenizer, stops=()):
        self.tokenizer, self.stops, self.count, self.stopped = tokenizer, stops, 0, False
        # the last tokens, of which the first `seen` are already in `pending` or shown; characters of both
        self.window, self.seen, self.pending, self.length = [], 0, "", 0

    def add(self, token, last=False):
        """What may be shown now: of the `last` token all that was held back."""
        self.count += 1
        self.window.append(token)
        before, now = (
            self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for tokens in (self.window[: self.seen], self.window)
        )
        if last or not now.endswith(LOST):
            self.pending, self.length = self.pending + now[len(before) :], self.length + len(now) - len(before)
            # one earlier piece stays: decoders treat the first token of a text apart
            self.window, self.seen = self.window[self.seen :], len(self.window) - self.seen
        found = [i for i in map(self.pending.find, self.stops) if i >= 0]
        held = [k for stop in self.stops for k in range(1, len(stop)) if self.pending.endswith(stop[:k])]
        self.stopped = bool(found)
        length = min(found) if found else len(self.pending) - (0 if last else max(held, default=0))
        shown, self.pending = self.pending[:length], self.pending[length:]
        return shown


class Names(dict):
    """{token: (its text, its bytes)}, filled when asked; of bytes that are no whole character the text is \\x… ."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __missing__(self, token):
        # what its second copy adds: decoders leave out the space of a text's first token
        once, twice = (self.tokenizer.decode([token] * n, clean_up_tokenization_spaces=False) for n in (1, 2))
        raw = list((text := twice[len(once) :]).encode())
        if LOST in text and (piece := self.tokenizer.convert_ids_to_tokens(token)):
            raw = [int(piece[3:-1], 16)] if piece.startswith("<0x") else [BYTES[c] for c in piece if c in BYTES]
            text = "".join(f"\\x{byte:02x}" for byte in raw)
        return self.setdefault(token, (text, raw))

    def chat(self, drawn):
        """`logprobs` of a chat's choice, of [(offset in the text, log-probabilities, tokens)], the drawn one first."""
        parts = [[{"token": self[t][0], "logprob": x, "bytes": self[t][1]} for x, t in zip(*part, strict=True)]
                 for _, *part in drawn]  # fmt: skip
        return {"content": [{**part[0], "top_logprobs": part[1:]} for part in parts], "refusal": None}

    def completion(self, drawn):
        """The same of a completion's choice."""
        tops = [{self[t][0]: x for x, t in zip(*part, strict=True)} for _, *part in drawn]
        columns = {"text_offset": [offset for offset, _, _ in drawn], "tokens": [self[t[0]][0] for _, _, t in drawn]}
        return {**columns, "token_logprobs": [values[0] for _, values, _ in drawn], "top_logprobs": tops}
