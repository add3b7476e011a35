// What the native kernels share: vectors of fp32, small matrix products, reading and writing rows.

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

#ifdef _WIN32
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C"
#endif

namespace {

using Vec = at::vec::Vectorized<float>;
using at::vec::fmadd;

constexpr int64_t LANES = Vec::size();
constexpr int64_t TILE = 16; // rows and columns are padded to a multiple of it
static_assert(TILE % LANES == 0);

inline int64_t padded(int64_t n) {
  return (n + TILE - 1) / TILE * TILE;
}

inline float sum(Vec x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, x);
}

inline float dot(const float* x, const float* y, int64_t n) { // n is padded
  Vec total(0.f);
  for (int64_t i = 0; i < n; i += LANES) total = fmadd(Vec::loadu(x + i), Vec::loadu(y + i), total);
  return sum(total);
}

// y[i] = factor * a[i] * b[i]
inline void multiply(const float* a, const float* b, float factor, float* y, int64_t n) {
  const Vec f(factor);
  for (int64_t i = 0; i < n; i += LANES) (f * Vec::loadu(a + i) * Vec::loadu(b + i)).store(y + i);
}

// The row will be read soon.
inline void prefetch(const float* x, int64_t n) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(x + i);
#endif
}

// x *= factor; n is padded
inline void scale_row(float* x, int64_t n, float factor) {
  const Vec f(factor);
  for (int64_t i = 0; i < n; i += LANES) (f * Vec::loadu(x + i)).store(x + i);
}

// y = factor * x, and zeros up to the padded width
inline void load_row(const float* x, int64_t n, float factor, float* y) {
  std::copy_n(x, n, y);
  std::fill(y + n, y + padded(n), 0.f);
  if (factor != 1) scale_row(y, padded(n), factor);
}

inline Vec sigmoid(Vec x) {
  return Vec(1.f) / (Vec(1.f) + x.neg().exp());
}

inline void silu(float* x, int64_t n) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const Vec z = Vec::loadu(x + i);
    (z / (Vec(1.f) + z.neg().exp())).store(x + i);
  }
  for (; i < n; i++) x[i] = x[i] / (1 + std::exp(-x[i]));
}

// x = x / sqrt(sum(x^2) + eps); n is padded
inline void normalize(float* x, int64_t n, float eps) {
  scale_row(x, n, 1 / std::sqrt(dot(x, x, n) + eps));
}

inline float sigmoid(float x) {
  return 1 / (1 + std::exp(-x));
}

// The gate from its raw input, as in `kda_ops.gate_formulas.gate_nats`.
struct Gate {
  const float *A_log, *dt_bias; // [HV] and [HV, K], or null
  int64_t bounded;
  double bound;

  // out = exp(gate of x [K] of a head), padded
  void decay(const float* x, int64_t head, int64_t K, float* out) const {
    const float a = A_log ? std::exp(std::min(std::max(A_log[head], -87.f), 88.f)) : 1.f;
    const Vec rate(a), one(1.f), linear(20.f), limit(bound);
    load_row(x, K, 1, out);
    int64_t biased = 0;
    if (dt_bias) {
      const float* bias = dt_bias + head * K;
      for (; biased + LANES <= K; biased += LANES)
        (Vec::loadu(out + biased) + Vec::loadu(bias + biased)).store(out + biased);
      for (; biased < K; biased++) out[biased] += bias[biased];
    }
    for (int64_t i = 0; i < padded(K); i += LANES) {
      const Vec z = Vec::loadu(out + i);
      const Vec g = bounded ? limit / (one + (rate * z).neg().exp())
                            : (rate * Vec::blendv(z.exp().log1p(), z, z > linear)).neg();
      g.exp().store(out + i);
    }
  }
};

// c [ROWS, TILE] (+)= sign * a [ROWS, k] b [k, TILE]
template <int ROWS, bool ADD>
inline void product_block(
    int64_t k, float sign,
    const float* a, int64_t a_row, int64_t a_column,
    const float* b, int64_t b_row,
    float* c, int64_t c_row) {
  constexpr int WIDE = TILE / LANES;
  Vec total[ROWS][WIDE];
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < WIDE; j++) total[i][j] = Vec(0.f);
  for (int64_t p = 0; p < k; p++) {
    Vec right[WIDE];
    for (int j = 0; j < WIDE; j++) right[j] = Vec::loadu(b + p * b_row + j * LANES);
    for (int i = 0; i < ROWS; i++) {
      const Vec left(a[i * a_row + p * a_column]);
      for (int j = 0; j < WIDE; j++) total[i][j] = fmadd(left, right[j], total[i][j]);
    }
  }
  const Vec s(sign);
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < WIDE; j++) {
      float* out = c + i * c_row + j * LANES;
      (ADD ? fmadd(s, total[i][j], Vec::loadu(out)) : s * total[i][j]).store(out);
    }
}

// c [m, n] (+)= sign * a [m, k] b [k, n], m a multiple of 4 and n of TILE
template <bool ADD>
inline void product(
    int64_t m, int64_t n, int64_t k, float sign,
    const float* a, int64_t a_row, int64_t a_column,
    const float* b, int64_t b_row,
    float* c, int64_t c_row) {
  for (int64_t j = 0; j < n; j += TILE)
    for (int64_t i = 0; i < m; i += 4)
      product_block<4, ADD>(
          k, sign, a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row);
}

} // namespace
