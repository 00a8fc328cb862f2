// See products.h; and torch.ops.fastattn.{product_cpu, product_cpu_out, product_cpu_add,
// product_cpu_bias, linear_cpu} for the Python layer.

#include "products.h"

#include "../cpu/cast.h"
#include "../cpu/isa.h"
#include "../cpu/scratch.h"
#include "dispatcher.h"

namespace fastattn::binding {
namespace {

constexpr const char* kOp = "product";

// On the caller's memory.
Tensor matrix(float* memory, int64_t M, int64_t N, int64_t s0, int64_t s1) {
  const int64_t sizes[] = {M, N}, strides[] = {s0, s1};
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_create_tensor_from_blob(memory, 2, sizes, strides, 0, aoti_torch_dtype_float32(),
                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Floats of scratch that the thread keeps from call to call.
class Buffer {
 public:
  Buffer() = default;
  ~Buffer() {
    if (memory_) scratch_give(memory_, bytes_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* reserve(int64_t floats) {
    memory_ = scratch_take(size_t(floats) * sizeof(float), &bytes_);
    ask_for_huge_pages(memory_, int64_t(bytes_));
    return static_cast<float*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

int64_t div_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// A bf16 matrix whose rows or columns have unit stride, and blocks of it as fp32 rows.
class Wide {
 public:
  explicit Wide(const Tensor& x) : x_(x), turned_(x.stride(1) != 1) {
    rows_ = {data(x), DType::kBf16, turned_ ? x.stride(1) : x.stride(0)};
  }
  bool serves() const { return x_.stride(turned_ ? 0 : 1) == 1 && rows_.stride > 0; }
  // Rows [m, m + M) and columns [n, n + N), in `scratch`.
  Tensor block(int64_t m, int64_t M, int64_t n, int64_t N, float* scratch,
               const Parallel& parallel) const {
    CastParams p;
    p.M = turned_ ? N : M, p.N = turned_ ? M : N;
    p.x = turned_ ? from(n, m) : from(m, n);
    p.y = {scratch, DType::kF32, p.N};
    cast_rows(p, parallel);
    return turned_ ? matrix(scratch, M, N, 1, M) : matrix(scratch, M, N, N, 1);
  }
  // As they lie in memory, from a row and a column of memory on.
  Rows from(int64_t row, int64_t column) const {
    return {static_cast<char*>(rows_.ptr) + 2 * (row * rows_.stride + column), rows_.dtype,
            rows_.stride};
  }
  int64_t rows() const { return x_.size(0); }
  int64_t columns() const { return x_.size(1); }
  bool turned() const { return turned_; }

 private:
  Tensor x_;
  bool turned_;
  Rows rows_;
};

Tensor by_library(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  call("aten::mm", stack, "out");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// to += x, (M, N) in fp32. (The dispatcher's addmm takes Scalars, which no stable call can.)
void add(const float* x, int64_t M, int64_t N, float* to, const Parallel& parallel) {
  NormParams p;
  p.M = M, p.N = N, p.x = {const_cast<float*>(x), DType::kF32, N};
  p.residual = p.y = {to, DType::kF32, N};
  norm_forward(p, parallel);
}

// Widening and rounding cost about what 70 products cost.
bool worth_widening(int64_t M, int64_t N, int64_t K) {
  constexpr double kPasses = 0.012;
  return M > 0 && N > 0 && K > 0 && 1. / double(M) + 1. / double(N) + 1. / double(K) < kPasses;
}

// Blocks: what is widened of b stays in the caches while rows of a go by.
constexpr int64_t kMostK = 4096, kFloatsOfB = 3 << 19, kFloatsOfRows = 1 << 19;

void by_fp32(const Wide& a, const Wide& b, int64_t K, const Vec& bias, const Wide& out,
             bool accumulate) {
  const Parallel parallel = threads();
  const int64_t M = out.rows(), N = out.columns();
  const auto even = [](int64_t n, int64_t most) {
    const int64_t parts = div_up(n, std::max<int64_t>(most, 64));
    return div_up(n, parts);
  };
  const int64_t k_step = even(K, kMostK), n_step = even(N, kFloatsOfB / k_step),
                m_step = even(M, kFloatsOfRows / std::max(k_step, n_step));
  Buffer of_b, of_a, of_c, of_part;
  float *const wide_b = of_b.reserve(k_step * n_step),
               *const wide_a = of_a.reserve(m_step * k_step),
               *const sums = of_c.reserve(m_step * n_step),
               *const part = k_step < K || accumulate ? of_part.reserve(m_step * n_step) : nullptr;
  const int64_t bias_item = bias.dtype == DType::kF32 ? 4 : 2;
  for (int64_t n = 0; n < N; n += n_step) {
    const int64_t columns = std::min(n_step, N - n);
    std::optional<Tensor> right;
    for (int64_t m = 0; m < M; m += m_step) {
      const int64_t rows = std::min(m_step, M - m);
      const Tensor c = accumulate ? out.block(m, rows, n, columns, sums, parallel)
                                  : matrix(sums, rows, columns, columns, 1);
      for (int64_t k = 0; k < K; k += k_step) {
        const int64_t depth = std::min(k_step, K - k);
        if (!right || k_step < K) right = b.block(k, depth, n, columns, wide_b, parallel);
        const Tensor left = a.block(m, rows, k, depth, wide_a, parallel);
        const bool more = k || accumulate;
        by_library(left, *right, more ? matrix(part, rows, columns, columns, 1) : c);
        if (more) add(part, rows, columns, sums, parallel);
      }
      CastParams p;
      p.M = rows, p.N = columns, p.x = {sums, DType::kF32, columns};
      if (bias.ptr) p.bias = {static_cast<const char*>(bias.ptr) + n * bias_item, bias.dtype};
      p.y = out.from(m, n);
      cast_rows(p, parallel);
    }
  }
}

// Whether it was done.
bool widened(const Tensor& a, const Tensor& b, const Opt& bias, const Tensor& out,
             bool accumulate = false) {
  const int64_t M = a.size(0), K = a.size(1), N = b.size(1);
  if (a.scalar_type() != ScalarType::BFloat16 || !fp32_multiplies_faster() ||
      !worth_widening(M, N, K))
    return false;
  const Wide left(a), right(b), result(out);
  if (!left.serves() || !right.serves() || !result.serves() || result.turned()) return false;
  Opt kept = bias;
  by_fp32(left, right, K, vec(kOp, kept, N, "bias"), result, accumulate);
  return true;
}

void check(const Tensor& a, const Tensor& b, const Tensor& out) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), "fastattn::", kOp,
                  ": a and b must be (M, K) and (K, N), got ", text(a), " and ", text(b));
  STD_TORCH_CHECK(shape_of(out) == (Shape{a.size(0), b.size(1)}), "fastattn::", kOp,
                  ": out must be (M, N), got ", text(out));
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type() && a.scalar_type() == out.scalar_type(),
                  "fastattn::", kOp, ": a, b and out must have one dtype");
}

Tensor result_of(const Tensor& a, const Tensor& b) {
  return empty({a.size(0), b.size(1)}, row_dtype(kOp, a, "a"));
}

Tensor product_cpu(Tensor a, Tensor b) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2, "fastattn::", kOp,
                  ": a and b must be (M, K) and (K, N), got ", text(a), " and ", text(b));
  const Tensor out = result_of(a, b);
  check(a, b, out);
  return product(a, b, out);
}

void product_cpu_out(Tensor a, Tensor b, Tensor out) {
  check(a, b, out);
  product(a, b, out);
}

// out += a b; false where that is the library's to do.
bool product_cpu_add(Tensor a, Tensor b, Tensor out) {
  check(a, b, out);
  return widened(a, b, std::nullopt, out, true);
}

// out = a b + bias, likewise.
bool product_cpu_bias(Tensor a, Tensor b, Tensor bias, Tensor out) {
  check(a, b, out);
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == b.size(1), "fastattn::", kOp,
                  ": bias must be (N,), got ", text(bias));
  return widened(a, b, bias, out);
}

Tensor linear_cpu(Tensor x, Tensor w, Opt bias) { return linear(x, w, bias); }

}  // namespace

Tensor product(const Tensor& a, const Tensor& b, const Tensor& out) {
  return widened(a, b, std::nullopt, out) ? out : by_library(a, b, out);
}

Tensor linear(const Tensor& x, const Tensor& w, const Opt& bias) {
  using torch::stable::detail::from;
  if (x.scalar_type() == ScalarType::BFloat16 && w.scalar_type() == ScalarType::BFloat16 &&
      x.is_contiguous() && x.dim() && w.dim() == 2 && x.numel() && x.size(-1) == w.size(1) &&
      (!bias || (bias->scalar_type() == ScalarType::BFloat16 && bias->dim() == 1))) {
    Shape shape = shape_of(x);
    const int64_t K = shape.back(), M = x.numel() / K;
    shape.back() = w.size(0);
    const Tensor y = empty(shape, row_dtype(kOp, x, "x"));
    if (widened(view2(x, M, K, K, 1), transposed(w), bias, view2(y, M, w.size(0), w.size(0), 1)))
      return y;
  }
  std::array<StableIValue, 3> stack{from(x), from(w), from(bias)};
  call("aten::linear", stack);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace fastattn::binding

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  using namespace fastattn::binding;
  m.impl("product_cpu", TORCH_BOX(&product_cpu));
  m.impl("product_cpu_out", TORCH_BOX(&product_cpu_out));
  m.impl("product_cpu_add", TORCH_BOX(&product_cpu_add));
  m.impl("product_cpu_bias", TORCH_BOX(&product_cpu_bias));
  m.impl("linear_cpu", TORCH_BOX(&linear_cpu));
}
