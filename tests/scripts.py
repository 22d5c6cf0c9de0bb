"""Commands that end well, end badly, or do not end."""

import sys

from bench import ladder

RIGHT, WRONG = "print('fine')", f"print('y is wrong'); raise SystemExit({ladder.WRONG})"
# In a child, as a compiler would; the number is that child's.
HANGS = "import subprocess; p = subprocess.Popen(['sleep', '100']); print(p.pid); p.wait()"
CRASHES = "import os; os.abort()"


def script(code: str) -> list[str]:
    return [sys.executable, "-c", code]
