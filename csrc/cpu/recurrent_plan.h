// Who does what: directions and slices of the batch never meet; within one of them a team may share
// the hidden units, with one barrier a step. And the memory of all of it, taken before anyone
// starts (a member that fails alone would leave the others waiting).

namespace fastattn {
namespace FASTATTN_ISA {

// One direction of one slice of the batch: slots first, first + apart, ...
struct Slice {
  const Steps* steps;
  int64_t first, apart, slots;

  int64_t active(int64_t t) const {
    if (!steps->active && !steps->offsets) return slots;
    const int64_t n = steps->active ? steps->active[t] : steps->offsets[t + 1] - steps->offsets[t];
    return n > first ? div_up(n - first, apart) : 0;
  }
  int64_t sequence(int64_t k) const {
    const int64_t slot = first + k * apart;
    return steps->index ? steps->index[slot] : slot;
  }
  int64_t row(int64_t t, int64_t k) const { return steps->first(t) + sequence(k); }
  int64_t length(int64_t k) const {
    const int64_t slot = first + k * apart;
    if (steps->lengths) return steps->lengths[slot];
    if (!steps->offsets) return steps->T;
    int64_t t = 0;
    while (t < steps->T && active(t) > k) ++t;
    return t;
  }
};

// [begin, end) of n things for a member of a team.
struct Share {
  int64_t begin, end;
  Share(int64_t n, int member, int of) : begin(n * member / of), end(n * (member + 1) / of) {}
  // The i-th, from the other end in every other step: what was read last is still in L1.
  int64_t turning(int64_t i, int parity) const { return parity ? end - 1 - i : begin + i; }
  int64_t size() const { return end - begin; }
};

struct RecurrentPlan {
  int directions, slices, team;

  int groups() const { return directions * slices; }
  Slice slice(const Steps& steps, int group) const {
    const int64_t first = group % slices;
    return {&steps, first, slices, div_up(steps.B - first, slices)};
  }
  int64_t most_slots(const Steps& steps) const { return div_up(steps.B, slices); }
};

// units: what a team can divide; item: bytes of a packed weight.
inline RecurrentPlan plan_recurrence(const RecurrentParams& p, int64_t units, int64_t item,
                                     const Parallel& parallel) {
  const int64_t weights = int64_t(kGates[int(p.cell)]) * p.H * p.P, B = p.steps.B;
  constexpr int64_t kWake = 256 << 10;    // products that take as long as waking a thread
  constexpr int64_t kBarrier = 24 << 10;  // ... as a barrier and what it makes cold
  constexpr int64_t kCache = 1280 << 10;  // bytes of L2 for weights that a thread reads every step
  constexpr int64_t kCell = 16;           // products that take as long as one unit's cell
  const int64_t each = p.gh ? kCell * p.H : weights;
  const bool worth = parallel.threads > 1 && p.steps.N * each * p.D > kWake;
  const int threads = worth ? std::max(1, parallel.threads / p.D) : 1;
  RecurrentPlan plan{p.D, 1, 1};
  if (threads == 1) return plan;
  if (B >= 4 * threads && weights * item <= kCache)
    plan.slices = threads;
  else if (B * weights > kBarrier * threads && units > 1 && !p.gh)
    plan.team = int(std::min<int64_t>(threads, units));
  else
    plan.slices = int(std::min<int64_t>(threads, B));
  return plan;
}

// Runs work(group, team, member's number) for every group on the plan's threads.
template <class F>
void run_groups(const RecurrentPlan& plan, const Parallel& parallel, F&& work) {
  const int groups = plan.groups();
  if (plan.team == 1) {
    Queue queue(groups);
    parallel.workers(std::min(parallel.threads, groups), [&](int) FASTATTN_LAMBDA {
      for (int64_t g; queue.next(&g);) {
        Team alone(1);
        work(int(g), alone, alone.join());
      }
    });
    return;
  }
  std::vector<std::unique_ptr<Team>> teams;
  for (int g = 0; g < groups; ++g) teams.push_back(std::make_unique<Team>(plan.team));
  parallel.workers(groups * plan.team, [&](int worker) FASTATTN_LAMBDA {
    const int g = worker / plan.team, member = teams[g]->join();
    if (member >= 0) work(g, *teams[g], member);
  });
}

// Items from one row of a left operand to the next: an odd number of lines, or all rows of a power
// of two of features would fall into two sets of L1.
template <class E>
int64_t row_stride(int64_t columns) {
  constexpr int64_t kLine = 64 / int64_t(sizeof(typename E::Item));
  return (div_up(E::columns(columns), kLine) | 1) * kLine;
}

// Parts of one block of memory, each on a line of its own. Asked for twice: for the size, then for
// the addresses.
class Arena {
 public:
  explicit Arena(char* base = nullptr) : base_(base) {}
  template <class T>
  T* take(int64_t n) {
    T* at = reinterpret_cast<T*>(base_ ? base_ + used_ : nullptr);
    used_ += round_up(n * int64_t(sizeof(T)), 64) + 64;  // a line more: stores of whole vectors
    return at;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
