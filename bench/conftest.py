"""Options of the bench suite."""


def pytest_addoption(parser):
    parser.addoption("--fastattn-backend", default="auto", help="backend= of the fused calls")
    parser.addoption("--fastattn-rounds", default=21, type=int, help="interleaved rounds a case")
