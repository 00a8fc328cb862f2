// The recurrence backward, through time: for each step the cell's gradients from dh, then
// dh of the step before += dgates W_hh.
//
// FLOPs: 2 T B G H P. Bytes: gates, cells, y, dy and dgx once; the weights T times, from the
// caches. A member of a team owns columns of h and makes both dh and the gates' gradients there;
// the gradients go to one of two buffers in turn, and one barrier a step makes them everybody's
// (with a projection two).

namespace fastattn {
namespace FASTATTN_ISA {

template <class C, class T, class E>
class RecurrentBackward {
  using A = typename E::Item;
  static constexpr int kGates = C::kGates;
  static constexpr int64_t kColumns = 4 * W;  // of a panel

 public:
  RecurrentBackward(const RecurrentParams& p, const RecurrentGrads& grads, const Parallel& parallel)
      : p_(p),
        out_(grads),
        parallel_(parallel),
        panels_(div_up(p.P, kColumns)),
        h_panels_(div_up(p.H, kColumns)) {
    plan_ = plan_recurrence(p, panels_, sizeof(A), parallel);
  }

  void run() {
    Buffer<char> memory;
    Arena sizes;
    layout(sizes);
    Arena arena(memory.reserve(sizes.used()));
    layout(arena);
    pack();
    run_groups(plan_, parallel_, [&](int group, Team& team, int member) FASTATTN_LAMBDA {
      Member m{*this, group, team, member};
      m.run();
    });
  }

 private:
  struct Group {
    A* d[2];    // (slots, G H): gradients of the gates, of the product's side
    A* dh_out;  // (slots, P): gradient of h, where it came out of a projection
    float* dh;  // (slots, P): what reaches h of the step before
    float* dm;  // (slots, H): gradient of what the projection is given
    float* dc;  // (slots, H)
  };

  void layout(Arena& arena) {
    const int64_t rows = E::rows(plan_.most_slots(p_.steps));
    k_ = row_stride<E>(kGates * p_.H), k_hr_ = row_stride<E>(p_.P);
    lane_ = round_up(p_.H, kColumns), lane_p_ = round_up(p_.P, kColumns);
    for (int d = 0; d < p_.D; ++d) {
      w_[d] = arena.take<A>(p_.gh ? 0 : panels_ * E::panel_size(kGates * p_.H, 4));
      w_hr_[d] = arena.take<A>(p_.w_hr[0] ? h_panels_ * E::panel_size(p_.P, 4) : 0);
    }
    groups_.resize(plan_.groups());
    for (Group& g : groups_) {
      g.d[0] = arena.take<A>(rows * k_), g.d[1] = arena.take<A>(rows * k_);
      g.dh_out = arena.take<A>(p_.w_hr[0] ? rows * k_hr_ : 0);
      g.dh = arena.take<float>(rows * lane_p_);
      g.dm = arena.take<float>(p_.w_hr[0] ? rows * lane_ : 0);
      g.dc = arena.take<float>(C::kHasC ? rows * lane_ : 0);
    }
    const int64_t block = std::min<int64_t>(E::rows(kRowBlock), rows);
    sums_.resize(plan_.groups() * plan_.team);
    for (float*& s : sums_) s = arena.take<float>(block * kColumns);
  }

  void pack() {
    const int64_t mine = p_.gh ? 0 : panels_, theirs = p_.w_hr[0] ? h_panels_ : 0;
    const int64_t each = mine + theirs;
    Queue queue(each * p_.D);
    const int workers = workers_for(each * p_.D * kColumns * kGates * p_.H, each * p_.D, parallel_);
    parallel_.workers(workers, [&](int) FASTATTN_LAMBDA {
      for (int64_t i; queue.next(&i);) {
        const int64_t d = i / each, panel = i % each;
        if (panel < mine) {
          E::template pack_columns<4>(static_cast<const T*>(p_.w_hh[d]), kGates * p_.H, p_.P,
                                      Panel::side_by_side(panel * kColumns, p_.P),
                                      w_[d] + panel * E::panel_size(kGates * p_.H, 4));
        } else {
          E::template pack_columns<4>(static_cast<const T*>(p_.w_hr[d]), p_.P, p_.H,
                                      Panel::side_by_side((panel - mine) * kColumns, p_.H),
                                      w_hr_[d] + (panel - mine) * E::panel_size(p_.P, 4));
        }
      }
    });
  }

  // One member of the team of one group.
  struct Member {
    RecurrentBackward& f;
    const int group;
    Team& team;
    const int member;
    const RecurrentParams& p = f.p_;
    const RecurrentGrads& out = f.out_;
    const int64_t H = p.H, P = p.P, N = p.steps.N, T_ = p.steps.T;
    const int64_t d = group / f.plan_.slices;
    const Slice slice = f.plan_.slice(p.steps, group);
    const Group& g = f.groups_[group];
    float* const sums = f.sums_[group * f.plan_.team + member];
    const bool projected = p.w_hr[0] != nullptr;
    // Panels of columns of h, and of hidden units: the same ones without a projection.
    const Share columns{f.panels_, member, team.size()};
    const Share hidden{f.h_panels_, member, team.size()};
    const bool reverse = p.backwards(int(d)), relu = p.cell == Cell::kRelu;
    const T* const mask = static_cast<const T*>(p.h_mask);

