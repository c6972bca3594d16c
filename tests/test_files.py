"""What every reader of files refuses; writing them is in test_checkpoint.py."""

import os
import re

import pytest

from cifar_lib.errors import InputError
from cifar_lib.files import parse_object
from cifar_lib.kaggle import read_test_file
from cifar_lib.pictures import read_picture


@pytest.mark.parametrize(
    ("reader", "what"), [(read_test_file, "test file"), (read_picture, "picture")]
)
def test_what_is_no_file_is_named(tmp_path, reader, what):
    reasons = {"absent": "No such file", ".": ""}
    if hasattr(os, "mkfifo"):  # not on Windows
        os.mkfifo(tmp_path / "fifo")
        reasons["fifo"] = "it isn't a regular file"
    for name, reason in reasons.items():
        path = re.escape(str(tmp_path / name))
        with pytest.raises(InputError, match=f"^{what}: {path} can't be read .*{reason}"):
            reader(tmp_path / name)


def test_what_is_no_json_object_within_bounds_is_refused():
    for content, reason in (
        (b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "nested too deep"),
        (b'{"a": 1' + b"0" * 99 + b"}", "100 digits"),
        (b"{}", "or it is empty"),
        (b"[1]", "isn't a JSON object"),
        (b"{", "."),
        (b"\xff", "."),
    ):
        with pytest.raises(ValueError, match=reason):
            parse_object(content)
    assert parse_object(b'{"a": 1' + b"0" * 98 + b"}") == {"a": 10**98}
