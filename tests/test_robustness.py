"""What a process may do around the ops: threads, forks, interrupts, and tens of thousands of calls.

What needs a process of its own (a fork, a signal, a resident set that nobody else moves) is a
script below, run by this interpreter.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from robustness_calls import CALLS
from torch import Tensor

TESTS = Path(__file__).parent


def script(text: str, *args: str, timeout: float = 300) -> list[str]:
    """The lines that a script prints; it runs here, with the tests on its path."""
    command = [sys.executable, "-c", text, *args]
    out = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=TESTS)
    assert out.returncode == 0, out.stderr[-3000:]
    return out.stdout.splitlines()


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return len(got) == len(want) and all(map(torch.equal, got, want))


def test_every_op_from_many_threads() -> None:
    """Eight threads, each op in its turn, forward and backward: bit for bit as alone."""
    names = sorted(CALLS)
    alone = {name: CALLS[name](seed)[:] for seed, name in enumerate(names)}

    def one(at: int) -> tuple[str, bool]:
        name = names[at % len(names)]
        return name, same(CALLS[name](at % len(names)), alone[name])

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, range(6 * len(names))))
    assert [name for name, right in found if not right] == []


# fork() keeps the calling thread alone. A pool of GNU OpenMP does not survive that (a child of
# plain PyTorch hangs in its first parallel region too), so a child computes with one thread, which
# is what torch's DataLoader sets in its workers.
_FORK = """
import multiprocessing, os, signal, sys
import torch
from robustness_calls import CALLS
used = sys.argv[1] == "used"
names = sorted(CALLS)
torch.set_num_threads(2)
if used:
    before = {n: CALLS[n](i) for i, n in enumerate(names)}

def check(want):
    torch.set_num_threads(1)
    for i, n in enumerate(names):
        found = CALLS[n](i)
        if want is not None:
            assert all(map(torch.equal, found, want[n])), n
        assert all(bool(x.isfinite().all()) for x in found), n

pid = os.fork()
if pid == 0:
    signal.alarm(200)
    try:
        check(before if used else None)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
assert os.waitpid(pid, 0)[1] == 0, "a child of os.fork"
if not used:
    before = {n: CALLS[n](i) for i, n in enumerate(names)}
child = multiprocessing.get_context("fork").Process(target=check, args=(before,))
child.start(); child.join(200)
assert child.exitcode == 0, "a child of multiprocessing"
# The parent is as it was, its threads too.
assert all(all(map(torch.equal, CALLS[n](i), before[n])) for i, n in enumerate(names))
print("fine")
"""


@pytest.mark.parametrize("when", ["imported", "used"])
def test_children_of_a_fork_compute_the_same(when: str) -> None:
    assert script(_FORK, when) == ["fine"]


_LOADER = """
import torch, fastattn
from torch.utils.data import DataLoader, Dataset
from robustness_calls import CALLS

class Computed(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, i):
        return CALLS["attention"](i)[0].detach()

first = CALLS["attention"](0)[0]
loaded = [x for batch in DataLoader(Computed(), batch_size=2, num_workers=2) for x in batch]
assert len(loaded) == 8 and torch.equal(loaded[0], first)
assert all(torch.equal(x, CALLS["attention"](i)[0]) for i, x in enumerate(loaded))
print("fine")
"""


def test_workers_of_a_data_loader() -> None:
    assert script(_LOADER) == ["fine"]


# Every call has tensors of its own: what is kept by address or by size would be kept again.
_LEAK = """
import ctypes, gc, re, sys
from pathlib import Path
import torch
from robustness_calls import CALLS, forward_only
torch.set_num_threads(1)
trim = ctypes.CDLL(None).malloc_trim

def resident():
    gc.collect(); trim(0)
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

grad, calls = sys.argv[1] == "backward", int(sys.argv[2])
for name in sys.argv[3:]:
    call = CALLS[name] if grad else forward_only(name)
    for i in range(300):
        call(i)
    before = resident()
    for i in range(calls):
        call(i)
    print(name, resident() - before)
if sys.argv[3:] == ["attention"] and calls == 1000:  # what the meter is held against
    kept = []
    before = resident()
    for i in range(calls):
        kept.append(torch.ones(2048))
    print("kept", resident() - before)
