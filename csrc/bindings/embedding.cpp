// torch.ops.fastattn.embedding_{fwd,bwd} on the CPU: checks, allocation, launch.

#include "../cpu/embedding.h"

#include <tuple>

#include "row_args.h"

namespace {

using namespace fastattn;
using namespace fastattn::binding;

constexpr const char* kOp = "embedding";
constexpr uint32_t kOutputSite = 2;

struct Numbers {
  int64_t offset;
  double scale;
  int64_t norm;
  double eps, dropout_p;
};

// The arguments that both directions share, checked.
struct Call {
  EmbeddingParams p;
  DType dtype;
  Tensor ids, weight;
  Opt positions, position_weight, segments, segment_weight, norm_weight, norm_bias;

  Call(Tensor ids_, Tensor weight_, Opt positions_, Opt position_weight_, Opt segments_,
       Opt segment_weight_, Opt norm_weight_, Opt norm_bias_, const Opt& seed, Numbers n)
      : ids(ids_),
        weight(weight_),
        positions(positions_),
        position_weight(position_weight_),
        segments(segments_),
        segment_weight(segment_weight_),
        norm_weight(norm_weight_),
        norm_bias(norm_bias_) {
    p.M = ids.numel();
    dtype = row_dtype(kOp, weight, "weight");
    p.table[0] = table(weight, "weight");
    p.N = weight.size(1);
    STD_TORCH_CHECK(p.N > 0, "fastattn::", kOp, ": weight must have columns, got ", text(weight));
    p.table[0].index = index(ids, "ids", true);
    p.table[0].scale = float(n.scale);
    if (position_weight) {
      p.table[1] = table(*position_weight, "position_weight");
      if (positions) {
        p.table[1].index = index(*positions, "positions", false);
      } else {
        STD_TORCH_CHECK(ids.dim() > 0, "fastattn::", kOp, ": ids must have a dimension to count");
        p.table[1].index = {nullptr, true, std::max<int64_t>(1, ids.size(-1)), n.offset};
      }
    }
    if (segment_weight) {
      p.table[2] = table(*segment_weight, "segment_weight");
      if (segments) p.table[2].index = index(*segments, "segments", false);
    }
    STD_TORCH_CHECK(n.norm >= 0 && n.norm <= 2, "fastattn::", kOp, ": norm out of range");
    p.norm = Norm(n.norm), p.eps = float(n.eps);
    p.weight = vec(kOp, norm_weight, p.N, "norm_weight");
    p.shift = vec(kOp, norm_bias, p.N, "norm_bias");
    p.dropout = dropout_site(kOp, n.dropout_p, seed, kOutputSite);
    inside();
  }

  Shape shape() const {
    Shape s = shape_of(ids);
    s.push_back(p.N);
    return s;
  }

 private:
  Table table(Tensor& x, const char* name) const {
    STD_TORCH_CHECK(x.dim() == 2 && (p.N == 0 || x.size(1) == p.N), "fastattn::", kOp, ": ", name,
                    " must have shape (rows, ", p.N, "), got ", text(x));
    if (x.size(1) != 1 && x.stride(1) != 1) x = torch::stable::contiguous(x);
    Table t;
    t.rows = {data(x), row_dtype(kOp, x, name), x.stride(0)};
    // A table without rows has no address, and is not an absent one.
    static const float nowhere = 0.f;
    if (!t.rows.ptr) t.rows.ptr = const_cast<float*>(&nowhere);
    t.V = x.size(0);
    return t;
  }

  Index index(Tensor& x, const char* name, bool every) const {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Long || x.scalar_type() == ScalarType::Int,
                    "fastattn::", kOp, ": ", name, " must be int64 or int32");
    const int64_t n = x.numel();
    STD_TORCH_CHECK(every || (p.M == 0 ? n == 0 : n > 0 && p.M % n == 0), "fastattn::", kOp, ": ",
                    name, " must have ids' last dimensions, got ", text(x));
    x = torch::stable::contiguous(x);
    return {x.const_data_ptr(), x.scalar_type() == ScalarType::Long, std::max<int64_t>(1, n), 0};
  }

  void inside() const {
    const OutOfRange bad = embedding_check(p);
    if (bad.token < 0) return;
    const char* const names[] = {"ids", "positions", "segments"};
    STD_TORCH_CHECK(false, "fastattn::", kOp, ": ", names[bad.table], " must be in [0, ",
                    p.table[bad.table].V, "), got ", bad.index, " at token ", bad.token);
  }
};

