"""The ops: each file holds one op's mathematics, schema, reference and fake."""

from fastlora import backends
from fastlora.ops import dropout, library
from fastlora.ops.expand import lora_expand
from fastlora.ops.linear import lora_linear, lora_linear_op
from fastlora.ops.norm import lora_norm
from fastlora.ops.route import Pages, Route
from fastlora.ops.routed import lora_routed, lora_routed_op
from fastlora.ops.shrink import lora_shrink, lora_shrink_op

__all__ = ["Pages", "Route", "dropout", "lora_expand", "lora_linear", "lora_norm", "lora_routed", "lora_shrink"]

if backends.native()[0] is None:
    for formula in library.formulas:
        library.autograd_in_python(*formula)
    for op in (lora_linear_op, lora_shrink_op, lora_routed_op):
        library.autocast_in_python(op)
backends.pin_from_environment()
