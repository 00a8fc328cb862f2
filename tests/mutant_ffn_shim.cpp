// The kernels of layernorm_ffn and embedding, of the instruction set ISA, as a library of their
// own, for test_mutations_ffn.py: one C entry point, compiled against a copy of csrc/cpu with a bug
// planted. Contiguous; fp32, but that all of layernorm_ffn runs in bf16 where `half` says so.
#include SOURCE
#include "isa.h"
#include "mutant_bf16.h"

#undef FASTATTN_DISPATCH
#define FASTATTN_DISPATCH(call) return ISA::call

namespace fastattn {
void norm_forward(const NormParams& p, const Parallel& parallel) { ISA::norm_forward(p, parallel); }
void norm_backward(const NormGrads& p, const Parallel& parallel) {
  ISA::norm_backward(p, parallel);
}
}  // namespace fastattn
#include "embedding.cpp"
#include "scratch.cpp"

namespace {

using namespace fastattn;

// Everything is 8 bytes wide. Null = absent. mutant_ffn.py holds the same list.
struct MutantFfn {
  int64_t M, N, F, norm, act, seed, threads, half;
  double eps, dropout_p, smoothing;
  float *x, *residual, *bias, *weight, *shift, *y, *s, *mean, *rstd;        // norm pass
  float *dy, *dsum, *ds, *dx, *dweight, *dshift, *dbias;                    // and its backward
  float *u, *g, *b1, *b_gate, *a, *da, *du, *dg, *db1, *db_gate, *a_again;  // act pass (M, F)
  float *w1, *w_gate, *w2, *ffn_y, *ffn_u, *ffn_a;                          // all of it
  float* scale;     // (M,), of the cross-entropy of u + b1
  int64_t* target;  // (M,)
  float *loss, *dlogits, *dclass_bias;
  float *emb_y, *emb_dwords, *emb_dpositions, *emb_dweight, *emb_dshift;  // words w1, of target
};

Rows rows(float* p, int64_t n) { return {p, DType::kF32, n}; }
Vec vec(float* p) { return {p, DType::kF32}; }

void ffn_in_bf16(FfnParams f, const MutantFfn& c, const Parallel& parallel) {
  ask_for_tiles();
  const int64_t x_size = c.M * c.N, w_size = c.F * c.N, u_size = c.M * c.F;
  Half x(c.x, x_size, false), y(c.ffn_y, x_size, true);
  Half w1(c.w1, w_size, false), w_gate(c.w_gate, w_size, false), w2(c.w2, w_size, false);
  Half u(c.ffn_u, u_size, true), a(c.ffn_a, u_size, true);
  const auto rows = [](Half& half, int64_t n) { return Rows{half.data(), DType::kBf16, n}; };
  f.before.x = f.after.residual = rows(x, c.N), f.after.y = rows(y, c.N);
  f.w1 = rows(w1, c.N), f.w_gate = rows(w_gate, c.N), f.w2 = rows(w2, c.F);
  f.u = rows(u, c.F), f.a = rows(a, c.F);
  ISA::ffn_forward(f, parallel);
}

}  // namespace

