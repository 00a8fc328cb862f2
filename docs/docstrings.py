"""From docstrings to what the site's parser reads; an extension of griffe, for mkdocs.yml.

Docstrings are written for ``help()`` and doctest: their example stands at the end without a title,
and references are roles (``:func:`attention```). Here the example gets its title, and a reference
becomes a link where the site has a page of the name, or else code.
"""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`~?([\w.]+)`")


def _link(match: re.Match[str]) -> str:
    name = match[1]
    if name.startswith("torch."):
        return f"`{name}`"
    path = name if name.startswith("fastattn.") else f"fastattn.{name}"
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'


def _with_example(text: str) -> str:
    lines = text.split("\n")
    first = next((i for i, line in enumerate(lines) if line.startswith(">>>")), None)
    if first is None:
        return text
    end = next((i for i, line in enumerate(lines[first:], first) if not line.strip()), len(lines))
    example = ["Examples:", *(f"    {line}" for line in lines[first:end])]
    return "\n".join([*lines[:first], *example, *lines[end:]])


def rewritten(text: str) -> str:
    return _with_example(_ROLE.sub(_link, text))


class Docstrings(griffe.Extension):
    """Rewrites every docstring once the package has been read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)
