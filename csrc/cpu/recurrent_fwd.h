// The recurrence forward: for each step the product W_hh h, then the cell on its sums.
//
// FLOPs: 2 T B G H P. Bytes: gx, y and what is saved once; the weights T times, from the caches. A
// member of a team owns hidden units and all of their gates, so the cell needs nobody else; the new
// h goes to the other one of two buffers, and one barrier a step makes it everybody's.

namespace fastattn {
namespace FASTATTN_ISA {

template <class C, class T, class E>
class RecurrentForward {
  using A = typename E::Item;
  static constexpr int kGates = C::kGates, kV = kGates == 1 ? 4 : kGates;
  static constexpr int64_t kUnits = kGates == 1 ? 4 * W : W;  // of a panel
  static constexpr int64_t kSums = kV * W;

 public:
  RecurrentForward(const RecurrentParams& p, const Parallel& parallel)
      : p_(p), parallel_(parallel), panels_(div_up(p.H, kUnits)), out_panels_(div_up(p.P, 4 * W)) {
    plan_ = plan_recurrence(p, panels_, sizeof(A), parallel);
  }

  void run() {
    Buffer<char> memory;
    Arena sizes;
    layout(sizes);
    Arena arena(memory.reserve(sizes.used()));
    layout(arena);
    pack();
    const Parts& parts = p_.parts;
    for (int64_t i = 0; i < std::max<int64_t>(parts.n, 1); ++i) {
      const int64_t s0 = parts.n ? parts.bounds[i] : 0,
                    s1 = parts.n ? parts.bounds[i + 1] : p_.steps.T;
      for (int d = 0; d < (parts.n ? p_.D : 0); ++d) {
        first_row_[d] = p_.first_row(d, s0, s1);
        parts.make(parts.ctx, d, first_row_[d], p_.end_row(d, s0, s1) - first_row_[d]);
      }
      run_groups(plan_, parallel_, [&](int group, Team& team, int member) FASTATTN_LAMBDA {
        Member m{*this, group, team, member};
        m.run(s0, s1);
      });
    }
  }

 private:
  struct Group {
    A* h[2];     // (slots, P): what enters the product of the step
    A* m;        // (slots, H): what enters the projection
    float* c;    // (slots, H)
    float* h32;  // (slots, H)
  };
  // In fp32, a gate's units side by side: x: b_ih + b_hh, but GRU's n gate, whose b_hh is hn.
  struct Biases {
    float *x, *hn;
  };

  void layout(Arena& arena) {
    const int64_t rows = E::rows(plan_.most_slots(p_.steps));
    k_ = row_stride<E>(p_.P), k_hr_ = row_stride<E>(p_.H), lane_ = round_up(p_.H, W);
    for (int d = 0; d < p_.D; ++d) {
      w_[d] = arena.take<A>(p_.gh ? 0 : panels_ * E::panel_size(p_.P, kV));
      w_hr_[d] = arena.take<A>(p_.w_hr[0] ? out_panels_ * E::panel_size(p_.H, 4) : 0);
    }
    for (int d = 0; d < p_.D; ++d)
      biases_[d] = {arena.take<float>(kGates * lane_), arena.take<float>(lane_)};
    groups_.resize(plan_.groups());
    for (Group& g : groups_) {
      g.h[0] = arena.take<A>(rows * k_), g.h[1] = arena.take<A>(rows * k_);
      g.m = arena.take<A>(p_.w_hr[0] ? rows * k_hr_ : 0);
      g.c = arena.take<float>(C::kHasC ? rows * lane_ : 0);
      g.h32 = arena.take<float>(C::kKeepsH ? rows * lane_ : 0);
    }
    const int64_t block = std::min<int64_t>(E::rows(kRowBlock), rows);
    sums_.resize(plan_.groups() * plan_.team);
    for (float*& s : sums_) s = arena.take<float>(block * 4 * W);
  }

