// Lanes that meet: __syncwarp, shuffles, votes, ldmatrix, mma.
//
// Only __syncwarp orders memory (PTX: shfl, vote, redux, ldmatrix and mma do not), so only its
// meetings carry a happens-before edge.
#include <cstring>

#include "runtime.h"

namespace fastattn::emu {

const char* name_of(Meet m) {
  switch (m) {
    case Meet::kSync:
      return "__syncwarp";
    case Meet::kShuffle:
      return "shfl.sync";
    case Meet::kVote:
      return "vote.sync";
    case Meet::kMatch:
      return "match.sync";
    case Meet::kReduce:
      return "redux.sync";
    case Meet::kLdmatrix:
      return "ldmatrix";
    case Meet::kMma:
      return "mma.sync";
  }
  return "?";
}

namespace {

using Combine = void (*)(uint32_t arrived, const Meeting& m);

struct ShuffleIn {
  Shuffle mode;
  uint32_t value;
  int operand, width;
};
struct MmaIn {
  Mma type;
  const uint32_t* a;
  uint32_t b0, b1;
};

bool aligned(Meet kind) { return kind == Meet::kLdmatrix || kind == Meet::kMma; }

bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

// --- what a complete meeting does ----------------------------------------------------------------
template <class T>
const T& in(const Meeting& m, unsigned lane) {
  return *static_cast<const T*>(m.in[lane]);
}
template <class T>
T& out(const Meeting& m, unsigned lane) {
  return *static_cast<T*>(m.out[lane]);
}

// The lane a shuffle reads from; its own where that lies outside its segment.
unsigned source_lane(const ShuffleIn& s, unsigned lane) {
  const int width = s.width, base = static_cast<int>(lane) & ~(width - 1);
  const int within = static_cast<int>(lane) & (width - 1);
  int target = within;
  switch (s.mode) {
    case Shuffle::kIndex:
      target = s.operand & (width - 1);
      break;
    case Shuffle::kUp:
      target = within - s.operand;
      break;
    case Shuffle::kDown:
      target = within + s.operand;
      break;
    case Shuffle::kXor:
      target = within ^ s.operand;
      break;
  }
  const bool inside = target >= 0 && target < width;
  return static_cast<unsigned>(base + (inside ? target : within));
}

void combine_shuffle(uint32_t arrived, const Meeting& m) {
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (!(arrived >> lane & 1)) continue;
    const unsigned from = source_lane(in<ShuffleIn>(m, lane), lane);
    if (!(arrived >> from & 1)) {
      fault("diverged", m.site, "lane %u shuffles from lane %u, which %s", lane, from,
            m.mask >> from & 1 ? "has exited" : "is not in the mask");
    }
    out<uint32_t>(m, lane) = in<ShuffleIn>(m, from).value;
  }
}

void combine_ballot(uint32_t arrived, const Meeting& m) {
  uint32_t bits = 0;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (arrived >> lane & 1 && in<bool>(m, lane)) bits |= 1u << lane;
  }
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (arrived >> lane & 1) out<uint32_t>(m, lane) = bits;
  }
}

void combine_match(uint32_t arrived, const Meeting& m) {
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (!(arrived >> lane & 1)) continue;
    uint32_t bits = 0;
    for (unsigned other = 0; other < kLanes; ++other) {
      if (arrived >> other & 1 && in<uint64_t>(m, other) == in<uint64_t>(m, lane)) {
        bits |= 1u << other;
      }
    }
    out<uint32_t>(m, lane) = bits;
  }
}

uint32_t fold(Reduce op, bool is_signed, uint32_t x, uint32_t y) {
  const bool less = is_signed ? static_cast<int32_t>(x) < static_cast<int32_t>(y) : x < y;
  switch (op) {
    case Reduce::kAdd:
      return x + y;
    case Reduce::kMin:
      return less ? x : y;
    case Reduce::kMax:
      return less ? y : x;
    case Reduce::kAnd:
      return x & y;
    case Reduce::kOr:
      return x | y;
    case Reduce::kXor:
      return x ^ y;
  }
  return 0;
}

struct ReduceIn {
  Reduce op;
  bool is_signed;
  uint32_t value;
};

void combine_reduce(uint32_t arrived, const Meeting& m) {
  bool first = true;
  uint32_t total = 0;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (!(arrived >> lane & 1)) continue;
    const auto& x = in<ReduceIn>(m, lane);
    total = first ? x.value : fold(x.op, x.is_signed, total, x.value);
    first = false;
  }
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (arrived >> lane & 1) out<uint32_t>(m, lane) = total;
  }
}

