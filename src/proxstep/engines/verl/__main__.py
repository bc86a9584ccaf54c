"""Write a recipe's data for verl: `python -m proxstep.engines.verl recipe.yaml`."""

from __future__ import annotations

import sys

from proxstep.config.loading import load_recipe
from proxstep.engines.verl.prompt_files import prepare
from proxstep.errors import ProxstepError


def main(arguments: list[str]) -> int:
    """Write the files and return the exit status."""
    try:
        if len(arguments) != 1:
            raise ProxstepError("give one recipe: python -m proxstep.engines.verl FILE")
        prepared = prepare(load_recipe(arguments[0]), lambda text: None)
    except ProxstepError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"wrote {prepared.train} and {prepared.validation}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
