// Philox4x32-10 (Salmon et al., SC 2011), as in kernels/philox.py, for LANES counters side by side.
#pragma once

#include <cstdint>

namespace safer_fast {

template <int LANES>
struct Philox {
  uint32_t c0[LANES], c1[LANES], c2[LANES], c3[LANES];

  // The lanes are the inner loop, so that the compiler makes vectors of them.
  inline __attribute__((always_inline)) void rounds(uint32_t k0, uint32_t k1) {
    for (int round = 0; round < 10; ++round) {
      for (int i = 0; i < LANES; ++i) {
        const uint64_t p0 = uint64_t{0xD2511F53} * c0[i], p1 = uint64_t{0xCD9E8D57} * c2[i];
        c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
        c1[i] = static_cast<uint32_t>(p1);
        c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
        c3[i] = static_cast<uint32_t>(p0);
      }
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
  }
};

inline uint32_t low_half(int64_t v) {
  return static_cast<uint32_t>(v);
}
inline uint32_t high_half(int64_t v) {
  return static_cast<uint32_t>(static_cast<uint64_t>(v) >> 32);
}

}  // namespace safer_fast
