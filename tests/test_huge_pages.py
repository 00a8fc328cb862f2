"""Who asks for huge pages: csrc/cpu/huge_pages.cpp."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BITS = "01100{}01" + "0" * 120  # bit 0 first, as the kernel prints them

# The features of each of a driver's devices, and whether one of them reports free pages.
DRIVERS: dict[str, tuple[dict[str, str], str]] = {
    "none": ({}, "0"),
    "reports": ({"virtio0": BITS.format(1)}, "1"),
    "does_not": ({"virtio0": BITS.format(0)}, "0"),
    "second": ({"virtio0": BITS.format(0), "virtio3": BITS.format(1)}, "1"),
    "short": ({"virtio0": "01111"}, "0"),
    "empty": ({"virtio0": ""}, "0"),
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("huge_pages") / "check"
    source = ROOT / "tests" / "huge_pages_check.cpp"
    subprocess.run([os.environ.get("CXX", "c++"), "-std=c++20", source, "-o", program], check=True)
    return program


def says(program: Path, driver: Path) -> str:
    done = subprocess.run([program, driver], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("name", DRIVERS)
def test_balloon(program: Path, tmp_path: Path, name: str) -> None:
    devices, right = DRIVERS[name]
    for device, features in devices.items():
        (tmp_path / device).mkdir()
        (tmp_path / device / "features").write_text(features + "\n")
    (tmp_path / "bind").write_text("")  # drivers have files as well
    assert says(program, tmp_path) == right


def test_no_such_driver(program: Path, tmp_path: Path) -> None:
    assert says(program, tmp_path / "virtio_balloon") == "0"
