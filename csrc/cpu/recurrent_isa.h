// The entry points of one instruction set. Included inside target_begin.h / target_end.h.
#include "simd.h"
#include "philox.h"
#include "gemm.h"
#include "amx.h"
#include "rows.h"
#include "activation.h"
#include "recurrent_cell.h"
#include "lstm.h"
#include "gru.h"
#include "recurrent_products.h"
#include "recurrent_plan.h"
#include "recurrent_fwd.h"
#include "recurrent_bwd.h"

namespace fastattn {
namespace FASTATTN_ISA {

template <class T>
struct As {
  using type = T;
};

// f(storage, products) of a call.
template <class F>
FASTATTN_INLINE void with_storage(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kF16:
      return f(As<f16>{}, As<FloatProducts>{});
    case DType::kBf16:
#if FASTATTN_LEVEL >= 3
      return f(As<bf16>{}, As<TileRecurrentProducts>{});
#else
      return f(As<bf16>{}, As<FloatProducts>{});
#endif
    default:
      return f(As<float>{}, As<FloatProducts>{});
  }
}

// f(cell, storage, products). Values that are rounded to bf16 next need no exact exponentials.
template <class F>
FASTATTN_INLINE void with_cell(const RecurrentParams& p, F&& f) {
  with_storage(p.dtype, [&](auto storage, auto products) FASTATTN_LAMBDA {
    using T = typename decltype(storage)::type;
    constexpr Grade kGrade = std::is_same_v<T, bf16> ? Grade::kCoarse : Grade::kExact;
    switch (p.cell) {
      case Cell::kLstm:
        return f(As<LstmCell<kGrade>>{}, storage, products);
      case Cell::kGru:
        return f(As<GruCell<kGrade>>{}, storage, products);
      default:
        return f(As<RnnCell>{}, storage, products);
    }
  });
}

void recurrent_forward(const RecurrentParams& p, const Parallel& parallel) {
  with_cell(p, [&](auto cell, auto storage, auto products) FASTATTN_LAMBDA {
    RecurrentForward<typename decltype(cell)::type, typename decltype(storage)::type,
                     typename decltype(products)::type>(p, parallel)
        .run();
  });
}

void recurrent_backward(const RecurrentParams& p, const RecurrentGrads& g,
                        const Parallel& parallel) {
  with_cell(p, [&](auto cell, auto storage, auto products) FASTATTN_LAMBDA {
    RecurrentBackward<typename decltype(cell)::type, typename decltype(storage)::type,
                      typename decltype(products)::type>(p, g, parallel)
        .run();
  });
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn

#include "recurrent_step_rows.h"
