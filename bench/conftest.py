"""Options of the bench suite, and which cases of a section it takes."""

from bench.registry import SECTIONS, cases


def pytest_addoption(parser):
    parser.addoption("--fastattn-section", default="attention", choices=[*SECTIONS])
    parser.addoption("--fastattn-backend", default="auto", help="backend= of the fused calls")
    parser.addoption("--fastattn-rounds", default=21, type=int, help="interleaved rounds a case")
    parser.addoption("--fastattn-seconds", default=5.0, type=float, help="most for a case")
    parser.addoption("--fastattn-every", default=1, type=int, help="only each n-th case")
    parser.addoption("--fastattn-no-peers", action="store_true", help="stock and fused alone")


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    section = option("--fastattn-section")
    found = [c for c in cases(section).values() if c.tag != "memory"][:: option("--fastattn-every")]
    metafunc.parametrize("case", found, ids=[f"{section}/{case.name}" for case in found])
