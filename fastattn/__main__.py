"""The command line: ``python -m fastattn`` or ``fastattn``; see ``--help``."""

import sys


def main() -> None:
    """Run the command line; where typer or rich is missing that is one line and exit code 2."""
    try:
        from fastattn.cli.app import app
    except ModuleNotFoundError as error:
        from fastattn.cli._mistakes import missing

        print(f"fastattn: {missing(error)}", file=sys.stderr)
        sys.exit(2)
    app(prog_name="fastattn")


if __name__ == "__main__":
    main()