    void run() {
      begin();
      team.barrier();
      [[maybe_unused]] typename E::Scope scope;
      for (int64_t s = 0; s < T_; ++s) step(reverse ? s : T_ - 1 - s, s & 1);
      end();
    }

    int64_t from(const Share& s, int64_t n) const { return std::min(n, s.begin * kColumns); }
    int64_t to(const Share& s, int64_t n) const { return std::min(n, s.end * kColumns); }

    void begin() {
      for (int64_t k = 0; k < slice.slots; ++k) {
        const int64_t at = d * p.steps.B + slice.sequence(k);
        start(out.dh_n, at * P, from(columns, P), to(columns, P), g.dh + k * f.lane_p_);
        if (C::kHasC) start(out.dc_n, at * H, from(hidden, H), to(hidden, H), g.dc + k * f.lane_);
        if (member) continue;
        for (A* row : {g.d[0] + k * f.k_, g.d[1] + k * f.k_})
          std::fill(row + kGates * H, row + f.k_, A{});
        if (projected) std::fill(g.dh_out + k * f.k_hr_ + P, g.dh_out + (k + 1) * f.k_hr_, A{});
      }
    }
    static void start(const void* given, int64_t at, int64_t begin, int64_t end, float* row) {
      for (int64_t j = begin; j < end; j += W) {
        const int64_t n = std::min<int64_t>(W, end - j);
        store(row + j, given ? load_lanes(static_cast<const T*>(given) + at + j, n) : vf{});
      }
    }

    void step(int64_t t, int parity) {
      const int64_t n = slice.active(t);
      if (projected) through_projection(t, n);
      for (int64_t k = 0; k < n; ++k) {
        const Place at = place(t, k);
        for (int64_t u = from(hidden, H); u < to(hidden, H); u += W)
          one_cell(at, k, u, std::min<int64_t>(W, H - u), parity);
      }
      if (n < slice.slots) absent(t, n);
      if (p.gh) return;
      team.barrier();
      for (int64_t i = 0; i < columns.size(); ++i)
        for (int64_t r = 0; r < n; r += kRowBlock) {
          const int64_t rows = std::min(kRowBlock, n - r), panel = columns.turning(i, parity);
          E::template multiply<4>(rows, kGates * H, g.d[parity] + r * f.k_, f.k_,
                                  f.w_[d] + panel * E::panel_size(kGates * H, 4), sums);
          for (int64_t k = r; k < r + rows; ++k) carry(k, panel, sums + (k - r) * kColumns);
        }
    }

    // dh of the step before, the product's part; one_cell has left the rest there.
    void carry(int64_t k, int64_t panel, const float* sum) const {
      for (int v = 0; v < 4; ++v, sum += W) {
        const int64_t j = panel * kColumns + v * W, n = std::min<int64_t>(W, P - j);
        if (n <= 0) return;
        vf x = load(sum);
        if (mask) x *= load_lanes(mask + (d * p.steps.B + slice.sequence(k)) * P + j, n);
        float* dh = g.dh + k * f.lane_p_ + j;
        store(dh, load(dh) + x);
      }
    }

    // Rows of a slot's step and of the one that the forward did before it (-1: the initial state).
    struct Place {
      int64_t row, before, sequence;
    };
    Place place(int64_t t, int64_t k) const {
      const int64_t before = reverse ? t + 1 : t - 1;
      const bool inside = before >= 0 && before < T_ && k < slice.active(before);
      return {slice.row(t, k), inside ? slice.row(before, k) : -1, slice.sequence(k)};
    }

    FASTATTN_INLINE vf upstream(int64_t row, int64_t j, int64_t n) const {
      if (!out.dy) return vf{};
      return load_lanes(static_cast<const T*>(out.dy) + row * p.D * P + d * P + j, n);
    }

