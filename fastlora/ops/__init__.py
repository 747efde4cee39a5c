"""The ops: each file holds one op's mathematics, schema, reference and fake."""

from fastlora import backends
from fastlora.ops import dropout, expand, linear, routed, shrink
from fastlora.ops.expand import lora_expand
from fastlora.ops.linear import lora_linear
from fastlora.ops.route import Pages, Route
from fastlora.ops.routed import lora_routed
from fastlora.ops.shrink import lora_shrink

__all__ = ["Pages", "Route", "dropout", "lora_expand", "lora_linear", "lora_routed", "lora_shrink"]

if backends.native()[0] is None:
    for op in (linear, shrink, expand, routed):
        op.register_python_autograd()
backends.pin_from_environment()
