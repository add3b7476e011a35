// The short convolution of whole sequences, and the L2 norm of heads of its result.
//
// A thread copies 64 tokens of a head, and those before them, into its first-level cache and
// computes there.

namespace {

constexpr int64_t TOKENS = 64, CHANNELS = 64;

struct Part {
  int64_t sequence, first, end;
};

// Rows [0, count) of `rows` from the `W - 1 + count` that lie there, `wide` apart. `taps [W, wide]`.
// TAPS is W, or 0 where the window is not kept in registers.
template <int TAPS>
void convolve(
    float* rows, int64_t count, int64_t wide, const float* taps, const float* bias, int64_t W) {
  for (int64_t i = 0; i < wide; i += LANES) {
    const Vec start = Vec::loadu(bias + i);
    if constexpr (TAPS == 0) {
      for (int64_t t = 0; t < count; t++) {
        Vec total = start;
        for (int64_t w = 0; w < W; w++)
          total = fmadd(Vec::loadu(taps + w * wide + i), Vec::loadu(rows + (t + w) * wide + i), total);
        total.store(rows + t * wide + i);
      }
    } else {
      Vec tap[TAPS], window[TAPS];
      for (int w = 0; w < TAPS; w++) {
        tap[w] = Vec::loadu(taps + w * wide + i);
        window[w] = Vec::loadu(rows + w * wide + i);
      }
      for (int64_t t = 0; t < count; t++) {
        window[TAPS - 1] = Vec::loadu(rows + (t + TAPS - 1) * wide + i);
        Vec total = start;
        for (int w = 0; w < TAPS; w++) total = fmadd(tap[w], window[w], total);
        total.store(rows + t * wide + i);
        for (int w = 0; w + 1 < TAPS; w++) window[w] = window[w + 1];
      }
    }
  }
}

} // namespace

// x [tokens, D], y [tokens, D] and dense, weight [D, W], history [N, W - 1, D] or null for zeros;
// bias may be null. `head_dim`: of the heads that are normalised, or 0. Sequences that are not
// `live` are not read and give nothing.
EXPORT void short_conv(
    const float* x, int64_t x_token, const float* weight, const float* bias, const float* history,
    float* y, const int64_t* offsets, const bool* live,
    int64_t N, int64_t D, int64_t W, int64_t activated, int64_t head_dim, double eps,
    int64_t threads) {
  std::vector<Part> parts;
  for (int64_t n = 0; n < N; n++)
    for (int64_t t = offsets[n]; live[n] && t < offsets[n + 1]; t += TOKENS)
      parts.push_back({n, t, std::min(t + TOKENS, offsets[n + 1])});
  const int64_t width = head_dim ? head_dim : CHANNELS, wide = padded(width), past = W - 1;
  const auto run = W == 2 ? convolve<2> : W == 3 ? convolve<3> : W == 4 ? convolve<4> : convolve<0>;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> rows((past + TOKENS) * wide), taps(W * wide), start(wide);
#pragma omp for schedule(dynamic)
    for (size_t part = 0; part < parts.size(); part++)
      for (int64_t channel = 0; channel < D; channel += width) {
        const auto [n, first, end] = parts[part];
        const int64_t count = std::min(width, D - channel), tokens = end - first;
        for (int64_t i = 0; i < count; i++) {
          start[i] = bias ? bias[channel + i] : 0.f;
          for (int64_t w = 0; w < W; w++) taps[w * wide + i] = weight[(channel + i) * W + w];
        }
        for (int64_t r = 0; r < past + tokens; r++) {
          const int64_t t = first - past + r, before = t - offsets[n];
          float* row = &rows[r * wide];
          if (before >= 0)
            std::copy_n(x + t * x_token + channel, count, row);
          else if (history)
            std::copy_n(history + (n * past + past + before) * D + channel, count, row);
          else
            std::fill_n(row, count, 0.f);
          std::fill(row + count, row + wide, 0.f);
        }
        run(rows.data(), tokens, wide, taps.data(), start.data(), W);
        if (activated) silu(rows.data(), tokens * wide);
        for (int64_t t = 0; t < tokens; t++) {
          float* row = &rows[t * wide];
          std::fill(row + count, row + wide, 0.f);
          if (head_dim) normalize(row, wide, eps);
          std::copy_n(row, count, y + (first + t) * D + channel);
        }
      }
  }
}
