// The arithmetic of attention.cpp in one vector width, included once for each instruction set: ISA names it, TARGET is
// its function attribute, BYTES its vector, TILE_ROWS x TILE_VECTORS the accumulators that fit its registers.
//
// No templates over the width: GCC splits a vector that the function's own target lacks before it inlines anything.

namespace ISA {

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(BYTES)));
};
template <class T>
using V = typename Vector<T>::type;
template <class T>
constexpr int64_t LANES = BYTES / sizeof(T);

template <class T>
INLINE TARGET V<T> load(const T* p) {
  V<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
INLINE TARGET void store(T* p, V<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// The largest lane, or the sum of all, by halves: one after another they would take as long as the softmax itself.
template <bool LARGEST, class T>
INLINE TARGET T fold(V<T> v) {
  typedef T Part __attribute__((vector_size(16)));
  Part parts[BYTES / 16];
  V<T> kept = v;
  asm("" : "+m"(kept));  // else GCC keeps v itself in memory, all through the loop that computes it
  __builtin_memcpy(parts, &kept, sizeof kept);
  UNROLL for (int half = BYTES / 32; half; half /= 2)
    UNROLL for (int i = 0; i < half; ++i) {
      const Part a = parts[i], b = parts[i + half];
      parts[i] = LARGEST ? (b > a ? b : a) : a + b;
    }
  T all = parts[0][0];
  UNROLL for (int l = 1; l < int(16 / sizeof(T)); ++l) {
    const T lane = parts[0][l];
    all = LARGEST ? (lane > all ? lane : all) : all + lane;
  }
  return all;
}

template <class T, int ROWS, int VECTORS>
INLINE TARGET void tile(const Product<T>& p, int64_t i, int64_t j) {
  const T *a = p.a + i * p.a_row, *b = p.b + j;
  V<T> sum[ROWS][VECTORS] = {};
  for (int64_t k = 0; k < p.k; ++k, a += p.a_column, b += p.b_row) {
    V<T> row[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; ++v) row[v] = load(b + v * LANES<T>);
    UNROLL for (int r = 0; r < ROWS; ++r)
      UNROLL for (int v = 0; v < VECTORS; ++v) sum[r][v] += row[v] * a[r * p.a_row];
  }
  T* c = p.c + i * p.c_row + j;
  UNROLL for (int r = 0; r < ROWS; ++r)
    UNROLL for (int v = 0; v < VECTORS; ++v) store<T>(c + r * p.c_row + v * LANES<T>, sum[r][v] * p.scale);
}

template <class T, int ROWS, int VECTORS>
INLINE TARGET void last_rows(const Product<T>& p, int64_t i, int64_t j) {
  if constexpr (ROWS > 0) {
    if (p.m - i == ROWS) return tile<T, ROWS, VECTORS>(p, i, j);
    last_rows<T, ROWS - 1, VECTORS>(p, i, j);
  }
}

template <class T, int VECTORS>
TARGET void strip(const Product<T>& p, int64_t j) {
  int64_t i = 0;
  for (; i + TILE_ROWS <= p.m; i += TILE_ROWS) tile<T, TILE_ROWS, VECTORS>(p, i, j);
  last_rows<T, TILE_ROWS - 1, VECTORS>(p, i, j);
}

template <class T, int VECTORS>
INLINE TARGET void strip_of(int64_t vectors, const Product<T>& p, int64_t j) {
  if constexpr (VECTORS > 0) {
    if (vectors == VECTORS) return strip<T, VECTORS>(p, j);
    strip_of<T, VECTORS - 1>(vectors, p, j);
  }
}

// The columns beyond the last whole vector, by way of zero-padded copies.
template <class T>
TARGET void last_columns(const Product<T>& p, int64_t j) {
  const int64_t rest = p.n - j;
  std::vector<T> b(p.k * LANES<T>), c(p.m * LANES<T>);
  for (int64_t k = 0; k < p.k; ++k)
    for (int64_t l = 0; l < rest; ++l) b[k * LANES<T> + l] = p.b[k * p.b_row + j + l];
  Product<T> padded = p;
  padded.b = b.data(), padded.b_row = LANES<T>, padded.c = c.data(), padded.c_row = LANES<T>;
  strip<T, 1>(padded, 0);
  for (int64_t i = 0; i < p.m; ++i)
    for (int64_t l = 0; l < rest; ++l) p.c[i * p.c_row + j + l] = c[i * LANES<T> + l];
}

template <class T>
TARGET void multiply(const Product<T>& p) {
  // 5 vectors are 3 + 2 rather than 4 + 1: one vector has too few sums in flight to hide the latency.
  const int64_t vectors = p.n / LANES<T>;
  int64_t j = 0;
  for (int64_t left = vectors, strips = (vectors + TILE_VECTORS - 1) / TILE_VECTORS; strips; --strips) {
    const int64_t width = (left + strips - 1) / strips;
    strip_of<T, TILE_VECTORS>(width, p, j);
    j += width * LANES<T>;
    left -= width;
  }
  if (j < p.n) last_columns<T>(p, j);
}

// e^x for x <= 0 within 1 ulp in float32, 0 below the smallest normal number; NaN stays NaN.
template <class T>
INLINE TARGET V<T> exp_of_negative(V<T> x) {
  if constexpr (sizeof(T) == 4) {
    // x = n log 2 + r: the sum with 1.5 * 2^23 rounds to the integer n, and its low bits are n.
    const V<T> shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    const V<T> r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    V<T> y = 1.37805939e-3f * r + 8.37312452e-3f;
    y = y * r + 4.16695364e-2f;
    y = y * r + 1.66664720e-1f;
    y = y * r + 4.99999851e-1f;
    y = (y * r) * r + r + 1.0f;
    using Bits = typename Vector<uint32_t>::type;
    const Bits power = (reinterpret_cast<Bits>(shifted) + 127u) << 23;
    return x < -87.33654f ? V<T>{} : y * reinterpret_cast<V<T>>(power);
  } else {
    for (int64_t l = 0; l < LANES<T>; ++l) x[l] = std::exp(x[l]);
    return x;
  }
}

// Each row s[0, n) of a matrix becomes its softmax, and s[n, row) zero.
template <class T>
TARGET void softmax(T* s, int64_t rows, int64_t n, int64_t row) {
  const int64_t last = (n - 1) / LANES<T> * LANES<T>;
  T added[LANES<T>];  // by vectors: a vector read of what was written by elements waits for the cache
  for (int64_t l = 0; l < LANES<T>; ++l) added[l] = last + l < n ? 0 : -std::numeric_limits<T>::infinity();
  const V<T> beyond = load(added);
  for (const T* end = s + rows * row; s < end; s += row) {
    V<T> most = load(s + last) + beyond;
    store<T>(s + last, most);
    for (int64_t j = 0; j < last; j += LANES<T>) {
      const V<T> v = load(s + j);
      most = v > most ? v : most;
    }
    const T top = fold<true, T>(most);
    V<T> sums = {};
    for (int64_t j = 0; j <= last; j += LANES<T>) {
      const V<T> v = exp_of_negative<T>(load(s + j) - top);
      store<T>(s + j, v);
      sums += v;
    }
    const T factor = 1 / fold<false, T>(sums);
    for (int64_t j = 0; j <= last; j += LANES<T>) store<T>(s + j, load(s + j) * factor);
    for (int64_t j = last + LANES<T>; j < row; j += LANES<T>) store<T>(s + j, V<T>{});
  }
}

// Each row: ds <- scale p (ds - <p, ds>).
template <class T>
TARGET void softmax_backward(T* ds, const T* p, int64_t rows, int64_t n, int64_t row, T scale) {
  for (const T* end = ds + rows * row; ds < end; ds += row, p += row) {
    V<T> sums = {};
    for (int64_t j = 0; j < n; j += LANES<T>) sums += load(ds + j) * load(p + j);
    const T sum = fold<false, T>(sums);
    for (int64_t j = 0; j < n; j += LANES<T>) store<T>(ds + j, (load(ds + j) - sum) * (load(p + j) * scale));
  }
}

template <class T>
constexpr Kernels<T> kernels = {LANES<T>, multiply<T>, softmax<T>, softmax_backward<T>};

}  // namespace ISA

#undef ISA
#undef TARGET
#undef BYTES
#undef TILE_ROWS
#undef TILE_VECTORS
