"""Fills what the kernels are told of tokens with adapters of their own: the structs Routed and Pages."""

from harness import set_matrix


def set_route(routed, route, table, ranks, columns=None):
    """Fills a struct Routed from a fastlora.Route and the tables of its pages; the tensors to declare, by name."""
    tensors = {name: getattr(route, name) for name in ("order", "tiles", "offsets", "slots")} | dict(ranks=ranks)
    tensors |= {} if columns is None else dict(columns=columns)
    for name, t in tensors.items():
        setattr(routed, name, t.data_ptr())
    set_matrix(routed.table, table)
    routed.m, routed.count, routed.entries = len(route.order), len(route.tiles), len(route.slots)
    routed.adapters, routed.pages = table.shape
    return tensors | dict(table=table)


def set_pages(pages, t, *steps):
    """Fills a struct Pages; steps: elements from page to page, slice, row."""
    pages.data, (pages.page, pages.slice, pages.row) = t.data_ptr(), steps
