"""Bugs to plant in ops that are one binding: every one must make a test of the op's own file fail.
The rules are those of mutations.py; files are relative to csrc/cpu, and may be Python."""

from mutations import Mutation

ROWS, HEADER = "recurrent_step_rows.h", "recurrent_step.h"
STEP, LAYER = "../bindings/recurrent_step.cpp", "../bindings/encoder_layer.cpp"
PARTS = "../bindings/layer_parts.h"
FEW_TOKENS, LAYER_OP = "few_tokens_rows.h", "../../fastattn/ops/encoder_layer.py"

STEP_MUTATIONS = (
    # ---- sums over k by lanes
    Mutation("second_product_lost", ROWS, "{products[0], products[count - 1]}",
             "{products[0], products[0]}"),
    Mutation("tokens_of_the_first_block", ROWS, "here[i].x += kTokens * here[i].K;",
             "(void)here;"),
    Mutation("last_token_lost", ROWS, "if (b < B) dots_of_tokens", "if (b + 1 < B) dots_of_tokens"),
    Mutation("rows_of_the_first", ROWS, "(here, count, n + r)", "(here, count, n)"),
    Mutation("token_of_the_row", ROWS, "r + i / kTokens] = sums[i]", "r] = sums[i]"),
    Mutation("lanes_not_added_up", ROWS, "k < K; k += W) { vf rows", "k < W; k += W) { vf rows"),
    Mutation("units_lost", ROWS, "const Share mine(blocks, worker, workers);",
             "const Share mine(blocks, worker, workers + 1);"),
    # ---- the cell
    Mutation("hn_of_x", ROWS, "(products + 1, 1, n, p_.B", "(products, 1, n, p_.B"),
    Mutation("all_in_the_product", ROWS, "products, apart ? 1 : 2, n", "products, 2, n"),
    Mutation("b_hh_lost", ROWS, "if (!apart) in.x[gate] += bias(p_.b_hh, gate * H + u);", ""),
    Mutation("b_hn_of_x", ROWS, "in.b_hn = bias(p_.b_hh", "in.b_hn = bias(p_.b_ih"),
    Mutation("c_of_the_first_sequence", ROWS, "in.c = load(p_.c + at); const CellOut",
             "in.c = load(p_.c + u); const CellOut"),
    Mutation("gates_saved_by_sequence", ROWS, "p_.gates + (b * C::kSaved + i) * H + u, out",
             "p_.gates + b * C::kSaved * H + u, out"),
    # ---- backward
    Mutation("dc_lost", ROWS, "in.dc = or_zero(g_.dc_new, at)", "in.dc = vf{}"),
    Mutation("dhn_is_dn", ROWS, "i == kGates - 1 ? out.dhn : out.d[i]", "out.d[i]"),
    Mutation("past_lost", ROWS, "store(past_ + at, out.dh)", "store(past_ + at, vf{})"),
    Mutation("db_of_all_but_one", ROWS, "b < p_.B; ++b) sum +=", "b < p_.B - 1; ++b) sum +="),
    Mutation("db_hh_of_x", ROWS, "add_rows(dgh_, g_.db_hh)", "add_rows(dgx_, g_.db_hh)"),
    Mutation("dh_of_other_columns", ROWS, "p_.H, (i - of_dx) * kColumns, past_",
             "p_.H, (i > of_dx ? i - of_dx - 1 : 0) * kColumns, past_"),
    Mutation("narrow_tile_lost", ROWS, "n = std::min(kColumns, columns - j)",
             "n = std::min(kColumns, columns - j) / 32 * 32"),
    Mutation("past_of_the_first_sequence", ROWS, "load(to + i) + load(past + i)",
             "load(to + i) + load(past + i % columns)"),
    Mutation("dw_of_all_but_one", ROWS, "columns, p_.B, dg + n,",
             "columns, std::max<int64_t>(1, p_.B - 1), dg + n,"),
    Mutation("dw_hh_of_x", ROWS, "weights(dgh_, p_.h, p_.H, i * kMR, g_.dw_hh)",
             "weights(dgx_, p_.h, p_.H, i * kMR, g_.dw_hh)"),
    Mutation("multiple_of_eight", HEADER, "kStepMultiple = 16", "kStepMultiple = 8"),
    # ---- the binding
    Mutation("strides_ignored", STEP, "if (x.is_contiguous()) return", "return"),
    Mutation("any_dtype", STEP, "x.scalar_type() == ScalarType::Float", "true"),
    Mutation("b_ih_twice", STEP, 'p.b_hh = optional(b_hh, {rows}, "b_hh',
             'p.b_hh = optional(b_ih, {rows}, "b_hh'),
    Mutation("no_sequence_allowed", STEP, 'check(p.B > 0, "there must be a sequence");', ""),
    Mutation("gates_of_lstm_alone", STEP, "save && kSaved[cell] ?", "save && lstm ?"),
    Mutation("dh_and_dc_swapped", STEP, "&g.db_hh, &g.dh, &g.dc", "&g.db_hh, &g.dc, &g.dh"),
    Mutation("upstream_swapped", STEP, "g.dh_new = call.optional(dh_new,",
             "g.dh_new = call.optional(dc_new,"),
    Mutation("need_of_the_next", STEP, "need >> i & 1", "need >> (i + 1) % 7 & 1"),
)  # fmt: skip

