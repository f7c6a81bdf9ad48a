// safer_fast::l2_step on the CPU: three passes over an image that fits the cache, one thread an image.
#include "norms.h"

namespace safer_fast {
namespace {

constexpr double MARGIN = 1 - 0x1p-21;  // kernels/l2_step.py says why

template <class T, class G>
inline T displaced(T adv, T x, G grad, double scale) {
  return adv - x + static_cast<T>(static_cast<double>(grad) * scale);
}

template <class T, class G>
SAFER_FAST_CLONES double displacement(const T* adv, const G* grad, const T* x, double scale, int64_t n) {
  double lanes[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  for (int64_t i = 0; i < n; i += 8)
    for (int64_t k = 0; k < (n - i < 8 ? n - i : 8); ++k) {
      const double d = displaced<T, G>(adv[i + k], x[i + k], grad[i + k], scale);
      lanes[k] += d * d;
    }
  return std::sqrt(
      ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7])));
}

template <class T, class G>
SAFER_FAST_CLONES void move(T* adv, const G* grad, const T* x, double scale, T factor, int64_t n) {
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  for (int64_t i = 0; i < n; ++i) {
    const T d = displaced<T, G>(adv[i], x[i], grad[i], scale) * factor;
    T moved = x[i] + d;
    const T off = moved - x[i];
    // One float towards x. Where this matters `moved` is positive, and its neighbour's bits are one more or less.
    const Bits bits = __builtin_bit_cast(Bits, moved) + (x[i] > moved ? Bits(1) : Bits(-1));
    moved = (off < 0 ? -off : off) > (d < 0 ? -d : d) && moved > T(0) ? __builtin_bit_cast(T, bits) : moved;
    adv[i] = at_most(at_least(moved, T(0)), T(1));
  }
}

template <class T, class G>
void step(T* adv, const G* grad, const T* x, double alpha, double eps, int64_t n) {
  const double size = std::sqrt(sum_of_squares<G>(grad, n));
  if (!(size > 0) || !std::isfinite(size)) return;
  const double scale = alpha / size;
  const double radius = eps * MARGIN, length = displacement<T, G>(adv, grad, x, scale, n);
  move<T, G>(adv, grad, x, scale, static_cast<T>(length > radius ? radius / length : 1.0), n);
}

void l2_step(Tensor x_adv, Tensor grad, Tensor x, Tensor alpha, Tensor eps) {
  check_written(x_adv, "l2_step: x_adv");
  check_alike(x_adv, grad, "l2_step: x_adv, grad, x");
  check_alike(x_adv, x, "l2_step: x_adv, grad, x");
  STD_TORCH_CHECK(x.scalar_type() == x_adv.scalar_type(), "l2_step: give x and x_adv one dtype");
  STD_TORCH_CHECK(x.dim() >= 2, "l2_step: images are [B, ...], with pixels beside B");
  grad = packed(grad);
  x = packed(x);
  const int64_t B = x.sizes()[0], D = B ? x.numel() / B : 0;
  if (!D) return;
  const double a = number(alpha, "l2_step: alpha"), e = number(eps, "l2_step: eps");
  with_float(x_adv, "l2_step: x_adv", [&](auto t) {
    using T = typename decltype(t)::type;
    T* p_adv = static_cast<T*>(x_adv.mutable_data_ptr());
    const T* p_x = static_cast<const T*>(x.const_data_ptr());
    with_any_float(grad, "l2_step: grad", [&](auto g) {
      using G = typename decltype(g)::type;
      const G* p_grad = static_cast<const G*>(grad.const_data_ptr());
      torch::stable::parallel_for(0, B, 1 + GRAIN / 4 / D, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) step<T, G>(p_adv + b * D, p_grad + b * D, p_x + b * D, a, e, D);
      });
    });
  });
}

}  // namespace
}  // namespace safer_fast

STABLE_TORCH_LIBRARY_IMPL(safer_fast, CPU, m) {
  m.impl("l2_step", TORCH_BOX(&safer_fast::l2_step));
}