// out: eight row pointers a lane; only the first 8 * matrices lanes' addresses count.
void combine_ldmatrix(uint32_t, const Meeting& m) {
  const bool transposed = m.detail & 1;
  const unsigned matrices = m.detail >> 1;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    auto** rows = static_cast<const unsigned char**>(m.out[lane]);
    for (unsigned i = 0; i < matrices; ++i) {
      const unsigned g = lane / 4, t = lane % 4;
      const auto row = [&](unsigned r) {
        return static_cast<const unsigned char*>(m.in[8 * i + r]);
      };
      rows[2 * i] = transposed ? row(2 * t) + 2 * g : row(g) + 4 * t;
      rows[2 * i + 1] = transposed ? row(2 * t + 1) + 2 * g : nullptr;
    }
  }
}

float bits_to_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

float half_to_float(uint32_t h) {
  const uint32_t exponent = h >> 10 & 31, mantissa = h & 1023, sign = (h & 0x8000u) << 16;
  if (exponent == 0) {
    const float x = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -x : x;
  }
  return bits_to_float(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13);
}

// The elements that one 32-bit register holds.
void unpack(Mma type, uint32_t word, float* to, int stride) {
  switch (type) {
    case Mma::kBf16:
      to[0] = bits_to_float(word << 16);
      to[stride] = bits_to_float(word & 0xffff0000u);
      break;
    case Mma::kF16:
      to[0] = half_to_float(word & 0xffff);
      to[stride] = half_to_float(word >> 16);
      break;
    case Mma::kTf32:
      to[0] = bits_to_float(word & 0xffffe000u);
      break;
  }
}

float& accumulator(const Meeting& m, int row, int column) {
  auto* d = static_cast<float*>(m.out[row % 8 * 4 + column / 2]);
  return d[row / 8 * 2 + column % 2];
}

// d += a b with one rounding to fp32 a sum. The hardware's own sum (aligned, truncated, in chunks)
// is not specified; this lies within its error.
void combine_mma(uint32_t, const Meeting& m) {
  const Mma type = in<MmaIn>(m, 0).type;
  const int K = type == Mma::kTf32 ? 8 : 16, half = K / 2, pair = type == Mma::kTf32 ? 1 : 2;
  float a[16 * 16], b[16 * 8];  // a[row][k], b[k][column]
  for (int lane = 0; lane < 32; ++lane) {
    const auto& x = in<MmaIn>(m, static_cast<unsigned>(lane));
    const int g = lane / 4, k = pair * (lane % 4);
    unpack(type, x.a[0], a + g * K + k, 1);
    unpack(type, x.a[1], a + (g + 8) * K + k, 1);
    unpack(type, x.a[2], a + g * K + k + half, 1);
    unpack(type, x.a[3], a + (g + 8) * K + k + half, 1);
    unpack(type, x.b0, b + k * 8 + g, 8);
    unpack(type, x.b1, b + (k + half) * 8 + g, 8);
  }
  for (int row = 0; row < 16; ++row) {
    double sum[8];
    for (int n = 0; n < 8; ++n) sum[n] = accumulator(m, row, n);
    for (int k = 0; k < K; ++k) {
      const double x = a[row * K + k];
      for (int n = 0; n < 8; ++n) sum[n] += x * b[k * 8 + n];
    }
    for (int n = 0; n < 8; ++n) accumulator(m, row, n) = static_cast<float>(sum[n]);
  }
}

// --- the meeting ---------------------------------------------------------------------------------
Meeting& meeting_of(Warp& w, uint32_t mask) {
  for (Meeting& m : w.meetings) {
    if (m.mask == mask) return m;
  }
  const Unseen unseen;
  w.meetings.emplace_back();
  w.meetings.back().mask = mask;
  return w.meetings.back();
}

Combine combine_of(Meet kind) {
  switch (kind) {
    case Meet::kSync:
      return nullptr;
    case Meet::kShuffle:
      return combine_shuffle;
    case Meet::kVote:
      return combine_ballot;
    case Meet::kMatch:
      return combine_match;
    case Meet::kReduce:
      return combine_reduce;
    case Meet::kLdmatrix:
      return combine_ldmatrix;
    case Meet::kMma:
      return combine_mma;
  }
  return nullptr;
}

