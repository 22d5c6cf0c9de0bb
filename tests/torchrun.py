"""A script under torchrun."""

import os
import subprocess
import sys


def torchrun(processes: int, *command: object) -> "subprocess.CompletedProcess[str]":
    """Run a script with its arguments in so many processes of this machine."""
    runner = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    return subprocess.run(
        [sys.executable, *runner, *map(str, command)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