  void add_biases(int d) {
    const T *b_ih = static_cast<const T*>(p_.b_ih[d]), *b_hh = static_cast<const T*>(p_.b_hh[d]);
    for (int gate = 0; gate < kGates; ++gate)
      for (int64_t u = 0; u < p_.H; ++u) {
        const float of_x = b_ih ? to_float(b_ih[gate * p_.H + u]) : 0.f;
        const float of_h = b_hh ? to_float(b_hh[gate * p_.H + u]) : 0.f;
        const bool apart = C::kKeepsH && gate == kGates - 1;
        biases_[d].x[gate * lane_ + u] = apart ? of_x : of_x + of_h;
        if (apart) biases_[d].hn[u] = of_h;
      }
  }

  void pack() {
    for (int d = 0; d < p_.D; ++d) add_biases(d);
    const int64_t mine = p_.gh ? 0 : panels_, theirs = p_.w_hr[0] ? out_panels_ : 0;
    const int64_t each = mine + theirs;
    Queue queue(each * p_.D);
    const int workers = workers_for(each * p_.D * W * p_.P * kV, each * p_.D, parallel_);
    parallel_.workers(workers, [&](int) FASTATTN_LAMBDA {
      for (int64_t i; queue.next(&i);) {
        const int64_t d = i / each, panel = i % each;
        if (panel < mine) {
          const Panel columns = kGates == 1 ? Panel::side_by_side(panel * kUnits, p_.H)
                                            : Panel::gates(panel * kUnits, p_.H);
          E::template pack_rows_as_columns<kV>(static_cast<const T*>(p_.w_hh[d]), p_.P, columns,
                                               w_[d] + panel * E::panel_size(p_.P, kV));
        } else {
          E::template pack_rows_as_columns<4>(static_cast<const T*>(p_.w_hr[d]), p_.H,
                                              Panel::side_by_side((panel - mine) * 4 * W, p_.P),
                                              w_hr_[d] + (panel - mine) * E::panel_size(p_.H, 4));
        }
      }
    });
  }

  // One member of the team of one group.
  struct Member {
    RecurrentForward& f;
    const int group;
    Team& team;
    const int member;
    const RecurrentParams& p = f.p_;
    const int64_t H = p.H, P = p.P, N = p.steps.N, T_ = p.steps.T;
    const int d = group / f.plan_.slices;
    const Slice slice = f.plan_.slice(p.steps, group);
    const Group& g = f.groups_[group];
    float* const sums = f.sums_[group * f.plan_.team + member];
    const Share units{f.panels_, member, team.size()}, outs{f.out_panels_, member, team.size()};
    const bool reverse = p.backwards(d), relu = p.cell == Cell::kRelu;
    const T* const mask = static_cast<const T*>(p.h_mask);
    T* const y = static_cast<T*>(p.y) + d * P;

    void run(int64_t s0, int64_t s1) {
      if (s0 == 0) {
        begin();
        team.barrier();
      }
      [[maybe_unused]] typename E::Scope scope;
      for (int64_t s = s0; s < s1; ++s) step(reverse ? T_ - 1 - s : s, s & 1);
      if (s1 == T_) end();
    }

    const T* gx(int64_t row) const {
      const int64_t rows = p.parts.n ? p.parts.rows : N;
      return static_cast<const T*>(p.gx) + (d * rows + row - f.first_row_[d]) * kGates * H;
    }

    // Columns of h that are the member's: with a projection those of its part of the product.
    Share own(int64_t width, const Share& panels, int64_t n) const {
      Share s = panels;
      s.begin = std::min(n, s.begin * width), s.end = std::min(n, s.end * width);
      return s;
    }
    Share own_h() const { return p.w_hr[0] ? own(4 * W, outs, P) : own(kUnits, units, H); }

