"""What numba's language lacks, as a few lines of LLVM's: vectors that stay in registers, and masks of what is not zero.

A vector has 16 floats; LLVM cuts it in two or four where the processor's are shorter. Arguments are flat arrays and
places in them; nothing checks bounds. To the type checker everything here is ``Any``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

LANES = 16
tools: Any = cgutils

_int32, _int64, _float = ir.IntType(32), ir.IntType(64), ir.FloatType()
_vector = ir.VectorType(_float, LANES)


def intrinsic(function: Callable[..., Any]) -> Any:
    """Let compiled code call what ``function`` generates."""
    return extending.intrinsic(function)


def _data(context: Any, builder: Any, type_: Any, array: Any) -> Any:
    return context.make_array(type_)(context, builder, array).data


def _at(builder: Any, pointer: Any, *places: Any) -> Any:
    for place in places:
        pointer = builder.gep(pointer, [_int64(place) if isinstance(place, int) else place])
    return pointer


def _load(builder: Any, pointer: Any) -> Any:
    loaded = builder.load(builder.bitcast(pointer, _vector.as_pointer()))
    loaded.align = 4
    return loaded


def _store(builder: Any, value: Any, pointer: Any) -> None:
    builder.store(value, builder.bitcast(pointer, _vector.as_pointer())).align = 4


def _fetch(builder: Any, pointer: Any) -> None:
    byte = ir.IntType(8).as_pointer()
    function = ir.FunctionType(ir.VoidType(), [byte, _int32, _int32, _int32])
    fetch = tools.get_or_insert_function(builder.module, function, "llvm.prefetch.p0")
    builder.call(fetch, [builder.bitcast(pointer, byte), _int32(0), _int32(3), _int32(1)])


def _everywhere(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(_vector, ir.Undefined)
    first = builder.insert_element(undefined, value, _int32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_int32, LANES), [0] * LANES))


def _adder(vectors: int) -> Any:
    @intrinsic
    def add_rows(
        context: Any,
        lists: Any,
        n: Any,
        units: Any,
        values: Any,
        pitch: Any,
        table: Any,
        origin: Any,
        out: Any,
        place: Any,
    ) -> Any:
        """Add ``values[i] * row[units[i]]`` to ``out[place:]``, with sums in registers.

        ``lists`` has a row for each of the first ``n`` lists: where it starts, how long it is, and where in ``table``,
        beyond ``origin``, the rows lie that it counts; of these, ``pitch`` apart, 16 times ``vectors`` are used.
        """
        signature = types.void(lists, n, units, values, pitch, table, origin, out, place)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            rows, unit, value, weights, result = (
                _data(context, builder, signature.args[i], args[i]) for i in (0, 2, 3, 5, 7)
            )
            result = _at(builder, result, args[8])
            sums = [tools.alloca_once(builder, _vector) for _ in range(vectors)]
            for i, each in enumerate(sums):
                builder.store(_load(builder, _at(builder, result, LANES * i)), each)
            with tools.for_range(builder, args[1]) as outer:
                row = _at(builder, rows, builder.mul(outer.index, _int64(3)))
                start, length, base = (builder.load(_at(builder, row, i)) for i in range(3))
                weights_of = _at(builder, weights, base, args[6])
                unit_of, value_of = _at(builder, unit, start), _at(builder, value, start)
                with tools.for_range(builder, length) as inner:
                    unit_now = builder.zext(builder.load(_at(builder, unit_of, inner.index)), _int64)
                    factor = _everywhere(builder, builder.load(_at(builder, value_of, inner.index)))
                    weight = _at(builder, weights_of, builder.mul(unit_now, args[4]))
                    for i, each in enumerate(sums):
                        product = builder.fmul(factor, _load(builder, _at(builder, weight, LANES * i)), ("contract",))
                        builder.store(builder.fadd(product, builder.load(each), ("contract",)), each)
            for i, each in enumerate(sums):
                _store(builder, builder.load(each), _at(builder, result, LANES * i))
            return context.get_dummy_value()

        return signature, generate

    return add_rows


add_rows_1, add_rows_2, add_rows_4, add_rows_8 = (_adder(vectors) for vectors in (1, 2, 4, 8))


@intrinsic
def prefetch(context: Any, x: Any, place: Any) -> Any:
    """Have the processor fetch the 64 bytes at ``x[place]``; any place is allowed."""
    signature = types.void(x, place)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _fetch(builder, _at(builder, _data(context, builder, signature.args[0], args[0]), args[1]))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def nonzero_mask(context: Any, x: Any, place: Any) -> Any:
    """Return 64 bits: which of ``x[place : place + 64]`` are not zero (NaN is not)."""
    signature = types.uint64(x, place)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        start = _at(builder, _data(context, builder, signature.args[0], args[0]), args[1])
        zero, mask = ir.Constant(_vector, [0.0] * LANES), _int64(0)
        for i in range(64 // LANES):
            bits = builder.fcmp_unordered("!=", _load(builder, _at(builder, start, LANES * i)), zero)
            wide = builder.zext(builder.bitcast(bits, ir.IntType(LANES)), _int64)
            mask = builder.or_(mask, builder.shl(wide, _int64(LANES * i)))
        return mask

    return signature, generate


@intrinsic
def lowest(context: Any, mask: Any) -> Any:
    """Return the place of the lowest bit that is set."""
    return types.int64(types.uint64), lambda context, builder, signature, args: builder.cttz(args[0], ir.IntType(1)(1))


@intrinsic
def ones(context: Any, mask: Any) -> Any:
    """Return how many bits are set."""
    return types.int64(types.uint64), lambda context, builder, signature, args: builder.ctpop(args[0])


@intrinsic
def transpose_16(context: Any, x: Any, place: Any, step: Any, out: Any, to: Any, out_step: Any) -> Any:
    """Write 16 rows of 16 from ``x[place:]``, ``step`` apart, as columns to ``out[to:]``, ``out_step`` apart."""
    signature = types.void(x, place, step, out, to, out_step)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source = _at(builder, _data(context, builder, signature.args[0], args[0]), args[1])
        result = _at(builder, _data(context, builder, signature.args[3], args[3]), args[4])
        rows = [_load(builder, _at(builder, source, builder.mul(args[2], _int64(i)))) for i in range(LANES)]
        for bit in (1, 2, 4, 8):  # swap the off-diagonal blocks of this size
            low = [j if not j & bit else LANES + j - bit for j in range(LANES)]
            high = [j + bit if not j & bit else LANES + j for j in range(LANES)]
            for i in range(LANES):
                if not i & bit:
                    pair = rows[i], rows[i + bit]
                    for place, lanes in ((i, low), (i + bit, high)):
                        rows[place] = builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(_int32, LANES), lanes))
        for i, row in enumerate(rows):
            _store(builder, row, _at(builder, result, builder.mul(args[5], _int64(i))))
        return context.get_dummy_value()

    return signature, generate