LAYER_MUTATIONS = (
    # ---- attention
    Mutation("k_is_q", LAYER, "packed ? E : 0", "0"),
    Mutation("v_is_k", LAYER, "packed ? 2 * E : 0", "packed ? E : 0"),
    Mutation("keys_of_the_first_batch", LAYER, "o.b = S * width", "o.b = part ? 0 : S * width"),
    Mutation("scale_lost", LAYER, "p.scale = float(scale)", "p.scale = 1.f"),
    Mutation("not_causal", LAYER, "causal ? Causal::kTopLeft : Causal::kNone", "Causal::kNone"),
    Mutation("mask_ignored", LAYER, "if (mask) {", "if (mask && mask->numel() == 0) {"),
    Mutation("mask_of_floats", LAYER, "mask->scalar_type() == ScalarType::Bool", "true"),
    # ---- projections
    Mutation("every_bias_is_q_s", LAYER, "add_bias(results[i], biases[i])",
             "add_bias(results[i], biases[0])"),
    Mutation("columns_taken_for_rows", LAYER, "(w.size(1) == 1 || w.stride(1) == 1)", "true"),
    Mutation("wo_with_a_bias_of_q", LAYER, "projected(o, {&wo}, {std::nullopt})",
             "projected(o, {&wo}, {bq})"),
    # ---- norms
    Mutation("bo_lost", LAYER, ', norm.bias = vec(kOp, bo, E, "bo");', ";"),
    Mutation("residual_is_normed", LAYER, "norm.residual = rows_of(x, E, dtype)",
             "norm.residual = rows_of(inner, E, dtype)"),
    Mutation("eps_of_the_second", LAYER, "norm.eps = float(eps1)", "norm.eps = float(eps2)"),
    Mutation("normed_twice", LAYER, "norm.norm = Norm::kNone, norm.weight = norm.shift = {};",
             "norm.weight = norm.shift = {};"),
    Mutation("x_as_it_lies", LAYER, "x = torch::stable::contiguous(x);", ""),
    # ---- feed-forward
    Mutation("always_pre_norm", LAYER, "f.pre_norm ? p.before : p.after", "p.before"),
    Mutation("other_order_of_norms", PARTS, "from(f.pre_norm)", "from(!f.pre_norm)"),
    Mutation("b2_lost", LAYER, 'p.after.bias = vec(kOp, f.b2, p.D, "b2");', ""),
    Mutation("act_forgotten", LAYER, "p.act = Act(f.act)", "p.act = Act::kGelu"),
    Mutation("eps_of_the_first", LAYER, "norm2_bias, eps2, act, pre_norm}); } }",
             "norm2_bias, eps1, act, pre_norm}); } }"),
    # ---- the products of few tokens
    Mutation("products_of_the_first", FEW_TOKENS, "product(p.products[i], p.M",
             "product(p.products[0], p.M"),
    Mutation("rows_of_the_first_piece", FEW_TOKENS, "few_rows_of<V>(p.w, K, n0, n1,",
             "few_rows_of<V>(p.w, K, 0, n1 - n0,"),
    # ---- who calls it
    Mutation("in_training_too", LAYER_OP, "not torch.is_grad_enabled() and type", "type"),
    Mutation("subclasses_too", LAYER_OP, "and type(x) is Tensor", ""),
    Mutation("under_autocast_too", LAYER_OP,
             'and not torch.is_autocast_enabled("cpu")', ""),
    Mutation("under_a_tracer_too", LAYER_OP, "and torch._C._get_tracing_state() is None", ""),
    Mutation("under_a_mode_too", LAYER_OP, "and not torch._C._len_torch_dispatch_stack()", ""),
    Mutation("under_a_transform_too", LAYER_OP, "and not transformed()", ""),
    Mutation("any_backend", LAYER_OP, 'and backend in ("auto", "cpu")', ""),
    Mutation("any_dtype_of_x", LAYER_OP, ', x.dtype) == "cpu"', ', torch.float32) == "cpu"'),
    Mutation("eps_swapped", LAYER_OP, "causal, *eps, ACTIVATIONS",
             "causal, *eps[::-1], ACTIVATIONS"),
    Mutation("shape_of_the_last_dimensions", LAYER_OP, "x.new_empty(x.shape)",
             "x.new_empty(x.shape[1:])"),
)  # fmt: skip

