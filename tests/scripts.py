"""Commands that end well, end badly, or do not end."""

import sys

from bench import ladder

RIGHT, WRONG = "print('fine')", f"print('y is wrong'); raise SystemExit({ladder.WRONG})"
HANGS = "import subprocess; subprocess.run(['sleep', '100'])"  # in a child, as a compiler would
CRASHES = "import os; os.abort()"


def script(code: str) -> list[str]:
    return [sys.executable, "-c", code]
