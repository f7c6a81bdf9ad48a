// safer_fast::global_norm on the CPU: in chunks of a fixed size, added up in order, whoever computed them.
#include "norms.h"

namespace safer_fast {
namespace {

Tensor global_norm(Tensor v) {
  STD_TORCH_CHECK(v.dim() == 1 && floating(v.scalar_type()), "global_norm: v must be a flat vector of floats");
  v = packed(v);
  Tensor out = torch::stable::new_empty(v, {}, at_least_float32(v));
  with_any_float(v, "global_norm: v", [&](auto t) {
    using T = typename decltype(t)::type;
    put(out, 0, norm_of<T>(static_cast<const T*>(v.const_data_ptr()), v.numel()));
  });
  return out;
}

}  // namespace
}  // namespace safer_fast

STABLE_TORCH_LIBRARY_IMPL(safer_fast, CPU, m) {
  m.impl("global_norm", TORCH_BOX(&safer_fast::global_norm));
}
