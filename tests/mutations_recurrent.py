"""Bugs to plant in the CPU kernels of LSTM, GRU and RNN: every one must make a case of
test_mutations_recurrent.py fail, or ThreadSanitizer speak. The rules are those of mutations.py."""

from mutations import Mutation

LSTM, GRU, CELL = "lstm.h", "gru.h", "recurrent_cell.h"
FWD, BWD = "recurrent_fwd.h", "recurrent_bwd.h"
PRODUCTS, PLAN, TEAM = "recurrent_products.h", "recurrent_plan.h", "team.h"
AMX = "amx.h"

LSTM_MUTATIONS = (
    # ---- the cell
    Mutation("g_and_o_swapped", LSTM, "g = tanh_of<kGrade>(in.x[2] + in.a[2]),"
             " o = sigmoid<kGrade>(in.x[3] + in.a[3]).y",
             "g = tanh_of<kGrade>(in.x[3] + in.a[3]), o = sigmoid<kGrade>(in.x[2] + in.a[2]).y"),
    Mutation("f_taken_from_1", "activation.h", "return v > top ? vf{} : y;",
             "return v > top ? vf{} : 1.f - y;"),
    Mutation("c_not_forgotten", LSTM, "fma(f, in.c, i * g)", "fma(i, g, in.c)"),
    Mutation("df_of_new_c", LSTM, "dc * in.c_old *", "dc * in.c *"),
    Mutation("no_slope_of_g", LSTM, "dc * i * (1.f - g * g)", "dc * i"),
    Mutation("no_slope_of_tanh_c", LSTM, "fma(in.dh * o, 1.f - tc * tc, in.dc)",
             "fma(in.dh, o, in.dc)"),
    Mutation("dc_of_the_step_after_lost", LSTM, "fma(in.dh * o, 1.f - tc * tc, in.dc)",
             "in.dh * o * (1.f - tc * tc)"),
    Mutation("dc_not_forgotten", LSTM, "vf{}, dc * f, vf{}", "vf{}, dc, vf{}"),
    Mutation("tanh_of_negative_x", CELL, "x < vf{} ? -big : big", "big"),
    Mutation("tanh_coefficient", CELL, "1.33314422036e-1f", "1.333e-1f"),
    Mutation("last_lane_not_written", CELL, "size_t(n) * sizeof(T)", "size_t(n - 1) * sizeof(T)"),
    # ---- forward
    Mutation("b_hh_lost", FWD, "apart ? of_x : of_x + of_h", "of_x"),
    Mutation("mask_not_applied", FWD, "x = load(rounded) * load_lanes(mask +"
             " (d * p.steps.B + slice.sequence(k)) * P + j, n);", "x = load(rounded);"),
    Mutation("mask_of_another_sequence", FWD, "mask + (d * p.steps.B + slice.sequence(k)) * P",
             "mask + (d * p.steps.B + k) * P"),
    Mutation("reverse_off_by_one", FWD, "reverse ? T_ - 1 - s : s", "reverse ? (T_ - s) % T_ : s"),
    Mutation("reverse_of_the_first", FWD, "p.backwards(d)", "p.backwards(0)"),
    Mutation("h_n_of_the_last_row", FWD, "reverse ? 0 : length - 1", "length - 1"),
    Mutation("h_n_of_padding", FWD, "reverse ? 0 : length - 1",
             "reverse ? 0 : p.steps.offsets ? length - 1 : T_ - 1"),
    Mutation("c_n_by_slot", FWD, "static_cast<T*>(p.c_n) + at * H + j",
             "static_cast<T*>(p.c_n) + (d * p.steps.B + k) * H + j"),
    Mutation("buffer_of_this_step", FWD, "put_h(k, u, n, out.h, 1 - parity)",
             "put_h(k, u, n, out.h, parity)"),
    Mutation("absent_rows_of_y_kept", FWD, "if (n < slice.slots) absent(t, n);", ""),
    Mutation("second_block_reads_the_first", FWD, "g.h[parity] + r * f.k_", "g.h[parity]"),
    Mutation("projection_transposed", FWD, "pack_rows_as_columns<4>("
             "static_cast<const T*>(p_.w_hr[d]), p_.H,",
             "pack_columns<4>(static_cast<const T*>(p_.w_hr[d]), p_.H, p_.P,"),
    Mutation("part_begins_anew", FWD, "if (s0 == 0) {", "{"),
    Mutation("part_ends_the_call", FWD, "if (s1 == T_) end();", "if (s0 == 0) end();"),
    Mutation("parity_of_the_part", FWD, "s & 1);", "s - s0 & 1);"),
    Mutation("rows_of_the_first_part", FWD, "first_row_[d] = p_.first_row(d, s0, s1);",
             "first_row_[d] = p_.first_row(d, 0, s1);"),
    Mutation("part_of_the_first_direction", FWD, "(d * rows + row - f.first_row_[d])",
             "(d * rows + row - f.first_row_[0])"),
    Mutation("directions_a_whole_apart", FWD, "p.parts.n ? p.parts.rows : N", "N"),
    Mutation("end_of_the_part_lost", "recurrent.h", "steps.first(backwards(d) ? steps.T - s0 : s1)",
             "steps.first(backwards(d) ? steps.T - s0 - 1 : s1)"),
    Mutation("gh_by_slot", FWD, "static_cast<const T*>(p.gh) +"
             " (d * p.steps.B + slice.sequence(k))", "static_cast<const T*>(p.gh) +"
             " (d * p.steps.B + k)"),
    # ---- backward
    Mutation("carry_not_masked", BWD, "if (mask) x *=", "if (false) x *="),
    Mutation("dh_n_lost", BWD, "start(out.dh_n,", "start(nullptr,"),
    Mutation("dy_lost", BWD, "load(dh) + upstream(at.row, u, n)", "load(dh)"),
    Mutation("c_old_of_this_step", BWD, "c + at.before * H", "c + at.row * H"),
    Mutation("before_is_earlier", BWD, "before = reverse ? t + 1 : t - 1", "before = t - 1"),
    Mutation("before_beyond_the_end", BWD, "k < slice.active(before)",
             "(!p.steps.offsets || k < slice.active(before))"),
    Mutation("absent_gradients_kept", BWD, "if (n < slice.slots) absent(t, n);", ""),
    Mutation("dh_counted_again", BWD, "put(g.dh_out + k * f.k_hr_ + j, lanes, x);"
             " store(dh, vf{});", "put(g.dh_out + k * f.k_hr_ + j, lanes, x);"),
    Mutation("dh_without_dy", BWD, "+ (d * N + row) * P + j, lanes, x)",
             "+ (d * N + row) * P + j, lanes, load(dh))"),
    Mutation("back_projection_transposed", BWD, "pack_columns<4>("
             "static_cast<const T*>(p_.w_hr[d]), p_.P, p_.H,",
             "pack_rows_as_columns<4>(static_cast<const T*>(p_.w_hr[d]), p_.P,"),
    Mutation("dc_not_carried", BWD, "if (C::kHasC) store(dc, o.dc);", ""),
    Mutation("gradients_in_the_other_buffer", BWD, "A* product = g.d[parity]",
             "A* product = g.d[1 - parity]"),
    Mutation("second_block_added_to_the_first", BWD, "carry(k, panel,", "carry(k - r, panel,"),
    # ---- products
    Mutation("gates_a_vector_apart", PRODUCTS, "{unit, H, {n, n, n, n}}",
             "{unit, W, {n, n, n, n}}"),
    Mutation("last_column_not_packed", PRODUCTS, "N - column - g * W, 0, W)",
             "N - column - g * W, 0, W - 1)"),
    Mutation("tile_reads_the_first_rows", PRODUCTS, "A + r * lda + k0,", "A + k0,"),
    # ---- who does what
    Mutation("slot_taken_for_a_sequence", PLAN, "steps->index ? steps->index[slot] : slot",
             "slot"),
    Mutation("slices_overlap", PLAN, "const int64_t slot = first + k * apart;"
             " return steps->index", "const int64_t slot = k; return steps->index"),
    Mutation("slice_ends_early", PLAN, "div_up(n - first, apart) : 0", "(n - first) / apart : 0"),
    Mutation("rows_of_the_step_before", PLAN, "steps->first(t) + sequence(k)",
             "steps->first(t > 0 ? t - 1 : 0) + sequence(k)"),
    Mutation("share_loses_the_rest", PLAN, "end(n * (member + 1) / of)",
             "end(n / of * (member + 1))"),
    Mutation("turning_skips_one", PLAN, "end - 1 - i", "std::max(begin, end - 2 - i)"),
)  # fmt: skip