    void begin() {
      const Share h = own_h(), c = own(kUnits, units, H);
      const bool last = h.begin < h.end && h.end == P;
      for (int64_t k = 0; k < slice.slots; ++k) {
        const int64_t at = d * p.steps.B + slice.sequence(k);
        const T* h0 = static_cast<const T*>(p.h0) + at * P;
        for (int64_t j = h.begin; j < h.end; j += W) {
          const int64_t n = std::min<int64_t>(W, h.end - j);
          const vf x = load_lanes(h0 + j, n);
          if (C::kKeepsH) store(g.h32 + k * f.lane_ + j, x);
          put_h(k, j, n, x, 0), put_h(k, j, n, x, 1);
        }
        for (A* to : {g.h[0] + k * f.k_, g.h[1] + k * f.k_})
          if (last) std::fill(to + P, to + f.k_, A{});
        if (p.w_hr[0] && last) std::fill(g.m + k * f.k_hr_ + H, g.m + (k + 1) * f.k_hr_, A{});
        if (!C::kHasC) continue;
        const T* c0 = static_cast<const T*>(p.c0) + at * H;
        for (int64_t j = c.begin; j < c.end; j += W)
          store(g.c + k * f.lane_ + j, load_lanes(c0 + j, std::min<int64_t>(W, c.end - j)));
      }
    }

    // h (its slot, from column j) as the product of the next step takes it: rounded, masked.
    FASTATTN_INLINE void put_h(int64_t k, int64_t j, int64_t n, vf x, int to) const {
      if (mask) {
        T rounded[W];
        store(rounded, x);
        x = load(rounded) * load_lanes(mask + (d * p.steps.B + slice.sequence(k)) * P + j, n);
      }
      put(g.h[to] + k * f.k_ + j, n, x);
    }
    // Rounded to the storage, as an operand.
    static FASTATTN_INLINE void put(A* to, int64_t n, vf x) {
      if constexpr (std::is_same_v<A, T>) {
        store_lanes(to, n, x);
      } else {
        T rounded[W];
        store(rounded, x);
        store_lanes(to, n, load(rounded));
      }
    }

    void step(int64_t t, int parity) {
      const int64_t n = slice.active(t);
      for (int64_t i = 0; i < units.size(); ++i)
        for (int64_t r = 0; r < n; r += kRowBlock) {
          const int64_t rows = std::min(kRowBlock, n - r), panel = units.turning(i, parity);
          ask_for(t, panel, r, rows);
          product(parity, panel, r, rows);
          cells(t, panel, r, rows, parity);
        }
      if (p.w_hr[0]) project(t, n, parity);
      if (n < slice.slots) absent(t, n);
      team.barrier();
    }

    // gx is read once, in pieces too small for the hardware's prefetchers: they come meanwhile.
    void ask_for(int64_t t, int64_t panel, int64_t r, int64_t rows) const {
      for (int64_t k = r; k < r + rows; ++k) {
        const T* row = gx(slice.row(t, k));
        for (int gate = 0; gate < kGates; ++gate) prefetch(row + gate * H + panel * kUnits);
      }
    }

    void product(int parity, int64_t panel, int64_t r, int64_t rows) const {
      if (!p.gh)
        return E::template multiply<kV>(rows, P, g.h[parity] + r * f.k_, f.k_,
                                        f.w_[d] + panel * E::panel_size(P, kV), sums);
      for (int64_t k = r; k < r + rows; ++k) {
        const T* row = static_cast<const T*>(p.gh) +
                       (d * p.steps.B + slice.sequence(k)) * kGates * H + panel * kUnits;
        for (int v = 0; v < kV; ++v) {
          const int64_t j = kGates == 1 ? v * W : 0;
          const int64_t n = std::min<int64_t>(W, H - panel * kUnits - j);
          store(sums + (k - r) * kSums + v * W,
                n > 0 ? load_lanes(row + (kGates == 1 ? j : v * H), n) : vf{});
        }
      }
    }

    void cells(int64_t t, int64_t panel, int64_t r, int64_t rows, int parity) const {
      for (int64_t k = r; k < r + rows; ++k)
        for (int64_t j = 0; j < kUnits; j += W) {
          const int64_t u = panel * kUnits + j, n = std::min<int64_t>(W, H - u);
          if (n > 0) one_cell(slice.row(t, k), k, u, n, sums + (k - r) * kSums + j, parity);
        }
    }

