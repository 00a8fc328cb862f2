"""The PTX inside a fatbin, the container that nvcc embeds device code in.

A fatbin is a header (magic, version, size of the header, size of the rest) and entries, each with a
header of its own: kind (1 = PTX, 2 = ELF), sizes, the architecture. Offsets were read off what nvcc
12 and 13 write; `texts` refuses what it cannot read.
"""

from __future__ import annotations

import ctypes
import re
import struct
from dataclasses import dataclass

_MAGIC = 0xBA55ED50
_PTX = 1
_ENTRY = re.compile(r"^(?:\.visible |\.weak )?\.entry ([\w$]+)\(.*?^}$", re.MULTILINE | re.DOTALL)


class FatbinError(ValueError):
    """A fatbin that holds no PTX that could be read."""


@dataclass(frozen=True)
class Text:
    arch: int  # 80: sm_80
    ptx: str


def texts(address: int) -> list[Text]:
    """Every PTX text of the fatbin at an address of this process."""
    magic, _, header, size = struct.unpack("<IHHQ", ctypes.string_at(address, 16))
    if magic != _MAGIC:
        raise FatbinError(f"magic {magic:#x}, not {_MAGIC:#x}")
    found = []
    at, end = address + header, address + header + size
    while at < end:
        kind, _, header, size = struct.unpack("<HHIQ", ctypes.string_at(at, 16))
        (compressed,) = struct.unpack("<I", ctypes.string_at(at + 16, 4))
        (arch,) = struct.unpack("<I", ctypes.string_at(at + 28, 4))
        if kind == _PTX:
            if compressed:
                raise FatbinError("the PTX is compressed: compile with nvcc --no-compress")
            ptx = ctypes.string_at(at + header, size).rstrip(b"\0").decode()
            if ".version" not in ptx:
                raise FatbinError(f"an entry of kind PTX starts with {ptx[:40]!r}")
            found.append(Text(arch, ptx))
        at += header + size
    if not found:
        raise FatbinError("it has machine code only: compile with code=compute_80")
    return found


def with_one_kernel(ptx: str, kernel: str) -> str:
    """The text without its other kernels; line numbers stay."""

    def cut(match: re.Match[str]) -> str:
        nonlocal found
        if match[1] == kernel:
            found = True
            return match[0]
        return "\n" * match[0].count("\n")

    found = False
    text = _ENTRY.sub(cut, ptx)
    if not found:
        raise FatbinError(f"no kernel {kernel} in the PTX")
    return text
