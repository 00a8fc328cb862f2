// Who computes what in the backward: five products where one item owns a kv head, seven (dk and dv
// by keys, dq by rows) where there are too few heads to keep the threads busy.

namespace fastattn {
namespace FASTATTN_ISA {

// What one item computes: rows [row0, row1) of heads [h0, h1) of a kv head against keys [key0,
// key1).
struct GradItem {
  int64_t b, hk, h0, h1, row0, row1, key0, key1;
  bool dq, dkv, dbias;
  int64_t cost;
  int64_t part = 0;  // which sum of dbias it adds to: 0 = the result itself
};

// Runs in order on one worker, so that what its items share has one order of summation.
using Group = std::vector<GradItem>;

// Sums of dbias beside the result: 256 MB at most.
inline constexpr int64_t kMaxPartials = 64 << 20;

class GradPlan {
 public:
  GradPlan(const Problem& prob, const AttentionGrads& g, int threads, int kBM, int kBN)
      : prob_(prob), p_(prob.p), g_(g), bm_(kBM), bn_(kBN) {
    const int64_t units = p_.B * p_.Hk;
    for (int64_t b = 0; b < p_.B; ++b) {
      const Sequence s = prob.sequence(b);
      work_ += p_.H * s.Sq * s.Sk * (3 * p_.D + 2 * p_.Dv);
    }
    workers = work_ <= kSerialWork ? 1 : threads;
    // One pass unless its imbalance costs more than two passes do (7 products for 5).
    const bool one_pass = workers == 1 || div_up(units, workers) * workers * 5 <= units * 7;
    const bool want_dkv = g.dk.ptr || g.dv.ptr, want_dq = g.dq.ptr != nullptr;
    const bool own_b = g.dbias_b || p_.B == 1, own_h = g.dbias_h || p_.H == 1;
    bool fused = false;
    if (one_pass) {
      const bool own = own_b && (own_h || p_.Hk == 1);
      if (g.dbias && !own) fused = by_bias_slices(want_dq, want_dkv);
      if (!fused && (want_dkv || want_dq || (g.dbias && own))) {
        fused = g.dbias && own;
        whole_heads(want_dq, want_dkv, fused);
      }
    } else {
      fused = want_dq && g.dbias && own_b && own_h && g.dbias_i;
      if (want_dkv) by_keys(chunk(p_.Sk, bn_, workers, units));
      if (want_dq) by_rows(chunk(p_.Sq, bm_, workers, p_.B * p_.H), fused);
    }
    std::stable_sort(groups.begin(), groups.end(),
                     [](const Group& a, const Group& b) { return cost_of(a) > cost_of(b); });
    if (g.dbias && !fused) bias_groups(workers);
  }

  int workers = 1;
  std::vector<Group> groups;
  std::vector<Group> bias;  // a pass of its own, after `groups`
  int64_t parts = 1;        // sums of dbias that are added up at the end, in order
  int64_t part_size = 0;    // floats

 private:
  static int64_t cost_of(const Group& group) {
    int64_t cost = 0;
    for (const GradItem& item : group) cost += item.cost;
    return cost;
  }
  static int64_t chunk(int64_t n, int64_t block, int threads, int64_t units) {
    const int64_t parts = div_up(4 * threads, std::max<int64_t>(units, 1));
    return round_up(div_up(std::max<int64_t>(n, 1), parts), block);
  }
  GradItem whole_head(int64_t b, int64_t hk, bool dq, bool dkv, bool dbias) const {
    const Sequence s = prob_.sequence(b);
    return {b,   hk,    hk * prob_.group, (hk + 1) * prob_.group, 0, s.Sq, 0, s.Sk, dq,
            dkv, dbias, s.Sq * s.Sk};
  }
  void whole_heads(bool dq, bool dkv, bool dbias) {
    for (int64_t b = 0; b < p_.B; ++b)
      for (int64_t hk = 0; hk < p_.Hk; ++hk) groups.push_back({whole_head(b, hk, dq, dkv, dbias)});
  }

