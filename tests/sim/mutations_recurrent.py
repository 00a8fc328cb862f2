"""Bugs to plant in the recurrence (csrc/cuda/recurrent*, lstm.cu, gru.cu, grid_barrier.cuh): the
rules are those of mutations.py. `only`: (element type, hidden units of a block, True); 16 units:
blocks that meet at the grid barrier, 128: a block that is alone. Cases are in mutants.py, under
names that begin with rnn."""

from .mutations import BF16, FP32, Mutation, Variant

CELLS = ("lstm.cu", "gru.cu", "rnn.cu")
LSTM, GRU, HOST, STEP = "lstm.cu", "gru.cu", "recurrent.cu", "recurrent_step.cu"
BARRIER, CALL, CELL = "grid_barrier.cuh", "recurrent_call.cuh", "recurrent_cells.cuh"
FWD, BWD, PRODUCT = "recurrent_fwd.cuh", "recurrent_bwd.cuh", "recurrent_product.cuh"
GRID, ALONE = (BF16, 16, True), (FP32, 128, True)


def _bug(
    name: str, file: str, find: str, replace: str, breaks: str, by: str, sees: str,
    only: Variant = GRID,
) -> Mutation:  # fmt: skip
    """Headers are planted in the one cell that the case runs, or in the step's kernels."""
    gru = "gru" in by
    cell = STEP if only[1] == 0 else GRU if gru else LSTM
    planted = () if file.endswith(".cu") else (cell,)
    if only[1] == 0:
        only = GRID
    return Mutation(f"rnn_{name}", file, find, replace, breaks, by, sees, only, planted)


_STEP: Variant = (BF16, 0, True)

