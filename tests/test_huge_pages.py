"""Who asks for huge pages: csrc/cpu/huge_pages.cpp."""

import subprocess
from pathlib import Path

import pytest
from mutation_lab import build_check, check_place
from mutations import Mutation

BITS = "01100{}01" + "0" * 120  # bit 0 first, as the kernel prints them

# The features of each of a driver's devices, and whether one of them reports free pages.
DRIVERS: dict[str, tuple[dict[str, str], str]] = {
    "none": ({}, "0"),
    "reports": ({"virtio0": BITS.format(1)}, "1"),
    "does_not": ({"virtio0": BITS.format(0)}, "0"),
    # Whichever comes first in the folder.
    "one": ({"virtio0": BITS.format(1), "virtio3": BITS.format(0)}, "1"),
    "the_other": ({"virtio0": BITS.format(0), "virtio3": BITS.format(1)}, "1"),
    "short": ({"virtio0": "01111"}, "0"),
    "empty": ({"virtio0": ""}, "0"),
}


SOURCE = "huge_pages.cpp"
MUTATIONS = (
    Mutation("another_bit", SOURCE, "kReporting = 5", "kReporting = 4"),
    Mutation("bit_that_is_there", SOURCE, "bits[kReporting] == '1'", "true"),
    Mutation("beyond_a_short_line", SOURCE, "bits.size() > kReporting &&", ""),
    Mutation("first_device_alone", SOURCE, "return true; }", "return true; break; }"),
)  # fmt: skip


def build(folder: Path, mutation: Mutation | None = None) -> Path:
    # A read beyond a string's end is a death.
    flags = ("-D_GLIBCXX_ASSERTIONS",)
    return build_check(folder, "huge_pages_check.cpp", "huge_pages.*", mutation, flags)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("huge_pages"))


def says(program: Path, driver: Path) -> str:
    done = subprocess.run([program, driver], capture_output=True, text=True, check=False)
    return done.stdout.strip() or f"died: {done.returncode}"


def lay_out(driver: Path, name: str) -> Path:
    for device, features in DRIVERS[name][0].items():
        (driver / device).mkdir(parents=True)
        (driver / device / "features").write_text(features + "\n")
    driver.mkdir(exist_ok=True)
    (driver / "bind").write_text("")  # drivers have files as well
    return driver


@pytest.mark.parametrize("name", DRIVERS)
def test_balloon(program: Path, tmp_path: Path, name: str) -> None:
    assert says(program, lay_out(tmp_path / name, name)) == DRIVERS[name][1]


def test_no_such_driver(program: Path, tmp_path: Path) -> None:
    assert says(program, tmp_path / "virtio_balloon") == "0"


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_planted_bugs_are_found(mutation: Mutation, tmp_path: Path) -> None:
    check_place(mutation)
    mutant = build(tmp_path, mutation)
    said = {name: says(mutant, lay_out(tmp_path / name, name)) for name in DRIVERS}
    assert said != {name: right for name, (_, right) in DRIVERS.items()}
