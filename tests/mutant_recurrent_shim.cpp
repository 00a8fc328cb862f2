// The recurrence's kernels of one instruction set (FASTATTN_ISA, FASTATTN_LEVEL) as a library of
// their own, for test_mutations_recurrent.py: one C entry point, compiled against a copy of
// csrc/cpu with a bug planted. With LSTM of that cell alone, in fp32; with TILES of LSTM and GRU,
// in bf16 on AMX tiles; else of all but LSTM, in fp32. With RACES it is a program, for
// ThreadSanitizer.
#include "layernorm_ffn.h"
#include "recurrent.h"
#include "team.h"
#include "target_begin.h"

#include "simd.h"
#include "philox.h"
#include "gemm.h"
#include "amx.h"
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

#include <unistd.h>

#include <chrono>
#include <deque>

#include "mutant_bf16.h"

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

#ifdef TILES
constexpr isa::Grade kGrade = isa::Grade::kCoarse;
using Storage = isa::bf16;
using Products = isa::TileRecurrentProducts;
#else
constexpr isa::Grade kGrade = isa::Grade::kExact;
using Storage = float;
using Products = isa::FloatProducts;
#endif

// The caller's arrays in the storage of the kernels.
class Arrays {
 public:
  Storage* argument(float* x, int64_t n) { return stored(x, n, false); }
  Storage* result(float* x, int64_t n) { return stored(x, n, true); }

 private:
  Storage* stored(float* x, [[maybe_unused]] int64_t n, [[maybe_unused]] bool result) {
#ifdef TILES
    return static_cast<Storage*>(halves_.emplace_back(x, n, result).data());
#else
    return x;
#endif
  }
  std::deque<Half> halves_;
};

template <class Cell>
void both(const RecurrentParams& p, const RecurrentGrads& g, const Parallel& parallel) {
  isa::RecurrentForward<Cell, Storage, Products>(p, parallel).run();
  isa::RecurrentBackward<Cell, Storage, Products>(p, g, parallel).run();
}

// Everything is 8 bytes wide. Null = absent. mutant_recurrent.py holds the same list.
struct MutantRecurrent {
  int64_t cell, H, P, D, reverse, T, B, N, threads, n_parts;
  int64_t *offsets, *lengths, *index, *active, *bounds;
  float *gx, *gh, *w_hh, *b_ih, *b_hh, *w_hr, *h0, *c0, *h_mask;  // weights: (D, ...)
  float *dy, *dh_n, *dc_n;
  float *y, *h_n, *c_n, *gates, *cells, *dgx, *dghn, *dh0, *dc0, *dh;
};

// gx in parts, each of them copied from the whole; what is not the part's is NaN.
class InParts {
 public:
  InParts(const MutantRecurrent& c, RecurrentParams& p)
      : whole_(static_cast<const Storage*>(p.gx)), N_(c.N), columns_(kGates[c.cell] * c.H) {
    if (c.n_parts == 0) return;
    p.parts = {c.bounds, c.n_parts, 0, copy, this};
    for (int64_t i = 0; i < c.n_parts; ++i)
      for (int d = 0; d < p.D; ++d) {
        const int64_t s0 = c.bounds[i], s1 = c.bounds[i + 1];
        p.parts.rows = std::max(p.parts.rows, p.end_row(d, s0, s1) - p.first_row(d, s0, s1));
      }
    rows_ = p.parts.rows, part_.resize(size_t(p.D * rows_ * columns_)), p.gx = part_.data();
  }

 private:
  static void copy(void* self, int d, int64_t row, int64_t rows) {
    InParts& s = *static_cast<InParts*>(self);
    const auto to = s.part_.begin() + d * s.rows_ * s.columns_;
    std::fill_n(to, s.rows_ * s.columns_, Storage(std::nanf("")));
    std::copy_n(s.whole_ + (d * s.N_ + row) * s.columns_, rows * s.columns_, to);
  }

