"""Starts the command line as a process: `python -m cifar_lib`.

The command line itself is in cli.py. This module handles the beginning and the end of the process:
an interrupt that comes before `main` can handle it, and output that can no longer be written at
exit.
"""

import os
import signal
import sys


def _stop(*_: object) -> None:
    """Handle Ctrl-C while the modules are imported, by ending the process at once."""
    os.write(2, b"\ninterrupted before anything was done: run the command again\n")
    os._exit(130)  # a module being imported might catch an exception, and raise another one


# File names that aren't UTF-8 are printed with escapes. Without a console there is no stdout.
if sys.stdout is not None:
    sys.stdout.reconfigure(errors="backslashreplace")

# Importing torch takes seconds. Until torch is imported, Ctrl-C ends the process with one line. A
# job that a shell runs in the background ignores Ctrl-C, and goes on ignoring it.
handler = signal.getsignal(signal.SIGINT)
if handler is signal.default_int_handler:
    signal.signal(signal.SIGINT, _stop)
from cifar_lib.cli import main  # noqa: E402

signal.signal(signal.SIGINT, handler)

# Run the command. `main` handles most interrupts, but not those right before and after its work.
try:
    raise SystemExit(main())
except KeyboardInterrupt:
    raise SystemExit(130) from None
finally:
    # If the output can't be written, `main` has dealt with the error (that of --help is ignored).
    # Python would try again at exit and complain, so the rest of the output goes to the null
    # device.
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
