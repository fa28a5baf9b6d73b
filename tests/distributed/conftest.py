"""A small Surgery run that trains every kind of parameter, and a server that starts ranks fast."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.inputs import write_inputs
from tests.distributed.lives import Lives, lives


@pytest.fixture(scope="session")
def server() -> Iterator[Lives]:
    """Starts ranks."""
    with lives() as started:
        yield started


@pytest.fixture(scope="session")
def flags(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Everything but the output folder and the number of steps."""
    return write_inputs(tiny_model_dir, tmp_path_factory.mktemp("inputs"))
