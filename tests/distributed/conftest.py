"""A small Surgery run that trains every kind of parameter."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.inputs import write_inputs


@pytest.fixture(scope="session")
def flags(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Everything but the output folder and the number of steps."""
    return write_inputs(tiny_model_dir, tmp_path_factory.mktemp("inputs"))
