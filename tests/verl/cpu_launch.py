"""The `proxstep` command where verl runs on the CPU: python -m tests.verl.cpu_launch train ..."""

from __future__ import annotations

import os
import sys

from tests.verl.cpu_settings import cpu_environment, cpu_machine

from proxstep.cli import main
from proxstep.engines.verl import launch

if __name__ == "__main__":
    os.environ |= cpu_environment()
    launch.find_machine = cpu_machine
    sys.exit(main())
