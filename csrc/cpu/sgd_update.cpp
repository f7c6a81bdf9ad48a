// safer_fast::sgd_update on the CPU: clipping, decay, momentum, step and copy in one pass over the buffers.
#include "update.h"

namespace safer_fast {
namespace {

template <class T>
struct Hyper {
  T clip, lr, momentum, weight_decay;
  bool nesterov;
};

template <class T>
SAFER_FAST_CLONES void step(T* w, T* m, const T* g, Hyper<T> h, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const T d = g[i] * h.clip + h.weight_decay * w[i];
    m[i] = h.momentum * m[i] + d;
    w[i] -= h.lr * (h.nesterov ? d + h.momentum * m[i] : m[i]);
  }
}

void sgd_update(
    Tensor w, Tensor m, std::optional<Tensor> copy, Tensor g, Tensor norm, Tensor lr, double max_norm, double momentum,
    double weight_decay, bool nesterov) {
  check_state("sgd_update: w, m", w, m);
  check_update("sgd_update: w, g, copy", w, g, copy);
  g = packed(g);
  with_float(w, "sgd_update: w", [&](auto t) {
    using T = typename decltype(t)::type;
    const T size = static_cast<T>(number(norm, "sgd_update: norm"));
    if (!std::isfinite(size)) return;
    const Hyper<T> h{
        clip_factor<T>(size, max_norm), static_cast<T>(number(lr, "sgd_update: lr")), static_cast<T>(momentum),
        static_cast<T>(weight_decay), nesterov};
    T *p_w = static_cast<T*>(w.mutable_data_ptr()), *p_m = static_cast<T*>(m.mutable_data_ptr());
    for_blocks<T>(p_w, g, copy, [&](int64_t first, int64_t n, const T* b_g) { step<T>(p_w + first, p_m + first, b_g, h, n); });
  });
}

}  // namespace
}  // namespace safer_fast

STABLE_TORCH_LIBRARY_IMPL(safer_fast, CPU, m) {
  m.impl("sgd_update", TORCH_BOX(&safer_fast::sgd_update));
}