DECODER, CALL = "../bindings/decoder_layer.cpp", "../bindings/attention_kv_cache_call.h"
DECODER_OP, DECODING = "../../fastattn/ops/decoder_layer.py", "../../fastattn/swap/_decoding.py"

DECODER_MUTATIONS = (
    # ---- attention
    Mutation("packed_k_is_q", DECODER, "heads_of(all, H, Hk, D)", "heads_of(all, 0, Hk, D)"),
    Mutation("packed_v_is_k", DECODER, "heads_of(all, H + Hk, Hk, D)", "heads_of(all, H, Hk, D)"),
    Mutation("bk_lost", DECODER, "linear(n, *wk, bk)", "linear(n, *wk, Opt())"),
    Mutation("scale_of_one", DECODER, "scale, 0., !mask", "1., 0., !mask"),
    Mutation("not_causal_without_mask", DECODER, "scale, 0., !mask", "scale, 0., false"),
    Mutation("rows_not_normed", DECODER, "of(n, k_cache, v_cache, cache_lens), wo",
             "of(x, k_cache, v_cache, cache_lens), wo"),
    Mutation("bo_forgotten", DECODER, "cache_lens), wo, bo)", "cache_lens), wo, Opt())"),
    # ---- rotation
    Mutation("table_of_the_first_sequence", CALL, "(batches > 1 ? b : 0) * a.Sq + i", "i"),
    Mutation("table_of_the_first_row", CALL, "(batches > 1 ? b : 0) * a.Sq + i",
             "(batches > 1 ? b : 0) * a.Sq"),
    Mutation("table_by_position", CALL, "p.tables_of_rows = true;", ""),
    Mutation("cos_for_sin", CALL, "table == &cos_ ? cos : sin", "cos"),
    Mutation("rows_of_q_by_the_first", "attention_kv_cache_rows.h", "b * p_.Sn + i : position",
             "i : position"),
    # ---- norms and feed-forward
    Mutation("residual_is_the_norm", DECODER, "sum.residual = rows_of(x, E, dtype)",
             "sum.residual = rows_of(n, E, dtype)"),
    Mutation("first_norm_of_layers", DECODER, "p.norm = Norm(norm)", "p.norm = Norm::kLayer"),
    Mutation("second_norm_of_layers", DECODER, "act, true, Norm(norm)", "act, true, Norm::kLayer"),
    Mutation("first_eps_is_the_second", DECODER, "p.eps = float(eps1)", "p.eps = float(eps2)"),
    Mutation("gate_forgotten", DECODER, "w_gate, b_gate});", "Opt(), Opt()});"),
    Mutation("gate_by_rows", DECODER, "for (Opt* w : {&wk, &wv, &w_gate})",
             "for (Opt* w : {&wk, &wv})"),
    # ---- checks, before anything is written
    Mutation("rows_of_wq_unchecked", DECODER, "check(wq, wk ? H * D : (H + 2 * Hk) * D);", ""),
    Mutation("norm2_unchecked", DECODER, 'check_vec(norm2_bias, E, "norm2_bias");', ""),
    Mutation("b1_unchecked", DECODER, 'check_vec(b1, F, "b1"),', ""),
    Mutation("gate_unchecked", DECODER, "!w_gate || shape_of(*w_gate) == shape_of(w1)", "true"),
    # ---- who calls it
    Mutation("version_kept", DECODER_OP,
             "torch.autograd.graph.increment_version((k_cache, v_cache))", ""),
    Mutation("rows_not_counted", DECODING, "layer.append(rows)", ""),
    Mutation("room_beyond_the_mask", DECODING, "if mask is not None:", "if False:"),
    Mutation("hooks_of_mlp_ignored", DECODING, "untouched((attention, mlp, *linears, *norms))",
             "untouched((attention, *linears, *norms))"),
    Mutation("hooks_of_norms_ignored", DECODING,
             "untouched((attention, mlp, *linears, *norms, *drops))",
             "untouched((attention, mlp, *linears, *drops))"),
    Mutation("adapters_ignored", DECODING, "all(type(m) is _LINEAR for m in linears)", "True"),
    Mutation("dropout_ignored", DECODING, "not (m.training and m.p)", "True"),
    Mutation("other_rotations_too", DECODING, "rotate.__module__ == home", "True"),
)  # fmt: skip

