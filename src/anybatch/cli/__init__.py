"""The command line: one thin file a verb; parse, call the library, print. Imports every room."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Entry point of the `anybatch` command: exit code 0, or 2 with a message for what the user can mend."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of the libraries below would cut into ours

    from anybatch.cli.app import app
    from anybatch.errors import AnybatchError

    try:
        app()
    except SystemExit as done:
        if not done.code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # Under torchrun a thread of the communication library that is still there when the interpreter ends aborts a run whose work is done,
            # once in some dozens of runs, and torchrun reports a failure. All files are written, and the group is closed.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        raise
    except AnybatchError as error:
        print(f"anybatch: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("anybatch: stopped; finished work is kept. Add --resume to go on.", file=sys.stderr)
        sys.exit(130)