    FASTATTN_INLINE void one_cell(int64_t row, int64_t k, int64_t u, int64_t n, const float* sum,
                                  int parity) const {
      CellIn in;
      const T* x = gx(row) + u;
#pragma GCC unroll 4
      for (int gate = 0; gate < kGates; ++gate) {
        in.x[gate] = load_lanes(x + gate * H, n) + load(f.biases_[d].x + gate * f.lane_ + u);
        in.a[gate] = load(sum + gate * W);
      }
      const int64_t at = k * f.lane_ + u;
      if (C::kKeepsH) {
        in.h = load(g.h32 + at);
        in.b_hn = load(f.biases_[d].hn + u);
      }
      if (C::kHasC) in.c = load(g.c + at);
      const CellOut out = C::forward(in, relu);
      if (C::kHasC) store(g.c + at, out.c);
      if (C::kKeepsH) store(g.h32 + at, out.h);
      if (C::kSaved && p.gates) {
        T* saved = static_cast<T*>(p.gates) + (d * N + row) * C::kSaved * H + u;
#pragma GCC unroll 4
        for (int i = 0; i < C::kSaved; ++i) store_lanes(saved + i * H, n, out.saved[i]);
        if (C::kHasC) store_lanes(static_cast<T*>(p.cells) + (d * N + row) * H + u, n, out.c);
      }
      if (p.w_hr[0]) return put(g.m + k * f.k_hr_ + u, n, out.h);
      store_lanes(y + row * p.D * P + u, n, out.h);
      put_h(k, u, n, out.h, 1 - parity);
    }

    void project(int64_t t, int64_t n, int parity) {
      team.barrier();
      for (int64_t panel = outs.begin; panel < outs.end; ++panel)
        for (int64_t r = 0; r < n; r += kRowBlock) {
          const int64_t rows = std::min(kRowBlock, n - r);
          E::template multiply<4>(rows, H, g.m + r * f.k_hr_, f.k_hr_,
                                  f.w_hr_[d] + panel * E::panel_size(H, 4), sums);
          for (int64_t k = r; k < r + rows; ++k)
            for (int v = 0; v < 4; ++v) {
              const int64_t j = panel * 4 * W + v * W, lanes = std::min<int64_t>(W, P - j);
              if (lanes <= 0) break;
              const vf x = load(sums + ((k - r) * 4 + v) * W);
              store_lanes(y + slice.row(t, k) * p.D * P + j, lanes, x);
              put_h(k, j, lanes, x, 1 - parity);
            }
        }
    }

    // Slots without this step: their state stays, in both buffers; padded rows of y are zero.
    void absent(int64_t t, int64_t n) const {
      const Share h = own_h();
      for (int64_t k = n; k < slice.slots; ++k) {
        if (!p.steps.offsets)
          std::fill(y + slice.row(t, k) * p.D * P + h.begin, y + slice.row(t, k) * p.D * P + h.end,
                    T{});
      }
    }

    void end() const {
      const Share h = own_h(), c = own(kUnits, units, H);
      for (int64_t k = 0; k < slice.slots; ++k) {
        const int64_t at = d * p.steps.B + slice.sequence(k), length = slice.length(k);
        const T* from = length == 0 ? static_cast<const T*>(p.h0) + at * P
                                    : y + slice.row(reverse ? 0 : length - 1, k) * p.D * P;
        std::copy(from + h.begin, from + h.end, static_cast<T*>(p.h_n) + at * P + h.begin);
        if (!C::kHasC) continue;
        for (int64_t j = c.begin; j < c.end; j += W)
          store_lanes(static_cast<T*>(p.c_n) + at * H + j, std::min<int64_t>(W, c.end - j),
                      load(g.c + k * f.lane_ + j));
      }
    }
  };

  const RecurrentParams& p_;
  const Parallel& parallel_;
  const int64_t panels_, out_panels_;
  RecurrentPlan plan_;
  int64_t k_ = 0, k_hr_ = 0, lane_ = 0;
  int64_t first_row_[2] = {};  // of the whole, in gx's first row: by direction
  A *w_[2] = {}, *w_hr_[2] = {};
  Biases biases_[2] = {};
  std::vector<Group> groups_;
  std::vector<float*> sums_;
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
