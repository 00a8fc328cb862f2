// Softmax cross-entropy, a row of logits at a time.
//
// Three passes over a row that lies in L2 as fp32 (30522 classes: 122 KB): its maximum, the sum of
// exponentials, the gradient. About 20 instructions a vector, one read and one write of the chunk:
// a tenth of the three GEMMs around it at D = 384 in bf16, a fiftieth in fp32.

namespace fastattn {
namespace FASTATTN_ISA {

class CrossEntropy {
 public:
  explicit CrossEntropy(const CrossEntropyParams& params) : p(params), V(params.V) {
    bias_ = read_vec(p.bias, V, bias_buf_);
    row_.reserve(round_up(V, kPad));
  }

  // Adds to dbias, the sums of the row's block, unless it is null.
  void row(int64_t m, float* dbias) {
    const Logits at = read(m);
    const float sum = exponentials(at.top);
    const float rest = std::log(sum), s = p.smoothing;  // of lse beside the top
    if (p.loss) {
      // Not lse - right: where the target is the top the loss may be far below lse's last digit.
      p.loss[m] = (1.f - s) * (rest + (at.top - at.right));
      if (s > 0.f) p.loss[m] += s * (rest + (at.top - at.sum / float(V)));
    }
    if (p.gradient) gradient(m, sum, dbias);
  }

 private:
  struct Logits {
    float top, right, sum;
  };

  // l into the row, -inf behind its end, with its maximum; the sum only where it counts.
  Logits read(int64_t m) {
    float* l = row_.data();
    widen(p.logits.dtype, row_of(p.logits, m), V, l);
    std::fill(l + V, l + round_up(V, kPad), kNegInf);
    vf top = set1(kNegInf), total{};
    for (int64_t t = 0; t < V; t += W) {
      vf v = load(l + t);
      if (bias_) store(l + t, v = v + load(bias_ + t));
      top = vmax(top, v);  // may step over a NaN, which the sum meets again
    }
    if (p.smoothing > 0.f)
      for (int64_t t = 0; t < V; t += W) total += first_lanes(load(l + t), V - t);
    return {reduce_max(top), l[p.target[m]], reduce_add(total)};
  }

  // l to e^(l - top), and their sum.
  float exponentials(float top) {
    float* l = row_.data();
    vf sum0{}, sum1{};
    const int64_t end = round_up(V, 2 * W);
    for (int64_t t = 0; t < end; t += 2 * W) {
      const vf a = exp2v<6>((load(l + t) - top) * kLog2e);
      const vf b = exp2v<6>((load(l + t + W) - top) * kLog2e);
      store(l + t, a), store(l + t + W, b);
      sum0 += a, sum1 += b;
    }
    return reduce_add(sum0 + sum1);
  }

  void gradient(int64_t m, float sum, float* dbias) {
    float* l = row_.data();
    const float scale = p.scale ? p.scale[m] : p.share;
    const vf factor = set1(scale / sum), less = set1(scale * p.smoothing / float(V));
    for (int64_t t = 0; t < V; t += W) store(l + t, load(l + t) * factor - less);
    l[p.target[m]] -= scale * (1.f - p.smoothing);
    if (dbias)
      for (int64_t t = 0; t < V; t += W) store(dbias + t, load(dbias + t) + load(l + t));
    write_row(p.logits, m, V, l);
  }

  const CrossEntropyParams& p;
  const int64_t V;
  const float* bias_;
  Buffer<float> bias_buf_, row_;
};

void cross_entropy(const CrossEntropyParams& p, const Parallel& parallel) {
  const bool sums_rows = p.gradient && p.dbias;
  const RowBlocks blocks(p.M);
  RowSums sums(sums_rows ? blocks.count : 0, sums_rows ? p.V : 0, 1);
  const int workers = workers_for(p.M * p.V, blocks.count, parallel);
  Shares shares(blocks.count, workers);
  parallel.workers(workers, [&](int worker) FASTATTN_LAMBDA {
    CrossEntropy pass(p);
    for (int64_t b; shares.next(worker, &b);) {
      if (sums_rows) sums.clear(b);
      for (int64_t m = b * blocks.rows; m < std::min(p.M, (b + 1) * blocks.rows); ++m)
        pass.row(m, sums_rows ? sums.part(b, 0) : nullptr);
    }
  });
  if (sums_rows) sums.total(0, p.V, p.dbias);
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
