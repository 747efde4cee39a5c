"""The ops: each file holds one op's mathematics, schema, reference and fake."""

from fastlora import backends
from fastlora.ops import dropout
from fastlora.ops.expand import lora_expand
from fastlora.ops.library import autocast_in_python, autograd_in_python, lib
from fastlora.ops.linear import lora_linear, lora_linear_forward_op
from fastlora.ops.route import Pages, Route
from fastlora.ops.routed import lora_routed, lora_routed_forward_op
from fastlora.ops.shrink import lora_shrink

__all__ = ["Pages", "Route", "dropout", "lora_expand", "lora_linear", "lora_routed", "lora_shrink"]

if backends.native()[0] is None:
    autograd_in_python("lora_shrink", (0, 1))
    autograd_in_python("lora_expand", (1, 2, 3, 4), apart=0)
    autograd_in_python("lora_linear_forward", (0, 1, 2, 3, 4, 5, 6, 8), apart=5)
    autograd_in_python("lora_routed_forward", (0, 1, 2, 3, 4, 5, 7), apart=5)
    lib.impl("lora_routed", lambda *args: lora_routed_forward_op(*args)[0], "Autograd")
    lib.impl("lora_linear", lambda *args: lora_linear_forward_op(*args)[0], "Autograd")
    autocast_in_python("lora_shrink", (0,), (1,))
    for op in ("lora_linear", "lora_routed"):
        autocast_in_python(op, (0, 1, 5), (2, 3))
backends.pin_from_environment()
