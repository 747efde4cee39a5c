"""The ops: each file holds one op's mathematics, schema, reference and fake."""

from fastlora import backends
from fastlora.ops import dropout, expand, linear, shrink
from fastlora.ops.expand import lora_expand
from fastlora.ops.linear import lora_linear
from fastlora.ops.shrink import lora_shrink

__all__ = ["dropout", "lora_expand", "lora_linear", "lora_shrink"]

if backends.native()[0] is None:
    for op in (linear, shrink, expand):
        op.register_python_autograd()
backends.pin_from_environment()