RECURRENT = (
    # ---- the grid barrier
    _bug(
        "no_barrier_before_arrival",
        BARRIER,
        "__syncthreads();  // the block's writes come before its arrival",
        "",
        "a block arrives before its h is written",
        "tsan:rnn_grid",
        "race",
    ),
    _bug(
        "no_barrier_after_arrival",
        BARRIER,
        "__syncthreads();  // all others go on once the first thread has seen the other blocks",
        "",
        "threads read h of blocks that have not arrived",
        "ptx:rnn_grid",
        "Race",
    ),
    _bug(
        "arrival_releases_nothing",
        BARRIER,
        "ptx::red_release_add(arrived_, 1u);",
        "atomicAdd(arrived_, 1u);",
        "the counter says that h is there, and orders nothing",
        "ptx:rnn_grid",
        "Race",
    ),
    _bug(
        "wait_acquires_nothing",
        BARRIER,
        "ptx::ld_acquire(arrived_)",
        "ptx::ld_relaxed(arrived_)",
        "h may be read before the counter",
        "ptx:rnn_grid",
        "Race",
    ),
    _bug(
        "one_block_too_many_is_waited_for",
        BARRIER,
        "target_ += blocks_;",
        "target_ += blocks_ + 1;",
        "a group waits for a block that it does not have",
        "plain:rnn_grid",
        "deadlock",
    ),
    _bug(
        "one_block_too_few_is_waited_for",
        BARRIER,
        "target_ += blocks_;",
        "target_ += blocks_ - 1;",
        "the last block's h is read before it has arrived",
        "ptx:rnn_torn",
        "Race",
    ),
    _bug(
        "steps_without_a_grid_barrier",
        FWD,
        "if (s + 1 < p.T) meet();",
        "",
        "blocks run ahead of each other",
        "tsan:rnn_grid",
        "race",
    ),
    _bug(
        "backward_steps_without_a_grid_barrier",
        BWD,
        "barrier.meet();",
        "__syncthreads();",
        "blocks run ahead of each other",
        "ptx:rnn_grid",
        "Race",
    ),
    _bug(
        "counters_are_not_zeroed",
        HOST,
        "out.error = cudaMemsetAsync(shared, 0, size_t(scratch.shared), stream);",
        "out.error = scratch.shared ? cudaSuccess : cudaErrorInvalidValue;",
        "blocks wait for arrivals of what memory held",
        "plain:rnn_grid",
        "deadlock",
    ),
    _bug(
        "blocks_that_are_not_resident",
        HOST,
        "launch_together(out, v, blocks, stream, c);",
        "launch(out, v, blocks, stream, c);",
        "without a cooperative launch a block waits for one that cannot start",
        "plain:rnn_tiles",
        "deadlock",
    ),
    # ---- barriers in a block, the exchange
    _bug(
        "one_buffer",
        FWD,
        "exchange.write((s + 1) % 2, b - at.lo, unit, masked",
        "exchange.write(s % 2, b - at.lo, unit, masked",
        "the new h overwrites what other blocks still read",
        "ptx:rnn_grid",
        "Race",
    ),
    _bug(
        "sums_are_not_waited_for",
        FWD,
        "__syncthreads();  // the sums of all warps are there",
        "",
        "gates of half a product",
        "ptx:rnn_grid",
        "Race",
    ),
    _bug(
        "sums_are_overwritten",
        FWD,
        "__syncthreads();  // the sums are read",
        "",
        "the next tile's sums over those that another warp reads",
        "tsan:rnn_tiles",
        "race",
    ),
    _bug(
        "backward_sums_are_not_waited_for",
        BWD,
        "__syncthreads();  // the sums of all warps are there",
        "",
        "dh of half a product",
        "ptx:rnn_grid",
        "Race",
    ),
    # ---- bounds
    _bug(
        "rows_beyond_the_batch",
        FWD,
        "min(b0 + 8 * n + g, last)",
        "b0 + 8 * n + g",
        "rows behind the last sequence are read: those that others write",
        "ptx:rnn_grid",
        "Race",
    ),
    _bug(
        "weights_at_another_warps_place",
        PRODUCT,
        "return s_rest + (chunk - G::kSplit * G::kHeld) * G::kTileBytes;",
        "return s_rest + (chunk - G::kSplit * G::kHeld + 8) * G::kTileBytes;",
        "weights beyond the block's shared memory",
        "ptx:rnn_block",
        "OutOfBounds",
        ALONE,
    ),
    _bug(
        "columns_beyond_the_weights",
        FWD,
        "unit < p.H && column < p.P ? w_hh[",
        "unit < p.H ? w_hh[",
        "what pads the last unit's columns is read from behind w_hh",
        "asan:rnn_ragged",
        "out of bounds",
        (FP32, 16, True),
    ),
    # ---- values
    _bug(
        "k_steps_swapped",
        PRODUCT,
        "step ? low.z : low.x",
        "step ? low.x : low.z",
        "columns of W meet other columns of h",
        "ptx:rnn_grid",
        "values",
    ),
    _bug(
        "a_part_left_out",
        PRODUCT,
        "for (int part = 1; part < G::kSplit; ++part)",
        "for (int part = 2; part < G::kSplit; ++part)",
        "one warp's columns are not in the sum",
        "ptx:rnn_grid",
        "values",
    ),
    _bug(
        "mask_forgotten",
        FWD,
        "masked<T>(p, state, now.h)",
        "now.h",
        "recurrent dropout ends with the first step",
        "ptx:rnn_grid",
        "values",
    ),
    _bug(
        "late_sequences_begin_with_zero",
        FWD,
        "exchange.write(1, b - at.lo, unit, in);",
        "(void)in;",
        "a sequence that joins in an odd step of a reversed direction lacks its h0",
        "ptx:rnn_ragged",
        "values",
    ),
    _bug(
        "y_of_no_step_is_left",
        FWD,
        "store<T>(p.y, (row * p.D + at.d) * p.P + unit, 0.f);",
        "",
        "rows of no step keep what memory held",
        "tsan:rnn_ragged",
        "values",
    ),
    _bug(
        "input_and_forget_gate_swapped",
        CELL,
        "s.c = fmaf(f, s.c, i * g);",
        "s.c = fmaf(i, s.c, f * g);",
        "c forgets what it should take",
        "ptx:rnn_grid",
        "values",
    ),
    _bug(
        "reset_without_bias",
        CELL,
        "hn = gh[2] + b_hn;",
        "hn = gh[2];",
        "r does not reach b_hn",
        "ptx:rnn_gru",
        "values",
    ),
    _bug(
        "no_gradient_past_the_gates",
        CELL,
        "out.past = dh * z;",
        "out.past = 0.f;",
        "z h has no gradient",
        "ptx:rnn_gru",
        "values",
    ),
    _bug(
        "dc_is_not_forgotten",
        CELL,
        "dc *= f;",
        "",
        "dc of the former step lacks the forget gate",
        "ptx:rnn_grid",
        "values",
    ),
    _bug(
        "gradients_of_no_step",
        BWD,
        "if (s > 0 && has_step(p, b, t_after, after.n))",
        "if (s > 0)",
        "what another step left in the exchange is added to a sequence that has ended",
        "ptx:rnn_ragged",
        "values",
    ),
    _bug(
        "first_c_is_of_the_step_before",
        CALL,
        "t_before >= 0 && has_step(p, b, t_before, before.n)",
        "t_before >= 0",
        "a sequence's first c is a row that nobody wrote",
        "ptx:rnn_ragged",
        "values",
    ),
    # ---- one step around a GEMM
    _bug(
        "step_without_mask",
        STEP,
        "store<T>(c.next, state, masked<T>(p, state, now.h));",
        "store<T>(c.next, state, now.h);",
        "recurrent dropout ends with the first step",
        "ptx:rnn_step",
        "values",
        _STEP,
    ),
    _bug(
        "step_leaves_dgh",
        STEP,
        "const bool here = has_step(p, at.b, t, rows.n);\n  if (here) {\n    CellSaved",
        "const bool here = true;\n  if (here) {\n    CellSaved",
        "a sequence that has ended goes on",
        "ptx:rnn_step",
        "values",
        _STEP,
    ),
    _bug(
        "projection_carries_dh_twice",
        STEP,
        "of_step = dh, dh = 0.f;",
        "of_step = dh;",
        "the gradient of h is counted once a step",
        "ptx:rnn_projected",
        "values",
        _STEP,
    ),
)
