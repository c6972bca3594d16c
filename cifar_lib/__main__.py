"""The process around the command line: its streams, and an interrupt while torch is imported."""

import os
import signal
import sys


def _stop(*_: object) -> None:
    os.write(2, b"\ninterrupted: the same command starts again\n")
    os._exit(130)  # an exception could become another one inside the modules


if sys.stdout is not None:
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files that aren't UTF-8
handler = signal.getsignal(signal.SIGINT)
if handler is signal.default_int_handler:  # else this is a background job, which ignores it
    signal.signal(signal.SIGINT, _stop)
from cifar_lib.cli import main  # noqa: E402

signal.signal(signal.SIGINT, handler)
try:
    raise SystemExit(main())
except KeyboardInterrupt:  # before `main` listens
    raise SystemExit(130) from None
finally:
    try:
        print(end="", flush=True)
    except OSError:  # main has said so; Python would try once more, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
