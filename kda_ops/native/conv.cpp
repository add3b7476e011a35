// The short convolution of whole sequences, and the L2 norm of heads of its result.
//
// A thread computes 32 tokens, head by head: the weights of a head stay in its first-level cache.

namespace {

constexpr int64_t TOKENS = 32, CHANNELS = 64;

struct Part {
  int64_t sequence, first, end;
};

} // namespace

// y [tokens, D], dense. history [N, W - 1, D], dense, or null where all are zero; bias may be null.
// `head_dim`: of the heads that are normalised, or 0. Sequences that are not `live` are not read
// and give nothing.
EXPORT void short_conv(
    const float* x, int64_t x_token, const float* weight, const float* bias, const float* history,
    float* y, const int64_t* offsets, const bool* live,
    int64_t N, int64_t D, int64_t W, int64_t activated, int64_t head_dim, double eps,
    int64_t threads) {
  std::vector<Part> parts;
  for (int64_t n = 0; n < N; n++)
    for (int64_t t = offsets[n]; live[n] && t < offsets[n + 1]; t += TOKENS)
      parts.push_back({n, t, std::min(t + TOKENS, offsets[n + 1])});
  const int64_t width = head_dim ? head_dim : CHANNELS, wide = padded(width);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> taps(W * wide), start(wide), row(wide);
    std::vector<const float*> sources(W);
#pragma omp for schedule(dynamic)
    for (size_t part = 0; part < parts.size(); part++)
      for (int64_t first = 0; first < D; first += width) {
        const auto [n, from, to] = parts[part];
        const int64_t count = std::min(width, D - first), whole = count / LANES * LANES;
        for (int64_t c = 0; c < count; c++) {
          start[c] = bias ? bias[first + c] : 0.f;
          for (int64_t w = 0; w < W; w++) taps[w * wide + c] = weight[(first + c) * W + w];
        }
        for (int64_t t = from; t < to; t++) {
          for (int64_t w = 0; w < W; w++) {
            const int64_t source = t - (W - 1) + w, before = source - offsets[n];
            if (before >= 0)
              sources[w] = x + source * x_token + first;
            else
              sources[w] = history ? history + ((n + 1) * (W - 1) + before) * D + first : nullptr;
          }
          for (int64_t c = 0; c < whole; c += LANES) {
            Vec total = Vec::loadu(&start[c]);
            for (int64_t w = 0; w < W; w++)
              if (sources[w])
                total = fmadd(Vec::loadu(&taps[w * wide + c]), Vec::loadu(sources[w] + c), total);
            total.store(&row[c]);
          }
          for (int64_t c = whole; c < count; c++) {
            row[c] = start[c];
            for (int64_t w = 0; w < W; w++)
              if (sources[w]) row[c] += taps[w * wide + c] * sources[w][c];
          }
          if (activated) silu(row.data(), count);
          std::fill(row.begin() + count, row.end(), 0.f);
          if (head_dim) normalize(row.data(), wide, eps);
          std::copy_n(row.data(), count, y + t * D + first);
        }
      }
  }
}
