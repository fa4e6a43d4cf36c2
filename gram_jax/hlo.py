"""A compiled program's text (HLO), read into computations and instructions, with loop counts."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator

from gram_jax.errors import UserError

_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
    "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "s4": 0.5, "u4": 0.5,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Array:
    """One array of an instruction's result; ``space`` 0 is the device's main memory (HBM)."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        """0 for what is no array, such as a token."""
        size = 1 if self.dtype.startswith("f8") else _BYTES.get(self.dtype, 0)
        return math.ceil(math.prod(self.dims) * size)


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """``name = type opcode(operands), attributes``.

    Attributes:
      arrays: of its result; of a tuple all, nested ones as well.
      operands: names of instructions, or, of a parameter or constant, what stands in the brackets.
      is_root: what the computation returns.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def attribute(self, name: str) -> str:
        """The value of ``name=``, or ''."""
        match = re.search(rf"(?:^|[ ,]){name}=(\{{.*?\}}|[^,\s]+)", self.attributes)
        return match.group(1) if match else ""

    def called(self, name: str) -> list[str]:
        """The computations that an attribute names."""
        return re.findall(r"%?([\w.\-]+)", self.attribute(name))


@dataclasses.dataclass(slots=True)
class Computation:
    """Instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.is_root)


@dataclasses.dataclass(slots=True)
class Program:
    """All computations of a module, and which one is run."""

    computations: dict[str, Computation]
    entry: str

    def runs(self) -> Iterator[tuple[Computation, float]]:
        """Computations that are run as they stand, and how often; not those within fusions."""
        yield from self._runs(self.computations[self.entry], 1.0)

    def _runs(self, computation: Computation, times: float) -> Iterator[tuple[Computation, float]]:
        yield computation, times
        for i in computation.instructions.values():
            if i.opcode == "while":
                count = times * self.trip_count(computation, i)
                for name in i.called("body"):
                    yield from self._runs(self.computations[name], count)
            elif i.opcode in ("call", "async-start", "custom-call"):
                # A custom call's are run by another core of the device (SparseCore).
                called = ("to_apply", "calls", "called_computations")
                for name in itertools.chain.from_iterable(i.called(kind) for kind in called):
                    yield from self._runs(self.computations[name], times)
            elif i.opcode == "conditional":
                branches = i.called("branch_computations") or (
                    i.called("true_computation") + i.called("false_computation")
                )
                for name in branches:  # one of them is run; which one is not known
                    yield from self._runs(self.computations[name], times / len(branches))

    def trip_count(self, computation: Computation, loop: Instruction) -> float:
        """How often a counted loop's body is run.

        Raises:
          UserError: that depends on the data.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if known:
            return int(known.group(1))
        condition = self.computations[loop.called("condition")[0]]
        body = self.computations[loop.called("body")[0]]
        index, limit = self._compared(condition)
        step = self._step(body, index)
        start = _constant(computation, _element(computation, loop.operands[0], index)) or 0
        return max(math.ceil((limit - start) / step), 0)

    def _compared(self, condition: Computation) -> tuple[int, int]:
        """Which element of the loop's state is compared with which number."""
        root = condition.root
        compared = [_source(condition, name) for name in root.operands[:2]]
        if root.opcode == "fusion":
            # It was fused: what it compares are constants in there, or operands of the fusion.
            inside = self.computations[root.called("calls")[0]]
            given, root = root.operands, inside.root
            compared = [_source(inside, name) for name in root.operands[:2]]
            compared = [
                _source(condition, given[int(i.operands[0])]) if i.opcode == "parameter" else i
                for i in compared
            ]
        if root.opcode == "compare" and "direction=LT" in root.attributes:
            first, second = compared
            index = first.attribute("index")
            if second.opcode == "constant" and index:
                return int(index), int(second.operands[0])
        raise UserError(
            f"the loop of {condition.name} runs as often as the data says, so the program cannot be"
            " planned; of compute.attention, blocks has such loops"
        )

    def _step(self, body: Computation, index: int) -> int:
        name = _element(body, body.root.name, index)
        step = body.instructions.get(name)
        if step is not None and step.opcode == "add":
            for operand in step.operands:
                value = _constant(body, operand)
                if value is not None:
                    return value
        return 1


def _source(computation: Computation, name: str) -> Instruction:
    """The instruction whose value this is, past copies."""
    found = computation.instructions[name]
    while found.opcode in ("copy", "bitcast", "reshape", "convert") and found.operands:
        found = computation.instructions[found.operands[0]]
    return found


def _constant(computation: Computation, name: str) -> int | None:
    """The number that an instruction holds, or None."""
    if name not in computation.instructions:
        return None
    found = _source(computation, name)
    if found.opcode == "constant" and re.fullmatch(r"-?\d+", found.operands[0]):
        return int(found.operands[0])
    return None


def _element(computation: Computation, name: str, index: int) -> str:
    """The instruction that is an element of a tuple; '' where that is not written."""
    found = computation.instructions[name]
    return found.operands[index] if found.opcode == "tuple" else ""


def parse(text: str) -> Program:
    """Reads the text of a compiled module."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")) and line.endswith("{"):
            match = re.match(r"(ENTRY )?%?([\w.\-]+)", line)
            assert match is not None
            current = computations[match.group(2)] = Computation(match.group(2), {})
            entry = match.group(2) if match.group(1) else entry
        elif current is not None and re.match(r"  (ROOT )?%?[\w.\-]+ = ", line):
            # Other lines go on with an attribute that is text of several lines.
            instruction = _instruction(line.strip())
            current.instructions[instruction.name] = instruction
    return Program(computations, entry)


def _instruction(line: str) -> Instruction:
    head, _, rest = line.partition(" = ")
    is_root = head.startswith("ROOT ")
    end = _closing(rest, 0) if rest.startswith("(") else rest.find(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.find("(")
    closing = _closing(rest, opening)
    inside = re.sub(r"/\*.*?\*/", "", rest[opening + 1 : closing - 1])
    opcode = rest[:opening]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or tuple(filter(None, [inside.strip()]))
    return Instruction(
        head.removeprefix("ROOT ").lstrip("%"),
        opcode,
        _arrays(kind),
        operands,
        rest[closing:].lstrip(", "),
        is_root,
    )


def _closing(text: str, opening: int) -> int:
    """The place after the bracket that closes the one at ``opening``."""
    depth = 0
    for i in range(opening, len(text)):
        if text[i] == "(":
            depth += 1
        elif text[i] == ")":
            depth -= 1
            if depth == 0:
                return i + 1
    return len(text)


@functools.lru_cache(maxsize=65536)
def _arrays(kind: str) -> tuple[Array, ...]:
    found = re.findall(r"(\w+)\[([\d,<=]*)\](\{[^{}]*\})?", kind)
    arrays = []
    for dtype, dims, layout in found:
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        arrays.append(Array(dtype, sizes, int(space.group(1)) if space else 0))
    return tuple(arrays)