GRU_MUTATIONS = (
    Mutation("z_and_n_swapped", GRU, "fma(z, in.h - n, n)", "fma(z, n - in.h, in.h)"),
    Mutation("hn_without_r", GRU, "fma(r, hn, in.x[2])", "hn + in.x[2]"),
    Mutation("b_hn_in_x", GRU, "hn = in.a[2] + in.b_hn, n = tanh_of<kGrade>(fma(r, hn, in.x[2]))",
             "hn = in.a[2], n = tanh_of<kGrade>(fma(r, hn, in.x[2] + in.b_hn))"),
    Mutation("dr_of_n", GRU, "dn * hn * (r * (1.f - r))", "dn * n * (r * (1.f - r))"),
    Mutation("dz_of_n_alone", GRU, "(in.h_old - n)", "in.h_old"),
    Mutation("dhn_without_r", GRU, "dn * r, vf{}, in.dh * z", "dn, vf{}, in.dh * z"),
    Mutation("carry_forgotten", GRU, "dn * r, vf{}, in.dh * z", "dn * r, vf{}, vf{}"),
    Mutation("relu_passes_all_back", GRU, "in.h > vf{} ? set1(1.f) : vf{}", "set1(1.f)"),
    Mutation("no_slope_of_the_rnn", GRU, "1.f - in.h * in.h", "set1(1.f)"),
    Mutation("mask_on_the_carry", FWD, "store(g.h32 + k * f.lane_ + j, x);",
             "store(g.h32 + k * f.lane_ + j, mask ? x * load_lanes(mask + at * P + j, n) : x);"),
    Mutation("h_not_carried", FWD, "if (C::kKeepsH) store(g.h32 + at, out.h);", ""),
    Mutation("hn_is_saved_as_n", FWD, "for (int i = 0; i < C::kSaved; ++i) store_lanes("
             "saved + i * H, n, out.saved[i]);", "for (int i = 0; i < C::kSaved; ++i) store_lanes("
             "saved + i * H, n, out.saved[i == 3 && !C::kHasC ? 2 : i]);"),
    Mutation("product_of_dn", BWD, "C::kKeepsH && i == kGates - 1 ? o.dhn : o.d[i]", "o.d[i]"),
    Mutation("h_old_of_this_step", BWD, "y + at.before * p.D * P", "y + at.row * p.D * P"),
)  # fmt: skip

