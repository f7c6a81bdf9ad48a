// safer_fast::linf_step on the CPU: one pass over the pixels, where the reference makes ten.
#include "tensors.h"

namespace safer_fast {
namespace {

template <class T, class G>
SAFER_FAST_CLONES void step(T* adv, const G* grad, const T* x, T alpha, T eps, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const G g = grad[i];
    const T sign = static_cast<T>((g > G(0)) - (g < G(0)));  // 0 for NaN
    const T moved = at_most(at_least(adv[i] + alpha * sign, x[i] - eps), x[i] + eps);
    adv[i] = at_most(at_least(moved, T(0)), T(1));
  }
}

void linf_step(Tensor x_adv, Tensor grad, Tensor x, Tensor alpha, Tensor eps) {
  check_written(x_adv, "linf_step: x_adv");
  check_alike(x_adv, grad, "linf_step: x_adv, grad, x");
  check_alike(x_adv, x, "linf_step: x_adv, grad, x");
  STD_TORCH_CHECK(x.scalar_type() == x_adv.scalar_type(), "linf_step: give x and x_adv one dtype");
  grad = packed(grad);
  x = packed(x);
  with_float(x_adv, "linf_step: x_adv", [&](auto t) {
    using T = typename decltype(t)::type;
    const T a = static_cast<T>(number(alpha, "linf_step: alpha")), e = static_cast<T>(number(eps, "linf_step: eps"));
    T* p_adv = static_cast<T*>(x_adv.mutable_data_ptr());
    const T* p_x = static_cast<const T*>(x.const_data_ptr());
    with_any_float(grad, "linf_step: grad", [&](auto g) {
      using G = typename decltype(g)::type;
      const G* p_grad = static_cast<const G*>(grad.const_data_ptr());
      torch::stable::parallel_for(0, x_adv.numel(), GRAIN, [&](int64_t begin, int64_t end) {
        step<T, G>(p_adv, p_grad, p_x, a, e, begin, end);
      });
    });
  });
}

}  // namespace
}  // namespace safer_fast

STABLE_TORCH_LIBRARY_IMPL(safer_fast, CPU, m) {
  m.impl("linf_step", TORCH_BOX(&safer_fast::linf_step));
}