void complete(Warp& w, Meeting& m) {
  const uint32_t arrived = m.arrived;
  if (const Combine combine = combine_of(m.kind)) combine(arrived, m);
  m.arrived = 0;
  ++m.phase;
  progressed();
  for (uint32_t rest = arrived; rest; rest &= rest - 1) {
    Thread& t = *w.lanes[__builtin_ctz(rest)];
    if (t.state == State::kWarp) wake(t);
  }
}

void check_arrival(const Thread& t, const Meeting& m, Meet kind, uint32_t detail, Site site) {
  const Warp& w = *t.warp;
  if (!(m.mask >> t.lane & 1)) {
    fault("diverged", site, "%s with mask %08x by lane %u, which is not in it", name_of(kind),
          m.mask, t.lane);
  }
  if (aligned(kind) && w.live != 0xffffffffu) {
    fault("diverged", site, "%s needs all 32 lanes of its warp; live are %08x", name_of(kind),
          w.live);
  }
  if (m.arrived &&
      (m.kind != kind || (aligned(kind) && (m.detail != detail || !same(m.site, site))))) {
    fault("diverged", site, "%s, while lanes %08x of its warp are at %s of %s:%u", name_of(kind),
          m.arrived, name_of(m.kind), m.site.file_name(), m.site.line());
  }
}

void meet(Meet kind, uint32_t detail, uint32_t mask, const void* input, void* output, Site site) {
  Thread& t = *self;
  Warp& w = *t.warp;
  Meeting& m = meeting_of(w, mask);
  check_arrival(t, m, kind, detail, site);
  char* edge = &m.edge[m.phase & 1];
  m.kind = kind;
  m.detail = detail;
  m.site = site;
  m.in[t.lane] = input;
  m.out[t.lane] = output;
  m.arrived |= 1u << t.lane;
  if (kind == Meet::kSync) release(edge);
  if (m.arrived == (mask & w.live)) {
    complete(w, m);
    reschedule();
  } else {
    wait(State::kWarp, name_of(kind), site);
  }
  if (kind == Meet::kSync) acquire(edge);
}

}  // namespace

// Shuffles, votes and __syncwarp go on without lanes that have exited; ldmatrix and mma may not.
void warp_lane_exits(Thread& t) {
  Warp& w = *t.warp;
  for (Meeting& m : w.meetings) {
    if (!m.arrived || !(m.mask >> t.lane & 1)) continue;
    if (aligned(m.kind)) {
      fault("diverged", m.site, "lane %u exits while lanes %08x of its warp are at %s", t.lane,
            m.arrived, name_of(m.kind));
    }
    if (m.arrived == (m.mask & w.live)) complete(w, m);
  }
}

void sync_warp(uint32_t mask, Site site) { meet(Meet::kSync, 0, mask, nullptr, nullptr, site); }

uint32_t shuffle(Shuffle mode, uint32_t mask, uint32_t value, int operand, int width, Site site) {
  if (width < 1 || width > 32 || (width & (width - 1))) {
    fault("diverged", site, "a shuffle of width %d", width);
  }
  const ShuffleIn input{mode, value, operand, width};
  uint32_t result = 0;
  meet(Meet::kShuffle, 0, mask, &input, &result, site);
  return result;
}

uint32_t ballot(uint32_t mask, bool predicate, Site site) {
  uint32_t result = 0;
  meet(Meet::kVote, 0, mask, &predicate, &result, site);
  return result;
}

uint32_t match_any(uint32_t mask, uint64_t value, Site site) {
  uint32_t result = 0;
  meet(Meet::kMatch, 0, mask, &value, &result, site);
  return result;
}

uint32_t reduce(Reduce op, bool is_signed, uint32_t mask, uint32_t value, Site site) {
  const ReduceIn input{op, is_signed, value};
  uint32_t result = 0;
  meet(Meet::kReduce, 0, mask, &input, &result, site);
  return result;
}

void ldmatrix_rows(uint32_t address, int matrices, const unsigned char* (&rows)[8], bool transposed,
                   Site site) {
  const bool counts = self->lane < 8u * static_cast<unsigned>(matrices);
  const unsigned char* row = counts ? shared_pointer(address, 16, "ldmatrix", site) : nullptr;
  if (counts) check_access(__builtin_return_address(0), row, 16, false);
  meet(Meet::kLdmatrix, static_cast<uint32_t>(matrices) << 1 | transposed, 0xffffffffu, row, rows,
       site);
}

void mma(Mma type, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
  const MmaIn input{type, a, b0, b1};
  meet(Meet::kMma, static_cast<uint32_t>(type), 0xffffffffu, &input, d, site);
}

}  // namespace fastattn::emu
