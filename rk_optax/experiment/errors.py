"""The error that the command line shows as one line."""


class UsageError(ValueError):
    """What was asked for cannot be done; the message says what to change."""