PRODUCTS, CAST = "../bindings/products.cpp", "cast_rows.h"
PRODUCT_MUTATIONS = (
    # ---- which block
    Mutation("turned_as_it_lies", PRODUCTS, "p.x = turned_ ? from(n, m) : from(m, n);",
             "p.x = from(m, n);"),
    Mutation("turned_without_its_strides", PRODUCTS, "matrix(scratch, M, N, 1, M)",
             "matrix(scratch, M, N, N, 1)"),
    Mutation("a_of_the_first_depth", PRODUCTS, "a.block(m, rows, k, depth",
             "a.block(m, rows, 0, depth"),
    Mutation("a_of_the_first_rows", PRODUCTS, "a.block(m, rows, k, depth",
             "a.block(0, rows, k, depth"),
    Mutation("b_of_the_first_depth", PRODUCTS, "if (!right || k_step < K)", "if (!right)"),
    Mutation("b_of_the_first_columns", PRODUCTS, "b.block(k, depth, n, columns",
             "b.block(k, depth, 0, columns"),
    Mutation("result_in_the_first_columns", PRODUCTS, "p.y = out.from(m, n);",
             "p.y = out.from(m, 0);"),
    Mutation("bias_of_nobody", PRODUCTS, "return widened(a, b, bias, out);",
             "return widened(a, b, std::nullopt, out);"),
    Mutation("bias_of_any_size", PRODUCTS, "bias.dim() == 1 && bias.size(0) == b.size(1)", "true"),
    Mutation("bias_of_the_first_columns", PRODUCTS, "+ n * bias_item", ""),
    # ---- sums
    Mutation("sums_begun_anew", PRODUCTS, "const bool more = k || accumulate;",
             "const bool more = accumulate;"),
    Mutation("added_to_what_lay_there", PRODUCTS,
             "accumulate ? out.block(m, rows, n, columns, sums, parallel) :"
             " matrix(sums, rows, columns, columns, 1)",
             "matrix(sums, rows, columns, columns, 1)"),
    Mutation("not_accumulated", PRODUCTS, "widened(a, b, std::nullopt, out, true)",
             "widened(a, b, std::nullopt, out, false)"),
    # ---- what is served
    Mutation("any_stride", PRODUCTS, "return x_.stride(turned_ ? 0 : 1) == 1 && rows_.stride > 0;",
             "return true;"),
    Mutation("turned_results", PRODUCTS, "|| result.turned()", ""),
    Mutation("small_ones_too", PRODUCTS, "< kPasses", "< 99."),
    # ---- the passes
    Mutation("tail_lost", CAST, "if (t == n) return;", "return;"),
    Mutation("tail_of_a_whole_vector", CAST, "size_t(n - t) * sizeof(To)", "W * sizeof(To)"),
    Mutation("bias_of_the_tail_lost", CAST, "store(part, at(t, load_part(x + t, n - t)));",
             "store(part, load_part(x + t, n - t));"),
    Mutation("last_rows_lost", CAST, "std::min(p.M, (item + 1) * kStep)",
             "std::min(p.M - 1, (item + 1) * kStep)"),
)  # fmt: skip

RECURRENT = "../bindings/recurrent.cpp"

INPUTS_MUTATIONS = (
    Mutation("parts_of_the_first_rows", RECURRENT, "first * x_.stride(0)), transposed",
             "0), transposed"),
    Mutation("w_of_the_first_direction", RECURRENT, "transposed(w_[d])", "transposed(w_[0])"),
    Mutation("gx_of_the_first_direction", RECURRENT, "1, d * gx_.size(1) * columns", "1, 0"),
    Mutation("rows_of_the_last_part", RECURRENT,
             "p.parts.rows = std::max(p.parts.rows, p.end_row(d, s0, s1) - p.first_row(d, s0, s1))",
             "p.parts.rows = p.end_row(d, s0, s1) - p.first_row(d, s0, s1)"),
    Mutation("gates_kept_in_parts", RECURRENT, "whole ? 1 : N", "N"),
    Mutation("all_in_one_part", RECURRENT, "N / std::max(kLeast, kBytes / (p.D * row))", "1"),
    Mutation("a_step_lost", RECURRENT, "bounds_.push_back(T);", "bounds_.push_back(T - 1);"),
    Mutation("a_step_twice", RECURRENT, "bounds_.push_back(s + 1), here = 0;",
             "bounds_.push_back(s), here = 0;"),
)  # fmt: skip
