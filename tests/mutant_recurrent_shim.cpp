// The recurrence's kernels in fp32, of one instruction set (FASTATTN_ISA, FASTATTN_LEVEL), as a
// library of their own, for test_mutations_recurrent.py: one C entry point, compiled against a copy
// of csrc/cpu with a bug planted. With RACES it is a program instead, for ThreadSanitizer.
#include "layernorm_ffn.h"
#include "recurrent.h"
#include "team.h"
#include "target_begin.h"

#include "simd.h"
#include "philox.h"
#include "gemm.h"
#include "rows.h"
#include "activation.h"
#include "recurrent_cell.h"
#include "lstm.h"
#include "gru.h"
#include "recurrent_products.h"
#include "recurrent_plan.h"
#include "recurrent_fwd.h"
#include "recurrent_bwd.h"

#include "target_end.h"
#include "scratch.cpp"

namespace {

using namespace fastattn;
namespace isa = FASTATTN_ISA;

// Workers on threads of their own: all of them run at the same time, so a team is complete.
void run_threads(int n, void (*fn)(void* ctx, int worker), void* ctx) {
  std::vector<std::thread> threads;
  for (int w = 1; w < n; ++w) threads.emplace_back(fn, ctx, w);
  fn(ctx, 0);
  for (std::thread& t : threads) t.join();
}

template <class Cell>
void both(const RecurrentParams& p, const RecurrentGrads& g, const Parallel& parallel) {
  isa::RecurrentForward<Cell, float, isa::FloatProducts>(p, parallel).run();
  isa::RecurrentBackward<Cell, float, isa::FloatProducts>(p, g, parallel).run();
}

// Everything is 8 bytes wide. Null = absent. mutant_recurrent.py holds the same list.
struct MutantRecurrent {
  int64_t cell, H, P, D, reverse, T, B, N, threads;
  int64_t *offsets, *lengths, *index, *active;
  float *gx, *gh, *w_hh, *b_ih, *b_hh, *w_hr, *h0, *c0, *h_mask;  // weights: (D, ...)
  float *dy, *dh_n, *dc_n;
  float *y, *h_n, *c_n, *gates, *cells, *dgx, *dghn, *dh0, *dc0, *dh;
};

void run(const MutantRecurrent& c) {
  Parallel parallel;
  parallel.threads = int(c.threads), parallel.run = run_threads;

  RecurrentParams p;
  p.cell = Cell(c.cell), p.H = c.H, p.P = c.P, p.D = int(c.D), p.reverse = unsigned(c.reverse);
  p.steps = {c.T, c.B, c.N, c.offsets, c.lengths, c.index, c.active};
  p.gx = c.gx, p.gh = c.gh, p.h0 = c.h0, p.c0 = c.c0, p.h_mask = c.h_mask;
  p.y = c.y, p.h_n = c.h_n, p.c_n = c.c_n, p.gates = c.gates, p.cells = c.cells;
  const int64_t rows = kGates[c.cell] * c.H;
  for (int64_t d = 0; d < c.D; ++d) {
    p.w_hh[d] = c.w_hh + d * rows * c.P;
    if (c.b_ih) p.b_ih[d] = c.b_ih + d * rows;
    if (c.b_hh) p.b_hh[d] = c.b_hh + d * rows;
    if (c.w_hr) p.w_hr[d] = c.w_hr + d * c.P * c.H;
  }
  RecurrentGrads g;
  g.dy = c.dy, g.dh_n = c.dh_n, g.dc_n = c.dc_n;
  g.dgx = c.dgx, g.dghn = c.dghn, g.dh0 = c.dh0, g.dc0 = c.dc0, g.dh = c.dh;

  // LSTM alone takes half the time to compile.
#ifdef LSTM
  both<isa::LstmCell<isa::Grade::kExact>>(p, g, parallel);
#else
  if (p.cell == Cell::kGru)
    both<isa::GruCell<isa::Grade::kExact>>(p, g, parallel);
  else
    both<isa::RnnCell>(p, g, parallel);
#endif
}

}  // namespace

#ifdef RACES
// A team of two on LSTM with and without a projection; the values do not matter.
int main() {
  for (const bool projected : {false, true}) {
    MutantRecurrent c{};
    c.H = 70, c.P = projected ? 62 : 70, c.D = 1, c.T = 6, c.B = 3, c.N = c.T * c.B, c.threads = 2;
    std::vector<std::vector<float>> memory;
    const auto take = [&](int64_t n) { return memory.emplace_back(n, 0.01f).data(); };
    c.gx = c.gates = take(c.N * 4 * c.H), c.w_hh = take(4 * c.H * c.P);
    if (projected) c.w_hr = take(c.P * c.H), c.dh = take(c.N * c.P);
    c.h0 = take(c.B * c.P), c.c0 = take(c.B * c.H), c.cells = take(c.N * c.H);
    c.dy = take(c.N * c.P), c.y = take(c.N * c.P), c.h_n = take(c.B * c.P);
    c.c_n = take(c.B * c.H), c.dgx = take(c.N * 4 * c.H);
    c.dh0 = take(c.B * c.P), c.dc0 = take(c.B * c.H);
    run(c);
  }
}
#endif

// Returns 0, or 1 where `size` says that the caller has another struct.
extern "C" __attribute__((visibility("default"))) int mutant_recurrent_run(
    const MutantRecurrent* call, int64_t size) {
  if (size != int64_t(sizeof(MutantRecurrent))) return 1;
  run(*call);
  return 0;
}
