"""The one exception for what a user can put right."""

import contextlib
from collections.abc import Iterator


class InputError(ValueError):
    """An input from outside is wrong.

    The message says what was expected, what came and what to do, in one printable line.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Return `text` with line ends, control characters and undecoded bytes written out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


@contextlib.contextmanager
def explained(what: str, remedy: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of these kinds into an InputError: `what` is wrong, why, and the `remedy`.

    The kinds are OSError and ValueError by default. An error with a `remedy` of its own keeps it.
    """
    kinds = kinds or (OSError, ValueError)
    try:
        yield
    except kinds as error:
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        # Pillow's ends with a buffer, pydantic's with a link; torch takes several lines.
        text = text.partition(" <_io")[0].partition("\n    For further")[0]
        remedy = getattr(error, "remedy", remedy)
        raise InputError(f"{what} ({' '.join(text.split())[:200]}): {remedy}") from error
