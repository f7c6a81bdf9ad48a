// safer_fast::uniform_start on the CPU: Philox in vectors of 32-bit words, where PyTorch only has 64-bit integers.
#include "philox.h"
#include "tensors.h"

namespace safer_fast {
namespace {

constexpr int LANES = 16;

// Pixels [begin, end) of one image; begin is a multiple of 4 LANES.
template <class T>
SAFER_FAST_CLONES void draw(
    T* out, const T* x, int64_t id, int64_t seed, uint32_t stream, T eps, T low, T high, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += 4 * LANES) {
    Philox<LANES> words;
    for (int i = 0; i < LANES; ++i) {
      words.c0[i] = static_cast<uint32_t>(first / 4 + i);
      words.c1[i] = low_half(id);
      words.c2[i] = high_half(id);
      words.c3[i] = stream;
    }
    words.rounds(low_half(seed), high_half(seed));
    T u[4 * LANES];
    for (int i = 0; i < LANES; ++i) {
      // 24 bits fit an int32, which converts in vectors where uint32 does not.
      u[4 * i + 0] = static_cast<T>(static_cast<int32_t>(words.c0[i] >> 8));
      u[4 * i + 1] = static_cast<T>(static_cast<int32_t>(words.c1[i] >> 8));
      u[4 * i + 2] = static_cast<T>(static_cast<int32_t>(words.c2[i] >> 8));
      u[4 * i + 3] = static_cast<T>(static_cast<int32_t>(words.c3[i] >> 8));
    }
    const int64_t n = end - first < 4 * LANES ? end - first : 4 * LANES;
    for (int64_t j = 0; j < n; ++j) {
      const T moved = x[first + j] + eps * (u[j] * T(0x1p-23) - T(1));
      out[first + j] = at_most(at_least(moved, low), high);
    }
  }
}

Tensor uniform_start(Tensor x, Tensor ids, Tensor seed, Tensor eps, int64_t stream, double low, double high) {
  STD_TORCH_CHECK(
      ids.scalar_type() == ScalarType::Long && ids.dim() == 1 && x.dim() >= 1 && ids.numel() == x.sizes()[0],
      "uniform_start: ids must be int64 [B], one for each image");
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, "uniform_start: seed must be int64 0-D");
  x = packed(x);
  ids = packed(ids);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  const int64_t B = ids.numel(), D = B ? x.numel() / B : 0;
  if (!D) return out;
  const int64_t* p_ids = ids.const_data_ptr<int64_t>();
  const int64_t key = *seed.const_data_ptr<int64_t>();
  with_float(x, "uniform_start: x", [&](auto t) {
    using T = typename decltype(t)::type;
    const T e = static_cast<T>(number(eps, "uniform_start: eps"));
    const T* p_x = static_cast<const T*>(x.const_data_ptr());
    T* p_out = static_cast<T*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, B, 1 + GRAIN / 4 / D, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        draw<T>(p_out + b * D, p_x + b * D, p_ids[b], key, static_cast<uint32_t>(stream), e, static_cast<T>(low),
                static_cast<T>(high), 0, D);
    });
  });
  return out;
}

}  // namespace
}  // namespace safer_fast

STABLE_TORCH_LIBRARY_IMPL(safer_fast, CPU, m) {
  m.impl("uniform_start", TORCH_BOX(&safer_fast::uniform_start));
}
