"""Bugs to plant in the CPU kernels of layernorm_ffn: every one must make a case of
test_mutations_ffn.py fail. The rules are those of mutations.py."""

from mutations import Mutation

ROWS, NORM, ACT = "rows.h", "layernorm_rows.h", "bias_act.h"
ACTIVATION, FEW, PHILOX = "activation.h", "ffn_few_rows.h", "philox.h"
LOSS, WORDS, TABLES = "cross_entropy_rows.h", "embedding_rows.h", "embedding.cpp"
PANELS, BLOCKS, TILES, AMX = "ffn_panels.h", "ffn_blocks.h", "ffn_tiles.h", "amx.h"
TOKENS, FEW_TOKENS = "few_tokens_rows.h", "ffn_few_tokens.h"

MUTATIONS = (
    # ---- statistics
    Mutation("variance_of_squares", NORM, "const vf m = set1(mean);", "const vf m = vf{};"),
    Mutation("deviation_overcorrected", NORM, "return {mean + off,",
             "return {mean + 2e3f * off,"),
    Mutation("eps_forgotten", NORM, "std::sqrt(std::max(0.f, var) + eps)",
             "std::sqrt(std::max(0.f, var))"),
    Mutation("tail_counted", ROWS, "lane < int32_t(n) ? x : vf{}", "x"),
    Mutation("rms_has_a_mean", NORM, "const bool rms = p.norm == Norm::kRms;",
             "const bool rms = false;"),
    Mutation("overflow_not_done_again", NORM, "return moments_wide(s, N, rms, eps);",
             "return {mean, 0.f};"),
    # ---- norm pass
    Mutation("bias_before_nothing", NORM, "if (bias_) v += load(bias_ + t);", ""),
    Mutation("residual_dropped_too", NORM, "if (res) v += load(res + t);",
             "if (res) v += load(res + t) * (drop_.on ? load(mask_.data() + t) : set1(1.f));"),
    Mutation("shift_forgotten", NORM, "if (shift_) v += load(shift_ + t);"
             " store(y + t, v);", "store(y + t, v);"),
    Mutation("dsum_forgotten", NORM, "if (dsum) v += load(dsum + t);", ""),
    Mutation("no_projection_on_y_hat", NORM, "- load(hat + t) * c2", ""),
    Mutation("no_mean_of_gradient", NORM, "rms ? 0.f : sums.a * n", "0.f"),
    Mutation("dweight_of_s", NORM, "fma(d, y, load(dweight + t))", "fma(d, d, load(dweight + t))"),
    Mutation("dshift_of_h", NORM, "load(dshift + t) + d", "load(dshift + t) + h"),
    Mutation("dropout_not_in_dx", NORM, "keep == vf{} ? vf{} : load(ds + t) * keep",
             "load(ds + t)"),
    Mutation("ds_after_dropout", NORM, "if (g.ds.ptr) write_row(g.ds, m, N, ds);"
             " if (!g.dx.ptr && !g.dbias) return;",
             "if (g.ds.ptr) write_row(g.ds, m, N, ds_.data());"
             " if (!g.dx.ptr && !g.dbias) return;"
             " if (g.ds.ptr) std::memset(row_of(g.ds, m), 0, 4);"),
    # ---- sums over rows
    Mutation("block_not_cleared", ROWS, "std::fill_n(part(block, 0), size_, 0.f);",
             "std::fill_n(part(block, 0), n_, 0.f);"),
    Mutation("last_block_lost", ROWS, "for (int64_t b = 0; b < blocks_; ++b)",
             "for (int64_t b = 0; b + 1 < blocks_ || b == 0; ++b)"),
    Mutation("rows_of_block_lost", NORM, "std::min(g.M, (b + 1) * blocks.rows); ++m)"
             " pass.row(m, sums.part(b, NormBackward::kDweight)",
             "std::min(g.M, (b + 1) * blocks.rows) - (b > 0); ++m)"
             " pass.row(m, sums.part(b, NormBackward::kDweight)"),
    # ---- act pass
    Mutation("gate_and_up_swapped", ACT, "activate<kAct, kGradeOf<T>>(v) * up",
             "activate<kAct, kGradeOf<T>>(up) * v"),
    Mutation("gate_bias_forgotten", ACT, "if (gate_bias_) v += load(gate_bias_ + t);"
             " y = activate<kAct, kGradeOf<T>>(v) * up;",
             "y = activate<kAct, kGradeOf<T>>(v) * up;"),
    Mutation("tail_of_a_row_not_written", ACT, "narrow(part, N - t, row + t);", ""),
    Mutation("hidden_dropout_not_in_backward", ACT, "if (drop_.on) d = keep == vf{} ? vf{} : d"
             " * keep;", ""),
    Mutation("dgate_without_up", ACT, "d * up * f.dy", "d * f.dy"),
    Mutation("dup_without_gate", ACT, "y = f.y * up, dup = d * f.y", "y = f.y * up, dup = d * up"),
    Mutation("db1_of_da", ACT, "load(dbias + t) + dup", "load(dbias + t) + d"),
    Mutation("recomputed_a_not_dropped", ACT, "keep == vf{} ? vf{} : y * keep) : y",
             "y) : y"),
    # ---- activations
    Mutation("gelu_bell_sign", ACTIVATION, "fma(x * 0.3989422804f, bell, phi)",
             "fma(x * -0.3989422804f, bell, phi)"),
    Mutation("gelu_coefficient", ACTIVATION, "0.13986341655254364f", "0.1398f"),
    Mutation("gelu_tanh_cubic", ACTIVATION, "3.f * k * 0.044715f", "k * 0.044715f"),
    Mutation("silu_slope", ACTIVATION, "s : fma(x, slope, s)", "s : fma(x, s, s)"),
    Mutation("relu2_derivative", ACTIVATION, "{y * y, 2.f * y}", "{y * y, y}"),
    # ---- few rows
    Mutation("second_row_of_four", FEW, "x + m * ldx, ldx, out + m * ldo, ldo);"
             " if (p.M & 2)", "x + m * ldx, ldx, out + m * ldo, ldo);"
             " if (p.M & 2 && p.M < 2)"),
    Mutation("column_tail_of_dots", FEW, "first_lanes(load(x + k), K - k)", "vf{}"),
    Mutation("hidden_dropout_of_other_column", FEW, "drop_.row(i >> 32, i, n0,",
             "drop_.row(i >> 32, i, 0,"),
    Mutation("b1_of_first_columns", FEW, "const Vec b1 = from(p.b1, n0)",
             "const Vec b1 = from(p.b1, 0)"),
    # ---- cross-entropy
    Mutation("loss_about_no_maximum", LOSS, "(1.f - s) * (rest + (at.top - at.right))",
             "(1.f - s) * (rest - at.right)"),
    Mutation("loss_as_a_difference", LOSS, "(1.f - s) * (rest + (at.top - at.right))",
             "(1.f - s) * ((rest + at.top) - at.right)"),
    Mutation("class_bias_forgotten", LOSS, "if (bias_) store(l + t, v = v + load(bias_ + t));", ""),
    Mutation("smoothing_over_padding", LOSS, "total += first_lanes(load(l + t), V - t);",
             "total += load(l + t) == set1(kNegInf) ? vf{} : load(l + t) * 1.01f;"),
    Mutation("target_not_taken_off", LOSS, "l[p.target[m]] -= scale * (1.f - p.smoothing);", ""),
    Mutation("smoothing_not_in_gradient", LOSS, "load(l + t) * factor - less",
             "load(l + t) * factor"),
    Mutation("every_row_has_the_first_scale", LOSS, "p.scale ? p.scale[m]", "p.scale ? p.scale[0]"),
    Mutation("end_of_a_row_counted", LOSS, "std::fill(l + V, l + round_up(V, kPad), kNegInf);",
             "std::fill(l + V, l + round_up(V, kPad), 0.f);"),
    # ---- embedding
    Mutation("words_not_scaled", WORDS, "store(s + t, load(x + t) * by);",
             "store(s + t, load(x + t));"),
    Mutation("positions_forgotten", WORDS, "store(s + t, load(s + t) + load(x + t));",
             "store(s + t, load(s + t));"),
    Mutation("part_of_a_long_run_lost", WORDS,
             "store(total + t, load(total + t) + load(part + t));",
             "store(total + t, load(part + t));"),
    Mutation("gradient_of_padding", TABLES, "|| v == grad.skip", ""),
    Mutation("rows_without_tokens_left_as_they_were", TABLES, "clear(grad.d, first, v);", ""),
    Mutation("last_token_of_a_word_lost", TABLES, "begin[size_t(v) + 1]};",
             "begin[size_t(v) + 1] - (begin[size_t(v) + 1] > begin[size_t(v)])};"),
    Mutation("embedding_dropout_not_in_backward", TABLES, "ds = drop.dx;", ""),
    # ---- dropout
    Mutation("sites_share_a_mask", PHILOX, "c.word[2][l] = uint32_t(bh), c.word[3][l] = site;",
             "c.word[2][l] = uint32_t(bh), c.word[3][l] = 0;"),
)  # fmt: skip

