"""Draws the site's figures: `python docs/figures.py` writes docs/img/*.svg.

Plain SVG, from the standard library alone: the same bytes on every machine, on which
tests/test_docs.py relies. Tiles of the attention figure are not drawn by hand: each is asked
whether a pair in it takes part.
"""

from collections.abc import Iterator
from pathlib import Path

FULL, PART, NONE = "#0b6e99", "#8cc4de", "#e6e9ec"
INK, WARM = "#22313f", "#d9822b"
FOLDER = Path(__file__).parent / "img"


def text(x: float, y: float, words: str, size: int = 13, anchor: str = "middle") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{INK}">'
        f"{words}</text>"
    )


def box(x: float, y: float, w: float, h: float, fill: str, words: str = "") -> str:
    shape = (
        f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="3" fill="{fill}" '
        f'stroke="{INK}" stroke-width="0.7"/>'
    )
    return shape + (text(x + w / 2, y + h / 2 + 4.5, words) if words else "")


def arrow(x0: float, y0: float, x1: float, y1: float, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    return (
        f'<line x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}" stroke="{INK}" '
        f'stroke-width="1.3" marker-end="url(#tip)"{dash}/>'
    )


def picture(width: int, height: int, parts: list[str], title: str) -> str:
    """A drawing on a white ground, so that it reads on a dark page too."""
    tip = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{INK}"/></marker></defs>'
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" font-family="sans-serif" role="img">',
            f"<title>{title}</title>",
            tip,
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        ]
    )


def attention() -> str:
    """What is computed of the (Sq, Sk) matrix, tile by tile."""
    cases = (
        ("causal", lambda i, j: j <= i),
        ("causal, window=(3, 0)", lambda i, j: i - 3 <= j <= i),
        ("k_lens", lambda i, j: j < 11),
    )
    n, tile, size = 16, 2, 15
    parts = []
    for c, (name, takes_part) in enumerate(cases):
        left, top = 40 + c * (n * size + 45), 46
        parts.append(text(left + n * size / 2, 20, name, 15))
        for a in range(0, n, tile):
            for b in range(0, n, tile):
                pairs = [takes_part(i, j) for i in range(a, a + tile) for j in range(b, b + tile)]
                fill = FULL if all(pairs) else PART if any(pairs) else NONE
                parts.append(box(left + b * size, top + a * size, tile * size, tile * size, fill))
        parts.append(text(left - 14, top + n * size / 2, "rows of q", 12).replace(
            "<text", f'<text transform="rotate(-90 {left - 14:g} {top + n * size / 2:g})"', 1
        ))  # fmt: skip
        parts.append(text(left + n * size / 2, top - 8, "keys", 12))
    y = 46 + n * size + 26
    for x, fill, words in ((60, FULL, "every pair takes part"), (290, PART, "some do: masked"),
                           (490, NONE, "none: neither read nor computed")):  # fmt: skip
        parts += [box(x, y - 11, 14, 14, fill), text(x + 22, y + 1, words, 13, "start")]
    return picture(875, 330, parts, "Tiles of the attention matrix that are computed")


def layernorm_ffn() -> str:
    steps = ("x", "norm", "W1, b1", "act", "dropout", "W2, b2", "dropout", "+", "y")
    widths = (34, 62, 74, 52, 74, 74, 74, 34, 34)
    saved = {"x": "x", "norm": "8 bytes a row", "W1, b1": "u: M F", "act": "a: M F"}
    parts, x = [], 20.0
    for k, (name, width) in enumerate(zip(steps, widths, strict=True)):
        heavy = name.startswith("W")
        parts.append(box(x, 60, width, 40, PART if heavy else NONE, name))
        if name in saved:
            parts.append(arrow(x + width / 2, 100, x + width / 2, 132, dashed=True))
            parts.append(text(x + width / 2, 148, saved[name], 12))
        if k + 1 < len(steps):
            parts.append(arrow(x + width, 80, x + width + 22, 80))
        x += width + 22
    last = x - 22 - 34 - 22 - 17
    parts.append(
        f'<path d="M37 60 V28 H{last:g} V56" fill="none" stroke="{INK}" stroke-width="1.3" '
        'marker-end="url(#tip)"/>'
    )
    parts.append(text(last / 2 + 20, 20, "residual", 12))
    parts.append(text(20, 178, "dashed: kept for the backward with recompute=\"none\"; "
                      "\"activation\" drops a, \"all\" drops u too", 12, "start"))  # fmt: skip
    return picture(int(x), 192, parts, "The feed-forward block as one op")


def recurrent() -> str:
    parts = [box(20, 40, 150, 150, PART)]
    parts += [text(95, 105, "X W_ih for all steps", 13), text(95, 125, "one GEMM, T B rows", 12)]
    parts.append(arrow(170, 115, 205, 115))
    for t in range(4):
        x = 208 + 95 * t
        parts.append(box(x, 70, 64, 90, NONE))
        parts.append(text(x + 32, 108, "h W_hh", 12))
        parts.append(text(x + 32, 126, "gates", 12))
        parts.append(text(x + 32, 62, ("t = 0", "t = 1", "t = 2", "…")[t], 12))
        if t < 3:
            parts.append(arrow(x + 64, 115, x + 95, 115))
            parts.append(text(x + 79, 105, "h", 12))
    x = 208 + 95 * 4
    parts.append(arrow(x - 31, 115, x + 4, 115))
    parts.append(box(x + 7, 40, 165, 150, PART))
    parts += [
        text(x + 90, 105, "backward: dx, dW", 13),
        text(x + 90, 125, "GEMMs over all steps", 12),
    ]
    parts.append(text(20, 222, "W_hh stays near the arithmetic for the whole call: packed, in a "
                      "core's L2 (CPU);", 12, "start"))  # fmt: skip
    parts.append(text(20, 238, "in registers and shared memory (CUDA C++)", 12, "start"))
    return picture(790, 252, parts, "A recurrent layer: one product, the steps, products again")


def cross_entropy() -> str:
    parts = [text(60, 30, "x"), box(30, 40, 60, 180, NONE), text(235, 30, "weightᵀ"),
             box(150, 40, 170, 60, NONE)]  # fmt: skip
    for k in range(4):
        now = k == 1
        parts.append(box(30, 40 + 45 * k, 60, 45, PART if now else NONE, "chunk" if now else ""))
    parts.append(arrow(95, 107, 145, 145))
    parts.append(box(150, 125, 170, 45, PART, "logits of a chunk"))
    parts.append(text(235, 192, "(tokens, V) is never whole", 12))
    parts.append(arrow(325, 147, 370, 110))
    parts.append(box(375, 90, 150, 40, FULL))
    parts.append(text(450, 115, "loss").replace(INK, "#ffffff"))
    parts.append(arrow(325, 150, 370, 175))
    parts.append(box(375, 155, 150, 40, FULL))
    parts.append(text(450, 180, "dx; dW += …").replace(INK, "#ffffff"))
    return picture(560, 240, parts, "Loss and gradients, chunk by chunk of the tokens")


def figures() -> Iterator[tuple[Path, str]]:
    for draw in (attention, layernorm_ffn, recurrent, cross_entropy):
        yield FOLDER / f"{draw.__name__}.svg", draw()


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, drawing in figures():
        path.write_text(drawing)
