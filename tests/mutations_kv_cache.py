"""Bugs to plant in the CPU kernels of attention over a cache: every one must make a case of
test_mutations_kv_cache.py fail. The rules are those of mutations.py."""

from mutations import Mutation

ROWS, ENGINE = "attention_kv_cache_rows.h", "attention_kv_cache_engine.h"
FWD, PAIRS = "attention_kv_cache_fwd.h", "attention_engine.h"

MUTATIONS = (
    # ---- where keys lie
    Mutation("page_of_the_first_sequence", ROWS, "p_.block_table.at(b_, j / page_)",
             "p_.block_table.at(0, j / page_)"),
    Mutation("slot_not_within_its_page", ROWS, "(page * x.b + j % page_ * x.s)",
             "(page * x.b + std::min(j, page_ - 1) * x.s)"),
    Mutation("entry_of_the_sequence", ROWS, "p_.cache_index.ptr ? p_.cache_index.at(b_) : b_",
             "b_"),
    Mutation("pages_taken_for_neighbours", ROWS, "page_ - (p_.block_table.ptr ? j % page_ : j)",
             "page_ - (p_.block_table.ptr ? std::max<int64_t>(j % page_ - 1, 0) : j)"),
    Mutation("first_kv_head", ROWS, "entry * x.b + hk * x.h", "entry * x.b"),
    # ---- appending
    Mutation("appended_one_late", ROWS, "reinterpret_cast<T*>(slots.k(first + i))",
             "reinterpret_cast<T*>(slots.k(std::max<int64_t>(first + i - 1, 0)))"),
    Mutation("v_not_appended", ROWS, "std::memcpy(slots.v(first + i),"
             " row<T>(p_.new_v, b, hk, i), size_t(a_.Dv) * sizeof(T));", ""),
    Mutation("all_rows_appended", ROWS, "for (int64_t i = 0; i < p_.new_len[b]; ++i)",
             "for (int64_t i = 0; i < p_.Sn; ++i)"),
    Mutation("k_not_rotated", ROWS, "if (p_.cos) rotation.turn(k,", "if (false) rotation.turn(k,"),
    # ---- rotation
    Mutation("position_of_the_row_before", ROWS, "b, i, first + i, to)",
             "b, i, std::max<int64_t>(first + i - 1, 0), to)"),
    Mutation("q_at_the_end", ROWS, "first = p_.ragged ? p_.cache_len[b] : total - a_.Sq,",
             "first = total - a_.Sq,"),
    Mutation("turned_backwards", ROWS, "rounded(a * c) - rounded(b * s)",
             "rounded(a * c) + rounded(b * s)"),
    Mutation("second_half_turned_backwards", ROWS, "rounded(b * c) + rounded(a * s)",
             "rounded(b * c) - rounded(a * s)"),
    Mutation("pairs_taken_for_halves", ROWS, "step = p_.interleaved ? 2 : 1", "step = 1"),
    Mutation("tail_lost", ROWS, "if (to != x) std::copy(x + 2 * half_, x + D, to + 2 * half_);",
             "if (to != x) std::fill(to + 2 * half_, to + D, T{});"),
    # ---- products straight from the cache
    Mutation("padding_scored", ENGINE, "for (int64_t t = n; t < n_padded; ++t) k[t] = k[n - 1],"
             " v[t] = v[n - 1];", "for (int64_t t = n; t < n_padded; ++t) k[t] = k[0], v[t] = v[0];"
             " if (n > 1) k[n - 1] = k[n - 2];"),
    Mutation("rows_of_the_first_four", ENGINE, "dots<T, 4>(t, r, S)", "dots<T, 4>(t, 0, S)"),
    Mutation("one_row_against_the_first_key", ENGINE, "(keys_.k[t + x + i]),",
             "(keys_.k[t + x]),"),
    Mutation("tail_of_one_row_lost", ENGINE, "if (d == D) return; const vf qv",
             "return; const vf qv"),
    Mutation("tail_of_q_k_lost", ENGINE, "if (d == D) return; const vf kv",
             "return; const vf kv"),
    Mutation("columns_beyond_a_vector_lost", ENGINE, "if (c < Dv) product<T, R, 0>", "if (false)"
             " product<T, R, 0>"),
    Mutation("last_key_not_applied", ENGINE, "if (t < n) add_key", "if (false) add_key"),
    Mutation("tiles_not_added_up", ENGINE, "accumulate ? load(to) + all[x] : all[x]", "all[x]"),
    Mutation("every_second_key_lost", ENGINE, "if (kSums > 1) all[x] +=", "if (false) all[x] +="),
    Mutation("columns_left_in_pairs", ENGINE,
             "zip_pairs(all[x], all[x + 1], &all[x], &all[x + 1]);", ""),
    Mutation("q_not_in_pairs", ENGINE, "if (p.dtype == DType::kBf16) part_pairs(q + r * Dp, Dp);",
             ""),
    Mutation("odd_taken_for_even", PAIRS, "fma(load(row + W), odd, fma(load(row), even, c[i]))",
             "fma(load(row + W), even, fma(load(row), odd, c[i]))"),
    Mutation("last_of_the_pairs_lost", PAIRS, "load_pairs_part(k[i * k_step] + d, D - d,",
             "load_pairs_part(k[i * k_step] + d, D - d - 1,"),
    Mutation("pairs_of_the_first_key", PAIRS, "load_pairs(k[i * k_step] + d, &even",
             "load_pairs(k[0] + d, &even"),
    Mutation("sum_of_the_row_before", "simd.h", "m[r] = reduce_add(row[r]);",
             "m[r] = reduce_add(row[r & ~1]);"),
    Mutation("gathered_from_the_start", ENGINE, "std::memcpy(v, slots_->v(j)",
             "std::memcpy(v, slots_->v(j - lo)"),
    Mutation("chunk_taken_for_contiguous", ENGINE, "slots_->together(lo) >= hi - lo",
             "slots_->together(lo) >= (hi - lo) / 8"),
    # ---- parts of the keys and rows
    Mutation("rows_at_the_start", FWD, "s.shift = s.Sk - s.Sq;", "s.shift = 0;"),
    Mutation("chunk_forgets", FWD, "lo > item.lo, states + i * size", "false, states + i * size"),
    Mutation("part_lost", FWD, "(keys.hi - 1) / part - keys.lo / part + 1",
             "std::max<int64_t>(1, (keys.hi - 1) / part - keys.lo / part)"),
    Mutation("parts_overlap", FWD, "hi = std::min(keys.hi, at + part)",
             "hi = std::min(keys.hi, at + part + 1)"),
    Mutation("merged_without_the_last", FWD, "blocks * size, parts)", "blocks * size, parts - 1)"),
    Mutation("absent_rows_left", FWD, "if (before <= i && i < s.Sq) continue;", "continue;"),
    Mutation("rows_of_negative_position_kept", FWD,
             "std::clamp<int64_t>(s.Sq - s.Sk, 0, s.Sq)", "int64_t{0}"),
    Mutation("rows_beyond_new_lens", FWD, "cache.ragged ? cache.new_len[b] : p.Sq", "p.Sq"),
    Mutation("new_rows_not_seen", FWD, "cache.cache_len[b] + cache.new_len[b]",
             "std::max<int64_t>(1, cache.cache_len[b] + cache.new_len[b] - 1)"),
)  # fmt: skip
