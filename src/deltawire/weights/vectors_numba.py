"""Where 64 elements at a time differ, as plain LLVM vectors: no instruction set is asked for."""

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.cgutils import get_item_pointer
from numba.extending import intrinsic

LANES = 64


@intrinsic
def differing(typing, old, new, at, own):  # type: ignore[no-untyped-def]
    """A bit for each of 64 elements from `at` on: whether it differs. `new` is read once, into the 64 of `own`."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        lane = ir.IntType(signature.args[0].dtype.bitwidth)
        vector, align = ir.VectorType(lane, LANES), lane.width // 8

        def place(i: int, index: Any) -> Any:
            array = context.make_array(signature.args[i])(context, builder, arguments[i])
            address = get_item_pointer(context, builder, signature.args[i], array, [index], wraparound=False)
            return builder.bitcast(address, vector.as_pointer())

        before, after = (builder.load(place(i, arguments[2]), align=align) for i in (0, 1))
        builder.store(after, place(3, ir.Constant(ir.IntType(64), 0)), align=align)
        return builder.bitcast(builder.icmp_unsigned("!=", before, after), ir.IntType(64))

    return types.uint64(old, new, types.int64, own), emit


@intrinsic
def zeros_below(typing, x):  # type: ignore[no-untyped-def]
    """How many zeros lie below the lowest one of x, which is not 0."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.cttz(arguments[0], context.get_constant(types.boolean, True))

    return types.uint64(types.uint64), emit
