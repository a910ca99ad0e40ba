"""Translates the PTX of a kernel into Python: what a GPU would do, instruction by instruction, on NumPy arrays.

It knows the instructions that Triton makes of this library's kernels, with their modifiers; any other is an error. All
threads of a block go through a kernel together: a branch on which they disagree is an error too. Rounding is that of
the instructions, except that a fused multiply-add of float64 goes through x87's 64 bits, and one of float32 through
float64.
"""

import re
from collections.abc import Iterator

import numpy as np

SHARED_AT = 1 << 16  # the address of shared memory; it begins here so that a forgotten one is outside


# ------------------------------------------------------------------------------------------------ arithmetic


def _fma(a, b, c):
    wide = np.float64 if a.dtype == np.float32 else np.longdouble
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(a.dtype)


def _shift(a, by, left):
    """PTX clamps what it shifts by; C and NumPy leave it open."""
    bits = a.dtype.itemsize * 8
    by = by.astype(a.dtype)
    within = np.minimum(by.astype(np.uint64), bits - 1).astype(a.dtype)
    if left:
        return np.where(by == within, a << within, a.dtype.type(0))
    return np.where((by == within) | (a.dtype.kind == "i"), a >> within, a.dtype.type(0))


def _divide(a, b):
    quotient = np.abs(a) // np.abs(b)
    return np.where((a < 0) == (b < 0), quotient, -quotient).astype(a.dtype)


def _reciprocal(a):
    """rcp.approx.ftz.f64: of the mantissa only the upper 20 bits are there."""
    return ((np.float64(1) / a).view(np.uint64) >> np.uint64(32) << np.uint64(32)).view(np.float64)


def _flush(a):
    """.ftz: denormals are zeros."""
    return np.where(np.abs(a) < np.finfo(a.dtype).tiny, a * 0, a)


def _to_bf16(a):
    bits = a.view(np.uint32).astype(np.uint64)
    rounded = (bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(a), 0x7FFF, rounded).astype(np.uint16)


def _from_bf16(a):
    return (a.astype(np.uint32) << np.uint32(16)).view(np.float32)


def joined(low, high):
    """Two registers as one of twice their width; the first has the lower bits."""
    wide = np.dtype(f"u{2 * low.itemsize}").type
    return low.astype(wide) | (high.astype(wide) << wide(8 * low.itemsize))


def _permute(a, b, selector):
    """prmt: four of the eight bytes of b and a."""
    both = joined(a, b)
    result = np.uint32(0)
    for place in range(4):
        byte = (both >> np.uint64(8 * (selector >> 4 * place & 7))).astype(np.uint32) & np.uint32(255)
        result = result | byte << np.uint32(8 * place)
    return result


def _signed_halves(a, b):
    """add.s16x2"""
    low = (a + b) & np.uint32(0xFFFF)
    return low | ((a >> np.uint32(16)) + (b >> np.uint32(16))) << np.uint32(16)


def _by_halves(operation, *operands):
    """.f32x2: two float32 in a register."""
    pairs = [np.atleast_1d(x).view(np.float32).reshape(-1, 2) for x in operands]
    return np.ascontiguousarray(operation(*pairs)).view(np.uint64).ravel()


