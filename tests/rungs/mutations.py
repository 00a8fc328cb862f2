"""Bugs to plant in kernels/: each must be caught, and by which rung is written down.

`find` stands exactly once in `file`; `replace` takes its place. `by` is the cheapest check that
sees it (see `mutants.CHECKS`), which `make verify` runs. For the table of MUTATIONS.md every mutant
meets the interpreter and ttsem on the case of `by` (or `case`), the stand-in driver and the budget.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    find: str
    replace: str
    breaks: str
    by: str
    case: str = ""  # of cases.CASES, for interpreter and ttsem where `by` names none


COMMON, FWD, BWD = "attention_common.py", "attention_fwd.py", "attention_bwd.py"
LAUNCHERS = "attention.py"

MUTATIONS = (
    # ---- which keys
    Mutation("causal_off_by_one", COMMON, "ok = ok & (j <= at)\n    if window_left",
             "ok = ok & (j <= at + 1)\n    if window_left",
             "a row sees the key after its own", "ttsem:causal"),
    Mutation("causal_last_key_dropped", COMMON,
             "hi = tl.minimum(hi, last + shift + 1)\n        full",
             "hi = tl.minimum(hi, last + shift)\n        full",
             "a tile's last row misses its last key", "ttsem:causal_row_on_tile_edge"),
    Mutation("window_left_off_by_one", COMMON, "ok & (j >= at - window_left)",
             "ok & (j > at - window_left)", "a window is one key short", "ttsem:window"),
    Mutation("no_mask_after_exp", BWD,
             'x = tl.where(seen, x, float("-inf"))\n    p = probabilities',
             "x = tl.where(seen, x, x)\n    p = probabilities",
             "the backward gives hidden pairs a gradient", "ttsem:causal"),
    Mutation("k_lens_ignored", COMMON, "length = tl.load(lens_ptr + b).to(tl.int64)",
             "length = tl.load(lens_ptr + b).to(tl.int64) * 0 + S", "padding keys take part",
             "ttsem:k_lens"),
    # ---- online softmax
    Mutation("acc_not_rescaled", FWD, "acc = acc * alpha[:, None]", "acc = acc + 0.0",
             "o keeps the weights of an older maximum", "ttsem:plain"),
    Mutation("sum_not_rescaled", FWD, "l = l * alpha + tl.sum(p, 1)", "l = l + tl.sum(p, 1)",
             "the row sum keeps an older maximum", "ttsem:plain"),
    Mutation("empty_row_is_nan", FWD,
             'base = tl.where(m_new == float("-inf"), 0.0, m_new)', "base = m_new",
             "-inf - (-inf) in a row without keys", "ttsem:masked_rows"),
    # ---- memory
    Mutation("store_unmasked", COMMON, "tl.store(ptrs, x.to(ptrs.dtype.element_ty), mask=ok)",
             "tl.store(ptrs, x.to(ptrs.dtype.element_ty))", "writes past the last row",
             "ttsem:plain"),
    Mutation("load_unmasked", COMMON, "return tl.load(ptrs, mask=ok, other=0.0)",
             "return tl.load(ptrs)", "reads past the last row", "ttsem:plain"),
    Mutation("load_without_other", COMMON, "return tl.load(ptrs, mask=ok, other=0.0)",
             "return tl.load(ptrs, mask=ok)", "undefined values beyond the last row",
             "ttsem:plain"),
    Mutation("row_offset_32_bit", COMMON, "rows[:, None].to(tl.int64) * stride_s",
             "rows[:, None] * stride_s", "offsets beyond 2^31 wrap", "ttsem:far_apart"),
    Mutation("key_offset_32_bit", FWD, "step = tl.cast(j0, tl.int64)", "step = j0",
             "offsets of later tiles wrap", "ttsem:far_keys"),
    Mutation("wrong_stride", FWD, "v_base = v_ptr + b64 * stride_v[0] + hk64 * stride_v[1]",
             "v_base = v_ptr + b64 * stride_v[0] + hk64 * stride_k[1]",
             "v is walked with k's head stride", "ttsem:wide_values"),
    Mutation("last_rows_not_launched", LAUNCHERS,
             "return self.B * self.H * -(-self.Sq // config.BLOCK_M)",
             "return self.B * self.H * max(self.Sq // config.BLOCK_M, 1)",
             "the grid forgets the last block of rows", "ttsem:plain"),
    Mutation("delta_row_unwritten", BWD,
             "tl.store(delta_ptr + row_at + rows, delta, mask=rows < limit)",
             "tl.store(delta_ptr + row_at + rows, delta, mask=rows < limit - 1)",
             "the backward reads memory that nobody wrote", "ttsem:plain"),
    # ---- races
    Mutation("dq_added_without_atomics", BWD,
             'tl.atomic_add(dq_ptr + at, dq, mask=ok, sem="relaxed")',
             "tl.store(dq_ptr + at, tl.load(dq_ptr + at, mask=ok, other=0.0) + dq, mask=ok)",
             "programs overwrite each other's sums", "ttsem:atomics"),
    Mutation("dbias_slice_of_two_programs", BWD, "at_h.to(tl.int64) * stride_dbias[1]",
             "(at_h * 0).to(tl.int64) * stride_dbias[1]", "all heads write the slice of the first",
             "ttsem:bias_shared_by_batch"),
    # ---- features
    Mutation("gqa_group_order", FWD, "hk64 = (h // group).to(tl.int64)",
             "hk64 = (h % (H // group)).to(tl.int64)", "query heads take another kv head",
             "ttsem:plain"),
    Mutation("alibi_sign", COMMON, "x = x - slope", "x = x + slope", "far keys are preferred",
             "ttsem:alibi"),
    Mutation("alibi_top_left", COMMON, "tl.abs(i + (k_len - q_len) - j)", "tl.abs(i - j)",
             "distances of another corner", "ttsem:alibi"),
    Mutation("softcap_derivative", BWD, "dx = ds * (1.0 - t * t)", "dx = ds",
             "the gradient ignores the cap", "ttsem:softcap"),
    Mutation("philox_word_order", COMMON,
             "tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))",
             "tl.interleave(tl.interleave(w0, w1), tl.interleave(w2, w3))",
             "another dropout mask than the other backends", "ttsem:dropout"),
    Mutation("dropout_not_scaled", FWD, "factor = factor * keep_scale", "factor = factor * 1.0",
             "kept weights are too small", "ttsem:dropout"),
    Mutation("delta_without_dlse", BWD,
             "delta -= tl.load(dlse_ptr + at, mask=rows < q_len, other=0.0)", "delta += 0.0",
             "the gradient of lse is lost", "ttsem:plain"),
    Mutation("dsinks_sign", BWD, "total -= tl.where(seen", "total += tl.where(seen",
             "sinks learn the wrong way", "ttsem:sinks"),
    Mutation("weights_sum_for_mean", FWD, "(total / heads)", "(total + 0.0)",
             "averaged weights are summed", "ttsem:weights_mean"),
    Mutation("dq_not_scaled", BWD, "dq * scale, 0.0)", "dq * 1.0, 0.0)", "dq lacks the scale",
             "ttsem:plain"),
    # ---- what only a compiler or a launcher sees
    Mutation("stride_is_a_constant", COMMON, "cols[None, :].to(tl.int64) * stride_d",
             "cols[None, :] * stride_d.to(tl.int64)",
             "a stride of 1 is a Python integer and has no .to", "driver:aligned", "plain"),
    Mutation("recompiles_for_every_length", FWD, '"Sq", "Sk", "Tq", "Tk",', '"Tq", "Tk",',
             "a growing sequence compiles again and again", "driver:growing", "plain"),
    Mutation("tile_over_shared_memory", LAUNCHERS, "num_stages=config.num_stages,",
             "num_stages=config.num_stages + 4,", "a shipped tile cannot launch on sm_86",
             "driver:sm_86", "plain"),
    Mutation("tile_spills", LAUNCHERS, "num_warps=config.num_warps,",
             "num_warps=max(1, config.num_warps // 2),", "a shipped tile spills on sm_80",
             "budget:forward", "plain"),
    Mutation("tensor_cores_idle", FWD,
             "acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)",
             "acc = tl.dot(p, v.to(tl.float32), acc, input_precision=PRECISION)",
             "half of the products leave the tensor cores", "budget:forward", "plain"),
)  # fmt: skip
