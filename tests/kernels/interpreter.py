"""Makes Triton's interpreter compute in bfloat16 as a GPU does. Import before the kernels, under TRITON_INTERPRET=1.

The interpreter (Triton 3.6 to 3.9) keeps bfloat16 as its raw 16 bits and multiplies those as integers, without a word,
and cuts float32 off where the hardware rounds to nearest even. Here every float operation sees float32 values instead.
Triton 3.6 with NumPy 2.4 also cannot loop to a run-time bound.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

BINARY = ("fadd", "fsub", "fmul", "fdiv", "minnumf", "maxnumf", "minimumf", "maximumf")
COMPARE = [f"fcmp{ordered}{kind}" for ordered in "OU" for kind in ("LT", "GT", "LE", "GE", "EQ", "NE")]
UNARY = ("exp", "exp2", "log", "log2", "sin", "cos", "sqrt", "rsqrt", "fabs", "floor", "ceil", "fma")


def widen(handle):
    """The float32 values of a bfloat16 handle; anything else as it is."""
    if not isinstance(handle, interpreter.TensorHandle) or handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def narrow(handle):
    """float32 values rounded to nearest even bfloat16; a NaN stays one."""
    values = np.ascontiguousarray(handle.data, np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return interpreter.TensorHandle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded), tl.bfloat16)


def through_float32(method):
    def run(self, *operands):
        result = method(self, *map(widen, operands))
        # The type of the last operand is the result's: an accumulator's, or that of two alike.
        if operands[-1].dtype.scalar == tl.bfloat16 and result.dtype.scalar == tl.float32:
            return narrow(result)
        return result

    return run


def dot(method):
    def run(self, a, b, accumulator, *options):
        return method(self, widen(a), widen(b), accumulator, *options)

    return run


def cast(method):
    def run(self, source, target):
        to = target.scalar
        if source.dtype.scalar == to:
            return source
        if to == tl.bfloat16:
            return narrow(interpreter.TensorHandle(widen(source).data.astype(np.float32), tl.float32))
        return method(self, widen(source), target)

    return run


def index(patch):
    def run(tensor, *scope):
        result = patch(tensor, *scope)
        tensor.__index__ = lambda self: int(np.ravel(self.handle.data)[0])
        return result

    return run


def install():
    builder = interpreter.InterpreterBuilder
    for name in (*BINARY, *COMPARE, *UNARY):
        method = getattr(builder, f"create_{name}", None)
        if method:
            setattr(builder, f"create_{name}", through_float32(method))
    builder.create_dot = dot(builder.create_dot)
    builder.cast_impl = cast(builder.cast_impl)
    interpreter._patch_lang_tensor = index(interpreter._patch_lang_tensor)


install()
