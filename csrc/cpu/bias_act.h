// The act pass and its backward, a row at a time: what lies between the two GEMMs of an FFN.
//
// Bound by memory where M N leaves the caches (read u, write a: 8 bytes an element in fp32), by the
// exponential (about 25 instructions a vector) within them. The derivative is recomputed from u.

namespace fastattn {
namespace FASTATTN_ISA {

// Vectors of a row of N elements of T, the last of which may be a part of one. Reads are in whole
// vectors where they fit, a part is zero beyond N.
template <class T>
FASTATTN_INLINE vf load_at(const T* row, int64_t t, int64_t N) {
  return t + W <= N ? load(row + t) : load_part(row + t, N - t);
}
template <class T>
FASTATTN_INLINE void store_at(T* row, int64_t t, int64_t N, vf x) {
  if (t + W <= N) return store(row + t, x);
  float part[W];
  store(part, x);
  narrow(part, N - t, row + t);
}

// bf16 is rounded to 2e-3 next.
template <class T>
inline constexpr Grade kGradeOf = std::is_same_v<T, bf16> ? Grade::kCoarse : Grade::kExact;

// f(storage type) of matrices that all have it.
template <class F>
FASTATTN_INLINE void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kBf16:
      return f(bf16{});
    case DType::kF16:
      return f(f16{});
    default:
      return f(float{});
  }
}

class ActForward {
 public:
  explicit ActForward(const ActParams& params)
      : p(params), N(p.N), drop_(p.dropout.p, p.dropout.seed) {
    bias_ = read_vec(p.bias, N, bias_buf_);
    gate_bias_ = read_vec(p.gate_bias, N, gate_buf_);
    if (drop_.on) mask_.reserve(round_up(N, kPad));
  }

  // u, g and a are of T.
  template <Act kAct, class T>
  void row(int64_t m) {
    const T* u = reinterpret_cast<const T*>(row_of(p.u, m));
    const T* gate = p.g.ptr ? reinterpret_cast<const T*>(row_of(p.g, m)) : nullptr;
    T* a = reinterpret_cast<T*>(row_of(p.a, m));
    if (drop_.on) drop_row(drop_, p.dropout, m, N, mask_.data());
    for (int64_t t = 0; t < N; t += W) {
      vf up = load_at(u, t, N), y;
      if (bias_) up += load(bias_ + t);
      if (gate) {
        vf v = load_at(gate, t, N);
        if (gate_bias_) v += load(gate_bias_ + t);
        y = activate<kAct, kGradeOf<T>>(v) * up;
      } else {
        y = activate<kAct, kGradeOf<T>>(up);
      }
      if (drop_.on) {
        const vf keep = load(mask_.data() + t);
        y = keep == vf{} ? vf{} : y * keep;
      }
      store_at(a, t, N, y);
    }
  }

 private:
  const ActParams& p;
  const int64_t N;
  const Dropout drop_;
  const float *bias_, *gate_bias_;
  Buffer<float> bias_buf_, gate_buf_, mask_;
};

class ActBackward {
 public:
  enum { kDbias, kDgateBias, kSums };

  explicit ActBackward(const ActGrads& grads)
      : g(grads), N(g.N), drop_(g.dropout.p, g.dropout.seed) {
    bias_ = read_vec(g.bias, N, bias_buf_);
    gate_bias_ = read_vec(g.gate_bias, N, gate_buf_);
    if (drop_.on) mask_.reserve(round_up(N, kPad));
  }

  // All matrices are of T. A result may lie over what it is made from: a vector is read before it
  // is written.
  template <Act kAct, class T>
  void row(int64_t m, float* dbias, float* dgate_bias) {
    const T *u = at<T>(g.u, m), *gate = at<T>(g.g, m), *da = at<T>(g.da, m);
    T *du = at<T>(g.du, m), *dg = at<T>(g.dg, m), *a = at<T>(g.a, m);
    if (drop_.on) drop_row(drop_, g.dropout, m, N, mask_.data());
    for (int64_t t = 0; t < N; t += W) {
      vf up = load_at(u, t, N), d = load_at(da, t, N);
      if (bias_) up += load(bias_ + t);
      const vf keep = drop_.on ? load(mask_.data() + t) : set1(1.f);
      if (drop_.on) d = keep == vf{} ? vf{} : d * keep;
      vf y, dup;
      if (gate) {
        vf v = load_at(gate, t, N);
        if (gate_bias_) v += load(gate_bias_ + t);
        const Value f = activate_grad<kAct, kGradeOf<T>>(v);
        const vf dgate = d * up * f.dy;
        if (dg) store_at(dg, t, N, dgate);
        if (g.dgate_bias) store(dgate_bias + t, load(dgate_bias + t) + dgate);
        y = f.y * up, dup = d * f.y;
      } else {
        const Value f = activate_grad<kAct, kGradeOf<T>>(up);
        y = f.y, dup = d * f.dy;
      }
      if (du) store_at(du, t, N, dup);
      if (g.dbias) store(dbias + t, load(dbias + t) + dup);
      if (a) store_at(a, t, N, drop_.on ? (keep == vf{} ? vf{} : y * keep) : y);
    }
  }

 private:
  template <class T>
  static T* at(const Rows& x, int64_t m) {
    return x.ptr ? reinterpret_cast<T*>(row_of(x, m)) : nullptr;
  }

  const ActGrads& g;
  const int64_t N;
  const Dropout drop_;
  const float *bias_, *gate_bias_;
  Buffer<float> bias_buf_, gate_buf_, mask_;
};

void act_forward(const ActParams& p, const Parallel& parallel) {
  if (p.M == 0 || p.N == 0) return;
  const int64_t step = 8;
  const int workers = workers_for(p.M * p.N, div_up(p.M, step), parallel);
  Shares shares(div_up(p.M, step), workers);
  parallel.workers(workers, [&](int worker) FASTATTN_LAMBDA {
    ActForward pass(p);
    with_type(p.u.dtype, [&](auto item) FASTATTN_LAMBDA {
      with_act(p.act, [&](auto act) FASTATTN_LAMBDA {
        for (int64_t i; shares.next(worker, &i);)
          for (int64_t m = i * step; m < std::min(p.M, (i + 1) * step); ++m)
            pass.template row<decltype(act)::value, decltype(item)>(m);
      });
    });
  });
}

void act_backward(const ActGrads& g, const Parallel& parallel) {
  if (g.N == 0) return;
  const RowBlocks blocks(g.M);
  RowSums sums(blocks.count, g.N, ActBackward::kSums);
  const int workers = workers_for(g.M * g.N, blocks.count, parallel);
  Shares shares(blocks.count, workers);
  parallel.workers(workers, [&](int worker) FASTATTN_LAMBDA {
    ActBackward pass(g);
    with_type(g.u.dtype, [&](auto item) FASTATTN_LAMBDA {
      with_act(g.act, [&](auto act) FASTATTN_LAMBDA {
        for (int64_t b; shares.next(worker, &b);) {
          sums.clear(b);
          for (int64_t m = b * blocks.rows; m < std::min(g.M, (b + 1) * blocks.rows); ++m)
            pass.template row<decltype(act)::value, decltype(item)>(
                m, sums.part(b, ActBackward::kDbias), sums.part(b, ActBackward::kDgateBias));
        }
      });
    });
  });
  sums.total(ActBackward::kDbias, g.N, g.dbias);
  sums.total(ActBackward::kDgateBias, g.N, g.dgate_bias);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
