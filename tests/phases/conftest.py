"""What the tests of phases share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly(quick_compilation: None) -> None:
    """All of them: what is tested is what phases do with results, not how fast or in which bits they come."""
