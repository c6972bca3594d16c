"""The exception for mistakes that a user can correct."""

import contextlib
from collections.abc import Iterator


class InputError(ValueError):
    """Something that came from outside, such as a file or an option, is wrong.

    The message is one printable line: what was expected, what came instead, and what to do.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


class Unusable(ValueError):
    """Something was read, but can't be used. In `explained`, `remedy` replaces the general one."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(reason)
        self.remedy = remedy


def printable(text: str) -> str:
    """Return `text` with escapes in place of what can't be printed.

    That is line ends, control characters, undecoded bytes and the like.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


@contextlib.contextmanager
def explained(what: str, remedy: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of these `kinds`, raised in a `with` block, into an InputError.

    Its message is `what` (what is wrong), the error's own text in brackets, and the `remedy` (what
    to do). An Unusable brings its own remedy. Without `kinds`,
    OSError and ValueError are turned into InputErrors, and so is an InputError, which is a
    ValueError.

    Raises InputError in place of such an error.
    """
    kinds = kinds or (OSError, ValueError)
    try:
        yield
    except kinds as error:
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__

        # Keep the part that a user can read: Pillow ends its text with the name of a buffer, and
        # pydantic with a link. Below, torch's several lines become one.
        text = text.partition(" <_io")[0].partition("\n    For further")[0]
        remedy = getattr(error, "remedy", remedy)
        raise InputError(f"{what} ({' '.join(text.split())[:200]}): {remedy}") from error
