"""Gates of batch rows and of tokens, matched with a layer's input."""

from fastlora.ops import check


def match_rows(x, leading, gates):
    """x and its gates, in a shape that broadcasts over (*leading, E).

    `leading` are x's dimensions of positions, the batch first. Gates are (E,), for all; (batch, E), a row's for all of
    its positions; or (batch, tokens, E), for positions that a layer may get flattened. A single row of x is repeated
    where the gates are for several.
    """
    if gates is None or gates.dim() < 2 or gates.shape[:-1] == leading:
        return x, gates
    *given, E = gates.shape
    if len(given) == 2 and len(leading) == 1 and leading[0] == given[0] * given[1]:
        return x, gates.flatten(0, 1)
    # sizes are compared one by one: Dynamo's symbolic ones are equal to nothing inside a list
    fits = len(leading) >= len(given) and (leading[0] == given[0] or leading[0] == 1)
    fits = fits and all(a == b for a, b in zip(leading[1:], given[1:], strict=False))
    what = f"{given[0]} batch rows" if len(given) == 1 else f"{given[0]} batch rows of {given[1]} tokens"
    check.value(fits, "x", f"shape {tuple(x.shape)}", f"{what}: each has adapters of its own")
    if leading[0] != given[0]:
        x = x.expand(given[0], *x.shape[1:])
    return x, gates.view(*given, *(1,) * (len(leading) - len(given)), E)


class Stacked(tuple):
    """One tensor that holds the rank rows of several adapters, of `ranks`."""


def rank_list(A, gates):
    """The op's `ranks`: () for a single adapter that has a gate for each rank row, or none at all."""
    if isinstance(A, Stacked):
        return A.ranks
    ranks = [a.shape[0] for a in A]
    lone = len(ranks) == 1 and (gates is None or gates.shape[-1] == ranks[0])
    return () if lone else ranks
