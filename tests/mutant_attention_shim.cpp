// The portable kernels as a library of their own, for tests/mutant_attention.py: no torch, one C
// entry point, one translation unit, compiled against a copy of csrc/cpu with a bug planted.
#include "attention_portable.cpp"
#include "scratch.cpp"

namespace {

using namespace fastattn;

// Everything is 8 bytes wide, so that ctypes needs no rule of padding. Fields are those of
// AttentionParams and AttentionGrads; strides in elements. mutant_attention.py holds the same list.
struct View {  // ptr null = absent
  void* ptr;
  int64_t strides[4];
};

struct MutantCall {
  int64_t B, H, Hk, D, Dv, Sq, Sk, threads;
  View q, k, v, o, weights, d_o, dq, dk, dv;  // (b, h, s, d)
  View mask, bias, dweights;                  // (b, h, i, j)
  View lse;                                   // (b, h, s, -)
  View dbias;                                 // (b, h, i, j)
  float *lse_lo, *dlse, *dsinks, *alibi, *sinks;
  int64_t *q_len, *k_len, *q_start, *k_start;
  int64_t alibi_b, causal, window_left, window_right, seed, weights_mode, dbias_once;
  double scale, softcap, dropout_p, dweights_scale;
};

Operand operand(const View& x) {
  return {x.ptr, x.strides[0], x.strides[1], x.strides[2], x.strides[3]};
}

Broadcast broadcast(const View& x, DType dtype) {
  return {x.ptr, dtype, x.strides[0], x.strides[1], x.strides[2], x.strides[3]};
}

}  // namespace

// Forward, then backward. Returns 0, or 1 where `size` says that the caller has another struct.
extern "C" __attribute__((visibility("default"))) int mutant_run(const MutantCall* call,
                                                                 int64_t size) {
  if (size != int64_t(sizeof(MutantCall))) return 1;
  const MutantCall& c = *call;
  AttentionParams p;
  p.B = c.B, p.H = c.H, p.Hk = c.Hk, p.D = c.D, p.Dv = c.Dv, p.Sq = c.Sq, p.Sk = c.Sk;
  p.q = operand(c.q), p.k = operand(c.k), p.v = operand(c.v), p.o = operand(c.o);
  p.lse = static_cast<float*>(c.lse.ptr), p.lse_lo = c.lse_lo;
  p.lse_b = c.lse.strides[0], p.lse_h = c.lse.strides[1], p.lse_s = c.lse.strides[2];
  p.q_len = c.q_len, p.k_len = c.k_len, p.q_start = c.q_start, p.k_start = c.k_start;
  p.mask = broadcast(c.mask, DType::kBool), p.bias = broadcast(c.bias, DType::kF32);
  p.alibi = c.alibi, p.alibi_b = c.alibi_b, p.sinks = c.sinks;
  p.scale = float(c.scale), p.softcap = float(c.softcap), p.causal = Causal(c.causal);
  p.window_left = c.window_left, p.window_right = c.window_right;
  p.dropout_p = c.dropout_p, p.seed = uint64_t(c.seed);
  p.weights_mode = Weights(c.weights_mode), p.weights = operand(c.weights);
  // No run function: the workers of a plan for several threads go one after the other.
  Parallel parallel;
  parallel.threads = int(c.threads);
  portable::attention_forward(p, parallel);

  AttentionGrads g;
  g.d_o = operand(c.d_o), g.dlse = c.dlse;
  g.dweights = broadcast(c.dweights, DType::kF32), g.dweights_scale = float(c.dweights_scale);
  g.dq = operand(c.dq), g.dk = operand(c.dk), g.dv = operand(c.dv);
  g.dbias = static_cast<float*>(c.dbias.ptr), g.dsinks = c.dsinks;
  g.dbias_b = c.dbias.strides[0], g.dbias_h = c.dbias.strides[1];
  g.dbias_i = c.dbias.strides[2], g.dbias_j = c.dbias.strides[3];
  g.dbias_once = c.dbias_once != 0;
  portable::attention_backward(p, g, parallel);
  return 0;
}