# What runs in AVX-512 alone, and what begins there at fewer features: pieces of K.
WIDE_MUTATIONS = (
    Mutation("no_transpose", PRODUCTS, "t[u] = load_lanes(src + u * K + k, here); transpose16(t);",
             "t[u] = load_lanes(src + u * K + k, here);"),
    Mutation("transpose_of_the_first_columns", PRODUCTS, "load_lanes(src + u * K + k, here)",
             "load_lanes(src + u * K, here)"),
    Mutation("piece_not_accumulated", PRODUCTS, "std::min(at_once, n - r), k0 > 0,",
             "std::min(at_once, n - r), false,"),
    Mutation("piece_of_the_first_weights", PRODUCTS, "B + k0 * V * W", "B"),
    Mutation("piece_added_to_the_first_row", PRODUCTS, "c[r][v] + load(to)",
             "c[r][v] + load(C + v * W)"),
)  # fmt: skip

# Of the products on AMX tiles, bf16, and what feeds them.
TILE_MUTATIONS = (
    # ---- packing
    Mutation("tile_of_one_unit", PRODUCTS, "_mm512_castsi512_ps(load_row32(src + u * K + k, 1,",
             "_mm512_castsi512_ps(load_row32(src + k, 1,"),
    Mutation("tile_without_its_last_unit", PRODUCTS,
             "for (int64_t u = 0; u < n; ++u) t[u] = _mm512_castsi512_ps",
             "for (int64_t u = 0; u + 1 < n; ++u) t[u] = _mm512_castsi512_ps"),
    Mutation("tile_tail_of_k_cut", PRODUCTS, "src + u * K + k, 1, K - k, 0",
             "src + u * K + k, 1, std::max<int64_t>(K - k - 1, 1), 0"),
    Mutation("tile_not_transposed", PRODUCTS, "transpose16(t); for (int x = 0; x < 16; ++x)",
             "for (int x = 0; x < 16; ++x)"),
    Mutation("tile_group_begins_early", PRODUCTS, "k < K; k += 32, dst += 512",
             "k < K; k += 32, dst += k < K ? 512 : 0"),
    Mutation("tile_last_row_lost", PRODUCTS, "n > 0 && k + 1 < K ? load_row32",
             "n > 0 && k + 2 < K ? load_row32"),
    Mutation("tile_pairs_swapped", PRODUCTS, "interleave(r0, r1, &lo, &hi)",
             "interleave(r1, r0, &lo, &hi)"),
    Mutation("tile_second_half_is_the_first", PRODUCTS, "panel.first + half * 32",
             "panel.first"),
    Mutation("tile_halves_swapped", PRODUCTS, "interleave(r0, r1, &lo, &hi)",
             "interleave(r0, r1, &hi, &lo)"),
    Mutation("interleaved_alike", AMX, "_mm512_extracti64x4_epi64(r1, 1)",
             "_mm512_extracti64x4_epi64(r0, 1)"),
    # ---- multiplying
    Mutation("tile_rows_lost", PRODUCTS, "div_up(n, 16), V, k_tiles",
             "std::max<int64_t>(1, n / 16), V, k_tiles"),
    Mutation("tile_rows_are_the_first", PRODUCTS, "{A, lda * 32, 64, lda * 2}",
             "{A, 0, 64, lda * 2}"),
    Mutation("tile_step_of_w_is_the_first", PRODUCTS, "k_tiles * kTileBytes, kTileBytes}",
             "k_tiles * kTileBytes, 0}"),
    Mutation("block_of_one_column_tile", AMX, "_tile_loadd(7, b + b_n, 64)",
             "_tile_loadd(7, b, 64)"),
    Mutation("block_of_one_row_tile", AMX, "_tile_loadd(5, a + a_m, a_row); _tile_dpbf16ps(2,",
             "_tile_loadd(5, a, a_row); _tile_dpbf16ps(2,"),
    Mutation("block_without_its_corner", AMX, "if constexpr (NT == 2) _tile_dpbf16ps(3, 5, 7);",
             ""),
    Mutation("odd_row_tile_lost", AMX, "int64_t m = first; m < m_tiles",
             "int64_t m = first; m + 1 < m_tiles"),
    Mutation("odd_column_tile_as_two", AMX, "n2 = n + 1 < n_tiles", "n2 = n_tiles > 1"),
    Mutation("second_step_lost", AMX, "_tile_dpbf16ps(0, 6, 3);", ""),
    Mutation("second_step_of_the_first_rows", AMX, "_tile_loadd(7, a + a_m + a_k, a_row)",
             "_tile_loadd(7, a + a_k, a_row)"),
    Mutation("sums_not_cleared", AMX, "_tile_zero(0); _tile_zero(1); _tile_loadd(2, b, 64);",
             "_tile_zero(1); _tile_loadd(2, b, 64);"),
    Mutation("tile_of_fifteen_rows", AMX, "config.rows[t] = 16", "config.rows[t] = 15"),
    Mutation("tiles_not_configured", FWD, "[[maybe_unused]] typename E::Scope scope;", ""),
    Mutation("tiles_not_configured_back", BWD, "[[maybe_unused]] typename E::Scope scope;", ""),
    # ---- operands: whole tiles, zero where there is nothing
    Mutation("end_of_h_not_cleared", FWD, "if (last) std::fill(to + P, to + f.k_, A{});", ""),
    Mutation("end_of_m_not_cleared", FWD, "if (p.w_hr[0] && last) std::fill(g.m + k * f.k_hr_ + H,"
             " g.m + (k + 1) * f.k_hr_, A{});", ""),
    Mutation("end_of_gradients_not_cleared", BWD, "for (A* row : {g.d[0] + k * f.k_, g.d[1] +"
             " k * f.k_}) std::fill(row + kGates * H, row + f.k_, A{});", ""),
    Mutation("end_of_dh_not_cleared", BWD, "if (projected) std::fill(g.dh_out + k * f.k_hr_ + P,"
             " g.dh_out + (k + 1) * f.k_hr_, A{});", ""),
)  # fmt: skip

