// What the optimizer kernels share: gradients read, and copies written, a cache-sized block at a time in any dtype.
#pragma once

#include "tensors.h"

#include <algorithm>

namespace safer_fast {

constexpr int64_t BLOCK = 1024;

template <class To, class From>
SAFER_FAST_CLONES void convert(To* to, const From* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<To>(from[i]);
}

// min(1, max_norm / (norm + 1e-6)); the reciprocal first, as clip_grad_norm_ has it. 1 where max_norm is 0.
template <class T>
T clip_factor(T norm, double max_norm) {
  return max_norm > 0 ? at_most(T(1) / (norm + T(1e-6)) * static_cast<T>(max_norm), T(1)) : T(1);
}

// f(first, n, gradient block of w's dtype) for every block, then the block's copy, on all threads.
template <class T, class F>
void for_blocks(const T* w, const Tensor& g, const std::optional<Tensor>& copy, F f) {
  const int64_t P = g.numel();
  torch::stable::parallel_for(0, (P + BLOCK - 1) / BLOCK, GRAIN / BLOCK, [&](int64_t begin, int64_t end) {
    T buffer[BLOCK];
    for (int64_t first = begin * BLOCK; first < std::min(end * BLOCK, P); first += BLOCK) {
      const int64_t n = std::min(BLOCK, P - first);
      with_any_float(g, "g", [&](auto t) {
        using G = typename decltype(t)::type;
        const G* p_g = static_cast<const G*>(g.const_data_ptr()) + first;
        if constexpr (std::is_same_v<G, T>) {
          f(first, n, p_g);
        } else {
          convert<T, G>(buffer, p_g, n);
          f(first, n, static_cast<const T*>(buffer));
        }
      });
      if (copy)
        with_any_float(*copy, "copy", [&](auto t) {
          using C = typename decltype(t)::type;
          convert<C, T>(static_cast<C*>(copy->mutable_data_ptr()) + first, w + first, n);
        });
    }
  });
}

inline void check_update(const char* what, const Tensor& w, const Tensor& g, const std::optional<Tensor>& copy) {
  check_alike(w, g, what);
  if (copy) {
    check_alike(w, *copy, what);
    check_written(*copy, what);
  }
}

inline void check_state(const char* what, const Tensor& w, const Tensor& state) {
  check_alike(w, state, what);
  check_written(w, what);
  check_written(state, what);
  STD_TORCH_CHECK(state.scalar_type() == w.scalar_type(), what, " must have one dtype");
}

}  // namespace safer_fast
