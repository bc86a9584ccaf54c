"""`python -m proxstep` is the `proxstep` command."""

import sys

from proxstep.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
