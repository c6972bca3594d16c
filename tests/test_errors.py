"""Messages for users: one printable line, with what is wrong, why, and what to do."""

import pytest

from cifar_lib.errors import InputError, explained


def test_a_message_is_one_printable_line():
    assert str(InputError("a\nb\x1b[2J\udcff, Käse")) == r"a\nb\x1b[2J\udcff, Käse"


def test_an_explained_error_says_why_and_what_to_do():
    class Picky(ValueError):
        remedy = "feed it"

    with pytest.raises(InputError, match=r"^it is broken \(no 7 lines\): mend it$"):
        with explained("it is broken", "mend it"):
            raise ValueError("no 7\nlines")
    with pytest.raises(InputError, match=r"^it is broken \(No such file or directory\): mend it$"):
        with explained("it is broken", "mend it"):
            open("nowhere/at/all")
    with pytest.raises(InputError, match=r"^it is broken \(hungry\): feed it$"):
        with explained("it is broken", "mend it"):
            raise Picky("hungry")
    with pytest.raises(KeyError), explained("it is broken", "mend it"):
        raise KeyError("another kind")