"""


def growth(way: str, calls: int, *names: str) -> dict[str, int]:
    """KiB that the resident set grew by over that many calls, by op."""
    lines = script(_LEAK, way, str(calls), *names, timeout=500)
    return {name: int(kib) for name, kib in (line.split() for line in lines)}


_SOME = ("attention", "layernorm_ffn")  # every op: with --full
# One number of 64 bits a call would be 78 KiB in 10,000; pages of heaps come and go by hundreds.
_ALLOWED = 1500


def test_the_meter_sees_a_leak() -> None:
    found = growth("forward", 1000, "attention")
    assert found["kept"] > 7000
    assert found["attention"] < _ALLOWED


def test_ten_thousand_calls_leave_nothing() -> None:
    """A hundred bytes a call would be 1000 KiB more."""
    found = growth("forward", 10_000, *_SOME)
    assert max(found.values()) < _ALLOWED, found


def test_thousands_of_backwards_leave_nothing() -> None:
    found = growth("backward", 2_500, "attention", "lstm")
    assert max(found.values()) < _ALLOWED, found


@pytest.mark.full
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_ten_thousand_calls_of_every_op_leave_nothing(way: str) -> None:
    for name in CALLS:
        found = growth(way, 10_000, name)
        assert max(found.values()) < _ALLOWED, found


_SOAK = """
import ctypes, gc, re, sys
from pathlib import Path
import torch, fastattn
torch.set_num_threads(1)
trim = ctypes.CDLL(None).malloc_trim

def resident():
    gc.collect(); trim(0)
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
        self.words = torch.nn.Embedding(5, 32)
        self.encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.lstm = torch.nn.LSTM(32, 32, batch_first=True)
        self.out = torch.nn.Linear(32, 5)
    def forward(self, ids):
        return self.out(self.lstm(self.encoder(self.words(ids)))[0])

def train(fused, steps):
    torch.manual_seed(0)
    model = Model()
    if fused:
        assert len(fastattn.swap(model)) >= 7
    opt = torch.optim.Adam(model.parameters(), 5e-3)
    gen, losses, sizes = torch.Generator().manual_seed(1), [], []
    for step in range(steps):
        ids = torch.randint(5, (8, 12), generator=gen)
        target = (ids + ids.roll(1, 1)) % 5  # of the token before: attention or a state is wanted
        loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), target.flatten())
        opt.zero_grad(); loss.backward(); opt.step()
        losses.append(loss.item())
        if step in (steps // 4, steps - 1):
            sizes.append(resident())
    return losses, sizes[1] - sizes[0]

steps = int(sys.argv[1])
stock, _ = train(False, steps)
fused, grown = train(True, steps)
tail = steps // 10
print(grown, stock[0], fused[0], sum(stock[-tail:]) / tail, sum(fused[-tail:]) / tail)
"""


def soak(steps: int) -> None:
    grown, first, first_fused, last, last_fused = map(float, script(_SOAK, str(steps))[0].split())
    assert grown < _ALLOWED
    assert abs(first - first_fused) < 1e-5 * first
    assert last < first / 2  # it learns, so there is something to agree on
    assert abs(last - last_fused) < 0.1 * first


def test_training_soak() -> None:
    soak(200)


@pytest.mark.full
def test_long_training_soak() -> None:
    soak(5000)


_INTERRUPTED = """
import time, torch, fastattn
torch.set_num_threads(1)
q = torch.randn(1, 4, int(2**11), 64)
t = time.monotonic()
right = fastattn.attention(q, q, q)
one = time.monotonic() - t
print(one, flush=True)
try:
    while True:
        fastattn.attention(q, q, q)
except KeyboardInterrupt:
    print(time.monotonic(), flush=True)
assert torch.equal(fastattn.attention(q, q, q), right)
print("fine", flush=True)
"""


def test_ctrl_c_arrives_between_two_calls() -> None:
    """The interrupt is seen when the call that runs is done; the next call is right."""
    child = subprocess.Popen(
        [sys.executable, "-c", _INTERRUPTED], stdout=subprocess.PIPE, text=True, cwd=TESTS
    )
    assert child.stdout is not None
    one = float(child.stdout.readline())
    time.sleep(3.5 * one)  # in the middle of a call
    sent = time.monotonic()
    child.send_signal(signal.SIGINT)
    seen = float(child.stdout.readline())
    rest, code = child.stdout.read(), child.wait(120)
    assert (rest.split(), code) == (["fine"], 0)
    assert seen - sent < 20 * one + 5, (
        f"{seen - sent:.2f} s behind the signal, a call has {one:.2f}"
    )


def test_calls_are_of_every_public_op() -> None:
    import fastattn

    public = {n for n in fastattn.__all__ if callable(getattr(fastattn, n)) and n.islower()}
    public -= {"backends", "debug_checks", "swap", "tune", "unswap"}
    assert public <= set(CALLS)
    made: dict[str, Callable[[int], list[Tensor]]] = CALLS
    assert all(len(made[n](0)) > 1 for n in public)
