"""Follow the shared-memory addresses of matrix products through a kernel's machine code, without a GPU.

Triton 3.6 brings ptxas 12.8, which sometimes computes the descriptor of a ``wgmma`` operand from a register that
nothing has written: where an operand takes the place in shared memory of an earlier one. The product is then wrong, or
reads out of range. Every descriptor derives from constants, so it can be computed from the listing.
"""

from __future__ import annotations

import functools
import operator
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_POINTERS = {
    "bool": "*i1",
    "bfloat16": "*bf16",
    "float16": "*fp16",
    "float32": "*fp32",
    "int32": "*i32",
    "int64": "*i64",
}
_LINE = re.compile(r"\s+/\*([0-9a-f]{4,5})\*/\s+(?:@(!?U?P\w+)\s+)?(\S+)\s*(.*?);")
_PREDICATE = re.compile(r"!?U?P(\d|T)$")
_WORD = (1 << 32) - 1
# keywords of a launch that are no constants of the kernel
OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")


class Product(NamedTuple):
    """Hold one ``wgmma``: where it is, and byte addresses of its operands in shared memory.

    Attributes:
        place: Of the instruction.
        left, right: None if not known; ``left`` is -1 where it comes from registers.
    """

    place: str
    left: int | None
    right: int | None


def build(function, arguments, constants, options, capability: int = 90):
    """Compile a launch for a compute capability, ten times its number."""
    signature, fixed, attributes = {}, {}, {}
    for index, (name, value) in enumerate(zip(function.arg_names, arguments, strict=False)):
        if hasattr(value, "block_shape"):
            kind = _POINTERS[str(value.base.dtype).removeprefix("torch.")].removeprefix("*")
            signature[name] = f"tensordesc<{kind}[{','.join(map(str, value.block_shape))}]>"
        elif value is None or (isinstance(value, int) and value == 1):
            signature[name], fixed[(index,)] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = _POINTERS[str(value.dtype).removeprefix("torch.")]
            attributes[(index,)] = [["tt.divisibility", 16]]
    for name, value in constants.items():
        signature[name], fixed[(function.arg_names.index(name),)] = "constexpr", value
    source = ASTSource(fn=function, signature=signature, constexprs=fixed, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _dump(kernel, flag: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        done = subprocess.run([TOOL, flag, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def listing(function, arguments, constants, options) -> tuple[str, int]:
    """Compile a launch for compute capability 9.0; returns its machine code and bytes of shared memory."""
    kernel = build(function, arguments, constants, options)
    return code(kernel), kernel.metadata.shared


def code(kernel) -> str:
    """Return the machine code of a compiled kernel."""
    return _dump(kernel, "-sass")


class Usage(NamedTuple):
    """Say what a program takes: bytes of shared memory, registers of a thread, bytes of a thread on the stack."""

    shared: int
    registers: int
    stack: int


def usage(kernel) -> Usage:
    """Read what a program of a compiled kernel takes."""
    match = re.search(r"REG:(\d+) STACK:(\d+)", _dump(kernel, "-res-usage"))
    assert match is not None
    return Usage(kernel.metadata.shared, *map(int, match.groups()))


def late_loads(sass: str, *, skips: bool = False) -> int:
    """Count loads from global memory that are asked for after something that was loaded has been waited for.

    Args:
        sass: Machine code.
        skips: The first load, of a byte, may be waited for: it says whether there is anything else to load.
    """
    pending: set[str] = set()
    waited = late = 0
    for line in sass.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        name, rest = match[3], match[4]
        target, _, sources = rest.partition(",")
        if pending & {*re.findall(r"\bR\d+", sources if not name.startswith("ST") else rest)}:
            waited = 1
        if name.startswith("LDG"):
            late += waited
            if skips:
                assert ".U8" in name
                skips = False
                continue
            register = target.strip()
            for _ in range(4 if ".128" in name else 2 if ".64" in name else 1):
                pending.add(register)
                register = _next(register)
    return late


def products(sass: str, thread: int = 0) -> list[Product]:
    """Compute the operands' addresses of every ``wgmma`` for one thread, in the order of the listing."""
    machine, found = _Machine(thread), []
    for line in sass.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        place, predicate, name, rest = match.groups()
        operands = [part.strip().replace(".reuse", "") for part in rest.split(",")]
        if name.startswith("HGMMA"):
            base = int(re.search(r"gdesc\[UR(\d+)\]", rest).group(1))  # pyright: ignore[reportOptionalMemberAccess]
            left = -1 if not operands[1].startswith("gdesc") else machine.address(base)
            found.append(Product(place, left, machine.address(base + 2)))
        else:
            machine.step(name, operands, guarded=predicate is not None)
    return found


class _Machine:
    """Hold the integers that are known at one point of a program, which is read from top to bottom."""

    def __init__(self, thread: int) -> None:
        self.special = {"SR_CgaCtaId": 0, "SR_TID.X": thread}
        self.registers: dict[str, int | None] = {"RZ": 0, "URZ": 0, "SRZ": 0}
        self.carries: dict[str, int | None] = {"PT": 1, "UPT": 1}
        self.stack: dict[int, int | None] = {}

    def address(self, number: int) -> int | None:
        """Decode the descriptor in two uniform registers: 14 bits, in units of 16 bytes."""
        low, high = self.registers.get(f"UR{number}"), self.registers.get(f"UR{number + 1}")
        return None if low is None or high is None else (low & 0x3FFF) << 4

    def value(self, operand: str) -> int | None:
        sign = -1 if operand.startswith("-") else 1
        operand = operand.lstrip("-")
        known = int(operand, 16) if operand.startswith("0x") else self.registers.get(operand)
        return None if known is None else sign * known & _WORD

    def wide(self, operand: str) -> int | None:
        if "R" not in operand:
            return int(operand, 16)
        if operand in ("RZ", "URZ"):
            return 0
        low, high = self.registers.get(operand), self.registers.get(_next(operand))
        return None if low is None or high is None else low | high << 32

    def step(self, name: str, operands: list[str], *, guarded: bool) -> None:
        """Run one instruction; what is not listed here leaves its result unknown."""
        carries = []
        while operands and _PREDICATE.match(operands[0]):
            carries.append(operands.pop(0))
        if name.startswith(("LDL", "STL")):
            self._local(name, operands, guarded=guarded)
            return
        if not operands or not re.match(r"U?R\d+$", operands[0]):
            return
        target, sources = operands[0], operands[1:]
        kind = name.removeprefix("U")
        words = 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name or name == "CS2R" else 1
        result: int | None = None
        if guarded:
            pass
        elif kind == "IADD3.64":
            result = _sum([self.wide(part) for part in sources[:3]])
        elif kind.startswith("IADD3"):
            while _PREDICATE.match(sources[0]):
                carries.append(sources.pop(0))
            terms = [self.value(part) for part in sources[:3]]
            if kind.endswith(".X"):
                terms += [self._carry(part) for part in sources[3:]]
            result = _sum(terms)
            if carries:
                self.carries[carries[0]] = None if result is None else int(result > _WORD)
        elif name == "CS2R" and sources == ["SRZ"]:
            result = 0
        elif name in ("S2UR", "S2R"):
            result = self.special.get(sources[0])
        elif name == "SHFL.IDX":
            # from lane 0, which has what this thread has if threads of a warp agree
            result = self.value(sources[0])
        else:
            known = [self.value(part) for part in sources if not _PREDICATE.match(part)]
            result = _compute(kind, known)
        for word in range(words):
            self.registers[target] = None if result is None else result >> 32 * word & _WORD
            target = _next(target)

    def _carry(self, operand: str) -> int | None:
        known = self.carries.get(operand.lstrip("!"))
        return None if known is None else 1 - known if operand.startswith("!") else known

    def _local(self, name: str, operands: list[str], *, guarded: bool) -> None:
        place = next(part for part in operands if "[" in part)
        match = re.search(r"\[R1(?:\+(-?0x[0-9a-f]+))?\]", place)
        offset = None if match is None else int(match.group(1) or "0", 16)
        register = next(part for part in operands if "[" not in part)
        for word in range(4 if ".128" in name else 2 if ".64" in name else 1):
            if name.startswith("LDL"):
                known = None if guarded or offset is None else self.stack.get(offset + 4 * word)
                self.registers[register] = known if register != "RZ" else 0
            elif offset is not None:
                self.stack[offset + 4 * word] = self.registers.get(register)
            register = _next(register)


def _compute(kind: str, known: list[int | None]) -> int | None:
    """Return the result of an instruction on known integers, None if it or one that it needs is not known."""
    if kind == "MOV" or kind == "R2UR":
        return known[0]
    if kind.startswith("IMAD.MOV"):
        return known[2]
    if kind.startswith("IMAD.U32") or kind == "IMAD":
        product = 0 if 0 in known[:2] else None if None in known[:2] else known[0] * known[1]  # pyright: ignore
        return _sum([product, known[2]])
    if kind.startswith("SHF.R.U32.HI"):
        return None if None in known[1:3] else known[2] >> known[1]  # pyright: ignore
    if None in known:
        return None
    if kind == "VIADD":
        return _sum(known[:2])
    if kind.startswith("SHF.L.U32"):
        return known[0] << known[1]  # pyright: ignore
    if kind == "SGXT.U32":
        return known[0] & (1 << known[1]) - 1  # pyright: ignore
    if kind.startswith("LOP3"):
        # bit n of the last constant is the result where the operands' bits spell n
        rows = (n for n in range(8) if known[3] >> n & 1)  # pyright: ignore
        return sum(
            _WORD & _all(word if n >> 2 - place & 1 else ~word for place, word in enumerate(known[:3]))  # pyright: ignore
            for n in rows
        )
    if kind == "LEA":
        return (known[0] << known[2]) + known[1]  # pyright: ignore
    return None


def _all(words: Iterable[int]) -> int:
    return functools.reduce(operator.and_, words)


def _sum(terms: list[int | None]) -> int | None:
    total = 0
    for term in terms:
        if term is None:
            return None
        total += term
    return total


def _next(register: str) -> str:
    match = re.match(r"(U?R)(\d+)$", register)
    return register if match is None else f"{match.group(1)}{int(match.group(2)) + 1}"
