"""Products of bf16 pairs in a CPU's AMX tiles, for compiled loops."""

from .cpu import intrinsic, ir, numba

# An AMX configuration: eight tiles of 16 rows of 64 bytes
TILES = bytes([1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8])
AMX = {"ldtilecfg": "p", "tilerelease": "", "tilezero": "t", "tileloadd64": "tps",
       "tilestored64": "tps", "tdpbf16ps": "ttt"}  # fmt: skip


def _amx(builder, name, *arguments):
    """An instruction on tiles t, by their numbers, pointers p, and bytes s from row to row."""
    byte = ir.IntType(8)
    kinds = {"t": byte, "p": byte.as_pointer(), "s": ir.IntType(64)}
    kind = ir.FunctionType(ir.VoidType(), [kinds[letter] for letter in AMX[name]])
    name = f"llvm.x86.{name}"
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    builder.call(function, [byte(a) if isinstance(a, int) else a for a in arguments])


@intrinsic
def begin_tiles(typing):
    """Set up this thread's tiles."""

    def generate(context, builder, signature, arguments):
        _amx(builder, "ldtilecfg", context.insert_const_bytes(builder.module, TILES, "tiles"))
        return context.get_dummy_value()

    return numba.void(), generate


@intrinsic
def end_tiles(typing):
    """Give this thread's tiles back."""

    def generate(context, builder, signature, arguments):
        _amx(builder, "tilerelease")
        return context.get_dummy_value()

    return numba.void(), generate


def _block(typing, begin):
    """Type and code of out [32, 32] (+)= c @ x: totals begin with an instruction's."""

    def generate(context, builder, signature, arguments):
        out, out_step, c, c_step, x, x_step, steps = arguments
        integer = out.type
        totals, left, right = ((0, 1), (2, 3)), (4, 5), (6, 7)

        def pointer(address, step, rows, offset):
            address = builder.add(address, builder.mul(step, integer(rows)))
            address = builder.add(address, integer(offset))
            return builder.inttoptr(address, ir.IntType(8).as_pointer())

        def on_totals(name):
            for i in range(2):
                for j in range(2):
                    place = pointer(out, out_step, 16 * i, 64 * j)
                    where = () if name == "tilezero" else (place, out_step)
                    _amx(builder, name, totals[i][j], *where)

        on_totals(begin)
        before = builder.block
        body, after = (builder.append_basic_block(name) for name in ("products", "stores"))
        builder.branch(body)
        builder.position_at_end(body)
        k = builder.phi(integer)
        k.add_incoming(integer(0), before)
        c = builder.add(c, builder.mul(k, integer(64)))
        x = builder.add(x, builder.mul(k, builder.mul(x_step, integer(16))))
        for i in range(2):
            _amx(builder, "tileloadd64", left[i], pointer(c, c_step, 16 * i, 0), c_step)
            _amx(builder, "tileloadd64", right[i], pointer(x, x_step, 0, 64 * i), x_step)
        for i in range(2):
            for j in range(2):
                _amx(builder, "tdpbf16ps", totals[i][j], left[i], right[j])
        following = builder.add(k, integer(1))
        k.add_incoming(following, body)
        builder.cbranch(builder.icmp_signed("<", following, steps), body, after)
        builder.position_at_end(after)
        on_totals("tilestored64")
        return context.get_dummy_value()

    return numba.void(*[numba.int64] * 7), generate


@intrinsic
def add_block(typing, out, out_step, c, c_step, x, x_step, steps):
    """out [32, 32] += c [32, 16 steps] @ x [16 steps, 32] in tiles, where c and x are pairs.

    All three as addresses, and the bytes from row to row.
    """
    return _block(typing, "tileloadd64")


@intrinsic
def set_block(typing, out, out_step, c, c_step, x, x_step, steps):
    """`add_block` to zeros."""
    return _block(typing, "tilezero")
