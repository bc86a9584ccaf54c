"""The local engine: from a recipe to a finished run."""
