// LayerNorm + FFN backward: the hidden layer is made again a tile at a time, and never stored.
//
//   ds = dy, or dy through the norm behind;  dz = dropout(ds);  db2 = sum dz
//   u = W1 norm(x) + b1 (gated: g);  da = hidden_dropout(W2^T dz);  du = da act'(u)
//   (gated: du = da act(g), dg = da u act'(g))
//   dxn = du W1 (+ dg Wg);  dx = dxn through the norm in front, + ds
//   dW1 = du^T xn, db1 = sum du;  dWg = dg^T xn, dbg = sum dg;  dW2 = dz^T a
//
// Three passes: one writes xn = norm(x) and dz as the products read them (a row has D + Dout
// elements, where u and a have 2 F); dx by blocks of rows that walk the hidden units; dW1, dWg and
// dW2 by blocks that own hidden units and walk rows. No sum has two owners: where rows or hidden
// units are cut into parts, each part's sums lie in scratch and a last kernel adds them up in
// order. Bitwise repeatable, without atomics. 3 products by rows and 3 for dW1, 2 for dW2 (gated 5,
// 4 for each of dW1 and dWg, 3), of 2 M F D FLOPs each; only what is wanted is made.
#include "layernorm_ffn_grad.cuh"

namespace fastattn::cuda {
namespace {

constexpr int kPrepareWarps = 4, kRowsOfWarp = kPrepareRows / kPrepareWarps;
constexpr int kSums = 3;  // db2, dweight, dshift

// A column's sum over the block's warps, in order, to the block's part.
__device__ __forceinline__ void write_sums(const float* s_sums, float* to, int width) {
  for (int col = thread_id(); col < width; col += 32 * kPrepareWarps) {
    float sum = 0.f;
    for (int warp = 0; warp < kPrepareWarps; ++warp)
      sum += s_sums[warp * kSums * kMaxFfnWidth + col];
    to[int64_t(blockIdx.x) * width + col] = sum;
  }
}

template <typename T>
__global__ void __launch_bounds__(32 * kPrepareWarps)
    layernorm_ffn_bwd_prepare_kernel(const __grid_constant__ FfnGradCall c) {
  constexpr int kWidth = kMaxFfnWidth;
  constexpr DType kType = sizeof(T) == 4                     ? DType::kF32
                          : std::is_same_v<T, __nv_bfloat16> ? DType::kBf16
                                                             : DType::kF16;
  using Part = RowPart<kWidth>;
  const FfnCall& call = c.call;
  const LayerNormFfnParams& p = call.p;
  FASTATTN_STATIC_SHARED(float[kPrepareWarps * kSums * kWidth], s_sums);
  const int warp = thread_id() / 32;
  const uint64_t seed = seed_of(call);
  Part weight, shift, db2, dweight, dshift;
  load_parameter(weight, p.norm_weight, p.pre_norm ? p.D : p.Dout, 1.f);
  load_parameter(shift, p.shift, p.pre_norm ? p.D : p.Dout, 0.f);
  db2.fill(0.f), dweight.fill(0.f), dshift.fill(0.f);
  const int64_t first = int64_t(blockIdx.x) * kPrepareRows + warp * kRowsOfWarp;
#pragma unroll 1
  for (int64_t row = first; row < first + kRowsOfWarp && row < p.M; ++row) {
    if (c.g.xn) {
      Part x;
      load_row(x, p.x.ptr, p.x.dtype, row * p.x.stride, p.D, call.x_fours);
      if (call.pre != Norm::kNone) {
        const float mean = p.mean ? p.mean[row] : 0.f, rstd = p.rstd[row];
        normalise(x, {1.f, mean, rstd}, weight, shift);
      }
      x.each(kWidth, [&](float& v, int col) { v = col < p.D ? v : 0.f; });
      store_row(x, c.g.xn, kType, row * c.xn_stride, c.xn_stride, true);
    }
    Part ds, y_hat, dy;
    y_hat.fill(0.f);
    grad_of_sum(ds, y_hat, c, weight, row);
    if (call.post != Norm::kNone && c.norms) {
      load_row(dy, c.g.dy.ptr, c.g.dy.dtype, row * c.g.dy.stride, p.Dout, c.dy_fours);
#pragma unroll
      for (int i = 0; i < Part::kGroups; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          dweight.v[i][e] += dy.v[i][e] * y_hat.v[i][e];
          dshift.v[i][e] += dy.v[i][e];
        }
    }
    if (call.output.threshold)
      drop_row(ds, seed, call.output.threshold, call.output.keep_scale, row, kOutputSite);
    ds.each(kWidth, [&](float& v, int col) { v = col < p.Dout ? v : 0.f; });
#pragma unroll
    for (int i = 0; i < Part::kGroups; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) db2.v[i][e] += ds.v[i][e];
    if (c.g.dz) store_row(ds, c.g.dz, kType, row * c.dz_stride, c.dz_stride, true);
  }
  float* const mine = s_sums + warp * kSums * kWidth;
  db2.each(kWidth, [&](float& v, int col) { mine[col] = v; });
  dweight.each(kWidth, [&](float& v, int col) { mine[kWidth + col] = v; });
  dshift.each(kWidth, [&](float& v, int col) { mine[2 * kWidth + col] = v; });
  __syncthreads();  // all warps' sums are there
  if (c.db2_parts) write_sums(s_sums, c.db2_parts, p.Dout);
  if (call.post == Norm::kNone) return;
  if (c.dweight_parts) write_sums(s_sums + kWidth, c.dweight_parts, p.Dout);
  if (c.dshift_parts) write_sums(s_sums + 2 * kWidth, c.dshift_parts, p.Dout);
}

// ---- sums of parts -----------------------------------------------------------------------------

struct SumJob {
  const float* from;  // (parts, n)
  void* to;           // (n,)
  DType dtype;
  int64_t n, parts;
  int lanes;        // threads of a column, each with every lanes-th part: 1 or 32
  int64_t columns;  // of a block
  int64_t blocks;
};
constexpr int kMostJobs = 8, kSumThreads = 256, kSumLanes = 32;

struct SumJobs {
  SumJob job[kMostJobs];
  int count = 0;

