"""What the tests of tools/doctor.py share."""

from __future__ import annotations

import os
from pathlib import Path

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
HERE = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
LARGE = ("accelerate", "datasets", "deepspeed", "gguf", "matplotlib", "peft", "pyarrow", "transformers")


def quick_imports(folder: Path) -> Path:
    """A folder for PYTHONPATH where the large packages import at once, for tests of something else."""
    folder.mkdir(parents=True)
    for name in LARGE:
        (folder / f"{name}.py").write_text("")
    return folder


def other_version(folder: Path, name: str, version: str) -> Path:
    """Let a package have another version than installed, in a folder for PYTHONPATH, which is returned."""
    information = folder / f"{name}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder
