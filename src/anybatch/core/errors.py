"""The error a user can act on."""


class AnybatchError(ValueError):
    """Bad input: the message says what was given, what was expected and what to do.

    The command line prints it without a traceback and exits with code 2.

    >>> issubclass(AnybatchError, ValueError)
    True
    """
