"""Lines on stdout, for the commands of this package."""

import os
import sys
from collections.abc import Iterable


def show(lines: Iterable[str]) -> None:
    """Print each line as it comes; a reader who has seen enough (`| head`) is no error."""
    try:
        for line in lines:
            print(line, flush=True)
    except BrokenPipeError:  # and let nothing that is still buffered fail at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
