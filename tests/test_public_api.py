"""What a user may rely on: exported names, signatures, and the contract of every registered op."""

import importlib
import inspect
import subprocess
import sys

import pytest
import torch

import fastlora
from fastlora import backends, ops

EXPORTS = {
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "DyLinear",
    "Embedding",
    "Linear",
    "LoRALayer",
    "MergedLinear",
    "MultiheadAttention",
    "Pages",
    "Route",
    "checkpoint_context",
    "disable_adapter",
    "enable_input_require_grads",
    "explain",
    "inject",
    "load_adapter",
    "load_lora_state_dict",
    "lora_expand",
    "lora_linear",
    "lora_norm",
    "lora_routed",
    "lora_shrink",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merge",
    "merge_and_export",
    "print_trainable_parameters",
    "refresh",
    "remove",
    "save_adapter",
    "set_scale",
    "unmerge",
    "use_backend",
}
SIGNATURES = {
    "lora_linear": "(x, weight, lora_A, lora_B, scaling=1.0, bias=None, *, gates=None, ranks=None, column_scale=None, "
    "dropout_p=0.0, training=False, seed=None)",
    "lora_shrink": "(x, lora_A, *, dropout_p=0.0, training=False, seed=None)",
    "lora_norm": "(weight, lora_A, lora_B, scaling=1.0)",
    "lora_routed": "(x, weight, lora_A, lora_B, route, bias=None, *, scaling=1.0, column_scale=None, slices=None, "
    "pages=None)",
    "lora_expand": "(y, z, lora_B, scaling=1.0, *, gates=None, ranks=None, columns=None, ids=None)",
}
# Ops that back-ends implement; draw_seed calls torch's generator and has no back-ends.
IMPLEMENTED = {
    "lora_linear",
    "lora_linear_forward",
    "lora_linear_backward",
    "lora_shrink",
    "lora_shrink_backward",
    "lora_expand",
    "lora_expand_backward",
    "lora_routed",
    "lora_routed_forward",
    "lora_routed_backward",
    "lora_norm",
    "lora_dropout",
}


def registered():
    """Names of the ops in torch's registry, without their overloads."""
    names = torch._C._dispatch_get_all_op_names()
    return {n.removeprefix("fastlora::").partition(".")[0] for n in names if n.startswith("fastlora::")}


def test_exports():
    assert set(fastlora.__all__) == EXPORTS
    assert all(hasattr(fastlora, name) for name in EXPORTS)


@pytest.mark.parametrize("name", sorted(EXPORTS))
def test_exports_are_documented(name):
    assert len(inspect.getdoc(getattr(fastlora, name)) or "") > 40


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    assert str(inspect.signature(getattr(fastlora, name))) == SIGNATURES[name]


def test_every_op_is_listed():
    assert registered() == {*IMPLEMENTED, "draw_seed"}


@pytest.mark.parametrize("name", sorted(IMPLEMENTED))
def test_op_contract(name):
    """Schema without a float that would recompile (but dropout's), a fake, a reference, a documented home."""
    op = getattr(torch.ops.fastlora, name).default
    floats = [a.name for a in op._schema.arguments if str(a.type) == "float"]
    assert set(floats) <= {"dropout_p"}
    assert not op._schema.is_mutable
    assert torch.Tag.pt2_compliant_tag in op.tags
    assert torch._library.simple_registry.singleton.find(f"fastlora::{name}").fake_impl.kernel is not None
    whole = f"{name}_forward" if f"{name}_forward" in IMPLEMENTED else name
    assert whole in backends.references
    stem = name.removeprefix("lora_").partition("_")[0]
    assert len(importlib.import_module(f"{ops.__name__}.{stem}").__doc__) > 40


def test_import_does_not_load_optional_packages():
    """Importing the package must not import what only integrations use."""
    optional = ("transformers", "peft", "triton", "accelerate")
    code = f"import fastlora, sys; print([m for m in {optional} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
