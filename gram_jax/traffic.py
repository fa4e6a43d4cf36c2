"""Bytes that a compiled program reads from and writes to a device's main memory in a step.

Each fused instruction reads its operands and writes its results once; what the compiler keeps on
the chip (another memory space) costs nothing. A fusion that cuts a slice out of an operand reads
the slice, and one that updates a slice in place writes the slice.
"""

from __future__ import annotations

from gram_jax.hlo import Array, Computation, Instruction, Program

_FREE = frozenset(
    {
        "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
        "conditional", "after-all", "partition-id", "replica-id", "add-dependency",
        "opt-barrier", "async-start", "async-update", "domain",
    }
)  # fmt: skip
_FREE_TARGETS = ("AllocateBuffer", "ConcatBitcast", "AsyncCollective", "AssumeGather")
_CUTS = ("dynamic-slice", "slice", "gather")


def memory_traffic(program: Program) -> float:
    """Bytes per device and step."""
    return sum(
        times * _bytes(program, computation, i)
        for computation, times in program.runs()
        for i in computation.instructions.values()
    )


def _bytes(program: Program, computation: Computation, i: Instruction) -> int:
    op = i.opcode
    if op in _FREE or op.endswith("-done") or any(t in i.attributes for t in _FREE_TARGETS):
        return 0
    if op == "custom-call" and i.called("called_computations"):
        return 0  # counted where they are run
    if op in ("copy-start", "slice-start"):
        # (to, from, context) and ((from), to, context): what is moved is the smaller one.
        ends = i.arrays[:2]
        return min(array.bytes for array in ends) * sum(array.space == 0 for array in ends)
    if op in _CUTS:
        return 2 * _held(i.arrays)
    if op == "dynamic-update-slice":
        return 2 * _read(computation, i.operands[1])
    if op == "fusion":
        return _fusion_bytes(program, computation, i)
    return sum(_read(computation, name) for name in i.operands) + _held(i.arrays)


def _held(arrays: tuple[Array, ...]) -> int:
    """Bytes of those that lie in main memory."""
    return sum(array.bytes for array in arrays if array.space == 0)


def _read(computation: Computation, name: str) -> int:
    found = computation.instructions.get(name)
    return 0 if found is None or len(found.arrays) != 1 else _held(found.arrays)


def _fusion_bytes(program: Program, computation: Computation, i: Instruction) -> int:
    inside = program.computations[i.called("calls")[0]]
    users: dict[str, list[Instruction]] = {}
    for inner in inside.instructions.values():
        for name in inner.operands:
            users.setdefault(name, []).append(inner)
    root = inside.root
    results = [inside.instructions[n] for n in root.operands] if root.opcode == "tuple" else [root]
    total, updated = 0, set()
    for result, array in zip(results, i.arrays, strict=False):
        update = _past_bitcasts(inside, result)
        if update.opcode == "dynamic-update-slice":
            # Only the slice is written; the rest stays where it is.
            updated.add(_past_bitcasts(inside, inside.instructions[update.operands[0]]).name)
            slice_ = inside.instructions[update.operands[1]].arrays
            total += min(sum(a.bytes for a in slice_), array.bytes) * (array.space == 0)
        else:
            total += _held((array,))
    for inner in inside.instructions.values():
        if inner.opcode != "parameter" or inner.name in updated:
            continue
        whole = _read(computation, i.operands[int(inner.operands[0])])
        cuts = _cuts(users, inner.name)
        total += whole if cuts is None else min(whole, cuts)
    return total


def _past_bitcasts(inside: Computation, i: Instruction) -> Instruction:
    while i.opcode in ("bitcast", "copy", "reshape") and i.operands[0] in inside.instructions:
        i = inside.instructions[i.operands[0]]
    return i


def _cuts(users: dict[str, list[Instruction]], name: str) -> int | None:
    """Bytes of the slices of a value, where nothing else of it is used; else None."""
    total = 0
    for user in users.get(name, []):
        if user.opcode in _CUTS and user.operands[0] == name:
            total += sum(array.bytes for array in user.arrays)
        elif user.opcode == "bitcast":
            deeper = _cuts(users, user.name)
            if deeper is None:
                return None
            total += deeper
        else:
            return None
    return total
