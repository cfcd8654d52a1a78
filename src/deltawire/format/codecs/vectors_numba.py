"""The classes of 64 elements at a time, as plain LLVM vectors: no instruction set is asked for.

Four *planes* of 64 bits say the class of each of 64 elements, bit by bit. A *chunk* holds those of 64 blocks of 64
elements: the 64 planes of the lowest bit, then those of the next. A class's *mask* of a block is its planes, inverted
where the class's number has a zero, and together. Masks tell ranks by counting ones.
"""

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from deltawire.format.codecs.classes import CLASSES
from deltawire.weights.vectors_numba import LANES, address

BITS = 4
"""of a class's number"""
_I8, _I16, _I32, _I64 = (ir.IntType(width) for width in (8, 16, 32, 64))


def _vector(kind: Any, lanes: int, value: int | list[int] = 0) -> Any:
    values = value if isinstance(value, list) else [value] * lanes
    return ir.Constant(ir.VectorType(kind, lanes), values)


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    """A vector whose every lane is `value`."""
    empty = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(empty, value, _I32(0)), empty, _vector(_I32, lanes))


def _count_ones(builder: Any, vector: Any) -> Any:
    """The function that counts the ones of each lane."""
    name = f"llvm.ctpop.v{vector.count}i{vector.element.width}"
    return get_or_insert_function(builder.module, ir.FunctionType(vector, (vector,)), name)


