"""The one exception for what a user can put right."""


class InputError(ValueError):
    """An input from outside is wrong; the message says what was expected, what came and what to do,
    in one line."""
