"""The command line: ``python -m fastattn`` or ``fastattn``; see ``--help``."""

import errno
import os
import sys


def main() -> None:
    """Run the command line; where typer or rich is missing, or stdout cannot be written, that is
    one line and exit code 2."""
    try:
        from fastattn.cli.app import app
    except ModuleNotFoundError as error:
        from fastattn.cli._mistakes import missing

        print(f"fastattn: {missing(error)}", file=sys.stderr)
        sys.exit(2)
    try:
        try:
            app(prog_name="fastattn")
        finally:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        if error.errno == errno.EPIPE:  # the reader had enough: as typer has it
            sys.exit(1)
        print(f"fastattn: {error.filename or 'stdout'}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
