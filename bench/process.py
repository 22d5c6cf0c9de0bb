"""Runs a command under a time limit that holds whatever the command does."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lora_kernels.qualify.parent import die_with_parent

ROOT = Path(__file__).parent.parent
JOBS = min(max((os.cpu_count() or 2) // 2, 2), 8)  # side by side: they compile more than they run
GRACE_S = 5  # for a process that was killed: a driver may hold it until its kernel is gone


def run(
    command: Sequence[str],
    limit_s: float,
    say: Callable[[str], None],
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run `command` from the repository's root, handing its lines to `say`; return how it ended.

    "ok", "failed with status 3", "crashed: SIGSEGV" or "hung: stopped after 30 s". The limit also
    ends what the command has started.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=die_with_parent,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
    )

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            say(line.rstrip("\n"))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        status = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return f"hung: stopped after {limit_s:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        reader.join(GRACE_S)
    if status < 0:
        return f"crashed: {signal.Signals(-status).name}"
    return "ok" if status == 0 else f"failed with status {status}"