def _planes(context: Any, builder: Any, array: tuple[Any, Any], index: Any, scheme: list[Any]) -> list[Any]:
    """The four planes of the 64 elements from `index` on."""
    lane = ir.IntType(array[0].dtype.bitwidth)
    wide = ir.VectorType(lane, LANES)
    shift, mask, lowest = (
        _splat(builder, builder.trunc(number, lane) if lane.width < 64 else number, LANES) for number in scheme
    )
    x = builder.load(address(context, builder, array, index, wide), align=lane.width // 8)
    x = builder.and_(builder.lshr(x, shift), mask)
    x = builder.select(builder.icmp_unsigned(">", x, lowest), builder.sub(x, lowest), _vector(lane, LANES))
    top = _vector(lane, LANES, CLASSES - 1)
    x = builder.select(builder.icmp_unsigned("<", x, top), x, top)
    x = x if lane.width == 8 else builder.trunc(x, ir.VectorType(_I8, LANES))
    zeros = _vector(_I8, LANES)
    return [
        builder.bitcast(builder.icmp_unsigned("!=", builder.and_(x, _vector(_I8, LANES, 1 << bit)), zeros), _I64)
        for bit in range(BITS)
    ]


@intrinsic
def class_masks(typing, bits, at, scheme, masks, before, counts, place):  # type: ignore[no-untyped-def]
    """Of the 64 elements from bits[at] on: the mask of each class to masks[place : place + 16], how many elements of
    each class were counted so far to `before` likewise, and those of the 64 added to `counts`."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        vector, every = ir.VectorType(_I64, CLASSES), (1 << 64) - 1

        def at(array: int, index: Any) -> Any:
            return address(context, builder, (signature.args[array], arguments[array]), index, vector)

        scheme = [builder.extract_value(arguments[2], i) for i in range(3)]
        both = _vector(_I64, CLASSES, every)
        for bit, plane in enumerate(_planes(context, builder, (signature.args[0], arguments[0]), arguments[1], scheme)):
            flips = _vector(_I64, CLASSES, [0 if c >> bit & 1 else every for c in range(CLASSES)])
            both = builder.and_(both, builder.xor(_splat(builder, plane, CLASSES), flips))
        builder.store(both, at(3, arguments[6]), align=8)
        counted = builder.load(at(5, _I64(0)), align=8)
        builder.store(counted, at(4, arguments[6]), align=8)
        counted = builder.add(counted, builder.call(_count_ones(builder, vector), (both,)))
        builder.store(counted, at(5, _I64(0)), align=8)
        return context.get_dummy_value()

    three = types.UniTuple(types.int64, 3)
    return types.void(bits, types.int64, three, masks, before, counts, types.int64), emit


@intrinsic
def class_planes(typing, bits, at, scheme, planes, block):  # type: ignore[no-untyped-def]
    """Write the four planes of bits[at : at + 64] to planes[block], planes[64 + block], …"""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        parts = [builder.extract_value(arguments[2], i) for i in range(3)]
        found = _planes(context, builder, (signature.args[0], arguments[0]), arguments[1], parts)
        for bit, plane in enumerate(found):
            place = builder.add(arguments[4], _I64(LANES * bit))
            builder.store(plane, address(context, builder, (signature.args[3], arguments[3]), place, _I64), align=8)
        return context.get_dummy_value()

    return types.void(bits, types.int64, types.UniTuple(types.int64, 3), planes, types.int64), emit


@intrinsic
def class_column(typing, planes, number, masks, before):  # type: ignore[no-untyped-def]
    """Of one class in a chunk, to the 64 places from masks[64 * number] on: the mask of each block. To `before`
    (uint16) likewise: how many elements of it the blocks before hold. Returns how many all hold."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        eight = ir.VectorType(_I64, 8)
        ones = _count_ones(builder, eight)
        flips = []
        for bit in range(BITS):
            own = builder.and_(builder.lshr(arguments[1], _I64(bit)), _I64(1))
            flips.append(_splat(builder, builder.sub(own, _I64(1)), 8))
        counts, first = [], builder.mul(arguments[1], _I64(LANES))
        for part in range(0, LANES, 8):
            both = _vector(_I64, 8, (1 << 64) - 1)
            for bit in range(BITS):
                start = _I64(LANES * bit + part)
                place = address(context, builder, (signature.args[0], arguments[0]), start, eight)
                both = builder.and_(both, builder.xor(builder.load(place, align=8), flips[bit]))
            place = address(context, builder, (signature.args[2], arguments[2]), builder.add(first, _I64(part)), eight)
            builder.store(both, place, align=8)
            counts.append(builder.trunc(builder.call(ones, (both,)), ir.VectorType(_I16, 8)))
        own, total = _sums(builder, _joined(builder, counts))
        wide = ir.VectorType(_I16, LANES)
        place = address(context, builder, (signature.args[3], arguments[3]), first, wide)
        builder.store(builder.sub(total, own), place, align=2)
        return builder.zext(builder.extract_element(total, _I32(LANES - 1)), _I64)

    return types.int64(planes, types.uint64, masks, before), emit


def _joined(builder: Any, parts: list[Any]) -> Any:
    """Vectors end to end."""
    while len(parts) > 1:
        lanes = 2 * parts[0].type.count
        order = _vector(_I32, lanes, list(range(lanes)))
        parts = [builder.shuffle_vector(a, b, order) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _sums(builder: Any, own: Any) -> tuple[Any, Any]:
    """64 numbers, and the sum of each and all before it."""
    total, shift = own, 1
    while shift < LANES:
        order = [0] * shift + [LANES + i for i in range(LANES - shift)]
        total = builder.add(total, builder.shuffle_vector(_vector(_I16, LANES), total, _vector(_I32, LANES, order)))
        shift *= 2
    return own, total


@intrinsic
def count_up_to(typing, before, place, rank):  # type: ignore[no-untyped-def]
    """How many of the 64 ascending numbers (uint16) from before[place] on are at most `rank`."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        wide = ir.VectorType(_I16, LANES)
        numbers = builder.load(
            address(context, builder, (signature.args[0], arguments[0]), arguments[1], wide), align=2
        )
        rank = _splat(builder, builder.trunc(arguments[2], _I16), LANES)
        return builder.ctpop(builder.bitcast(builder.icmp_unsigned("<=", numbers, rank), _I64))

    return types.uint64(before, types.uint64, types.uint64), emit
