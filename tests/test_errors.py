"""Messages for users: one printable line, with what is wrong, why, and what to do."""

import pytest

from cifar_lib.errors import InputError, explained


class Picky(ValueError):
    remedy = "feed it"


def test_a_message_is_one_printable_line():
    assert str(InputError("a\nb\x1b[2J\udcff, Käse")) == r"a\nb\x1b[2J\udcff, Käse"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("no 7\nlines"), "it is broken (no 7 lines): mend it"),
        (ValueError(), "it is broken (ValueError): mend it"),
        (OSError(2, "No such file"), "it is broken (No such file): mend it"),
        (Picky("hungry"), "it is broken (hungry): feed it"),
    ],
)
def test_an_explained_error_says_why_and_what_to_do(error, message):
    with pytest.raises(InputError) as caught, explained("it is broken", "mend it"):
        raise error
    assert str(caught.value) == message


def test_an_error_of_another_kind_stays_what_it_is():
    with pytest.raises(KeyError), explained("it is broken", "mend it"):
        raise KeyError("a bug of ours")