# In what AVX-512 alone has: blocks of rows, and a few tokens as lanes.
WIDE_MUTATIONS = (
    Mutation("panel_depth_restarts", PANELS, "s += step, accumulate = true)", "s += step)"),
    Mutation("panel_depths_not_added_up", PANELS, "accumulate ? c[r][v] + load(to) : c[r][v]",
             "c[r][v]"),
    Mutation("panel_tail_of_two_lost", PANELS, "if (n & 2) {", "if (n & 2 && n < 2) {"),
    Mutation("narrow_panel_packed_wide", PANELS, "if (panels.width(m) == kWidth)", "if (true)"),
    Mutation("panel_of_other_rows", PANELS, "A += 6 * lda, C += 6 * ld)",
             "A += 5 * lda, C += 6 * ld)"),
    Mutation("chunks_not_added_up", BLOCKS, "panels_, f0 > 0, y_.data()",
             "panels_, false, y_.data()"),
    Mutation("block_gate_forgotten", BLOCKS, "activate<kAct, Kernel::kGrade>(v) * up",
             "activate<kAct, Kernel::kGrade>(v)"),
    Mutation("block_b1_of_first_chunk", BLOCKS, "up += b1_[f0 + f + j]", "up += b1_[f + j]"),
    Mutation("block_drops_as_the_first", BLOCKS, "p.dropout.first_row + m0_ + m",
             "p.dropout.first_row + m"),
    Mutation("saved_tail_cut", BLOCKS, "part, last + 1, dst", "part, last, dst"),
    Mutation("token_depth_tail", TOKENS, "for (; k < end; ++k) step(k);", ""),
    Mutation("token_chain_forgets_the_others", TOKENS, "first ? sum[r][v] : load(to) + sum[r][v]",
             "sum[r][v]"),
    Mutation("token_chains_of_the_first", TOKENS, "w.stride, k, std::min(K, k + kChain), xt,",
             "w.stride, 0, std::min(K, kChain), xt,"),
    Mutation("token_block_of_the_first", TOKENS, "xt + b * K * T, part", "xt, part"),
    Mutation("tokens_unpacked_shifted", TOKENS, "row[i] = part[i * T + m]",
             "row[i] = part[i * T + (m + 1) % T]"),
    Mutation("token_b1_of_first_item", FEW_TOKENS, "b1_[n0 + n]", "b1_[n]"),
    Mutation("token_gate_bias_forgotten", FEW_TOKENS, "load(part + t) + gate_shift",
             "load(part + t)"),
    Mutation("token_drops_as_the_first", FEW_TOKENS, "p.dropout.first_row + b * T + m",
             "p.dropout.first_row + m"),
)  # fmt: skip

