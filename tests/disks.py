"""Run a command where one folder is a small or a read-only disk of its own, gone when the command ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# In a mount namespace of its own: no other process sees the disk, and no killed test leaves it mounted.
_SCRIPT = (
    'mount -t tmpfs -o "$1" tmpfs "$2" || exit 99; cd "$3"; disk=$2; shift 3; "$@"; code=$?; ls -A "$disk"; exit $code'
)


def run_on_disk(folder: Path, options: str, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `python command` with a new disk (`options` of tmpfs, as `size=1m` or `ro`) at `folder`; what is left on it
    is the end of stdout, a name a line."""
    unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    try:
        done = subprocess.run(
            [*unshare, "sh", "-c", _SCRIPT, "sh", options, folder, ROOT, sys.executable, *command],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, capture_output=True, timeout=120, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("needs util-linux's unshare, to give the test a small disk of its own: install util-linux")
    if done.returncode == 99 or done.stderr.startswith("unshare:"):
        pytest.skip(
            f"needs the right to mount a small disk in a namespace of its own (run as root): {done.stderr.strip()}"
        )
    return done
