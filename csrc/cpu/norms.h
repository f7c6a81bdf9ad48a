// Sums of squares in float64, the same bits for any number of threads.
#pragma once

#include "tensors.h"

#include <vector>

namespace safer_fast {

// Eight running sums, so that the compiler may use vectors without reordering anything.
template <class T>
SAFER_FAST_CLONES double sum_of_squares(const T* v, int64_t n) {
  double lanes[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int k = 0; k < 8; ++k) {
      const double d = static_cast<double>(v[i + k]);
      lanes[k] += d * d;
    }
  for (; i < n; ++i) lanes[0] += static_cast<double>(v[i]) * static_cast<double>(v[i]);
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

template <class T>
double norm_of(const T* v, int64_t n) {
  const int64_t chunks = (n + GRAIN - 1) / GRAIN;
  std::vector<double> parts(chunks);
  torch::stable::parallel_for(0, chunks, 2, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      parts[c] = sum_of_squares<T>(v + c * GRAIN, c + 1 < chunks ? GRAIN : n - c * GRAIN);
  });
  double sum = 0;
  for (double part : parts) sum += part;
  return std::sqrt(sum);
}

inline ScalarType at_least_float32(const Tensor& v) {
  return v.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void put(Tensor& out, int64_t i, double value) {
  if (out.scalar_type() == ScalarType::Double)
    out.mutable_data_ptr<double>()[i] = value;
  else
    out.mutable_data_ptr<float>()[i] = static_cast<float>(value);
}

}  // namespace safer_fast
