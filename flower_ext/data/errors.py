"""The error raised when data cannot be fetched, read or prepared."""


class DataError(RuntimeError):
    """Data could not be fetched, verified or prepared.

    The message names the file or command, what was expected and what to do. Wrong
    arguments are a `ValueError` instead.
    """
