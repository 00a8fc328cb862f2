"""Bugs to plant in csrc/cuda: each must be caught, and by which rung is written down.

`find` stands exactly once in `file`; `replace` takes its place. `by` is the check that sees it, a
rung and a case (mutants.py), and `sees` what it says. `only` is the one variant of each kernel that
is compiled, the one that the case runs: (element type, head dim, laden). `planted`: the sources
that are compiled with the bug, where `file` is a header; others are as they are. The
backward's bugs are in mutations_backward.py.
"""

from dataclasses import dataclass

BF16, FP16, FP32 = "__nv_bfloat16", "__half", "float"
Variant = tuple[str, int, bool]


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    find: str
    replace: str
    breaks: str
    by: str
    sees: str = ""  # the verdict: a fault's name, "values", ...
    only: Variant = (BF16, 64, False)
    planted: tuple[str, ...] = ()

    def compiled(self) -> tuple[str, ...]:
        return self.planted or ((self.file,) if self.file.endswith(".cu") else (FWD,))


PTX, TILE, MMA, PHILOX = "ptx.cuh", "tile.cuh", "mma.cuh", "philox.cuh"
SEQUENCE, CALL, SOFTMAX, LAUNCH = "sequence.cuh", "attention_call.cuh", "softmax.cuh", "launch.cuh"
FWD, WEIGHTS = "attention_fwd.cu", "attention_weights.cu"
KEYS, ROWS = "attention_bwd_keys.cu", "attention_bwd_rows.cu"
BIAS, PREPARE = "attention_bwd_bias.cu", "attention_bwd_prepare.cu"
LADEN = (BF16, 64, True)