# Of the products on AMX tiles, bf16.
TILE_MUTATIONS = (
    Mutation("tile_depth_restarts", TILES, "s0 += part, accumulate = true)", "s0 += part)"),
    Mutation("tile_depth_beyond_the_end", TILES, "std::min(part, steps - s0)", "part"),
    Mutation("tile_part_of_w_is_the_first", TILES, "k0 * 2 + s0 * 64", "k0 * 2"),
    Mutation("tile_part_of_x_is_the_first", TILES, "(m / 16 * steps + s0)", "(m / 16 * steps)"),
    Mutation("tile_chunk_of_w_is_the_first", TILES, "+ k0 * 2 + s0", "+ s0"),
    Mutation("tile_of_other_columns", TILES, "c + i * M + m, M", "c + i * M + (m & ~63), M"),
    Mutation("tile_serves_any_width", TILES,
             "p.D % 32 == 0 && p.F % 32 == 0 && p.Dout % 32 == 0", "p.F % 32 == 0"),
    Mutation("tile_serves_any_hidden_width", TILES, "p.F % 32 == 0 && ", ""),
    Mutation("hidden_pairs_swapped", TILES,
             "pairs(__m256i(_mm512_cvtneps_pbh(a[j])), __m256i(_mm512_cvtneps_pbh(a[j + 1])))",
             "pairs(__m256i(_mm512_cvtneps_pbh(a[j + 1])), __m256i(_mm512_cvtneps_pbh(a[j])))"),
    Mutation("hidden_in_other_tile", TILES, "(m / 16 * (n / 32) + f / 32)", "(m / 16 + f / 32)"),
    Mutation("hidden_row_of_tile", TILES, "f % 32 / 2 * 32", "f % 16 / 2 * 32"),
    Mutation("stored_halves_swapped", TILES, "_mm512_cvtne2ps_pbh(b, a)",
             "_mm512_cvtne2ps_pbh(a, b)"),
    Mutation("rows_beyond_packed", AMX, "t[x] = r + x < rows ? ", "t[x] = r + x + 1 < rows ? "),
)  # fmt: skip
