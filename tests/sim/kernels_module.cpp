// _kernels: the torch-free launchers as a Python module, for tests and micro-benchmarks. Pointers
// are integers, the caller keeps what they point to alive, and nothing is checked: a development
// tool, never in the wheel.

#include <pybind11/pybind11.h>

#include <vector>

#include "../../csrc/cpu/attention.h"
#include "../../csrc/cpu/isa.h"
#include "../../csrc/cuda/attention.h"
#include "../../csrc/cuda/attention_kv_cache.h"
#include "../../csrc/cuda/layernorm_ffn.h"
#include "../../csrc/cuda/recurrent.h"

namespace py = pybind11;
using namespace fastattn;

namespace {

// A pointer field as an integer, 0 = null.
template <class C, class T>
void pointer(py::class_<C>& cls, const char* name, T* C::* field) {
  cls.def_property(
      name, [field](const C& c) { return reinterpret_cast<uintptr_t>(c.*field); },
      [field](C& c, uintptr_t at) { c.*field = reinterpret_cast<T*>(at); });
}
// An enum field as its number.
template <class C, class E>
void number(py::class_<C>& cls, const char* name, E C::* field) {
  cls.def_property(
      name, [field](const C& c) { return int(c.*field); },
      [field](C& c, int n) { c.*field = E(n); });
}

// What the parameters of every device have.
template <class P>
void common(py::class_<P>& cls) {
  cls.def(py::init<>())
      .def_readwrite("B", &P::B)
      .def_readwrite("H", &P::H)
      .def_readwrite("Hk", &P::Hk)
      .def_readwrite("D", &P::D)
      .def_readwrite("Dv", &P::Dv)
      .def_readwrite("Sq", &P::Sq)
      .def_readwrite("Sk", &P::Sk)
      .def_readwrite("q", &P::q)
      .def_readwrite("k", &P::k)
      .def_readwrite("v", &P::v)
      .def_readwrite("o", &P::o)
      .def_readwrite("mask", &P::mask)
      .def_readwrite("bias", &P::bias)
      .def_readwrite("alibi_b", &P::alibi_b)
      .def_readwrite("scale", &P::scale)
      .def_readwrite("softcap", &P::softcap)
      .def_readwrite("window_left", &P::window_left)
      .def_readwrite("window_right", &P::window_right)
      .def_readwrite("dropout_p", &P::dropout_p)
      .def_readwrite("weights", &P::weights);
  number(cls, "dtype", &P::dtype), number(cls, "causal", &P::causal);
  number(cls, "weights_mode", &P::weights_mode);
  pointer(cls, "lse", &P::lse), pointer(cls, "lse_lo", &P::lse_lo);
  pointer(cls, "alibi", &P::alibi), pointer(cls, "sinks", &P::sinks);
}

void operands(py::module_& m) {
  py::class_<Operand> operand(m, "Operand");
  operand.def(py::init<>())
      .def_readwrite("b", &Operand::b)
      .def_readwrite("h", &Operand::h)
      .def_readwrite("s", &Operand::s)
      .def_readwrite("d", &Operand::d);
  pointer(operand, "ptr", &Operand::ptr);
  py::class_<Broadcast> broadcast(m, "Broadcast");
  broadcast.def(py::init<>())
      .def_readwrite("b", &Broadcast::b)
      .def_readwrite("h", &Broadcast::h)
      .def_readwrite("i", &Broadcast::i)
      .def_readwrite("j", &Broadcast::j);
  number(broadcast, "dtype", &Broadcast::dtype);
  pointer(broadcast, "ptr", &Broadcast::ptr);
}

void cpu(py::module_ m) {
  py::class_<AttentionParams> params(m, "AttentionParams");
  common(params);
  params.def_readwrite("lse_b", &AttentionParams::lse_b)
      .def_readwrite("lse_h", &AttentionParams::lse_h)
      .def_readwrite("lse_s", &AttentionParams::lse_s)
      .def_readwrite("seed", &AttentionParams::seed);
  pointer(params, "q_len", &AttentionParams::q_len),
      pointer(params, "k_len", &AttentionParams::k_len);
  pointer(params, "q_start", &AttentionParams::q_start);
  pointer(params, "k_start", &AttentionParams::k_start);
  py::class_<AttentionGrads> grads(m, "AttentionGrads");
  grads.def(py::init<>())
      .def_readwrite("d_o", &AttentionGrads::d_o)
      .def_readwrite("dweights", &AttentionGrads::dweights)
      .def_readwrite("dweights_scale", &AttentionGrads::dweights_scale)
      .def_readwrite("dq", &AttentionGrads::dq)
      .def_readwrite("dk", &AttentionGrads::dk)
      .def_readwrite("dv", &AttentionGrads::dv)
      .def_readwrite("dbias_b", &AttentionGrads::dbias_b)
      .def_readwrite("dbias_h", &AttentionGrads::dbias_h)
      .def_readwrite("dbias_i", &AttentionGrads::dbias_i)
      .def_readwrite("dbias_j", &AttentionGrads::dbias_j)
      .def_readwrite("dbias_once", &AttentionGrads::dbias_once);
  pointer(grads, "dlse", &AttentionGrads::dlse), pointer(grads, "dbias", &AttentionGrads::dbias);
  pointer(grads, "dsinks", &AttentionGrads::dsinks);
  // On the calling thread alone: what is measured is the kernel.
  m.def("attention_forward", [](const AttentionParams& p) { attention_forward(p, Parallel()); });
  m.def("attention_backward", [](const AttentionParams& p, const AttentionGrads& g) {
    attention_backward(p, g, Parallel());
  });
  m.def("force_isa", [](int isa) { return force_isa(Isa(isa)); });
}

// What a launcher's table holds, as dicts.
py::list listed(int (*variants)(cuda::VariantInfo*, int)) {
  std::vector<cuda::VariantInfo> all(size_t(variants(nullptr, 0)));
  variants(all.data(), int(all.size()));
  py::list out;
  for (const cuda::VariantInfo& v : all)
    out.append(py::dict(py::arg("kernel") = v.kernel, py::arg("dtype") = int(v.dtype),
                        py::arg("head_dim") = v.head_dim, py::arg("laden") = v.laden,
                        py::arg("rows") = v.rows, py::arg("keys") = v.keys,
                        py::arg("threads") = v.threads, py::arg("shared") = v.shared,
                        py::arg("atomics") = v.atomics));
  return out;
}

void cuda_(py::module_ m) {
  using Params = cuda::AttentionParams;
  py::class_<cuda::Integers> integers(m, "Integers");
  integers.def(py::init<>()).def_readwrite("wide", &cuda::Integers::wide);
  pointer(integers, "ptr", &cuda::Integers::ptr);
  py::class_<Params> params(m, "AttentionParams");
  common(params);
  params.def_readwrite("Tq", &Params::Tq)
      .def_readwrite("Tk", &Params::Tk)
      .def_readwrite("q_lens", &Params::q_lens)
      .def_readwrite("k_lens", &Params::k_lens)
      .def_readwrite("cu_q", &Params::cu_q)
      .def_readwrite("cu_k", &Params::cu_k);
  pointer(params, "seed", &Params::seed);
  py::class_<cuda::Launch> launch(m, "Launch");
  launch.def_readonly("kernel", &cuda::Launch::kernel)
      .def_readonly("grid", &cuda::Launch::grid)
      .def_readonly("block", &cuda::Launch::block)
      .def_readonly("shared", &cuda::Launch::shared);
  launch.def_property_readonly("error", [](const cuda::Launch& l) { return int(l.error); });
  const auto on = [](uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); };
  m.def(
      "attention_forward",
      [on](const Params& p, uintptr_t stream) { return cuda::attention_forward(p, on(stream)); },
      py::arg("params"), py::arg("stream") = 0);
  m.def(
      "attention_weights",
      [on](const Params& p, uintptr_t stream) { return cuda::attention_weights(p, on(stream)); },
      py::arg("params"), py::arg("stream") = 0);
  using Grads = cuda::AttentionGrads;
  py::class_<Grads> grads(m, "AttentionGrads");
  grads.def(py::init<>())
      .def_readwrite("d_o", &Grads::d_o)
      .def_readwrite("dlse", &Grads::dlse)
      .def_readwrite("dweights", &Grads::dweights)
      .def_readwrite("dweights_scale", &Grads::dweights_scale)
      .def_readwrite("dq", &Grads::dq)
      .def_readwrite("dk", &Grads::dk)
      .def_readwrite("dv", &Grads::dv)
      .def_readwrite("dbias_b", &Grads::dbias_b)
      .def_readwrite("dbias_h", &Grads::dbias_h)
      .def_readwrite("dbias_i", &Grads::dbias_i)
      .def_readwrite("dbias_j", &Grads::dbias_j)
      .def_readwrite("bias_b", &Grads::bias_b)
      .def_readwrite("bias_h", &Grads::bias_h);
  number(grads, "dbias_mode", &Grads::dbias_mode);
  number(grads, "dbias_dtype", &Grads::dbias_dtype);
  pointer(grads, "dbias", &Grads::dbias), pointer(grads, "dsinks", &Grads::dsinks);
  pointer(grads, "delta", &Grads::delta), pointer(grads, "lse_units", &Grads::lse_units);
  pointer(grads, "dq_sums", &Grads::dq_sums);
  m.def(
      "attention_backward",
      [on](const Params& p, const Grads& g, uintptr_t stream) {
        return cuda::attention_backward(p, g, on(stream));
      },
      py::arg("params"), py::arg("grads"), py::arg("stream") = 0);
  m.def("attention_backward_variants", [] { return listed(cuda::attention_backward_variants); });
  m.def("attention_forward_variants", [] { return listed(cuda::attention_forward_variants); });
  m.def("attention_weights_variants", [] { return listed(cuda::attention_weights_variants); });
  m.def("attention_kv_cache_variants", [] { return listed(cuda::attention_kv_cache_variants); });
  // rows, splits, whether the append is a launch of its own.
  m.def("attention_kv_cache_plan", [](const Params& p, int new_rows, int multiprocessors) {
    const cuda::AttentionKVCacheParams call = {p, {.Sn = new_rows}};
    const auto plan = cuda::attention_kv_cache_plan(call, multiprocessors);
    return py::make_tuple(plan.rows, plan.splits, plan.apart);
  });
  m.def("layernorm_ffn_forward_variants",
        [] { return listed(cuda::layernorm_ffn_forward_variants); });
  m.def("layernorm_ffn_backward_variants",
        [] { return listed(cuda::layernorm_ffn_backward_variants); });
  m.def("recurrent_variants", [] { return listed(cuda::recurrent_variants); });
  m.def("recurrent_step_variants", [] { return listed(cuda::recurrent_step_variants); });
  m.def("error_name", [](int error) { return cudaGetErrorName(cudaError_t(error)); });
  m.def("error_text", [](int error) { return cudaGetErrorString(cudaError_t(error)); });
}

}  // namespace

PYBIND11_MODULE(_kernels, m) {
  operands(m);
  cpu(m.def_submodule("cpu"));
  cuda_(m.def_submodule("cuda"));
}