FORWARD = (
    # ---- barriers and asynchronous copies
    Mutation(
        "no_barrier_before_v",
        FWD,
        "__syncthreads();  // q and k are there; nobody reads the last v any more",
        "",
        "a tile of v lands while another warp reads the last one",
        "tsan:plain",
        "race",
    ),
    Mutation(
        "no_barrier_before_next_k",
        FWD,
        "__syncthreads();  // v is there; nobody reads k any more",
        "",
        "the next k lands while another warp reads this one",
        "ptx:plain",
        "Race",
    ),
    Mutation(
        "waits_for_one_group_less",
        FWD,
        "ptx::cp_async_wait<0>();\n    __syncthreads();  // q and k",
        "ptx::cp_async_wait<1>();\n    __syncthreads();  // q and k",
        "q and k are read before they are there",
        "ptx:plain",
        "Race",
    ),
    Mutation(
        "v_is_not_waited_for",
        FWD,
        "ptx::cp_async_wait<0>();\n    __syncthreads();  // v is there",
        "__syncthreads();  // v is there",
        "v is read before it is there",
        "ptx:plain",
        "Race",
    ),
    Mutation(
        "no_wait_without_keys",
        FWD,
        "ptx::cp_async_wait<0>();\n  __syncthreads();  // where there was no key, q is still "
        "under way",
        "",
        "o is staged where q still lands",
        "ptx:no_keys",
        "Race",
    ),
    Mutation(
        "no_syncwarp_before_o",
        FWD,
        "__syncwarp();  // a warp writes and reads its own rows alone",
        "",
        "lanes read o before their neighbours wrote it",
        "ptx:plain",
        "Race",
    ),
    # ---- tiles
    Mutation(
        "swizzle_of_reads_differs",
        MMA,
        "% 8 == 0 ? 7 : 3;",
        "% 8 == 0 ? 3 : 3;",
        "reads and writes of a tile permute its chunks differently",
        "ptx:plain",
        "Race",
    ),
    Mutation(
        "no_swizzle",
        TILE,
        "const int swap = kChunks % 8 == 0 ? row & 7 : (row >> 1) & 3;",
        "const int swap = 0;",
        "ldmatrix meets 8 rows in one bank",
        "conflicts:plain",
        "ConflictError",
    ),
    Mutation(
        "one_row_too_many_in",
        TILE,
        "? limit - first - row : 0;",
        "? limit + 1 - first - row : 0;",
        "a tile holds a row beyond the sequence",
        "ptx:poisoned_tail",
        "OutOfBounds",
    ),
    Mutation(
        "columns_are_not_limited",
        TILE,
        "chunk * Layout::kVec < from.width ? limit - first - row : 0;",
        "limit - first - row;",
        "a narrow head reads its neighbour's columns",
        "ptx:narrow",
        "OutOfBounds",
    ),
    Mutation(
        "one_row_too_many_out",
        TILE,
        "if (first + row >= limit || chunk",
        "if (first + row > limit || chunk",
        "o is written beyond its last row",
        "ptx:odd_rows",
        "OutOfBounds",
    ),
    Mutation(
        "vectors_where_unaligned",
        CALL,
        "x.d == 1 && width % n == 0 &&",
        "x.d == 1 &&",
        "16 bytes are read where a row ends earlier",
        "ptx:odd_head_dim",
        "OutOfBounds",
        only=(BF16, 64, False),
    ),
    Mutation(
        "one_row_too_many_in_by_elements",
        TILE,
        "if (first + row < limit && col < from.width)",
        "if (first + row <= limit && col < from.width)",
        "the copy of rows that are no vectors holds a row beyond the sequence",
        "ptx:unaligned",
        "OutOfBounds",
    ),
    Mutation(
        "one_row_too_many_out_by_elements",
        TILE,
        "if (first + row >= limit || col >= to.width) continue;",
        "if (first + row > limit || col >= to.width) continue;",
        "the copy of rows that are no vectors writes beyond the last row",
        "ptx:unaligned",
        "OutOfBounds",
    ),
    # ---- products
    Mutation(
        "operand_b_swapped",
        PTX,
        'f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "\n      "{%8, %9}',
        'f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "\n      "{%9, %8}',
        "the halves of operand B change places in the instruction's text",
        "ptx:plain",
        "values",
    ),
    Mutation(
        "v_is_not_transposed",
        MMA,
        "ptx::ldmatrix_x4_trans(b, v.at",
        "ptx::ldmatrix_x4(b, v.at",
        "P v takes rows of v for columns",
        "ptx:plain",
        "values",
    ),
    Mutation(
        "fp32_keys_out_of_order",
        MMA,
        "{__float_as_uint(c[0]), __float_as_uint(c[2]),\n",
        "{__float_as_uint(c[0]), __float_as_uint(c[1]),\n",
        "rows and keys of an fp32 P change places",
        "ptx:fp32",
        "values",
        only=(FP32, 64, False),
    ),
    Mutation(
        "one_tf32_product",
        MMA,
        "ptx::mma_tf32(d, a.small, b.big[0], b.big[1]);",
        "",
        "fp32 products have 11 bits of q",
        "ptx:fp32",
        "values",
        only=(FP32, 64, False),
    ),
    # ---- softmax
    Mutation(
        "acc_is_not_rescaled",
        MMA,
        "acc[m][n][e] *= alpha[m][e / 2];",
        ";",
        "o keeps the weight of an old maximum",
        "ptx:plain",
        "values",
    ),
    Mutation(
        "no_guard_for_no_key",
        SOFTMAX,
        "top == -INFINITY ? 0.f : top;",
        "top;",
        "a row whose first tiles are hidden is NaN",
        "ptx:window",
        "values",
    ),
    Mutation(
        "maximum_of_half_a_row",
        SOFTMAX,
        "return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));",
        "return x;",
        "lanes of one row disagree about its maximum",
        "ptx:plain",
        "values",
    ),
    Mutation(
        "sum_of_half_a_row",
        SOFTMAX,
        "return x + __shfl_xor_sync(0xffffffffu, x, 2);",
        "return x;",
        "a row is divided by half its sum",
        "ptx:plain",
        "values",
    ),
    Mutation(
        "lse_in_log2",
        CALL,
        "log2_l * kLn2",
        "log2_l",
        "lse adds log2 to natural log",
        "ptx:plain",
        "values",
    ),
    Mutation(
        "sink_joins_no_sum",
        CALL,
        "l = l * factor + ptx::exp2_approx(float((sink - top) * double(call.c) - lift));",
        "l = l * factor;",
        "the sink takes no share",
        "ptx:sinks",
        "values",
    ),
    # ---- which keys
    Mutation(
        "causal_off_by_one",
        CALL,
        "key >= seen.hi(row)",
        "key > seen.hi(row)",
        "a row sees the key after its own",
        "ptx:causal",
        "values",
    ),
    Mutation(
        "window_one_key_short",
        CALL,
        "key < seen.lo(row)",
        "key <= seen.lo(row)",
        "the first key of a window is hidden",
        "ptx:window",
        "values",
    ),
    Mutation(
        "tiles_skipped_too_early",
        SEQUENCE,
        "min(i + shift + right + 1, k_len)",
        "min(i + shift + right, k_len)",
        "a row's last key is skipped",
        "ptx:causal",
        "values",
    ),
    Mutation(
        "bottom_right_ignored",
        SEQUENCE,
        "shift = p.causal == Causal::kBottomRight ? k_len - q_len : 0;",
        "shift = 0;",
        "bottom-right causal is aligned top-left",
        "ptx:bottom_right",
        "values",
    ),
    Mutation(
        "heads_of_another_group",
        FWD,
        "const int hk = at.h / call.group;",
        "const int hk = at.h % p.Hk;",
        "a query head reads another group's keys",
        "ptx:plain",
        "values",
    ),
    Mutation(
        "tiles_of_packed_batches_missing",
        SEQUENCE,
        "return read(cu, b) / kBlock + b;",
        "return read(cu, b) / kBlock;",
        "the last rows of a packed sequence have no block",
        "ptx:packed",
        "values",
    ),
    Mutation(
        "length_is_not_clamped",
        SEQUENCE,
        "out.length = int(clamp(read(lens, b), 0, S));",
        "out.length = int(read(lens, b));",
        "a length beyond the tensor reads beyond it",
        "ptx:hostile_lengths",
        "OutOfBounds",
    ),
    # ---- features
    Mutation(
        "alibi_favours_the_far",
        CALL,
        "x -= slope *",
        "x += slope *",
        "ALiBi has its sign changed",
        "ptx:features",
        "values",
        only=LADEN,
    ),
    Mutation(
        "bias_of_another_row",
        CALL,
        "bias_at + i * p.bias.i",
        "bias_at + (i ^ 1) * p.bias.i",
        "neighbouring rows change their bias",
        "ptx:bias",
        "values",
        only=LADEN,
    ),
    Mutation(
        "mask_before_bias_range",
        CALL,
        "if (i >= q_len || j >= k_len) return x;\n",
        "",
        "a tile's tail reads bias and mask beyond them",
        "ptx:bias_and_mask",
        "OutOfBounds",
        only=LADEN,
    ),
    Mutation(
        "dropout_of_a_neighbour",
        PHILOX,
        "words[0] = odd ? from0 : w.x;",
        "words[0] = odd ? w.x : from0;",
        "the mask is not the one of other backends",
        "ptx:dropout",
        "values",
        only=LADEN,
    ),
    Mutation(
        "survivors_keep_their_size",
        CALL,
        "factor * call.keep_scale / l",
        "factor / l",
        "dropout shrinks o",
        "ptx:dropout",
        "values",
        only=LADEN,
    ),
    Mutation(
        "softcap_without_tanh",
        CALL,
        "x = p.softcap * t;",
        "",
        "softcap caps nothing",
        "ptx:features",
        "values",
        only=LADEN,
    ),
    Mutation(
        "weights_of_one_head",
        WEIGHTS,
        "h < h0 + heads",
        "h < h0 + 1",
        "the mean over heads has one head in it",
        "ptx:weights_mean",
        "values",
        only=LADEN,
    ),
    Mutation(
        "weights_of_hidden_keys",
        WEIGHTS,
        "hide(x, seen, i, key0 + 8 * n);",
        "",
        "hidden keys get a weight",
        "ptx:weights_causal",
        "values",
        only=LADEN,
    ),
    # ---- launcher and budget
    Mutation(
        "shared_memory_short_by_a_tile",
        FWD,
        "kQBytes + 2 * kKBytes + int",
        "kQBytes + kKBytes + int",
        "v lies beyond the block's shared memory",
        "ptx:plain",
        "OutOfBounds",
    ),
    Mutation(
        "one_block_too_few",
        LAUNCH,
        "out.grid = unsigned(blocks);",
        "out.grid = unsigned(blocks - 1);",
        "the last tile is never made",
        "ptx:plain",
        "values",
    ),
    Mutation(
        "shared_limit_is_not_raised",
        LAUNCH,
        "cudaFuncAttributeMaxDynamicSharedMemorySize, v.shared);",
        "cudaFuncAttributeMaxDynamicSharedMemorySize, 0);",
        "launches of more than 48 KB fail",
        "ptx:wide_head",
        "RuntimeError",
        only=(BF16, 256, False),
    ),
    Mutation(
        "registers_for_four_blocks",
        FWD,
        "__launch_bounds__(C::kThreads, 2)",
        "__launch_bounds__(C::kThreads, 4)",
        "accumulators spill",
        "budget:sm_80",
        "BudgetError",
    ),
)