// Returns 0, or 1 where `size` says that the caller has another struct.
extern "C" __attribute__((visibility("default"))) int mutant_run(const MutantFfn* call,
                                                                 int64_t size) {
  if (size != int64_t(sizeof(MutantFfn))) return 1;
  const MutantFfn& c = *call;
  // No run function: the workers go one after the other.
  Parallel parallel;
  parallel.threads = int(c.threads);
  const DropoutSite output{c.dropout_p, uint64_t(c.seed), 2, 0};
  const DropoutSite hidden{c.dropout_p, uint64_t(c.seed), 1, 0};

  NormParams n;
  n.M = c.M, n.N = c.N, n.norm = Norm(c.norm), n.eps = float(c.eps), n.dropout = output;
  n.x = rows(c.x, c.N), n.residual = rows(c.residual, c.N), n.bias = vec(c.bias);
  n.weight = vec(c.weight), n.shift = vec(c.shift);
  n.s = rows(c.s, c.N), n.y = rows(c.y, c.N), n.mean = c.mean, n.rstd = c.rstd;
  ISA::norm_forward(n, parallel);

  NormGrads g;
  g.M = c.M, g.N = c.N, g.norm = n.norm, g.dropout = output, g.weight = n.weight;
  g.dy = rows(c.dy, c.N), g.dsum = rows(c.dsum, c.N), g.s = n.s, g.mean = c.mean, g.rstd = c.rstd;
  g.ds = rows(c.ds, c.N), g.dx = rows(c.dx, c.N);
  g.dweight = c.dweight, g.dshift = c.dshift, g.dbias = c.dbias;
  ISA::norm_backward(g, parallel);

  ActParams a;
  a.M = c.M, a.N = c.F, a.u = rows(c.u, c.F), a.g = rows(c.g, c.F), a.act = Act(c.act);
  a.bias = vec(c.b1), a.gate_bias = vec(c.b_gate), a.dropout = hidden, a.a = rows(c.a, c.F);
  ISA::act_forward(a, parallel);

  ActGrads d;
  d.M = c.M, d.N = c.F, d.u = a.u, d.g = a.g, d.act = a.act, d.bias = a.bias;
  d.gate_bias = a.gate_bias, d.dropout = hidden, d.da = rows(c.da, c.F), d.du = rows(c.du, c.F);
  d.dg = rows(c.dg, c.F), d.a = rows(c.a_again, c.F), d.dbias = c.db1, d.dgate_bias = c.db_gate;
  ISA::act_backward(d, parallel);

  FfnParams f;
  f.M = c.M, f.D = c.N, f.F = c.F, f.Dout = c.N, f.act = a.act, f.dropout = hidden;
  f.before = n, f.before.bias = {}, f.before.dropout = {}, f.before.residual = {}, f.before.s = {};
  f.before.mean = f.before.rstd = nullptr;
  f.after.M = c.M, f.after.N = c.N, f.after.bias = n.bias, f.after.dropout = output;
  f.after.residual = n.x, f.after.y = rows(c.ffn_y, c.N);
  f.w1 = rows(c.w1, c.N), f.w_gate = rows(c.w_gate, c.N), f.w2 = rows(c.w2, c.F);
  f.b1 = a.bias, f.b_gate = a.gate_bias, f.u = rows(c.ffn_u, c.F), f.a = rows(c.ffn_a, c.F);
  if (c.half)
    ffn_in_bf16(f, c, parallel);
  else
    ISA::ffn_forward(f, parallel);

  CrossEntropyParams e;
  e.M = c.M, e.V = c.F, e.logits = rows(c.dlogits, c.F), e.bias = vec(c.b1), e.target = c.target;
  e.smoothing = float(c.smoothing), e.loss = c.loss, e.gradient = true, e.scale = c.scale;
  e.dbias = c.dclass_bias;
  ISA::cross_entropy(e, parallel);

  // Words are the rows of w1, positions those of residual.
  std::vector<float> mean(c.M), rstd(c.M);
  EmbeddingParams b;
  b.M = c.M, b.N = c.N, b.norm = n.norm, b.weight = n.weight, b.shift = n.shift, b.eps = n.eps;
  b.table[0] = {f.w1, c.F, {c.target, true, c.M, 0}, 1.5f};
  b.table[1] = {n.residual, c.M, {nullptr, true, c.M, 0}, 1.f};
  b.dropout = output, b.y = rows(c.emb_y, c.N), b.mean = mean.data(), b.rstd = rstd.data();
  embedding_forward(b, parallel);
  EmbeddingGrads t;
  t.dy = g.dy, t.mean = mean.data(), t.rstd = rstd.data();
  t.table[0].d = rows(c.emb_dwords, c.N), t.table[0].skip = 1;
  t.table[1].d = rows(c.emb_dpositions, c.N);
  t.dweight = c.emb_dweight, t.dshift = c.emb_dshift;
  embedding_backward(b, t, parallel);
  return 0;
}
