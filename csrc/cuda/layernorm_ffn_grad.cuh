// What the kernels of layernorm_ffn's backward share: their parameters, the gradient of a row's
// sum, and of a tile of the hidden layer. See layernorm_ffn_bwd.cu.
#pragma once

#include "layernorm_ffn_call.cuh"
#include "products.cuh"

namespace fastattn::cuda {

constexpr int kPrepareRows = 64;  // of a block that makes norm(x) and dz

// Which gradient a block of the pass by hidden units makes.
enum class FfnPart : int { kUp = 0, kGate = 1, kDown = 2 };

struct FfnGradCall {
  FfnCall call;
  LayerNormFfnGrads g;
  bool dy_fours, dx_fours;
  int xn_stride, dz_stride;  // elements: rows of 16-byte accesses
  bool norms;                // gradients of the norm's parameters are wanted

  // Sums of parts of the rows, to be added up in order; null = not wanted. Those of a norm in front
  // are made by the pass by rows, those of one behind with db2 before it.
  int width;                                        // columns of each of the next three
  float *db2_parts, *dweight_parts, *dshift_parts;  // (parts, width)
  float *dw1_parts, *dw_gate_parts, *dw2_parts;     // (chunks, F D), ..., (chunks, Dout F)
  float *db1_parts, *db_gate_parts;                 // (chunks, F)
  int64_t chunk_rows;
  FfnPart part[3];  // of the pass by hidden units
  int parts;

  FfnGradCall(const LayerNormFfnParams& p, const LayerNormFfnGrads& grads);
};

// The launches that layernorm_ffn_backward is made of, and their tables.
Launch launch_ffn_prepare(const FfnGradCall& c, cudaStream_t stream);
Launch launch_ffn_rows(const FfnGradCall& c, cudaStream_t stream);
Launch launch_ffn_weights(const FfnGradCall& c, cudaStream_t stream);
int list_ffn_prepare(VariantInfo* out, int capacity);
int list_ffn_rows(VariantInfo* out, int capacity);
int list_ffn_weights(VariantInfo* out, int capacity);
// Rows of a block of the pass by rows, hidden units of one of the pass by hidden units; 0 = no
// variant serves p.
int ffn_rows_of_block(const LayerNormFfnParams& p);
int ffn_hidden_of_block(const LayerNormFfnParams& p);

// Warps of a block: as many as leave what `bytes` says for one in the memory of every architecture.
template <class Bytes>
constexpr int most_warps(Bytes bytes) {
  return bytes(4) <= kMostShared ? 4 : bytes(2) <= kMostShared ? 2 : 1;
}

// The variant of a table that serves p; `laden` are those with room for a gate.
template <int kCount>
const Variant<FfnGradCall>* find(const Variant<FfnGradCall> (&all)[kCount],
                                 const LayerNormFfnParams& p) {
  const int width = p.D > p.Dout ? p.D : p.Dout;
  for (const auto& v : all)
    if (v.dtype == p.dtype && v.head_dim >= width && (v.laden || !p.w_gate.ptr)) return &v;
  return nullptr;
}

// dy of a row becomes the gradient of residual + z: through a norm behind. y_hat: of that norm.
template <int kWidth>
__device__ __forceinline__ void grad_of_sum(RowPart<kWidth>& dy, RowPart<kWidth>& y_hat,
                                            const FfnGradCall& c, const RowPart<kWidth>& weight,
                                            int64_t row) {
  const LayerNormFfnParams& p = c.call.p;
  load_row(dy, c.g.dy.ptr, c.g.dy.dtype, row * c.g.dy.stride, p.Dout, c.dy_fours);
  if (c.call.post == Norm::kNone) return;
  load_row(y_hat, p.s.ptr, p.s.dtype, row * p.s.stride, p.Dout, c.call.s_fours);
  norm_backward(dy, y_hat, p.mean ? p.mean[row] : 0.f, p.rstd[row], weight, p.Dout, c.call.post);
}

// From the products u, g and da of one hidden unit and row: da becomes what `part` asks for. keep:
// of the hidden dropout, 0 where it drops.
template <Act kAct>
__device__ __forceinline__ float hidden_grad(float up, float gate, float da, float keep, bool gated,
                                             FfnPart part) {
  da = keep == 0.f ? 0.f : da * keep;
  const Value f = activate_grad<kAct>(gated ? gate : up);
  if (part == FfnPart::kDown) return keep == 0.f ? 0.f : (gated ? f.y * up : f.y) * keep;
  if (part == FfnPart::kGate) return da * up * f.dy;
  return gated ? da * f.y : da * f.dy;
}

}  // namespace fastattn::cuda
