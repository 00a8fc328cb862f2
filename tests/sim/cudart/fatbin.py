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
from pathlib import Path

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
    _, _, header, size = struct.unpack("<IHHQ", ctypes.string_at(address, 16))
    return texts_of(ctypes.string_at(address, header + size))


def of_object(path: Path) -> list[Text]:
    """Those of an object file that nvcc made."""
    contents = path.read_bytes()
    at = contents.find(struct.pack("<I", _MAGIC))
    if at < 0:
        raise FatbinError(f"{path.name} has no fatbin")
    return texts_of(contents[at:])


def texts_of(fatbin: bytes) -> list[Text]:
    """fatbin: may be longer than it is."""
    magic, _, header, size = struct.unpack_from("<IHHQ", fatbin)
    if magic != _MAGIC:
        raise FatbinError(f"magic {magic:#x}, not {_MAGIC:#x}")
    found = []
    at, end = header, header + size
    while at < end:
        kind, _, header, size = struct.unpack_from("<HHIQ", fatbin, at)
        (compressed,) = struct.unpack_from("<I", fatbin, at + 16)
        (arch,) = struct.unpack_from("<I", fatbin, at + 28)
        if kind == _PTX:
            if compressed:
                raise FatbinError("the PTX is compressed: compile with nvcc --no-compress")
            ptx = fatbin[at + header : at + header + size].rstrip(b"\0").decode()
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
