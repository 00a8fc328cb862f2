// The functions of csrc/cuda/ptx.cuh for the emulator. Included inside namespace
// fastattn::cuda::ptx.
//
// A lane reads the elements that ldmatrix gives it by itself, so that the sanitizers see the access
// where the kernel's line is; mma is computed by the warp's last lane to arrive.

#define FASTATTN_EMU_SITE_ ::fastattn::emu::Site site = ::fastattn::emu::Site::current()

inline uint32_t shared_address(const void* p, FASTATTN_EMU_SITE_) {
  return emu::shared_address(p, site);
}

__forceinline__ void cp_async_16(uint32_t dst, const void* src, bool valid, FASTATTN_EMU_SITE_) {
  emu::cp_async(dst, src, 16, valid, site);
}
__forceinline__ void cp_async_4(uint32_t dst, const void* src, bool valid, FASTATTN_EMU_SITE_) {
  emu::cp_async(dst, src, 4, valid, site);
}
inline void cp_async_commit() { emu::cp_async_commit(); }
template <int N>
inline void cp_async_wait(FASTATTN_EMU_SITE_) {
  emu::cp_async_wait(N, site);
}

__forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address, FASTATTN_EMU_SITE_) {
  const unsigned char* rows[8];
  emu::ldmatrix_rows(address, 4, rows, false, site);
  for (int i = 0; i < 4; ++i) r[i] = *reinterpret_cast<const uint32_t*>(rows[2 * i]);
}
__forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address, FASTATTN_EMU_SITE_) {
  const unsigned char* rows[8];
  emu::ldmatrix_rows(address, 4, rows, true, site);
  for (int i = 0; i < 4; ++i) {
    const auto low = *reinterpret_cast<const uint16_t*>(rows[2 * i]);
    const auto high = *reinterpret_cast<const uint16_t*>(rows[2 * i + 1]);
    r[i] = low | static_cast<uint32_t>(high) << 16;
  }
}

inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16,
                FASTATTN_EMU_SITE_) {
  emu::mma(emu::Mma::kBf16, d, a, b0, b1, site);
}
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half,
                FASTATTN_EMU_SITE_) {
  emu::mma(emu::Mma::kF16, d, a, b0, b1, site);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                     FASTATTN_EMU_SITE_) {
  emu::mma(emu::Mma::kTf32, d, a, b0, b1, site);
}
// To the nearest, ties away from zero.
inline uint32_t to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & 0xffffe000u;
}

// .ftz: subnormal results are zero.
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.f : y;
}

// --- order between blocks ------------------------------------------------------------------------
inline unsigned ld_acquire(const unsigned* p, FASTATTN_EMU_SITE_) {
  return emu::atomic_load(p, emu::Order{.acquire = true}, site);
}
inline unsigned ld_relaxed(const unsigned* p, FASTATTN_EMU_SITE_) {
  return emu::atomic_load(p, emu::Order{}, site);
}
inline void st_release(unsigned* p, unsigned value, FASTATTN_EMU_SITE_) {
  emu::atomic_store(p, value, emu::Order{.release = true}, site);
}
inline void red_release_add(unsigned* p, unsigned value, FASTATTN_EMU_SITE_) {
  emu::atomic_update(
      p, [&](unsigned old) { return old + value; }, emu::Order{.release = true}, site);
}
inline uint4 ld_cg_16(const void* p) { return *static_cast<const uint4*>(p); }
inline void fence() { emu::fence(emu::Scope::kDevice); }
#undef FASTATTN_EMU_SITE_