  void add(const float* from, void* to, DType dtype, int64_t n, int64_t parts) {
    if (!to) return;
    // Few parts are those of large results, many those of a row.
    const int lanes = parts >= 2 * kSumLanes ? kSumLanes : 1;
    const int64_t columns = kSumThreads / lanes;
    job[count++] = {from, to, dtype, n, parts, lanes, columns, (n + columns - 1) / columns};
  }
};

__global__ void __launch_bounds__(kSumThreads)
    layernorm_ffn_bwd_sum_kernel(const __grid_constant__ SumJobs jobs) {
  FASTATTN_STATIC_SHARED(float[kSumThreads], s_sums);
  int64_t block = blockIdx.x;
  int at = 0;
  while (block >= jobs.job[at].blocks) block -= jobs.job[at++].blocks;
  const SumJob& job = jobs.job[at];
  const int column = thread_id() % int(job.columns), lane = thread_id() / int(job.columns);
  const int64_t i = block * job.columns + column;
  float sum = 0.f;
  if (i < job.n)
    for (int64_t part = lane; part < job.parts; part += job.lanes)
      sum += job.from[part * job.n + i];
  s_sums[thread_id()] = sum;
  __syncthreads();  // all lanes' sums are there
  if (lane > 0 || i >= job.n) return;
  for (int other = 1; other < job.lanes; ++other) sum += s_sums[other * int(job.columns) + column];
  store_float(job.to, job.dtype, i, sum);
}

// ---- launch ------------------------------------------------------------------------------------

template <typename T>
constexpr Variant<FfnGradCall> prepare(DType dtype) {
  return {{"layernorm_ffn_bwd_prepare_kernel", dtype, kMaxFfnWidth, true, kPrepareRows, 0,
           32 * kPrepareWarps, 0},
          layernorm_ffn_bwd_prepare_kernel<T>};
}
const Variant<FfnGradCall> kPrepare[] = {prepare<__nv_bfloat16>(DType::kBf16),
                                         prepare<__half>(DType::kF16), prepare<float>(DType::kF32)};
const Variant<SumJobs> kSum[] = {
    {{"layernorm_ffn_bwd_sum_kernel", DType::kF32, kMaxFfnWidth, true, 0, 0, kSumThreads, 0},
     layernorm_ffn_bwd_sum_kernel}};

int64_t div_up(int64_t x, int64_t n) { return (x + n - 1) / n; }
int in_eights(int n) { return (n + 7) / 8 * 8; }

bool front_sums(const LayerNormFfnParams& p) { return p.pre_norm && p.norm != Norm::kNone; }

// Rows whose sums are one part of dnorm_weight and dshift.
int rows_of_norm_part(const LayerNormFfnParams& p) {
  return front_sums(p) ? ffn_rows_of_block(p) : kPrepareRows;
}

Launch launch_sums(const FfnGradCall& c, cudaStream_t stream) {
  const LayerNormFfnParams& p = c.call.p;
  const LayerNormFfnGrads& g = c.g;
  const int64_t rows = div_up(p.M, kPrepareRows), norm_rows = div_up(p.M, rows_of_norm_part(p));
  const int64_t F = p.F, chunks = p.M > 0 ? g.chunks : 0;
  const int normed = p.pre_norm ? p.D : p.Dout;
  SumJobs jobs;
  jobs.add(c.db2_parts, g.db2, DType::kF32, p.Dout, rows);
  jobs.add(c.dweight_parts, g.dnorm_weight, DType::kF32, normed, norm_rows);
  jobs.add(c.dshift_parts, g.dshift, DType::kF32, normed, norm_rows);
  jobs.add(c.dw1_parts, g.dw1, p.dtype, F * p.D, chunks);
  jobs.add(c.dw_gate_parts, g.dw_gate, p.dtype, F * p.D, chunks);
  jobs.add(c.dw2_parts, g.dw2, p.dtype, F * p.Dout, chunks);
  jobs.add(c.db1_parts, g.db1, DType::kF32, F, chunks);
  jobs.add(c.db_gate_parts, g.db_gate, DType::kF32, F, chunks);
  Launch out;
  out.kernel = kSum[0].kernel;
  int64_t blocks = 0;
  for (int i = 0; i < jobs.count; ++i) blocks += jobs.job[i].blocks;
  if (blocks > 0) launch(out, kSum[0], blocks, stream, jobs);
  return out;
}

bool wants_hidden(const LayerNormFfnParams& p, const LayerNormFfnGrads& g) {
  return g.dx.ptr || g.dw1 || g.dw_gate || g.dw2 || g.db1 || g.db_gate ||
         (front_sums(p) && (g.dnorm_weight || g.dshift));
}

// Cuts `from` into the parts of the wanted sums; returns how many elements they are.
struct Cutter {
  float* from;
  int64_t at = 0;