  // Heads that share a slice of the bias run in order on one worker and add to one sum. With fewer
  // slices than keep the workers busy, a slice's heads are cut into parts with a sum each. False
  // where neither balances, or the sums would take too much memory: dbias gets its own pass.
  bool by_bias_slices(bool dq, bool dkv) {
    const int64_t nb = g_.dbias_b ? p_.B : 1, nh = g_.dbias_h ? p_.Hk : 1;
    const int64_t slices = nb * nh, sharers = p_.B * p_.Hk / std::max<int64_t>(slices, 1);
    const auto balanced = [](int64_t n, int64_t over) {
      return div_up(n, over) * over * 5 <= n * 7;
    };
    while (parts <= sharers && !(balanced(slices * parts, workers) && balanced(sharers, parts)))
      ++parts;
    part_size = 1 + (p_.B - 1) * g_.dbias_b + (p_.H - 1) * g_.dbias_h + (p_.Sq - 1) * g_.dbias_i +
                (p_.Sk - 1) * g_.dbias_j;
    if (parts > sharers || (parts - 1) * part_size > kMaxPartials) {
      parts = 1;
      return false;
    }
    for (int64_t x = 0; x < slices; ++x) {
      for (int64_t part = 0; part < parts; ++part) {
        Group group;
        for (int64_t y = sharers * part / parts; y < sharers * (part + 1) / parts; ++y) {
          // The y-th (b, hk) of slice x.
          const int64_t b = nb > 1 ? x / nh : y / (nh > 1 ? 1 : p_.Hk);
          const int64_t hk = nh > 1 ? x % nh : y % p_.Hk;
          group.push_back(whole_head(b, hk, dq, dkv, true));
          group.back().part = part;
        }
        groups.push_back(std::move(group));
      }
    }
    return true;
  }
  void by_keys(int64_t step) {
    for (int64_t b = 0; b < p_.B; ++b) {
      const Sequence s = prob_.sequence(b);
      for (int64_t hk = 0; hk < p_.Hk; ++hk)
        for (int64_t k = 0; k < s.Sk; k += step)
          groups.push_back({{b, hk, hk * prob_.group, (hk + 1) * prob_.group, 0, s.Sq, k,
                             std::min(s.Sk, k + step), false, true, false, s.Sq * step}});
    }
  }
  void by_rows(int64_t step, bool dbias) {
    for (int64_t b = 0; b < p_.B; ++b) {
      const Sequence s = prob_.sequence(b);
      for (int64_t h = 0; h < p_.H; ++h)
        for (int64_t i = 0; i < s.Sq; i += step)
          groups.push_back({rows_item(s, h, i, std::min(s.Sq, i + step), true, dbias)});
    }
  }
  GradItem rows_item(const Sequence& s, int64_t h, int64_t i0, int64_t i1, bool dq, bool dbias) {
    const Interval r = prob_.range(s, i0, i1);
    const int64_t lo = r.lo / bn_ * bn_;
    return {s.b, h / prob_.group,    h,  h + 1, i0,    i1,
            lo,  std::max(lo, r.hi), dq, false, dbias, (i1 - i0) * (r.hi - lo)};
  }
  // All (b, h) that share a slice of the bias, in order; a chunk of rows or of keys a group.
  void bias_groups(int threads) {
    const int64_t nb = g_.dbias_b ? p_.B : 1, nh = g_.dbias_h ? p_.H : 1;
    const int64_t rows = g_.dbias_i ? chunk(p_.Sq, bm_, threads, nb * nh) : p_.Sq;
    const int64_t keys = !g_.dbias_i && g_.dbias_j ? chunk(p_.Sk, bn_, threads, nb * nh) : p_.Sk;
    for (int64_t x = 0; x < nb * nh; ++x) {
      for (int64_t i = 0; i < p_.Sq; i += rows) {
        for (int64_t j = 0; j < p_.Sk; j += keys) {
          Group group;
          for (int64_t b = nb > 1 ? x / nh : 0; b < (nb > 1 ? x / nh + 1 : p_.B); ++b) {
            const Sequence s = prob_.sequence(b);
            const int64_t i1 = std::min(s.Sq, i + rows);
            for (int64_t h = nh > 1 ? x % nh : 0; h < (nh > 1 ? x % nh + 1 : p_.H); ++h) {
              if (i >= i1) continue;
              GradItem item = rows_item(s, h, i, i1, false, true);
              item.key0 = std::max(item.key0, j), item.key1 = std::min(item.key1, j + keys);
              if (item.key0 < item.key1) group.push_back(item);
            }
          }
          if (!group.empty()) bias.push_back(std::move(group));
        }
      }
    }
  }

  const Problem& prob_;
  const AttentionParams& p_;
  const AttentionGrads& g_;
  const int64_t bm_, bn_;
  int64_t work_ = 0;
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
