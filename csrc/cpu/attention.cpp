// safer_fast::attention and its gradient on the CPU: one head at a time in cache, straight from and to the packed qkv,
// where F.scaled_dot_product_attention needs q, k and v laid out anew and their gradients stacked.
//
// The vector code exists for AVX-512, AVX2 and any machine, chosen at each call. SAFER_FAST_ISA=avx2 or baseline in the
// environment forgoes the wider ones, to test and measure what another machine gets.
#include "tensors.h"

#include <cstdlib>
#include <limits>
#include <memory>
#include <string_view>
#include <vector>

// This op has a tolerance and no bits to keep, so multiply-adds are fused.
#if defined(__clang__)
#pragma clang fp contract(fast)
#define FUSED
#else
#define FUSED __attribute__((optimize("fp-contract=fast")))
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed to inlined functions only
#endif
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

namespace safer_fast {
namespace {

constexpr int64_t WIDTH = 16;  // kernels/attention.py

// c[m, n] = scale a[m, k] b[k, n]; rows of b and c have no gaps between columns.
template <class T>
struct Product {
  int64_t m, n, k;
  const T* a;
  int64_t a_row, a_column;
  const T* b;
  int64_t b_row;
  T* c;
  int64_t c_row;
  T scale;
};

template <class T>
struct Kernels {
  int64_t lanes;
  void (*multiply)(const Product<T>&);
  void (*softmax)(T* s, int64_t rows, int64_t n, int64_t row);
  void (*softmax_backward)(T* ds, const T* p, int64_t rows, int64_t n, int64_t row, T scale);
};

#define ISA baseline
#define TARGET FUSED
#define BYTES 16
#define TILE_ROWS 6
#define TILE_VECTORS 2
#include "attention_isa.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define ISA avx2
#define TARGET __attribute__((target("avx2,fma"))) FUSED
#define BYTES 32
#define TILE_ROWS 6
#define TILE_VECTORS 2
#include "attention_isa.h"

#define ISA avx512
#define TARGET __attribute__((target("avx512f,avx512dq,avx512vl,avx2,fma"))) FUSED
#define BYTES 64
#define TILE_ROWS 6
#define TILE_VECTORS 4
#include "attention_isa.h"

template <class T>
Kernels<T> kernels() {
  const char* variable = std::getenv("SAFER_FAST_ISA");
  const std::string_view most = variable ? variable : "";
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl");
  if (has_avx512 && most != "avx2" && most != "baseline") return avx512::kernels<T>;
  if (has_avx2 && most != "baseline") return avx2::kernels<T>;
  return baseline::kernels<T>;
}
#else
template <class T>
Kernels<T> kernels() {
  return baseline::kernels<T>;
}
#endif

int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// to[d, row] = from[n, d] transposed, zero beyond n, in blocks of 4 x 4 for stores without gaps.
template <class T>
void transpose(T* to, int64_t row, const T* from, int64_t from_row, int64_t n, int64_t d) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const T *f0 = from + i * from_row, *f1 = f0 + from_row, *f2 = f1 + from_row, *f3 = f2 + from_row;
    for (int64_t j = 0; j < d; ++j) {
      T* t = to + j * row + i;
      t[0] = f0[j], t[1] = f1[j], t[2] = f2[j], t[3] = f3[j];
    }
  }
  for (int64_t j = 0; j < d; ++j) {
    for (int64_t k = i; k < n; ++k) to[j * row + k] = from[k * from_row + j];
    for (int64_t k = n; k < row; ++k) to[j * row + k] = 0;
  }
}

// Memory that begins with a cache line, as a tensor's does: vectors across two lines cost a fifth.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : memory(new T[n + LINE / sizeof(T)]) {}
  T* get() const { return memory.get() + (-reinterpret_cast<uintptr_t>(memory.get()) % LINE) / sizeof(T); }

 private:
  static constexpr uintptr_t LINE = 64;
  std::unique_ptr<T[]> memory;
};

struct Shape {
  int64_t B, N, H, d, D, M;

  explicit Shape(const Tensor& qkv) {
    STD_TORCH_CHECK(
        qkv.scalar_type() == ScalarType::Float || qkv.scalar_type() == ScalarType::Double,
        "attention: qkv must be float32 (or float64); F.scaled_dot_product_attention takes lower precision");
    STD_TORCH_CHECK(
        qkv.dim() == 5 && qkv.sizes()[2] == 3 && qkv.sizes()[4] >= 1, "attention: qkv must be [B, N, 3, H, d]");
    B = qkv.sizes()[0], N = qkv.sizes()[1], H = qkv.sizes()[3], d = qkv.sizes()[4];
    D = H * d, M = up_to(N, WIDTH);
  }

  // f(first and last head of a thread's share), where that is work enough for a thread.
  template <class F>
  void for_heads(F f) const {
    if (N) torch::stable::parallel_for(0, B * H, 1 + 8 * GRAIN / (N * M * d), f);
  }

