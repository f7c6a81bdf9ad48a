// safer_fast::layer_norms on the CPU: global_norm of each segment.
#include "norms.h"

namespace safer_fast {
namespace {

Tensor layer_norms(Tensor v, Tensor offsets) {
  STD_TORCH_CHECK(
      v.dim() == 1 && floating(v.scalar_type()) && offsets.dim() == 1 && offsets.scalar_type() == ScalarType::Long &&
          offsets.numel() >= 1,
      "layer_norms: v must be a flat vector of floats and offsets int64 [L+1]");
  v = packed(v);
  offsets = packed(offsets);
  const int64_t segments = offsets.numel() - 1;
  const int64_t* p_offsets = offsets.const_data_ptr<int64_t>();
  Tensor out = torch::stable::new_empty(v, {segments}, at_least_float32(v));
  with_any_float(v, "layer_norms: v", [&](auto t) {
    using T = typename decltype(t)::type;
    const T* p_v = static_cast<const T*>(v.const_data_ptr());
    for (int64_t l = 0; l < segments; ++l) {
      const int64_t lo = p_offsets[l], hi = p_offsets[l + 1];
      STD_TORCH_CHECK(0 <= lo && lo <= hi && hi <= v.numel(), "layer_norms: offsets must rise from 0 to at most P");
      put(out, l, norm_of<T>(p_v + lo, hi - lo));
    }
  });
  return out;
}

}  // namespace
}  // namespace safer_fast

STABLE_TORCH_LIBRARY_IMPL(safer_fast, CPU, m) {
  m.impl("layer_norms", TORCH_BOX(&safer_fast::layer_norms));
}
