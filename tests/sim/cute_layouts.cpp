// Prints what CuTe says about the fragments of mma.sync and ldmatrix on sm_80: per lane, the
// offsets of its values in the (column-major) matrices of an mma, or the 16-bit elements that
// ldmatrix gives it. Host code only: the traits are compile-time layouts.
#include <cstdio>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/tensor.hpp>

template <class Layout>
void print_values(const char* what, Layout layout, int step) {
  std::printf("%s", what);
  for (int lane = 0; lane < 32; ++lane) {
    for (int value = 0; value < int(cute::size<1>(layout)); value += step) {
      std::printf(" %d", int(layout(lane, value)) / step);
    }
  }
  std::printf("\n");
}

template <class Operation>
void print_mma(const char* name) {
  using Traits = cute::MMA_Traits<Operation>;
  std::printf("mma %s\n", name);
  print_values("a", typename Traits::ALayout{}, 1);
  print_values("b", typename Traits::BLayout{}, 1);
  print_values("c", typename Traits::CLayout{}, 1);
}

template <class Operation>
void print_ldmatrix(const char* name) {
  using Traits = cute::Copy_Traits<Operation>;
  std::printf("ldmatrix %s\n", name);
  print_values("from", typename Traits::SrcLayout{}, 16);
  print_values("to", typename Traits::DstLayout{}, 16);
}

int main() {
  using namespace cute;
  print_mma<SM80_16x8x16_F32F16F16F32_TN>("m16n8k16 f32 f16");
  print_mma<SM80_16x8x16_F16F16F16F16_TN>("m16n8k16 f16 f16");
  print_mma<SM80_16x8x16_F32BF16BF16F32_TN>("m16n8k16 f32 bf16");
  print_mma<SM80_16x8x8_F32F16F16F32_TN>("m16n8k8 f32 f16");
  print_mma<SM80_16x8x8_F16F16F16F16_TN>("m16n8k8 f16 f16");
  print_mma<SM80_16x8x8_F32BF16BF16F32_TN>("m16n8k8 f32 bf16");
  print_mma<SM80_16x8x8_F32TF32TF32F32_TN>("m16n8k8 f32 tf32");
  print_mma<SM80_16x8x4_F32TF32TF32F32_TN>("m16n8k4 f32 tf32");
  print_ldmatrix<SM75_U32x1_LDSM_N>("x1");
  print_ldmatrix<SM75_U32x2_LDSM_N>("x2");
  print_ldmatrix<SM75_U32x4_LDSM_N>("x4");
  print_ldmatrix<SM75_U16x2_LDSM_T>("x1 trans");
  print_ldmatrix<SM75_U16x4_LDSM_T>("x2 trans");
  print_ldmatrix<SM75_U16x8_LDSM_T>("x4 trans");
  return 0;
}