COMPARISONS = {"eq": "{0} == {1}", "lt": "{0} < {1}", "le": "{0} <= {1}", "gt": "{0} > {1}", "ge": "{0} >= {1}"}
COMPARISONS |= {"ne": "({0} < {1}) | ({0} > {1})", "geu": "~({0} < {1})", "gtu": "~({0} <= {1})"}
COMPARISONS |= {"ltu": "~({0} >= {1})", "leu": "~({0} > {1})", "neu": "{0} != {1}"}
SIMPLE = {"add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "mad": "{0} * {1} + {2}", "neg": "-{0}"}
SIMPLE |= {"and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}", "not": "~{0}", "mov": "{0}"}
SIMPLE |= {"min": "np.minimum({0}, {1})", "max": "np.maximum({0}, {1})", "fma": "_fma({0}, {1}, {2})"}
CONVERSIONS = {
    ("f32", "bf16"): "_from_bf16({0})",
    ("f64", "bf16"): "_from_bf16({0}).astype(np.float64)",
    ("bf16", "f32"): "_to_bf16({0})",
    ("bf16x2", "f32"): "joined(_to_bf16({1}), _to_bf16({0}))",
    ("f16x2", "f32"): "joined({1}.astype(np.float16).view(np.uint16), {0}.astype(np.float16).view(np.uint16))",
}


# What may stand between a name and its types: what says nothing, or what the translation knows. Rounding to nearest.
MODIFIERS = {
    "add": {"rn"}, "sub": {"rn"}, "mul": {"rn", "lo", "wide"}, "mad": {"lo", "wide"}, "fma": {"rn"}, "div": {"rn"},
    "cvt": {"rn"}, "abs": {"ftz"}, "rcp": {"approx", "ftz"}, "shfl": {"sync", "bfly", "idx"}, "redux": {"sync", "add"},
}  # fmt: skip


# ----------------------------------------------------------------------------------------------- translation


class Program:
    """A kernel, from PTX: `run(block)` is a generator that stops where another block of threads may go on.

    Registers are unsigned integers, one for each thread or one for all: `block` does what is more than arithmetic.
    """

    def __init__(self, ptx: str) -> None:
        text = re.sub(r"//.*", "", ptx)
        body = text[text.index("{", text.index(".entry")) :]
        self.threads = int(re.search(r"\.reqntid (\d+)", text)[1])
        self.parameters = len(re.findall(r"\.param \.\w+ ", text[: text.index(".reqntid")]))
        self._widths = {"p": 1}
        for kind, name in re.findall(r"\.reg \.(\w+)\s+%(\w+)<", body):
            self._widths[name] = 1 if kind == "pred" else int(kind[1:])
        blocks: list[list[str]] = [[]]
        labels: dict[str, int] = {}
        for line in body[1 : body.index("\n}")].splitlines():
            line = re.sub(r"^\{ \.reg \.\w+ \w+; (.*) \}$", r"\1", line.strip())
            if label := re.match(r"(\$\w+):", line):
                labels[label[1]] = len(blocks)
                blocks.append([])
            elif line and not line.startswith("."):
                blocks[-1].append(line)
        source = ["def run(self):", " at = 0"]
        for register, width in self._widths.items():
            # Nobody knows what is in a register before something is. A NaN is rarely the right answer.
            if width > 1 and (names := sorted(set(re.findall(rf"%({register}\d+)\b", body)))):
                source.append(f" {' = '.join(names)} = np.uint{width}({0x7FF8BAD07FF8BAD0 % 2**width})")
        source.append(" while True:")
        for number, lines in enumerate(blocks):
            source.append(f"  if at == {number}:")
            source += [f"   {step}" for line in lines for step in self._steps(line.rstrip(";"), labels)]
            source.append(f"   at = {number + 1}")
        scope = dict(globals())
        exec("\n".join([*source, "  assert at < 0"]), scope)
        self.run = scope["run"]

    def _steps(self, line: str, labels: dict[str, int]) -> Iterator[str]:
        """Lines of Python for an instruction."""
        guard, code, rest = re.match(r"(?:@(!?%p\d+)\s+)?(\S+)\s*(.*)", line).groups()
        mask = None if guard is None else guard.replace("%", "").replace("!", "~")
        name, *modifiers = code.split(".")
        kind = modifiers[-1] if modifiers else ""
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
        if name == "bra":
            go = f"at = {labels[operands[0]]}; continue"
            yield go if mask is None else f"if self.agreed({mask}): {go}"
        elif name == "ret":
            yield "return"
        elif name == "bar":
            assert (modifiers, rest) == (["sync"], "0"), line  # others are of some threads alone
            yield "self.barrier(); yield"
        elif name == "ld" and modifiers[0] == "param":
            number = int(re.search(r"_(\d+)\]", operands[1])[1])
            yield self._write(operands[0], f"self.parameters[{number}]", kind, converted=True)
        elif name == "ld":
            targets = self._group(operands[0])
            old = "None" if mask is None else f"({', '.join(targets)},)"
            load = f"self.load({self._address(operands[1])}, {mask}, {len(targets)}, {kind[1:]}, {old})"
            yield f"loaded = {load}"
            for i, target in enumerate(targets):
                yield self._write(f"%{target}", f"loaded[{i}]", kind, converted=True)
        elif name == "st":
            values = ", ".join(self._read(f"%{x}", kind) for x in self._group(operands[1]))
            yield "yield"
            yield f"self.store({self._address(operands[0])}, {mask}, ({values},))"
        elif name in ("ldmatrix", "stmatrix"):
            assert (mask, modifiers[:3], kind) == (None, ["sync", "aligned", "m8n8"], "b16"), line
            yield "yield"
            group, address = operands if name == "ldmatrix" else reversed(operands)
            transposed = "trans" in modifiers
            for matrix, register in enumerate(self._group(group)):
                where = f"{self._address(address)}, {matrix}, {transposed}"
                if name == "ldmatrix":
                    yield f"{register} = self.load_matrix({where})"
                else:
                    yield f"self.store_matrix({where}, {register})"
        elif name == "atom":
            assert modifiers == ["global", "gpu", *modifiers[2:-2], "add", "u32"], line
            yield "yield"
            values = f"{self._read(operands[2], 'u32')}, {self._read(operands[0], 'u32')}, {'acq_rel' in modifiers}"
            yield self._write(operands[0], f"self.add({self._address(operands[1])}, {mask}, {values})", "u32")
        elif mask is not None:
            raise NotImplementedError(line)
        elif name == "createpolicy":
            pass  # how long to keep it in a cache
        elif name == "mov" and "{" in rest:
            yield from self._moved(operands, int(kind[1:]))
        elif not modifiers:
            raise NotImplementedError(line)
        else:
            yield self._computed(line, name, modifiers, operands)

    def _moved(self, operands: list[str], bits: int) -> Iterator[str]:
        """mov between one register and two halves of it."""
        if operands[0].startswith("{"):
            for half, target in enumerate(self._group(operands[0])):
                if target not in ("_", "tmp"):
                    part = f"({self._read(operands[1], f'b{bits}')} >> np.uint{bits}({half * bits // 2}))"
                    yield f"{target} = {part}.astype(np.uint{bits // 2})"
        else:
            low, high = (self._read(f"%{x}", f"b{bits // 2}") for x in self._group(operands[1]))
            yield self._write(operands[0], f"joined({low}, {high})", f"b{bits}")

    def _computed(self, line: str, name: str, modifiers: list[str], operands: list[str]) -> str:
        kind = modifiers[-1]
        target, *given = operands
        mixed = name in ("add", "sub") and modifiers[-2:] in (["f32", "bf16"], ["f32", "f16"])
        types = 2 if name == "cvt" or mixed else 1
        if name != "setp" and not set(modifiers[:-types]) <= MODIFIERS.get(name, set()):
            raise NotImplementedError(line)

        def args(of: str) -> list[str]:
            return [self._read(x, of) for x in given]

        if name == "cvt":
            to, of = modifiers[-2:]
            if (to, of) in CONVERSIONS:
                value = CONVERSIONS[to, of].format(*args(of))
                return self._write(target, value, {"bf16": "b16"}.get(to, "b32" if "x2" in to else to))
            exact = "rn" in modifiers or to[0] != "f" or of[0] == "f"
            if "b" not in to + of and "x" not in to and exact and not (to[0] != "f" and of[0] == "f"):
                return self._write(target, f"{args(of)[0]}.astype({self._dtype(to)})", to)
        if name == "setp":
            assert len(modifiers) == 2, line
            return self._write(target, COMPARISONS[modifiers[0]].format(*args(kind)), "pred")
        if name == "selp":
            a, b = (self._read(x, kind) for x in given[:2])
            return self._write(target, f"np.where({self._read(given[2], 'pred')}, {a}, {b})", kind)
        if name in ("mul", "mad") and modifiers[0] == "wide":
            wide = f"{kind[0]}{2 * int(kind[1:])}"
            a, b = (f"{x}.astype({self._dtype(wide)})" for x in (self._read(x, kind) for x in given[:2]))
            added = f" + {self._read(given[2], wide)}" if name == "mad" else ""
            return self._write(target, f"{a} * {b}{added}", wide)
        if name in ("shl", "shr"):
            value = f"_shift({self._read(given[0], kind)}, {self._read(given[1], 'u32')}, {name == 'shl'})"
            return self._write(target, value, kind)
        if name == "abs":
            value = f"np.abs({args(kind)[0]})"
            return self._write(target, f"_flush({value})" if "ftz" in modifiers else value, kind)
        if name == "div":
            a, b = args(kind)
            return self._write(target, f"{a} / {b}" if kind[0] == "f" else f"_divide({a}, {b})", kind)
        if name == "rcp":
            assert modifiers == ["approx", "ftz", "f64"], line
            return self._write(target, f"_reciprocal({args(kind)[0]})", kind)
        if name == "bfe":
            first, length = int(given[1]), int(given[2])
            value = f"{self._read(given[0], 'u32')} << np.uint32({32 - first - length})"
            return self._write(
                target, f"({value}).view({self._dtype(kind)}) >> {self._dtype(kind)}({32 - length})", kind
            )
        if name == "prmt":
            a, b = (self._read(x, "b32") for x in given[:2])
            selector = int(given[2].rstrip("U"), 0)
            assert not selector & 0x8888, line  # copies of the sign
            return self._write(target, f"_permute({a}, {b}, {selector})", "b32")
        if name == "shfl":
            assert (modifiers[0], kind, *given[2:]) == ("sync", "b32", "31", "-1"), line
            lane = {"idx": "{}", "bfly": "self.tid_x ^ {}"}[modifiers[1]].format(self._read(given[1], "u32"))
            return self._write(target, f"self.shuffle({self._read(given[0], 'b32')}, {lane})", "b32")
        if name == "redux":
            assert modifiers == ["sync", "add", "s32"], line
            return self._write(target, f"self.warp_sum({self._read(given[0], 's32')})", "s32")
        if kind == "f32x2":
            operation = f"lambda a, b, c=None: {SIMPLE[name].format('a', 'b', 'c')}"
            return self._write(target, f"_by_halves({operation}, {', '.join(args('b64'))})", "b64")
        if mixed:
            widened = CONVERSIONS.get(("f32", kind), "{0}.astype(np.float32)").format(self._read(given[0], kind))
            return self._write(target, SIMPLE[name].format(widened, self._read(given[1], "f32")), "f32")
        if kind == "s16x2":
            return self._write(target, f"_signed_halves({', '.join(args('b32'))})", "b32")
        if name in SIMPLE and not (name in ("min", "max") and kind[0] == "f"):  # PTX's prefer numbers to NaN
            return self._write(target, SIMPLE[name].format(*args(kind)), kind)
        raise NotImplementedError(line)

    def _group(self, operand: str) -> list[str]:
        return [x.strip().lstrip("%") for x in operand.strip("{}").split(",")]

    def _address(self, operand: str) -> str:
        base, offset = re.match(r"\[\s*([%\w]+)\s*\+?\s*(-?\d+)?\s*\]", operand).groups()
        kind = "u64" if base.startswith("%rd") else "u32"
        return f"{self._read(base, kind)} + {self._read(offset or '0', kind)}"

    def _width(self, register: str) -> int:
        return self._widths[re.match(r"%?([a-z]+)", register)[1]]

    def _dtype(self, kind: str) -> str:
        if kind in ("pred", "bf16"):
            return {"pred": "np.bool_", "bf16": "np.uint16"}[kind]
        family, bits = re.fullmatch(r"([bufs])(8|16|32|64)", kind).groups()
        return f"np.{ {'f': 'float', 's': 'int'}.get(family, 'uint') }{bits}"

    def _read(self, operand: str, kind: str) -> str:
        """An operand as an expression of a dtype."""
        dtype = self._dtype(kind)
        bits = 1 if kind == "pred" else int(re.search(r"\d+", dtype)[0])
        if operand in ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x"):
            return f"self.{operand[1:].replace('.', '_')}"
        if operand.startswith("%"):
            register = operand[1:]
            if self._width(operand) != bits:
                register = f"{register}.astype(np.uint{bits})"
            return register if "uint" in dtype or kind == "pred" else f"{register}.view({dtype})"
        if operand == "global_smem":
            return f"np.uint{bits}({SHARED_AT})"
        if literal := re.fullmatch(r"0[fdFD]([0-9A-F]+)", operand):
            return f"np.uint{bits}({int(literal[1], 16)}).view({dtype})"
        return f"np.uint{bits}({int(operand, 0) % 2**bits}).view({dtype})"

    def _write(self, target: str, value: str, kind: str, converted: bool = False) -> str:
        """converted: the value is of unsigned integers already."""
        register, width = target[1:], self._width(target)
        if kind == "pred":
            return f"{register} = {value}"
        bits = int(kind[1:])
        if not converted and kind[0] in "fs":
            value = f"({value}).view(np.uint{bits})"
        if bits != width:
            extended = f".view(np.int{bits}).astype(np.int{width})" if kind[0] == "s" else ""
            value = f"({value}){extended}.astype(np.uint{width})"
        return f"{register} = {value}"
