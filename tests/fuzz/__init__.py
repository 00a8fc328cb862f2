"""Random calls, right and wrong, of every public function and op, in processes of their own.

    make fuzz                       ten minutes, and the table of FIGURES.md
    make fuzz MINUTES=1 ARGS="--op attention --seed 7"
    make fuzz-asan, make fuzz-ubsan     the same under a sanitizer's build of the CPU's kernels
    cd tests && python -m fuzz --replay attention:7:31    one case again

Three kinds of case (`case.py`): *valid*, held to the fp64 oracle forward and backward by the rule
of rule.py; *invalid*, a valid call with one argument spoilt (`spoil.py`), which must be refused
with a message that names it; *raw*, an op of torch.ops.fastattn with hostile tensors and numbers
(`raw.py`), which may do what it likes but crash, hang or leave its tensors.

A family of ops is a strategy of `Valid` (`families.py`). The clock is shared: the family that has
had the least time is next, so all are reached in any run of minutes. A case is reproduced from
family, seed and index alone.
"""
