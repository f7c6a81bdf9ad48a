// safer_fast::gather_augment on the CPU: rows copied straight from the data set, with no padded image in between.
#include "philox.h"
#include "tensors.h"

#include <algorithm>

namespace safer_fast {
namespace {

constexpr uint32_t CROP = 0xA06;  // kernels/philox.py

SAFER_FAST_CLONES void convert_row(float* out, const uint8_t* row, int64_t stride, int64_t n) {
  if (stride == 1)
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(row[i]) / 255.0f;
  else
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(row[i * stride]) / 255.0f;
}

// out[i] = row[i + dx] / 255 where that lies inside the row, else 0; then mirrored if flipped.
void crop_row(float* out, const uint8_t* row, int64_t stride, int64_t dx, bool flipped, int64_t W) {
  const int64_t lo = std::min(std::max<int64_t>(0, -dx), W), hi = std::max(std::min(W, W - dx), lo);
  std::fill(out, out + lo, 0.0f);
  convert_row(out + lo, row + (lo + dx) * stride, stride, hi - lo);
  std::fill(out + hi, out + W, 0.0f);
  if (flipped) std::reverse(out, out + W);
}

Tensor gather_augment(Tensor data, Tensor index, Tensor ids, Tensor seed, int64_t pad, bool flip) {
  STD_TORCH_CHECK(data.scalar_type() == ScalarType::Byte && data.dim() == 4, "gather_augment: data must be uint8 [N, C, H, W]");
  STD_TORCH_CHECK(
      index.scalar_type() == ScalarType::Long && ids.scalar_type() == ScalarType::Long && index.dim() == 1 &&
          same_shape(index, ids),
      "gather_augment: index and ids must be int64 [B]");
  STD_TORCH_CHECK(pad >= 0, "gather_augment: padding is 0 or more; 0 turns the crop off");
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, "gather_augment: seed must be int64 0-D");
  index = packed(index);
  ids = packed(ids);
  const int64_t B = index.numel(), N = data.sizes()[0], C = data.sizes()[1], H = data.sizes()[2], W = data.sizes()[3];
  Tensor out = torch::stable::new_empty(data, {B, C, H, W}, ScalarType::Float);
  const int64_t *p_index = index.const_data_ptr<int64_t>(), *p_ids = ids.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < B; ++b)
    STD_TORCH_CHECK(0 <= p_index[b] && p_index[b] < N, "gather_augment: index ", p_index[b], " is outside the ", N, " images");
  const int64_t key = *seed.const_data_ptr<int64_t>();
  const int64_t s_n = data.stride(0), s_c = data.stride(1), s_h = data.stride(2), s_w = data.stride(3);
  const auto* p_data = static_cast<const uint8_t*>(data.const_data_ptr());
  float* p_out = out.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, B, 1 + GRAIN / (1 + C * H * W), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      Philox<1> words{{0}, {low_half(p_ids[b])}, {high_half(p_ids[b])}, {CROP}};
      words.rounds(low_half(key), high_half(key));
      const uint64_t span = 2 * static_cast<uint64_t>(pad) + 1;
      const int64_t dy = static_cast<int64_t>(words.c0[0] * span >> 32) - pad;
      const int64_t dx = static_cast<int64_t>(words.c1[0] * span >> 32) - pad;
      const bool flipped = flip && (words.c2[0] & 1);
      for (int64_t c = 0; c < C; ++c)
        for (int64_t y = 0; y < H; ++y) {
          float* row = p_out + ((b * C + c) * H + y) * W;
          if (y + dy < 0 || y + dy >= H)
            std::fill(row, row + W, 0.0f);
          else
            crop_row(row, p_data + p_index[b] * s_n + c * s_c + (y + dy) * s_h, s_w, dx, flipped, W);
        }
    }
  });
  return out;
}

}  // namespace
}  // namespace safer_fast

STABLE_TORCH_LIBRARY_IMPL(safer_fast, CPU, m) {
  m.impl("gather_augment", TORCH_BOX(&safer_fast::gather_augment));
}
