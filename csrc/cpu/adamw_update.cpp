// safer_fast::adamw_update on the CPU: the whole update in one pass over the buffers.
#include "update.h"

namespace safer_fast {
namespace {

template <class T>
struct Hyper {
  T clip, beta1, beta2, rest1, rest2, rate, root, keep, eps;
};

template <class T>
SAFER_FAST_CLONES void step(T* w, T* m, T* v, const T* g, Hyper<T> h, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const T d = g[i] * h.clip;
    m[i] = h.beta1 * m[i] + h.rest1 * d;
    v[i] = h.beta2 * v[i] + h.rest2 * d * d;
    w[i] = w[i] * h.keep - h.rate * (m[i] / (std::sqrt(v[i]) / h.root + h.eps));
  }
}

void adamw_update(
    Tensor w, Tensor m, Tensor v, std::optional<Tensor> copy, Tensor g, Tensor norm, Tensor count, Tensor lr,
    double max_norm, double beta1, double beta2, double eps, double weight_decay) {
  check_state("adamw_update: w, m, v", w, m);
  check_state("adamw_update: w, m, v", w, v);
  check_update("adamw_update: w, g, copy", w, g, copy);
  g = packed(g);
  with_float(w, "adamw_update: w", [&](auto t) {
    using T = typename decltype(t)::type;
    const T size = static_cast<T>(number(norm, "adamw_update: norm"));
    if (!std::isfinite(size)) return;
    const double k = number(count, "adamw_update: step"), rate = number(lr, "adamw_update: lr");
    const Hyper<T> h{
        clip_factor<T>(size, max_norm),
        static_cast<T>(beta1),
        static_cast<T>(beta2),
        static_cast<T>(1 - beta1),
        static_cast<T>(1 - beta2),
        static_cast<T>(rate / (1 - std::pow(beta1, k))),
        static_cast<T>(std::sqrt(1 - std::pow(beta2, k))),
        static_cast<T>(1 - rate * weight_decay),
        static_cast<T>(eps)};
    T *p_w = static_cast<T*>(w.mutable_data_ptr()), *p_m = static_cast<T*>(m.mutable_data_ptr());
    T* p_v = static_cast<T*>(v.mutable_data_ptr());
    for_blocks<T>(p_w, g, copy, [&](int64_t first, int64_t n, const T* b_g) {
      step<T>(p_w + first, p_m + first, p_v + first, b_g, h, n);
    });
  });
}

}  // namespace
}  // namespace safer_fast

STABLE_TORCH_LIBRARY_IMPL(safer_fast, CPU, m) {
  m.impl("adamw_update", TORCH_BOX(&safer_fast::adamw_update));
}