  float* operator()(bool wanted, int64_t n) {
    if (!wanted) return nullptr;
    float* const here = from ? from + at : nullptr;
    at += n;
    return here;
  }
};

int64_t cut_row_sums(FfnGradCall* c, const LayerNormFfnParams& p, const LayerNormFfnGrads& g) {
  const int normed = p.pre_norm ? p.D : p.Dout;
  const int64_t parts = div_up(p.M, rows_of_norm_part(p));
  Cutter cut{g.row_sums};
  float* const db2 = cut(g.db2, div_up(p.M, kPrepareRows) * p.Dout);
  float* const dweight = cut(g.dnorm_weight, parts * normed);
  float* const dshift = cut(g.dshift, parts * normed);
  if (c) c->db2_parts = db2, c->dweight_parts = dweight, c->dshift_parts = dshift;
  return cut.at;
}

int64_t cut_weight_sums(FfnGradCall* c, const LayerNormFfnParams& p, const LayerNormFfnGrads& g) {
  const int64_t F = int64_t(g.chunks) * p.F;
  Cutter cut{g.weight_sums};
  float* const dw1 = cut(g.dw1, F * p.D);
  float* const dw_gate = cut(g.dw_gate, F * p.D);
  float* const dw2 = cut(g.dw2, F * p.Dout);
  float* const db1 = cut(g.db1, F);
  float* const db_gate = cut(g.db_gate, F);
  if (c) {
    c->dw1_parts = dw1, c->dw_gate_parts = dw_gate, c->dw2_parts = dw2;
    c->db1_parts = db1, c->db_gate_parts = db_gate;
  }
  return cut.at;
}

int parts_of(const LayerNormFfnGrads& g) {
  return (g.dw1 || g.db1) + (g.dw_gate || g.db_gate) + (g.dw2 != nullptr);
}

}  // namespace

FfnGradCall::FfnGradCall(const LayerNormFfnParams& p, const LayerNormFfnGrads& grads)
    : call(p), g(grads) {
  dy_fours = fours(g.dy, p.Dout), dx_fours = fours(g.dx, p.D);
  xn_stride = in_eights(p.D), dz_stride = in_eights(p.Dout);
  norms = g.dnorm_weight || g.dshift;
  cut_row_sums(this, p, g), cut_weight_sums(this, p, g);
  const int64_t rows = div_up(p.M, g.chunks);
  chunk_rows = div_up(rows, kPrepareRows) * kPrepareRows;
  parts = 0;
  if (g.dw1 || g.db1) part[parts++] = FfnPart::kUp;
  if (g.dw_gate || g.db_gate) part[parts++] = FfnPart::kGate;
  if (g.dw2) part[parts++] = FfnPart::kDown;
}

int layernorm_ffn_chunks(const LayerNormFfnParams& p, const LayerNormFfnGrads& g,
                         int multiprocessors) {
  const int hidden = ffn_hidden_of_block(p), parts = parts_of(g);
  if (hidden == 0 || parts == 0) return 1;
  // Two blocks a multiprocessor. Less than 256 rows would not pay for the sums that a chunk writes.
  const int64_t blocks = div_up(p.F, hidden) * parts;
  const int64_t wanted = 2 * int64_t(multiprocessors) / blocks, most = div_up(p.M, 256);
  const int64_t chunks = wanted < most ? wanted : most;
  return chunks > 1 ? int(chunks) : 1;
}

LayerNormFfnScratch layernorm_ffn_scratch(const LayerNormFfnParams& p, const LayerNormFfnGrads& g) {
  LayerNormFfnScratch out;
  if (wants_hidden(p, g)) out.xn = p.M * in_eights(p.D), out.dz = p.M * in_eights(p.Dout);
  out.row_sums = cut_row_sums(nullptr, p, g);
  out.weight_sums = cut_weight_sums(nullptr, p, g);
  return out;
}

Launch launch_ffn_prepare(const FfnGradCall& c, cudaStream_t stream) {
  Launch out;
  out.kernel = kPrepare[0].kernel;
  out.error = cudaErrorInvalidValue;
  for (const auto& v : kPrepare)
    if (v.dtype == c.call.p.dtype) launch(out, v, div_up(c.call.p.M, v.rows), stream, c);
  return out;
}

Launch layernorm_ffn_backward(const LayerNormFfnParams& p, const LayerNormFfnGrads& g,
                              cudaStream_t stream) {
  const FfnGradCall c(p, g);
  Launch out;
  const auto then = [&](bool wanted, auto launched) {
    if (wanted && out.error == cudaSuccess) out = launched();
  };
  // Without rows every sum is 0: the last kernel alone.
  then(p.M > 0, [&] { return launch_ffn_prepare(c, stream); });
  then(p.M > 0 && (g.dx.ptr || (front_sums(p) && c.norms)),
       [&] { return launch_ffn_rows(c, stream); });
  then(p.M > 0 && c.parts > 0, [&] { return launch_ffn_weights(c, stream); });
  then(true, [&] { return launch_sums(c, stream); });
  return out;
}

int list_ffn_prepare(VariantInfo* out, int capacity) { return list(kPrepare, out, capacity); }

int layernorm_ffn_backward_variants(VariantInfo* out, int capacity) {
  int n = 0;
  const auto sums = [](VariantInfo* to, int room) { return list(kSum, to, room); };
  const auto add = [&](auto part) {
    n += n < capacity ? part(out + n, capacity - n) : part(nullptr, 0);
  };
  add(list_ffn_prepare), add(list_ffn_rows), add(list_ffn_weights), add(sums);
  return n;
}

}  // namespace fastattn::cuda
