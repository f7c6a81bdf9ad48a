// safer_fast::sam_perturb on the CPU: one pass, each thread walking the segments in its part of the buffer.
#include "tensors.h"

#include <algorithm>

namespace safer_fast {
namespace {

template <class T, class G>
SAFER_FAST_CLONES void perturb(T* e, const G* g, T scale, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) e[i] = scale * static_cast<T>(g[i]);
}

template <class T, class G>
SAFER_FAST_CLONES void perturb_adaptive(T* e, const G* g, const T* w, T scale, T eta, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T t = (w[i] < 0 ? -w[i] : w[i]) + eta;
    e[i] = scale * (t * t) * static_cast<T>(g[i]);
  }
}

void sam_perturb(
    Tensor e, Tensor g, Tensor w, Tensor norms, Tensor offsets, Tensor rho, bool adaptive, double eta) {
  check_written(e, "sam_perturb: e");
  check_alike(e, g, "sam_perturb: e, g, w");
  check_alike(e, w, "sam_perturb: e, g, w");
  STD_TORCH_CHECK(e.dim() == 1 && w.scalar_type() == e.scalar_type(), "sam_perturb: e and w must be flat and of one dtype");
  STD_TORCH_CHECK(
      norms.dim() == 1 && offsets.dim() == 1 && offsets.scalar_type() == ScalarType::Long &&
          offsets.numel() == norms.numel() + 1,
      "sam_perturb: norms must be [L] and offsets int64 [L+1]");
  g = packed(g);
  w = packed(w);
  offsets = packed(offsets);
  const int64_t L = norms.numel(), P = e.numel();
  const int64_t* ends = offsets.const_data_ptr<int64_t>();
  STD_TORCH_CHECK(
      ends[0] == 0 && ends[L] == P && std::is_sorted(ends, ends + L + 1), "sam_perturb: offsets must rise from 0 to P");
  norms = packed(torch::stable::to(norms, ScalarType::Double));
  const double* p_norms = norms.const_data_ptr<double>();
  with_float(e, "sam_perturb: e", [&](auto t) {
    using T = typename decltype(t)::type;
    const T radius = static_cast<T>(number(rho, "sam_perturb: rho"));
    T* p_e = static_cast<T*>(e.mutable_data_ptr());
    const T* p_w = static_cast<const T*>(w.const_data_ptr());
    with_any_float(g, "sam_perturb: g", [&](auto h) {
      using G = typename decltype(h)::type;
      const G* p_g = static_cast<const G*>(g.const_data_ptr());
      torch::stable::parallel_for(0, P, GRAIN, [&](int64_t begin, int64_t end) {
        int64_t l = std::upper_bound(ends, ends + L, begin) - ends - 1;
        for (int64_t lo = begin; lo < end; ++l) {
          const int64_t hi = std::min(end, ends[l + 1]);
          const T norm = static_cast<T>(p_norms[l]), scale = radius / (norm + T(1e-12));
          if (!std::isfinite(norm))
            std::fill(p_e + lo, p_e + hi, T(0));
          else if (adaptive)
            perturb_adaptive<T, G>(p_e, p_g, p_w, scale, static_cast<T>(eta), lo, hi);
          else
            perturb<T, G>(p_e, p_g, scale, lo, hi);
          lo = hi;
        }
      });
    });
  });
}

}  // namespace
}  // namespace safer_fast

STABLE_TORCH_LIBRARY_IMPL(safer_fast, CPU, m) {
  m.impl("sam_perturb", TORCH_BOX(&safer_fast::sam_perturb));
}
