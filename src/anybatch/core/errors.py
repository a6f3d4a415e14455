"""The error a user can act on."""


class AnybatchError(ValueError):
    """Bad input: the message says what was given, what was expected and what to do.

    The command line prints it without a traceback and exits with code 2. Where the error may be passed over, what to do
    is given apart, and `reason` is the message without it.

    >>> error = AnybatchError("Row 3 is empty.", "Fill it.")
    >>> str(error), error.reason
    ('Row 3 is empty. Fill it.', 'Row 3 is empty.')
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"{reason} {remedy}" if remedy else reason)
        self.reason = reason
