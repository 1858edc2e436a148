"""Entry point of `cowhand`, `kubectl cowhand` and `python -m cowhand`: parse, dispatch, exit code.

Exit codes: 0 done, 1 it failed, 2 the caller asked for something wrong, 130 interrupted. `exec` passes on the
exit code of the command.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cowhand.cli.args import parse
from cowhand.errors import CowhandError, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: arguments without the program name; None is `sys.argv[1:]`.

    Returns:
        The exit code.
    """
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        result: int = args.handler(args)
    except UserError as err:
        print(f"cowhand: {err}", file=sys.stderr)
        return 2
    except CowhandError as err:
        print(f"cowhand: {err}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader (head, less) went away: not our error, and nothing more can be written.
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        return 130
    return result
