"""What proves the Triton kernels on a machine without a GPU; `make verify` climbs all of it.

| module       | rung                                                                              |
|--------------|-----------------------------------------------------------------------------------|
| semantics.py | ttsem executes the IR of every launch: bounds, races, unwritten reads, values     |
| driver.py    | Triton's own JIT behind a stand-in CUDA driver: specialisation, packing, limits   |
| aot.py       | ahead of time for every architecture: registers, spills, shared memory, mma       |
| mutants.py   | planted bugs: each must be caught by one of the above                             |

toys.py holds kernels with planted faults of their own: the tests of the rungs themselves.
"""