  int64_t in(int64_t head) const { return head / H * N * 3 * D + head % H * d; }  // where its q begins; k is D on
  int64_t out(int64_t head) const { return head / H * N * D + head % H * d; }
};

template <class T>
void forward(const Shape& s, const T* qkv, T* out, T* probs) {
  const Kernels<T> run = kernels<T>();
  const int64_t N = s.N, d = s.d, M = s.M, row = 3 * s.D, width = up_to(N, run.lanes);
  s.for_heads([&](int64_t begin, int64_t end) {
    const Scratch<T> turned(d * M);
    for (int64_t head = begin; head < end; ++head) {
      const T *q = qkv + s.in(head), *k = q + s.D, *v = k + s.D;
      T* p = probs + head * N * M;
      transpose(turned.get(), M, k, row, N, d);
      run.multiply({N, width, d, q, row, 1, turned.get(), M, p, M, static_cast<T>(1 / std::sqrt(double(d)))});
      run.softmax(p, N, N, M);
      run.multiply({N, d, N, p, M, 1, v, row, out + s.out(head), s.D, T(1)});
    }
  });
}

template <class T>
void backward(const Shape& s, const T* grad, const T* qkv, const T* probs, T* dqkv) {
  const Kernels<T> run = kernels<T>();
  const int64_t N = s.N, d = s.d, M = s.M, D = s.D, row = 3 * D, width = up_to(N, run.lanes);
  const T scale = static_cast<T>(1 / std::sqrt(double(d)));
  s.for_heads([&](int64_t begin, int64_t end) {
    const Scratch<T> turned(d * M), scores(N * M);
    T* ds = scores.get();
    for (int64_t head = begin; head < end; ++head) {
      const T *q = qkv + s.in(head), *k = q + D, *v = k + D, *g = grad + s.out(head), *p = probs + head * N * M;
      T *dq = dqkv + s.in(head), *dk = dq + D, *dv = dk + D;
      run.multiply({N, d, N, p, 1, M, g, D, dv, row, T(1)});
      transpose(turned.get(), M, v, row, N, d);
      run.multiply({N, width, d, g, D, 1, turned.get(), M, ds, M, T(1)});
      run.softmax_backward(ds, p, N, N, M, scale);
      run.multiply({N, d, N, ds, M, 1, k, row, dq, row, T(1)});
      run.multiply({N, d, N, ds, 1, M, q, row, dk, row, T(1)});
    }
  });
}

std::tuple<Tensor, Tensor> attention(Tensor qkv) {
  const Shape s(qkv);
  qkv = packed(qkv);
  Tensor out = torch::stable::new_empty(qkv, {s.B, s.N, s.D});
  Tensor probs = torch::stable::new_empty(qkv, {s.B, s.H, s.N, s.M});
  with_float(qkv, "attention: qkv", [&](auto t) {
    using T = typename decltype(t)::type;
    forward<T>(
        s, static_cast<const T*>(qkv.const_data_ptr()), static_cast<T*>(out.mutable_data_ptr()),
        static_cast<T*>(probs.mutable_data_ptr()));
  });
  return {out, probs};
}

Tensor attention_backward(Tensor g, Tensor qkv, Tensor probs) {
  const Shape s(qkv);
  STD_TORCH_CHECK(
      g.dim() == 3 && g.sizes()[0] == s.B && g.sizes()[1] == s.N && g.sizes()[2] == s.D && probs.dim() == 4 &&
          probs.sizes()[0] == s.B && probs.sizes()[1] == s.H && probs.sizes()[2] == s.N && probs.sizes()[3] == s.M,
      "attention_backward: g must be [B, N, H d] and probs as attention returned it for this qkv");
  STD_TORCH_CHECK(
      g.scalar_type() == qkv.scalar_type() && probs.scalar_type() == qkv.scalar_type(),
      "attention_backward: give g, qkv and probs one dtype");
  g = packed(g), qkv = packed(qkv), probs = packed(probs);
  Tensor dqkv = torch::stable::new_empty(qkv, qkv.sizes());
  with_float(qkv, "attention_backward: qkv", [&](auto t) {
    using T = typename decltype(t)::type;
    backward<T>(
        s, static_cast<const T*>(g.const_data_ptr()), static_cast<const T*>(qkv.const_data_ptr()),
        static_cast<const T*>(probs.const_data_ptr()), static_cast<T*>(dqkv.mutable_data_ptr()));
  });
  return dqkv;
}

}  // namespace
}  // namespace safer_fast

STABLE_TORCH_LIBRARY_IMPL(safer_fast, CPU, m) {
  m.impl("attention", TORCH_BOX(&safer_fast::attention));
  m.impl("attention_backward", TORCH_BOX(&safer_fast::attention_backward));
}
