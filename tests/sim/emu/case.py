"""Cases for an emulated program: numbers and tensors, written to a file, results read back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

Number = int | float

_NAMES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.bool: "bool",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass
class Case:
    """What a launcher is called with.

    `tensors` are read, `outputs` are given as they are (fill them with what must not survive) and
    come back. A tensor keeps its strides; it lies in an allocation of exactly the bytes it spans,
    `lead` bytes (by name) behind a 16-byte boundary.
    """

    launcher: str
    numbers: dict[str, Number] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    lead: dict[str, int] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        lines = ["fastattn-case 1", f"launcher {self.launcher}"]
        for name, value in self.numbers.items():
            kind = "float" if isinstance(value, float) else "int"
            text = value.hex() if isinstance(value, float) else str(int(value))
            lines.append(f"{kind} {name} {text}")
        blobs = []
        for direction, group in (("in", self.tensors), ("out", self.outputs)):
            for name, tensor in group.items():
                blob = _bytes(_span(tensor))
                head = [name, _NAMES[tensor.dtype], direction, self.lead.get(name, 0), len(blob)]
                shape = [tensor.dim(), *tensor.shape, *tensor.stride()]
                lines.append(" ".join(["tensor", *map(str, head + shape)]))
                blobs.append(blob)
        path.write_bytes("\n".join([*lines, "end", ""]).encode() + b"".join(blobs))

    def read(self, path: Path) -> tuple[int, dict[str, torch.Tensor]]:
        """The launcher's cudaError_t and the outputs."""
        data = path.read_bytes()
        text, _, rest = data.partition(b"end\n")
        lines = text.decode().splitlines()
        error = int(lines[0].split()[1])
        results, at = {}, 0
        for line in lines[1:]:
            _, name, size = line.split()
            like = self.outputs[name]
            blob = bytearray(rest[at : at + int(size)])
            at += int(size)
            if like.numel() == 0:
                results[name] = like.clone()
                continue
            flat = torch.frombuffer(blob, dtype=torch.uint8)
            results[name] = torch.as_strided(flat.view(like.dtype), like.shape, like.stride())
        if at != len(rest) or set(results) != set(self.outputs):
            raise RuntimeError(f"the program's result does not hold {sorted(self.outputs)}")
        return error, results


def _span(x: torch.Tensor) -> torch.Tensor:
    """The elements between the first and the last of x, as they lie in memory."""
    if x.numel() == 0:
        return x.new_empty(0)
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return torch.as_strided(x, (last + 1,), (1,))


def _bytes(x: torch.Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b""