    FASTATTN_INLINE void one_cell(const Place& at, int64_t k, int64_t u, int64_t n,
                                  int parity) const {
      CellGradIn in;
      float* const dh = projected ? g.dm + k * f.lane_ + u : g.dh + k * f.lane_p_ + u;
      float* const dc = g.dc + k * f.lane_ + u;
      in.dh = projected ? load(dh) : load(dh) + upstream(at.row, u, n);
      const T* saved = static_cast<const T*>(p.gates) + (d * N + at.row) * C::kSaved * H + u;
#pragma GCC unroll 4
      for (int i = 0; i < C::kSaved; ++i) in.saved[i] = load_lanes(saved + i * H, n);
      const int64_t state = d * p.steps.B + at.sequence;
      if (C::kHasC) {
        const T* c = static_cast<const T*>(p.cells) + d * N * H + u;
        in.dc = load(dc), in.c = load_lanes(c + at.row * H, n);
        in.c_old = at.before >= 0 ? load_lanes(c + at.before * H, n)
                                  : load_lanes(static_cast<const T*>(p.c0) + state * H + u, n);
      } else {
        const T* y = static_cast<const T*>(p.y) + d * P + u;
        if (C::kKeepsH)
          in.h_old = at.before >= 0 ? load_lanes(y + at.before * p.D * P, n)
                                    : load_lanes(static_cast<const T*>(p.h0) + state * P + u, n);
        else
          in.h = load_lanes(y + at.row * p.D * P, n);
      }
      const CellGradOut o = C::backward(in, relu);
      T* dgx = static_cast<T*>(out.dgx) + (d * N + at.row) * kGates * H + u;
      A* product = g.d[parity] + k * f.k_ + u;
#pragma GCC unroll 4
      for (int i = 0; i < kGates; ++i) {
        store_lanes(dgx + i * H, n, o.d[i]);
        put(product + i * H, n, C::kKeepsH && i == kGates - 1 ? o.dhn : o.d[i]);
      }
      if (C::kKeepsH) store_lanes(static_cast<T*>(out.dghn) + (d * N + at.row) * H + u, n, o.dhn);
      if (C::kHasC) store(dc, o.dc);
      if (!projected) store(dh, C::kKeepsH ? o.dh : vf{});
    }
    // Rounded to the storage, as an operand: what the weights' gradients are made of.
    static FASTATTN_INLINE void put(A* to, int64_t n, vf x) {
      if constexpr (std::is_same_v<A, T>) {
        store_lanes(to, n, x);
      } else {
        T rounded[W];
        store(rounded, x);
        store_lanes(to, n, load(rounded));
      }
    }

    void through_projection(int64_t t, int64_t n) {
      for (int64_t k = 0; k < n; ++k) {
        const int64_t row = slice.row(t, k);
        for (int64_t j = from(columns, P); j < to(columns, P); j += W) {
          const int64_t lanes = std::min<int64_t>(W, P - j);
          float* dh = g.dh + k * f.lane_p_ + j;
          const vf x = load(dh) + upstream(row, j, lanes);
          store_lanes(static_cast<T*>(out.dh) + (d * N + row) * P + j, lanes, x);
          put(g.dh_out + k * f.k_hr_ + j, lanes, x);
          store(dh, vf{});
        }
      }
      team.barrier();
      for (int64_t panel = hidden.begin; panel < hidden.end; ++panel)
        for (int64_t r = 0; r < n; r += kRowBlock) {
          const int64_t rows = std::min(kRowBlock, n - r);
          E::template multiply<4>(rows, P, g.dh_out + r * f.k_hr_, f.k_hr_,
                                  f.w_hr_[d] + panel * E::panel_size(P, 4), sums);
          for (int64_t k = r; k < r + rows; ++k)
            std::copy_n(sums + (k - r) * kColumns, kColumns, g.dm + k * f.lane_ + panel * kColumns);
        }
    }

    // Rows of a padded batch that a sequence does not have.
    void absent(int64_t t, int64_t n) const {
      if (p.steps.offsets) return;
      const int64_t begin = from(hidden, H), count = to(hidden, H) - begin;
      for (int64_t k = n; k < slice.slots; ++k) {
        const int64_t row = d * N + slice.row(t, k);
        for (int i = 0; i < kGates; ++i)
          std::fill_n(static_cast<T*>(out.dgx) + (row * kGates + i) * H + begin, count, T{});
        if (C::kKeepsH) std::fill_n(static_cast<T*>(out.dghn) + row * H + begin, count, T{});
        if (projected)
          std::fill_n(static_cast<T*>(out.dh) + row * P + from(columns, P),
                      to(columns, P) - from(columns, P), T{});
      }
    }

    void end() const {
      for (int64_t k = 0; k < slice.slots; ++k) {
        const int64_t at = d * p.steps.B + slice.sequence(k);
        for (int64_t j = from(columns, P); j < to(columns, P); j += W)
          store_lanes(static_cast<T*>(out.dh0) + at * P + j, std::min<int64_t>(W, P - j),
                      load(g.dh + k * f.lane_p_ + j));
        if (!C::kHasC) continue;
        for (int64_t j = from(hidden, H); j < to(hidden, H); j += W)
          store_lanes(static_cast<T*>(out.dc0) + at * H + j, std::min<int64_t>(W, H - j),
                      load(g.dc + k * f.lane_ + j));
      }
    }
  };

  const RecurrentParams& p_;
  const RecurrentGrads& out_;
  const Parallel& parallel_;
  const int64_t panels_, h_panels_;
  RecurrentPlan plan_;
  int64_t k_ = 0, k_hr_ = 0, lane_ = 0, lane_p_ = 0;
  A *w_[2] = {}, *w_hr_[2] = {};
  std::vector<Group> groups_;
  std::vector<float*> sums_;
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
