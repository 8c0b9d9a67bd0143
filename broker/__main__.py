"""The command line's way in: parse, run, and leave with a status. The commands are broker/commands.

Exit status: 0 done, 1 failed (the reason is one line on stderr), 2 wrong usage or configuration; where a command's
differ, its page of help says so.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from broker.commands.failed import CommandFailed
from broker.commands.tree import make_parser
from broker.config import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    arguments = make_parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except ConfigError as error:
        print(f"homeport: {error}", file=sys.stderr)
        return 2
    except CommandFailed as error:
        print(f"homeport: {error}", file=sys.stderr)
        return error.status
    return status


if __name__ == "__main__":
    sys.exit(main())
