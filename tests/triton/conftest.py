"""Every test here runs the Triton kernels on CPU tensors, in Triton's interpreter."""

from collections.abc import Iterator

import pytest
from interpreter import interpreted


@pytest.fixture(autouse=True)
def _interpreted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if "not_interpreted" in request.fixturenames:
        yield
        return
    with interpreted():
        yield


@pytest.fixture
def not_interpreted() -> None:
    """For tests of what happens without the interpreter."""
