// What the CPU kernels share: reading arguments through torch's stable ABI, and the sentences that refuse them.
//
// The kernels attach to ops that Python declares (kernels/<op>.py) and repeat the arithmetic of their references in
// the same order, one rounding an operation (-ffp-contract=off, no -ffast-math), so results agree bit for bit.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <type_traits>

namespace safer_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements a thread takes at least: about 20 microseconds of work, what waking a thread costs.
constexpr int64_t GRAIN = 32768;

// The loops run over two kinds of bytes, so that each is compiled for AVX2 too and chosen when the library loads.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define SAFER_FAST_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define SAFER_FAST_CLONES
#endif

template <class T>
struct Type {
  using type = T;
};

inline bool floating(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::Half || t == ScalarType::BFloat16;
}

// f(Type<T>) for the dtype of a tensor that is written in small steps.
template <class F>
void with_float(const Tensor& t, const char* what, F f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f(Type<float>{});
    case ScalarType::Double:
      return f(Type<double>{});
    default:
      STD_TORCH_CHECK(false, what, " must be float32 (or float64), which small steps need");
  }
}

// f(Type<T>) for the dtype of a tensor that is only read, or a copy in lower precision.
template <class F>
void with_any_float(const Tensor& t, const char* what, F f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f(Type<float>{});
    case ScalarType::Double:
      return f(Type<double>{});
    case ScalarType::Half:
      return f(Type<c10::Half>{});
    case ScalarType::BFloat16:
      return f(Type<c10::BFloat16>{});
    default:
      STD_TORCH_CHECK(false, what, " must be float16, bfloat16, float32 or float64");
  }
}

// A 0-D tensor of any number type, in float64.
inline double number(const Tensor& t, const char* what) {
  STD_TORCH_CHECK(t.numel() == 1, what, " must be a 0-D tensor");
  const void* p = t.const_data_ptr();
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return *static_cast<const float*>(p);
    case ScalarType::Double:
      return *static_cast<const double*>(p);
    case ScalarType::Half:
      return static_cast<float>(*static_cast<const c10::Half*>(p));
    case ScalarType::BFloat16:
      return static_cast<float>(*static_cast<const c10::BFloat16*>(p));
    case ScalarType::Long:
      return static_cast<double>(*static_cast<const int64_t*>(p));
    case ScalarType::Int:
      return *static_cast<const int32_t*>(p);
    default:
      STD_TORCH_CHECK(false, what, " must be a floating-point or integer number");
  }
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.sizes()[d] != b.sizes()[d]) return false;
  return true;
}

inline void check_written(const Tensor& t, const char* what) {
  STD_TORCH_CHECK(t.is_contiguous(), what, " is written in place and must be contiguous; call .contiguous() on it first");
}

inline Tensor packed(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline void check_alike(const Tensor& a, const Tensor& b, const char* what) {
  STD_TORCH_CHECK(same_shape(a, b) && floating(b.scalar_type()), what, " must be floats of one shape");
}

// As PyTorch's clamp: NaN in either stays NaN.
template <class T>
inline T at_least(T v, T low) {
  return v >= low || v != v ? v : low;
}
template <class T>
inline T at_most(T v, T high) {
  return v <= high || v != v ? v : high;
}

}  // namespace safer_fast