  const Storage* whole_;
  int64_t N_, columns_, rows_ = 0;
  std::vector<Storage> part_;
};

void run(const MutantRecurrent& c) {
  Parallel parallel;
  parallel.threads = int(c.threads), parallel.run = run_threads;

  Arrays arrays;
  const int64_t rows = kGates[c.cell] * c.H, steps = c.D * c.N, states = c.D * c.B;
  RecurrentParams p;
  p.cell = Cell(c.cell), p.H = c.H, p.P = c.P, p.D = int(c.D), p.reverse = unsigned(c.reverse);
  p.steps = {c.T, c.B, c.N, c.offsets, c.lengths, c.index, c.active};
  p.gx = arrays.argument(c.gx, steps * rows), p.gh = arrays.argument(c.gh, states * rows);
  p.h0 = arrays.argument(c.h0, states * c.P), p.c0 = arrays.argument(c.c0, states * c.H);
  p.h_mask = arrays.argument(c.h_mask, states * c.P);
  for (int64_t d = 0; d < c.D; ++d) {
    const auto part = [&](float* x, int64_t n) { return arrays.argument(x ? x + d * n : x, n); };
    p.w_hh[d] = part(c.w_hh, rows * c.P), p.w_hr[d] = part(c.w_hr, c.P * c.H);
    p.b_ih[d] = part(c.b_ih, rows), p.b_hh[d] = part(c.b_hh, rows);
  }
  p.y = arrays.result(c.y, steps * c.P), p.h_n = arrays.result(c.h_n, states * c.P);
  p.c_n = arrays.result(c.c_n, states * c.H), p.cells = arrays.result(c.cells, steps * c.H);
  p.gates = arrays.result(c.gates, steps * kSaved[c.cell] * c.H);
  const InParts parts(c, p);
  RecurrentGrads g;
  g.dy = arrays.argument(c.dy, steps * c.P), g.dh_n = arrays.argument(c.dh_n, states * c.P);
  g.dc_n = arrays.argument(c.dc_n, states * c.H);
  g.dgx = arrays.result(c.dgx, steps * rows), g.dghn = arrays.result(c.dghn, steps * c.H);
  g.dh0 = arrays.result(c.dh0, states * c.P), g.dc0 = arrays.result(c.dc0, states * c.H);
  g.dh = arrays.result(c.dh, steps * c.P);

#ifdef TILES
  ask_for_tiles();
#endif
  // LSTM alone takes half the time to compile.
#if defined(LSTM) || defined(TILES)
  if (p.cell == Cell::kLstm) both<isa::LstmCell<kGrade>>(p, g, parallel);
#endif
#ifndef LSTM
  if (p.cell == Cell::kGru) both<isa::GruCell<kGrade>>(p, g, parallel);
#endif
#if !defined(LSTM) && !defined(TILES)
  if (p.cell == Cell::kTanh || p.cell == Cell::kRelu) both<isa::RnnCell>(p, g, parallel);
#endif
}

}  // namespace

#ifdef RACES
// One comes so late to every barrier that the other sleeps there.
void wait_long() {
  Team team(2);
  run_threads(
      2,
      [](void* ctx, int) {
        Team& team = *static_cast<Team*>(ctx);
        const int member = team.join();
        for (int turn = 0; turn < 6; ++turn) {
          if (turn % 2 == member) std::this_thread::sleep_for(std::chrono::milliseconds(200));
          team.barrier();
        }
      },
      &team);
}

// A team of two on LSTM with and without a projection; the values do not matter.
int main() {
  alarm(60);  // who waits for ever says so
  wait_long();
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
extern "C" __attribute__((visibility("default"))) int mutant_run(const MutantRecurrent* call,
                                                                 int64_t size) {
  if (size != int64_t(sizeof(MutantRecurrent))) return 1;
  run(*call);
  return 0;
}
