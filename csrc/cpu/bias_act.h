// The act pass and its backward, a row at a time: what lies between the two GEMMs of an FFN.
//
// Bound by memory where M N leaves the caches (read u, write a: 8 bytes an element in fp32), by the
// exponential (about 25 instructions a vector) within them. The derivative is recomputed from u.

namespace fastattn {
namespace FASTATTN_ISA {

class ActForward {
 public:
  explicit ActForward(const ActParams& params)
      : p(params), N(p.N), drop_(p.dropout.p, p.dropout.seed) {
    const int64_t n = round_up(N, kPad);
    bias_ = read_vec(p.bias, N, bias_buf_);
    gate_bias_ = read_vec(p.gate_bias, N, gate_buf_);
    u_.reserve(n), a_.reserve(n);
    if (p.g.ptr) g_.reserve(n);
    if (drop_.on) mask_.reserve(n);
  }

  template <Act kAct>
  void row(int64_t m) {
    const float* u = read_row(p.u, m, N, u_.data());
    const float* gate = p.g.ptr ? read_row(p.g, m, N, g_.data()) : nullptr;
    float* a = begin_row(p.a, m, N, a_.data());
    if (drop_.on) drop_row(drop_, p.dropout, m, N, mask_.data());
    for (int64_t t = 0; t < N; t += W) {
      vf up = load(u + t), y;
      if (bias_) up += load(bias_ + t);
      if (gate) {
        vf v = load(gate + t);
        if (gate_bias_) v += load(gate_bias_ + t);
        y = activate<kAct>(v) * up;
      } else {
        y = activate<kAct>(up);
      }
      if (drop_.on) {
        const vf keep = load(mask_.data() + t);
        y = keep == vf{} ? vf{} : y * keep;
      }
      store(a + t, y);
    }
    write_row(p.a, m, N, a);
  }

 private:
  const ActParams& p;
  const int64_t N;
  const Dropout drop_;
  const float *bias_, *gate_bias_;
  Buffer<float> bias_buf_, gate_buf_, u_, g_, a_, mask_;
};

class ActBackward {
 public:
  enum { kDbias, kDgateBias, kSums };

  explicit ActBackward(const ActGrads& grads)
      : g(grads), N(g.N), drop_(g.dropout.p, g.dropout.seed) {
    const int64_t n = round_up(N, kPad);
    bias_ = read_vec(g.bias, N, bias_buf_);
    gate_bias_ = read_vec(g.gate_bias, N, gate_buf_);
    for (Buffer<float>* b : {&u_, &gate_, &da_, &du_, &dg_, &a_}) b->reserve(n);
    if (drop_.on) mask_.reserve(n);
  }

  template <Act kAct>
  void row(int64_t m, float* dbias, float* dgate_bias) {
    const float* u = read_row(g.u, m, N, u_.data());
    const float* gate = g.g.ptr ? read_row(g.g, m, N, gate_.data()) : nullptr;
    const float* da = read_row(g.da, m, N, da_.data());
    // A result may overwrite what it is made from: every vector is read before it is written.
    float* du = g.du.ptr ? begin_row(g.du, m, N, du_.data()) : du_.data();
    float* dg = g.dg.ptr ? begin_row(g.dg, m, N, dg_.data()) : dg_.data();
    float* a = g.a.ptr ? begin_row(g.a, m, N, a_.data()) : a_.data();
    if (drop_.on) drop_row(drop_, g.dropout, m, N, mask_.data());
    for (int64_t t = 0; t < N; t += W) {
      vf up = load(u + t), d = load(da + t);
      if (bias_) up += load(bias_ + t);
      const vf keep = drop_.on ? load(mask_.data() + t) : set1(1.f);
      if (drop_.on) d = keep == vf{} ? vf{} : d * keep;
      vf y, dup;
      if (gate) {
        vf v = load(gate + t);
        if (gate_bias_) v += load(gate_bias_ + t);
        const Value f = activate_grad<kAct>(v);
        const vf dgate = d * up * f.dy;
        store(dg + t, dgate);
        if (g.dgate_bias) store(dgate_bias + t, load(dgate_bias + t) + dgate);
        y = f.y * up, dup = d * f.y;
      } else {
        const Value f = activate_grad<kAct>(up);
        y = f.y, dup = d * f.dy;
      }
      store(du + t, dup);
      if (g.dbias) store(dbias + t, load(dbias + t) + dup);
      if (g.a.ptr) store(a + t, drop_.on ? (keep == vf{} ? vf{} : y * keep) : y);
    }
    if (g.du.ptr) write_row(g.du, m, N, du);
    if (gate && g.dg.ptr) write_row(g.dg, m, N, dg);
    if (g.a.ptr) write_row(g.a, m, N, a);
  }

 private:
  const ActGrads& g;
  const int64_t N;
  const Dropout drop_;
  const float *bias_, *gate_bias_;
  Buffer<float> bias_buf_, gate_buf_, u_, gate_, da_, du_, dg_, a_, mask_;
};

void act_forward(const ActParams& p, const Parallel& parallel) {
  if (p.M == 0 || p.N == 0) return;
  const int64_t step = 8;
  Queue queue(div_up(p.M, step));
  parallel.workers(workers_for(p.M * p.N, div_up(p.M, step), parallel), [&](int) FASTATTN_LAMBDA {
    ActForward pass(p);
    with_act(p.act, [&](auto act) FASTATTN_LAMBDA {
      for (int64_t item; queue.next(&item);)
        for (int64_t m = item * step; m < std::min(p.M, (item + 1) * step); ++m)
          pass.template row<decltype(act)::value>(m);
    });
  });
}

void act_backward(const ActGrads& g, const Parallel& parallel) {
  if (g.N == 0) return;
  const RowBlocks blocks(g.M);
  RowSums sums(blocks.count, g.N, ActBackward::kSums);
  Queue queue(blocks.count);
  parallel.workers(workers_for(g.M * g.N, blocks.count, parallel), [&](int) FASTATTN_LAMBDA {
    ActBackward pass(g);
    with_act(g.act, [&](auto act) FASTATTN_LAMBDA {
      for (int64_t b; queue.next(&b);) {
        sums.clear(b);
        for (int64_t m = b * blocks.rows; m < std::min(g.M, (b + 1) * blocks.rows); ++m)
          pass.template row<decltype(act)::value>(m, sums.part(b, ActBackward::kDbias),
                                                  sums.part(b, ActBackward::kDgateBias));
      }
    });
  });
  sums.total(ActBackward::kDbias, g.N, g.dbias);
  sums.total(ActBackward::kDgateBias, g.N, g.dgate_bias);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
