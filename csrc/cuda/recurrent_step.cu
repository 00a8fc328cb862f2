// One step of the recurrence around a GEMM: where W_hh does not stay on chip, and for projections.
//
// Forward: gx_t + W_hh h -> gates, c, h, y and what the backward wants, in one launch for all
// directions. Backward likewise. An element a thread, units of a row neighbours. Bound by memory: a
// step moves (2 G + 8) B H elements about (LSTM, saving), which L2 has; the GEMM before it moves
// W_hh again in every step. Two launches a step are about 5 us of a GPU's front end (*estimate*):
// this tier is for H where the GEMM is longer than that.
#include "launch.cuh"
#include "recurrent_call.cuh"
#include "recurrent_cells.cuh"

namespace fastattn::cuda {
namespace {

constexpr int kStepThreads = 256;

template <typename T_, int kGates_>
struct Config {
  using T = T_;
  static constexpr int kGates = kGates_;
  using Cell =
      std::conditional_t<kGates == 4, LstmCell, std::conditional_t<kGates == 3, GruCell, RnnCell>>;
};

// This thread's element of (D, B, width).
struct Element {
  int d, b, unit;
  bool there;

  __device__ Element(const RecurrentParams& p, int width) {
    const int64_t i = int64_t(blockIdx.x) * kStepThreads + thread_id();
    unit = int(i % width), b = int(i / width % p.B), d = int(i / width / p.B);
    there = d < p.D;
  }
};

template <class C>
__global__ void __launch_bounds__(kStepThreads)
    recurrent_step_fwd_kernel(const __grid_constant__ RecurrentStep c) {
  using T = typename C::T;
  using Cell = typename C::Cell;
  const RecurrentParams& p = c.p;
  const Element at(p, p.H);
  if (!at.there) return;
  const int t = time_of(p, at.d, c.s);
  const StepRows rows(p, t);
  if (at.b >= rows.n) return;
  const bool projected = p.P != p.H;
  const int64_t row = rows.first + at.b, state = (int64_t(at.d) * p.B + at.b) * p.H + at.unit;
  const int64_t of_direction = int64_t(at.d) * p.N + row;
  const int64_t of_y = (row * p.D + at.d) * p.P + at.unit;
  if (!has_step(p, at.b, t, rows.n)) {
    if (!projected) store<T>(p.y, of_y, 0.f);
    return;
  }
  float x[4], gh[4], saved[4];
#pragma unroll
  for (int k = 0; k < C::kGates; ++k) {
    x[k] = load<T>(p.gx, (of_direction * C::kGates + k) * p.H + at.unit);
    gh[k] = load<T>(c.product[at.d], (int64_t(at.b) * C::kGates + k) * p.H + at.unit);
  }
  CellState now = {Cell::kReadsH ? c.h[state] : 0.f, Cell::kHasC ? c.c[state] : 0.f};
  Cell::forward(x, gh, p.b_hn[at.d] ? load<T>(p.b_hn[at.d], at.unit) : 0.f, p.cell, now, saved);
  if (Cell::kHasC) c.c[state] = now.c;
  if (projected) {
    store<T>(c.next, state, now.h);
  } else {
    c.h[state] = now.h;
    store<T>(c.next, state, masked<T>(p, state, now.h));
    store<T>(p.y, of_y, now.h);
  }
  if (Cell::kSaved && p.gates)
#pragma unroll
    for (int k = 0; k < Cell::kSaved; ++k)
      store<T>(p.gates, (of_direction * 4 + k) * p.H + at.unit, saved[k]);
  if (Cell::kHasC && p.cells) store<T>(p.cells, of_direction * p.H + at.unit, now.c);
}

// h = W_hr m is there: y, and what the next step reads.
template <typename T>
__global__ void __launch_bounds__(kStepThreads)
    recurrent_step_project_kernel(const __grid_constant__ RecurrentStep c) {
  const RecurrentParams& p = c.p;
  const Element at(p, p.P);
  if (!at.there) return;
  const int t = time_of(p, at.d, c.s);
  const StepRows rows(p, t);
  if (at.b >= rows.n) return;
  const bool here = has_step(p, at.b, t, rows.n);
  const float h = here ? load<T>(c.product[at.d], int64_t(at.b) * p.P + at.unit) : 0.f;
  store<T>(p.y, ((rows.first + at.b) * p.D + at.d) * p.P + at.unit, h);
  if (!here) return;
  const int64_t state = (int64_t(at.d) * p.B + at.b) * p.P + at.unit;
  c.h[state] = h;
  store<T>(c.next, state, masked<T>(p, state, h));
}

// dh of the carried state, with what W_hh^T brought from the step after.
template <typename T>
__device__ __forceinline__ float carried_dh(const RecurrentStep& c, const Element& at) {
  const RecurrentParams& p = c.p;
  const int64_t state = (int64_t(at.d) * p.B + at.b) * p.P + at.unit;
  float dh = c.h[state];
  if (c.s == 0) return dh;
  const int t_after = time_of(p, at.d, p.T - c.s);
  const StepRows after(p, t_after);
  if (has_step(p, at.b, t_after, after.n))
    dh += masked<T>(p, state, load<T>(c.product[at.d], int64_t(at.b) * p.P + at.unit));
  return dh;
}

template <class C>
__global__ void __launch_bounds__(kStepThreads)
    recurrent_step_bwd_kernel(const __grid_constant__ RecurrentStep c) {
  using T = typename C::T;
  using Cell = typename C::Cell;
  const RecurrentParams& p = c.p;
  const RecurrentGrads& g = c.g;
  const Element at(p, p.H);
  if (!at.there) return;
  const bool projected = p.P != p.H;
  const int64_t state = (int64_t(at.d) * p.B + at.b) * p.H + at.unit;
  float dh =
      projected ? load<T>(c.product[at.d], int64_t(at.b) * p.H + at.unit) : carried_dh<T>(c, at);
  const int j = p.T - 1 - c.s;
  if (j < 0) {  // the end: dh is dh0
    if (!projected) c.h[state] = dh;
    return;
  }
  const int t = time_of(p, at.d, j), t_before = j > 0 ? time_of(p, at.d, j - 1) : -1;
  const StepRows rows(p, t), before = j > 0 ? StepRows(p, t_before) : StepRows();
  const int64_t row = int64_t(at.d) * p.N + rows.first + at.b;
  CellGrad grad = {};
  const bool here = has_step(p, at.b, t, rows.n);
  if (here) {
    CellSaved saved;
    load_saved<Cell, T>(saved, p, at.d, at.b, at.unit, rows, before, t_before);
    if (!projected && g.dy) dh += load<T>(g.dy, ((rows.first + at.b) * p.D + at.d) * p.P + at.unit);
    float dc = Cell::kHasC ? c.c[state] : 0.f;
    Cell::backward(saved, dh, p.cell, dc, grad);
    if (Cell::kHasC) c.c[state] = dc;
    dh = grad.past;
  }
  if (!projected) c.h[state] = dh;
  const int64_t sequence = int64_t(at.d) * p.B + at.b;
#pragma unroll
  for (int k = 0; k < C::kGates; ++k) {
    store<T>(c.next, (sequence * C::kGates + k) * p.H + at.unit, grad.dgh[k]);
    if (at.b < rows.n) store<T>(g.dgx, (row * C::kGates + k) * p.H + at.unit, grad.dx[k]);
  }
  if (g.dghn && at.b < rows.n) store<T>(g.dghn, row * p.H + at.unit, grad.dgh[2]);
}

// A projection's dh of the step: carried, what the step after brought, and dy.
template <typename T>
__global__ void __launch_bounds__(kStepThreads)
    recurrent_step_gather_kernel(const __grid_constant__ RecurrentStep c) {
  const RecurrentParams& p = c.p;
  const Element at(p, p.P);
  if (!at.there) return;
  const int64_t state = (int64_t(at.d) * p.B + at.b) * p.P + at.unit;
  float dh = carried_dh<T>(c, at), of_step = 0.f;
  const int j = p.T - 1 - c.s;
  if (j >= 0) {
    const int t = time_of(p, at.d, j);
    const StepRows rows(p, t);
    if (has_step(p, at.b, t, rows.n)) {
      of_step = dh, dh = 0.f;
      if (c.g.dy) of_step += load<T>(c.g.dy, ((rows.first + at.b) * p.D + at.d) * p.P + at.unit);
    }
    if (at.b < rows.n)
      store<T>(c.dh, (int64_t(at.d) * p.N + rows.first + at.b) * p.P + at.unit, of_step);
    store<T>(c.next, state, of_step);
  }
  c.h[state] = dh;
}

// ---- launch ------------------------------------------------------------------------------------

using StepVariant = Variant<RecurrentStep>;

template <typename T, int kGates>
constexpr StepVariant forward(DType dtype) {
  return {{"recurrent_step_fwd_kernel", dtype, kGates, true, 0, 0, kStepThreads, 0},
          recurrent_step_fwd_kernel<Config<T, kGates>>};
}
template <typename T, int kGates>
constexpr StepVariant backward(DType dtype) {
  return {{"recurrent_step_bwd_kernel", dtype, kGates, true, 0, 0, kStepThreads, 0},
          recurrent_step_bwd_kernel<Config<T, kGates>>};
}
template <typename T, int>
constexpr StepVariant project(DType dtype) {
  return {{"recurrent_step_project_kernel", dtype, 256, true, 0, 0, kStepThreads, 0},
          recurrent_step_project_kernel<T>};
}
template <typename T, int>
constexpr StepVariant gather(DType dtype) {
  return {{"recurrent_step_gather_kernel", dtype, 256, true, 0, 0, kStepThreads, 0},
          recurrent_step_gather_kernel<T>};
}
#define FASTATTN_DTYPES(make, gates)                                          \
  make<__nv_bfloat16, gates>(DType::kBf16), make<__half, gates>(DType::kF16), \
      make<float, gates>(DType::kF32)
#define FASTATTN_CELLS(make) \
  FASTATTN_DTYPES(make, 4), FASTATTN_DTYPES(make, 3), FASTATTN_DTYPES(make, 1)
const StepVariant kForward[] = {FASTATTN_CELLS(forward)};
const StepVariant kBackward[] = {FASTATTN_CELLS(backward)};
const StepVariant kProject[] = {FASTATTN_DTYPES(project, 0)};
const StepVariant kGather[] = {FASTATTN_DTYPES(gather, 0)};
#undef FASTATTN_CELLS
#undef FASTATTN_DTYPES

template <int kCount>
Launch launch_step(const StepVariant (&variants)[kCount], const RecurrentStep& step, int gates,
                   int width, cudaStream_t stream) {
  Launch out;
  out.kernel = variants[0].kernel;
  out.error = cudaErrorInvalidValue;
  const int64_t elements = int64_t(step.p.D) * step.p.B * width;
  for (const auto& v : variants)
    if (v.dtype == step.p.dtype && v.head_dim == gates)
      launch(out, v, (elements + kStepThreads - 1) / kStepThreads, stream, step);
  return out;
}

}  // namespace

Launch recurrent_step_forward(const RecurrentStep& step, cudaStream_t stream) {
  return launch_step(kForward, step, recurrent_gates(step.p.cell), step.p.H, stream);
}
Launch recurrent_step_backward(const RecurrentStep& step, cudaStream_t stream) {
  return launch_step(kBackward, step, recurrent_gates(step.p.cell), step.p.H, stream);
}
Launch recurrent_step_project(const RecurrentStep& step, cudaStream_t stream) {
  return launch_step(kProject, step, 256, step.p.P, stream);
}
Launch recurrent_step_gather(const RecurrentStep& step, cudaStream_t stream) {
  return launch_step(kGather, step, 256, step.p.P, stream);
}

int recurrent_step_variants(VariantInfo* out, int capacity) {
  int n = 0;
  const auto add = [&](const auto& variants) {
    n += n < capacity ? list(variants, out + n, capacity - n) : list(variants, nullptr, 0);
  };
  add(kForward), add(kBackward), add(kProject), add(kGather);
  return n;
}

}  // namespace fastattn::cuda