# For ThreadSanitizer: what a value shows only by luck.
RACES = (
    Mutation("no_barrier_after_a_step", FWD, "absent(t, n); team.barrier();", "absent(t, n);"),
    Mutation("no_barrier_before_the_projection", FWD, "int parity) { team.barrier();"
             " for (int64_t panel = outs.begin", "int parity) {"
             " for (int64_t panel = outs.begin"),
    Mutation("no_barrier_after_h0", FWD, "begin(); team.barrier();", "begin();"),
    Mutation("one_buffer_of_h", FWD, "g.h[1] = arena.take<A>(rows * k_);", "g.h[1] = g.h[0];"),
    Mutation("no_barrier_before_the_product", BWD, "if (p.gh) return; team.barrier();",
             "if (p.gh) return;"),
    Mutation("no_barrier_before_back_projection", BWD, "team.barrier();"
             " for (int64_t panel = hidden.begin", "for (int64_t panel = hidden.begin"),
    Mutation("one_buffer_of_gradients", BWD, "g.d[1] = arena.take<A>(rows * k_);",
             "g.d[1] = g.d[0];"),
    Mutation("barrier_releases_nothing", TEAM, "epoch_.store(epoch + 1, std::memory_order_release)",
             "epoch_.store(epoch + 1, std::memory_order_relaxed)"),
    Mutation("sleepers_not_woken", TEAM, "epoch_.notify_all();", ""),
)  # fmt: skip

# No bugs: a team of the tests is always complete, however late its threads come; and memory that a
# kernel takes is NaN, so that whatever it reads there before it writes shows.
EDITS = (
    Mutation("patient_team", TEAM, "kPatience = 6000", "kPatience = 1 << 30"),
    Mutation("nothing_kept", "scratch.h", "kScratchKept = 8u << 20", "kScratchKept = 0"),
    Mutation("poisoned", "scratch.cpp", "if (!ptr) throw std::bad_alloc();",
             "if (!ptr) throw std::bad_alloc(); __builtin_memset(ptr, 0xff, *got);"),
)  # fmt: skip
