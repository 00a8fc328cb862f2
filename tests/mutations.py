"""Bugs to plant in csrc/cpu: every one must make a case of test_mutations.py fail.

`find` is code of `file` with white space left out of account, and must stand there exactly once;
`replace` takes its place. A mutant stays inside its tensors (a crash proves little), compiles, and
changes what the portable instruction set does: there a tile never begins inside a panel, for one.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    find: str
    replace: str


def sample(mutations: tuple[Mutation, ...], every: int = 4) -> list[Mutation]:
    """What `make test` plants, for each costs a compilation: the first of each file and every
    fourth, or so. `make verify-full` plants all."""
    files: set[str] = set()
    chosen = []
    for i, m in enumerate(mutations):
        if m.file not in files or i % every == 0:
            chosen.append(m)
        files.add(m.file)
    return chosen


FWD, BWD = "attention_fwd.h", "attention_bwd.h"
ROWS, PROBS, ENGINE = "attention_rows.h", "attention_probs.h", "attention_engine.h"
GRAD_ENGINE, PLAN = "attention_grad_engine.h", "attention_grad_plan.h"
GEMM, PHILOX, SIMD = "gemm.h", "philox.h", "simd.h"

MUTATIONS = (
    # ---- online softmax
    Mutation("acc_not_rescaled", FWD, "store(acc + d, load(acc + d) * a)", "(void)a"),
    Mutation("sum_not_rescaled", FWD, "state_.l[r] *= a;", ""),
    Mutation("dropout_before_sum", FWD, "l0 += a, l1 += b; if constexpr (kDrop)"
             " a *= load(drop + t), b *= load(drop + t + W);",
             "if constexpr (kDrop) a *= load(drop + t), b *= load(drop + t + W);"
             " l0 += a, l1 += b;"),
    Mutation("split_acc_not_rescaled", FWD, "acc[d] += a * from[d]", "acc[d] += from[d]"),
    Mutation("split_sum_not_rescaled", FWD, "l += a * part[2 * r + 1]", "l += part[2 * r + 1]"),
    Mutation("sink_not_in_sum", FWD,
             "*l * *factor + std::exp2(float((sink - m) * c - lift))", "*l * *factor"),
    Mutation("high_sink_overflows", FWD, "lift = std::max(0., sink - m) * c", "lift = 0."),
    Mutation("sink_not_in_lse_of_empty_row", FWD, "p_.sinks ? p_.sinks[h] : kNegInf", "kNegInf"),
    Mutation("lse_remainder_dropped", FWD,
             "store(lse_lo, to_single(log_l + (t - to_double(prob_.in_units(total))) * c))",
             "store(lse_lo, vf{})"),
    Mutation("interior_test_without_end", FWD, "j0 + n_padded <= rows_.full_hi", "true"),
    Mutation("padding_rows_not_zeroed", FWD,
             "zero_row(p.dtype, p.Dv, row_at(p.o, p.dtype, b, h, i));", ""),
    Mutation("dropout_row_of_the_tile", FWD,
             "prob_.dropout.row(s.b * p_.H + rows_.h[r], rows_.i[r]",
             "prob_.dropout.row(s.b * p_.H + rows_.h[r], r"),
    Mutation("dropout_same_in_a_batch", FWD, "prob_.dropout.row(s.b * p_.H + rows_.h[r]",
             "prob_.dropout.row(rows_.h[r]"),
    # ---- which keys, and the features
    Mutation("mask_inverted", ROWS, "m[t] ? x[t] : kNegInf", "m[t] ? kNegInf : x[t]"),
    Mutation("mask_tile_full_on_any", ROWS, "every &= row[t]", "every |= row[t]"),
    Mutation("mask_of_head_0", ROWS, "b * m.b + h * m.h", "b * m.b + 0 * h"),
    Mutation("causal_off_by_one", ROWS, "std::min(r.hi, at + 1)", "std::min(r.hi, at + 2)"),
    Mutation("window_left_off_by_one", ROWS, "at - p.window_left", "at - p.window_left + 1"),
    Mutation("window_right_off_by_one", ROWS, "at + p.window_right + 1", "at + p.window_right"),
    Mutation("bottom_right_sign", ROWS, "s.shift = s.Sk - s.Sq", "s.shift = s.Sq - s.Sk"),
    Mutation("gqa_head", ROWS, "h = hk * group + first / s.Sq", "h = hk + first / s.Sq"),
    Mutation("alibi_sign", ROWS, "x[t] -= slope", "x[t] += slope"),
    Mutation("alibi_top_left", ROWS, "i + s.Sk - s.Sq - j0", "i - j0"),
    Mutation("alibi_of_batch_0", ROWS, "p.alibi[s.b * p.alibi_b + h]", "p.alibi[h]"),
    Mutation("softcap_derivative_dropped", ROWS, "store(dcap + t, 1.f - u * u)",
             "store(dcap + t, set1(1.f))"),
    Mutation("bias_row", ROWS, "h * c.h + i * c.i", "h * c.h"),
    Mutation("bias_row_fast", ROWS, "i * p.bias.i + j0", "j0"),
    # ---- dropout mask and returned weights
    Mutation("philox_9_rounds", PHILOX, "round < 10", "round < 9"),
    Mutation("philox_high_seed_word", PHILOX, "k1 = uint32_t(seed >> 32)", "k1 = 0"),
    Mutation("dropout_kept_not_scaled", PHILOX, "float(1.0 / (1.0 - p))", "1.f"),
    Mutation("weights_before_dropout", PROBS, "if (!prob_.dropout.on) return;", "return;"),
    Mutation("weights_mean_is_sum", PROBS, "1.f / float(p.H)", "1.f"),
    Mutation("unseen_weights_not_zeroed", PROBS,
             "zero_row(p.dtype, p.Sk, out(hk * prob.group + g, i))", "(void)i"),
    # ---- backward
    Mutation("delta_without_dlse", BWD, "sum - (g.dlse ? g.dlse[at(h, i)] : 0.f)", "sum"),
    Mutation("delta_without_dweights", BWD, "delta[at(h, i)] += sum;", ""),
    Mutation("dropout_not_in_dp", BWD, "load(y + t) * keep - delta", "load(y + t) - delta"),
    Mutation("dropout_not_in_dv", BWD, "store(x + t, w * keep)", "store(x + t, w)"),
    Mutation("dropout_head_in_backward", BWD, "prob_.dropout.row(s.b * p_.H + h, i",
             "prob_.dropout.row(s.b * p_.H, i"),
    Mutation("dk_not_scaled", BWD, "engine_.Dp, p_.scale, g_.dk", "engine_.Dp, 1.f, g_.dk"),
    Mutation("dq_not_scaled", BWD, "p_.D, p_.scale, to", "p_.D, 1.f, to"),
    Mutation("dk_not_cleared", BWD, "engine_.clear_keys(dk, n, engine_.Dp)", "(void)0"),
    Mutation("dbias_batch_stride", BWD, "s.b * g_.dbias_b", "0 * g_.dbias_b"),
    Mutation("dbias_after_softcap", BWD, "if (dbias_) add_bias_grad(s, h, i, j0, n, y);"
             " if (p_.softcap != 0.f) for (int64_t t = 0; t < n_padded; t += W)"
             " store(y + t, load(y + t) * load(dcap_.data() + t));",
             "if (p_.softcap != 0.f) for (int64_t t = 0; t < n_padded; t += W)"
             " store(y + t, load(y + t) * load(dcap_.data() + t));"
             " if (dbias_) add_bias_grad(s, h, i, j0, n, y);"),
    Mutation("dbias_half_stored", BWD, "size_t(n) * sizeof(float)",
             "size_t(n / 2) * sizeof(float)"),
    Mutation("dbias_part_dropped", BWD, "part + 1 < plan.parts", "part + 2 < plan.parts"),
    Mutation("dbias_slice_of_all_heads", PLAN, "nh > 1 ? x % nh : y % p_.Hk", "y % p_.Hk"),
    Mutation("dbias_part_loses_a_head", PLAN, "sharers * (part + 1) / parts",
             "sharers * (part + 1) / parts - part"),
    Mutation("dbias_of_first_entry", PLAN, "b < (nb > 1 ? x / nh + 1 : p_.B)",
             "b < (nb > 1 ? x / nh + 1 : 1)"),
    Mutation("dsinks_sign", BWD, "sum -= std::exp2(", "sum += std::exp2("),
    Mutation("padding_grads_not_zeroed", BWD, "zero(g.dk, b, p.Hk, s.Sk, p.Sk, p.D);", ""),
    Mutation("dq_of_empty_rows_not_zeroed", BWD, "zero_row(p_.dtype, p_.D, to);", ";"),
    # ---- products
    Mutation("values_of_first_tile", ENGINE, "v_rows_ + (j0 - lo_) * v_stride_", "v_rows_"),
    Mutation("decode_head_dim_tail", ENGINE, "load_part(k + d, D - d)", "load_part(k + d, D - D)"),
    Mutation("dk_row_block", GRAD_ENGINE, "q_.ptr + r0 * q_.stride", "q_.ptr"),
    Mutation("dp_of_q", GRAD_ENGINE, "of_v_.q = d_o;", ""),
    Mutation("dp_with_k", GRAD_ENGINE, "of_v_(dots_with(p, p.v, Dv))",
             "of_v_(dots_with(p, p.k, Dv))"),
    Mutation("last_of_few_keys_lost", "attention_engine.h", "std::clamp<int64_t>(n - t, 0, W)",
             "std::clamp<int64_t>(n - t - 1, 0, W)"),
    Mutation("dv_row_block", GRAD_ENGINE, "do_.ptr + r0 * do_.stride", "do_.ptr"),
    Mutation("gemm_second_chunk", GEMM, "B + k0 * b.k", "B"),
    Mutation("gemm_not_added_up", GEMM, "c[r][v] += load(C + r * ldc + v * W);",
             "c[r][v] += vf{};"),
    Mutation("gemm_row_tail", GEMM, "if (m & 2)", "if (false)"),
    Mutation("exp2_coefficient", SIMD, "0.240226468906279f", "0.2402f"),
    Mutation("log2_coefficient", SIMD, "3.3333331174e-1f", "3.33e-1f"),
    Mutation("tanh_large", SIMD, "2.f / (e + 1.f)", "1.f / (e + 1.f)"),
)  # fmt: skip
