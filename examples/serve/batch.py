"""Which adapters the tokens of a forward use: one route a step, read by every layer."""

import numpy as np

from fastlora.ops import Route, check


class Batch:
    """Rows of a batch, each with its list of (slot, weight); x is (rows · n, tokens, …), n beams or copies of each row.

    What an attention mask leaves out is the base's alone. A layer that sees only the last tokens of each row, as an
    output layer does, gets their route. `AdapterPool.running` sets `pairs`: which adapters that are trained it uses.
    """

    def __init__(self, lists, device):
        self.lists, self.device, self.shape, self._mask, self._routes = lists, device, (), None, {}
        self.base_only, self.pairs = not any(lists), frozenset()

    def look_at(self, mask):
        """Heed an attention mask (rows, tokens) from now on; None: every token is one."""
        mask = None if mask is None or bool(mask.all()) else mask.bool().cpu().numpy()
        if mask is not None or self._mask is not None:
            self._routes = {}
        self._mask = mask

    def for_layer(self, x):
        """The Route of x's tokens."""
        shape = x.shape[:-1]
        route = self._routes.get(shape)
        if route is None:
            route = self._routes[shape] = self._build(*shape)
        return route

    def _build(self, rows, *more):
        if not more and (rows,) != (len(self.lists),) and rows == int(np.prod(self.shape, dtype=np.int64)):
            rows, *more = self.shape
        tokens = int(np.prod(more, dtype=np.int64))
        apart = not more and rows != len(self.lists)
        check.value(not apart, "x", f"{rows} tokens that do not lie in rows, as experts get them", "(rows, tokens, …)")
        whole = len(self.lists) and rows % len(self.lists) == 0
        check.value(whole, "adapters", f"{len(self.lists)} for {rows} batch rows", "one for each row")
        index = np.repeat(np.arange(rows) // (rows // len(self.lists)), tokens)
        if self._mask is not None and len(self._mask) == rows and self._mask.shape[1] >= tokens:
            index[~self._mask[:, -tokens:].reshape(-1)] = -1
        return Route.from_rows(self.lists, index, self.device)


class Packed:
    """A step of continuous batching: all tokens in one row, token t of request rows[t], −1 for padding.

    A layer that sees other than all tokens, an output layer, sees those at `kept`.
    """

    def __init__(self, lists, rows, device, kept=()):
        self.route, self.kept_rows, self._last = Route.from_rows(lists, rows, device), [rows[t] for t in kept], None
        self.lists, self.device, self.base_only, self.pairs = lists, device, self.route.base_only, frozenset()

    def for_layer(self, x):
        tokens = x.shape[:-1].numel()
        if tokens == self.route.tokens:
            return self.route
        if self._last is None:
            self._last = Route.from_rows(self.lists, self.kept_rows, self.device)
        check.value(tokens == self._last.tokens, "x", f"{tokens} tokens", f"{self.route.tokens} or {self._last.tokens}")
        return self._last