std::tuple<Tensor, Tensor, Tensor> embedding_fwd(Tensor ids, Tensor weight, Opt positions,
                                                 Opt position_weight, Opt segments,
                                                 Opt segment_weight, Opt norm_weight, Opt norm_bias,
                                                 Opt seed, int64_t offset, double scale,
                                                 int64_t norm, double eps, double dropout_p,
                                                 int64_t padding_idx, int64_t position_padding_idx,
                                                 bool by_count, bool keep) {
  Call c(ids, weight, positions, position_weight, segments, segment_weight, norm_weight, norm_bias,
         seed, {offset, scale, norm, eps, dropout_p});
  Tensor y = empty(c.shape(), c.dtype);
  const bool stats = keep && c.p.norm != Norm::kNone;
  Tensor mean = empty({stats && c.p.norm == Norm::kLayer ? c.p.M : 0}, DType::kF32);
  Tensor rstd = empty({stats ? c.p.M : 0}, DType::kF32);
  if (c.p.M > 0) {
    c.p.y = rows_of(y, c.p.N, c.dtype), c.p.mean = floats(mean), c.p.rstd = floats(rstd);
    embedding_forward(c.p, threads());
  }
  return {y, mean, rstd};
}

enum Need : int64_t {
  kDweight = 1,
  kDposition = 2,
  kDsegment = 4,
  kDnormWeight = 8,
  kDnormBias = 16
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> embedding_bwd(
    Tensor dy, Tensor ids, Tensor weight, Opt positions, Opt position_weight, Opt segments,
    Opt segment_weight, Opt norm_weight, Opt norm_bias, Opt seed, Tensor mean, Tensor rstd,
    int64_t offset, double scale, int64_t norm, double eps, double dropout_p, int64_t padding_idx,
    int64_t position_padding_idx, bool by_count, int64_t need) {
  Call c(ids, weight, positions, position_weight, segments, segment_weight, norm_weight, norm_bias,
         seed, {offset, scale, norm, eps, dropout_p});
  STD_TORCH_CHECK(shape_of(dy) == c.shape(), "fastattn::", kOp,
                  ": dy must have the output's shape, got ", text(dy));
  EmbeddingGrads g;
  if (c.p.norm == Norm::kLayer) g.mean = statistics(kOp, mean, c.p.M, "mean");
  if (c.p.norm != Norm::kNone) g.rstd = statistics(kOp, rstd, c.p.M, "rstd");
  const auto gradient = [&](const Opt& table, int64_t bit, int i, int64_t skip) {
    if (!table || !(need & bit)) return nothing();
    const DType dtype = c.p.table[i].rows.dtype;
    Tensor d = empty(shape_of(*table), dtype);
    g.table[i] = {rows_of(d, c.p.N, dtype), skip, i == 0 && by_count};
    return d;
  };
  Tensor dweight = gradient(c.weight, kDweight, 0, padding_idx);
  Tensor dposition = gradient(c.position_weight, kDposition, 1, position_padding_idx);
  Tensor dsegment = gradient(c.segment_weight, kDsegment, 2, -1);
  const auto sum = [&](const Opt& parameter, int64_t bit) {
    if (!parameter || !(need & bit)) return nothing();
    Tensor x = empty(shape_of(*parameter), DType::kF32);
    torch::stable::zero_(x);
    return x;
  };
  Tensor dw = sum(c.norm_weight, kDnormWeight), db = sum(c.norm_bias, kDnormBias);
  g.dweight = floats(dw), g.dshift = floats(db);
  if (c.p.M == 0) {
    for (Tensor* d : {&dweight, &dposition, &dsegment})
      if (d->numel()) torch::stable::zero_(*d);
  } else {
    const RowView rows(kOp, dy, c.p.N, "dy");
    g.dy = rows.rows();
    embedding_backward(c.p, g, threads());
  }
  if (dw.numel()) dw = as_parameter(dw, *c.norm_weight);
  if (db.numel()) db = as_parameter(db, *c.norm_bias);
  return {dweight, dposition, dsegment, dw, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("embedding_fwd", TORCH_BOX(&embedding_fwd));
  m.impl("embedding_bwd", TORCH_BOX(&embedding_bwd));
}
