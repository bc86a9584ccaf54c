"""The one exception that a user of proxstep is meant to read."""


class ProxstepError(ValueError):
    """A mistake in the input, with its remedy in the message.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """
