// The AMX tile instructions and the conversions to bf16 that csrc/cpu uses, in C++: for mutants of
// its AMX kernels on a machine that has AVX-512 alone. Included before those kernels. What traps on
// the hardware aborts here.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace stand_in {

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t colsb[16];
  uint8_t rows[16];
};

// Of this thread.
struct Tiles {
  Config config{};  // palette 0: none
  alignas(64) uint8_t tile[8][16][64] = {};

  uint8_t (*at(int t))[64] {
    if (config.palette != 1 || t < 0 || t >= 8 || !config.rows[t]) std::abort();
    return tile[t];
  }
};

inline Tiles& tiles() {
  static thread_local Tiles here;
  return here;
}

inline void configure(const void* config) {
  tiles() = Tiles{};
  std::memcpy(&tiles().config, config, sizeof(Config));
  for (int t = 0; t < 8; ++t)
    if (tiles().config.rows[t] > 16 || tiles().config.colsb[t] > 64) std::abort();
}

inline void zero(int t) { std::memset(tiles().at(t), 0, 1024); }

inline void load(int t, const void* from, int64_t stride) {
  const Config& c = tiles().config;
  zero(t);
  for (int r = 0; r < c.rows[t]; ++r)
    std::memcpy(tiles().at(t)[r], static_cast<const char*>(from) + r * stride, c.colsb[t]);
}

inline void save(int t, void* to, int64_t stride) {
  const Config& c = tiles().config;
  for (int r = 0; r < c.rows[t]; ++r)
    std::memcpy(static_cast<char*>(to) + r * stride, tiles().at(t)[r], c.colsb[t]);
}

// c += a b: b holds pairs of rows.
__attribute__((optimize("O3"))) inline void multiply(int c, int a, int b) {
  const Config& config = tiles().config;
  const auto* left = reinterpret_cast<const uint16_t (*)[32]>(tiles().at(a));
  const auto* right = reinterpret_cast<const uint32_t (*)[16]>(tiles().at(b));
  auto* sums = reinterpret_cast<float (*)[16]>(tiles().at(c));
  for (int m = 0; m < config.rows[c]; ++m)
    for (int k = 0; k < 32; ++k) {
      const uint32_t bits = uint32_t(left[m][k]) << 16;
      float x;
      std::memcpy(&x, &bits, 4);
      for (int n = 0; n < 16; ++n) {
        const uint32_t pair = right[k / 2][n], other = k % 2 ? pair & 0xffff0000u : pair << 16;
        float y;
        std::memcpy(&y, &other, 4);
        sums[m][n] += x * y;
      }
    }
}

// To the nearest, ties to even; what is smaller than a normal number is zero, as on the hardware.
inline uint16_t rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7f800000u) == 0) return uint16_t(bits >> 16 & 0x8000u);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40u);
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

#define STAND_IN_VECTORS __attribute__((target("avx512f")))

STAND_IN_VECTORS inline __m256i narrow(__m512 x) {
  float lanes[16];
  uint16_t halves[16];
  _mm512_storeu_ps(lanes, x);
  for (int i = 0; i < 16; ++i) halves[i] = rounded(lanes[i]);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves));
}

STAND_IN_VECTORS inline __m512i narrow_both(__m512 high, __m512 low) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(low)), narrow(high), 1);
}

}  // namespace stand_in

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) stand_in::configure(config)
#define _tile_release() (void)(stand_in::tiles().config.palette = 0)
#define _tile_loadd(t, from, stride) stand_in::load(t, from, stride)
#define _tile_stored(t, to, stride) stand_in::save(t, to, stride)
#define _tile_zero(t) stand_in::zero(t)
#define _tile_dpbf16ps(c, a, b) stand_in::multiply(c, a, b)
#define _mm512_cvtneps_pbh(x) stand_in::narrow(x)
#define _mm512_cvtne2ps_pbh(high, low) stand_in::narrow_both(high, low)
