"""The text that the examples learn from, as characters: articles of Wikipedia.

It is the excerpt that gensim ships for its own tests; nothing is downloaded.
"""

import bz2
import html
import importlib.util
import re
from pathlib import Path

import torch
from torch import Tensor

WIKIPEDIA = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
MARKUP = (  # templates twice, for one in the other
    r"<ref[^>]*/>|<ref.*?</ref>|<!--.*?-->", r"<[^>]*>", r"\{\{[^{}]*\}\}", r"\{\{[^{}]*\}\}",
    r"\{\|.*?\|\}", r"\[\[(?:[^|\]]*\|)?|\]\]", r"'''?",
)  # fmt: skip
CHARACTERS = 128  # ASCII; the rest of the text is left out


def wikipedia() -> str:
    """The articles of gensim's excerpt, without most of their markup."""
    spec = importlib.util.find_spec("gensim")
    if spec is None or spec.origin is None:
        raise SystemExit('no text: pip install "fastattn[examples]" (gensim), or give --text FILE')
    xml = bz2.decompress((Path(spec.origin).parent / WIKIPEDIA).read_bytes()).decode()
    articles = re.findall(r"<text[^>]*>(.*?)</text>", xml, re.DOTALL)
    text = html.unescape(html.unescape("\n".join(articles)))
    for markup in MARKUP:
        text = re.sub(markup, "", text, flags=re.DOTALL)
    return re.sub(r"\n\s*\n+", "\n", text)


def as_ids(text: str) -> Tensor:
    """The characters as numbers below CHARACTERS."""
    return torch.tensor([c for c in text.encode("ascii", "ignore") if c < CHARACTERS])
