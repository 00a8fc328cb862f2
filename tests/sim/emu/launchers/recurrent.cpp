// Cases of csrc/cuda/recurrent.h. Tensors: gx (D, N, G H), w_hh (D, G H, P) and b_hn (D, H) of all
// directions, h0, c0, h_mask, offsets, lengths; results by their names. The scratch is the
// launcher's own. `multiprocessors` and `shared` of the GPU that the plan is for.
#include "../../../../csrc/cuda/recurrent.h"

#include <memory>

#include "../case.h"

namespace fastattn::cuda {

namespace {

using emu::Case;
using emu::Tensor;

// Element d of a tensor of D contiguous parts; null where absent.
const void* part(Case& c, const char* name, int d) {
  Tensor* t = c.find(name);
  if (!t) return nullptr;
  return t->data<unsigned char>() + t->bytes / size_t(t->sizes[0]) * size_t(d);
}

RecurrentParams params(Case& c) {
  RecurrentParams p;
  Tensor &gx = c.tensor("gx"), &h0 = c.tensor("h0"), &w_hh = c.tensor("w_hh");
  p.D = int(h0.sizes[0]), p.B = int(h0.sizes[1]), p.P = int(h0.sizes[2]);
  p.cell = Cell(c.integer("cell")), p.H = int(w_hh.sizes[1]) / recurrent_gates(p.cell);
  p.T = int(c.integer("T")), p.N = gx.sizes[1], p.reverse = int(c.integer("reverse"));
  p.dtype = gx.dtype == "bf16" ? DType::kBf16 : gx.dtype == "f16" ? DType::kF16 : DType::kF32;
  p.gx = gx.data(), p.h0 = h0.data();
  for (int d = 0; d < p.D; ++d) p.w_hh[d] = part(c, "w_hh", d), p.b_hn[d] = part(c, "b_hn", d);
  p.c0 = c.data("c0"), p.h_mask = c.data("h_mask"), p.offsets = c.data<int64_t>("offsets");
  Tensor* lengths = c.find("lengths");
  if (lengths) p.lengths = lengths->data(), p.wide_lengths = lengths->dtype == "i64";
  p.y = c.data("y"), p.gates = c.data("gates"), p.cells = c.data("cells");
  return p;
}

// Scratch of exactly that many bytes, full of NaN.
std::unique_ptr<unsigned char[]> scratch(int64_t bytes) {
  auto p = std::make_unique<unsigned char[]>(size_t(bytes));
  for (int64_t i = 0; i < bytes; ++i) p[size_t(i)] = 0xff;
  return p;
}

template <class F>
cudaError_t planned(Case& c, const RecurrentParams& p, bool backward, F launch) {
  RecurrentRoom room;
  const cudaError_t error = recurrent_room(p, backward, room);
  if (error != cudaSuccess) return error;
  if (c.integer("multiprocessors")) room.multiprocessors = int(c.integer("multiprocessors"));
  if (c.integer("shared")) room.shared = int(c.integer("shared"));
  const RecurrentPlan plan = recurrent_plan(p, backward, room, RecurrentTier(c.integer("tier")));
  if (int(plan.tier) != c.integer("tier")) return cudaErrorNotSupported;
  const RecurrentScratch size = recurrent_scratch(p, backward, plan);
  const auto shared = scratch(size.shared), carried = scratch(size.carried);
  return launch(plan, shared.get(), carried.get()).error;
}

}  // namespace

FASTATTN_EMU_LAUNCHER(recurrent_forward) {
  RecurrentParams p = params(c);
  p.h_n = c.data("h_n"), p.c_n = c.data("c_n");
  return planned(c, p, false, [&](const RecurrentPlan& plan, void* shared, void* carried) {
    return recurrent_forward(p, plan, shared, carried, nullptr);
  });
}

FASTATTN_EMU_LAUNCHER(recurrent_backward) {
  const RecurrentParams p = params(c);
  RecurrentGrads g;
  g.dy = c.data("dy"), g.dh_n = c.data("dh_n"), g.dc_n = c.data("dc_n");
  g.dgx = c.data("dgx"), g.dghn = c.data("dghn"), g.dh0 = c.data("dh0"), g.dc0 = c.data("dc0");
  return planned(c, p, true, [&](const RecurrentPlan& plan, void* shared, void* carried) {
    return recurrent_backward(p, g, plan, shared, carried, nullptr);
  });
}

}  // namespace fastattn::cuda
