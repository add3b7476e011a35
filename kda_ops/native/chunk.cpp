// Chunked KDA, 64 tokens of a value head at a time.
//
// A thread goes through the chunks of one sequence and head; all that it makes of a chunk stays in
// its cache. Decays are products of the tokens' own, exp(g) <= 1, from both ends of blocks of 16,
// 32 and 64 rows: what lies between two rows of different blocks is a product of one of each.

namespace {

constexpr int64_t CHUNK = 64;

struct Tokens { // [tokens, heads, width], the last axis dense
  const float* data;
  int64_t token, head;
  const float* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

struct Chunk {
  int64_t K, V, KP, VP, W; // W: the columns of u | w
  int64_t rows = 0; // padded
  std::vector<float> q, k, decay, from_start, to_end, beta, scores, lower, uw, left, right, out, S;

  Chunk(int64_t K, int64_t V) : K(K), V(V), KP(padded(K)), VP(padded(V)), W(VP + KP) {
    for (auto* x : {&q, &k, &decay, &from_start, &to_end, &left, &right}) x->resize(CHUNK * KP);
    for (auto* x : {&scores, &lower}) x->resize(CHUNK * CHUNK);
    beta.resize(CHUNK);
    uw.resize(CHUNK * W);
    out.resize(CHUNK * VP);
    S.resize(KP * VP);
  }

  // Decays of the rows of one block of 16, and what its rows are to one another.
  void block(int64_t first) {
    for (int64_t i = first; i < first + TILE; i++) {
      const float *qi = &q[i * KP], *ki = &k[i * KP];
      float* d = &from_start[i * KP]; // of row i from row j on
      scores[i * CHUNK + i] = dot(qi, ki, KP);
      std::copy_n(&decay[i * KP], KP, d);
      for (int64_t j = i - 1; j >= first; j--) {
        const float *kj = &k[j * KP], *before = &decay[j * KP];
        Vec score(0.f), low(0.f);
        for (int64_t x = 0; x < KP; x += LANES) {
          const Vec between = Vec::loadu(d + x);
          const Vec decayed = between * Vec::loadu(kj + x);
          score = fmadd(Vec::loadu(qi + x), decayed, score);
          low = fmadd(Vec::loadu(ki + x), decayed, low);
          (between * Vec::loadu(before + x)).store(d + x);
        }
        scores[i * CHUNK + j] = sum(score);
        lower[i * CHUNK + j] = beta[i] * sum(low);
      }
    }
    std::fill_n(&to_end[(first + TILE - 1) * KP], KP, 1.f);
    for (int64_t i = first + TILE - 2; i >= first; i--)
      multiply(&to_end[(i + 1) * KP], &decay[(i + 1) * KP], 1, &to_end[i * KP], KP);
  }

  // Two neighbouring blocks of `size` rows: what the right one is to the left one, and the decays
  // of the block that they make.
  void join(int64_t first, int64_t size) {
    const int64_t middle = first + size, end = std::min(middle + size, rows), count = end - middle;
    for (int64_t j = 0; j < size; j++)
      for (int64_t x = 0; x < KP; x++)
        right[x * size + j] = k[(first + j) * KP + x] * to_end[(first + j) * KP + x];
    for (auto [rows_of, result, scaled] :
         {std::tuple(&q, &scores, false), std::tuple(&k, &lower, true)}) {
      for (int64_t i = 0; i < count; i++) {
        const int64_t row = (middle + i) * KP;
        const float factor = scaled ? beta[middle + i] : 1.f;
        multiply(&(*rows_of)[row], &from_start[row], factor, &left[i * KP], KP);
      }
      product<false>(
          count, size, KP, 1, left.data(), KP, 1, right.data(), size,
          &(*result)[middle * CHUNK + first], CHUNK);
    }
    const float *of_left = &from_start[(middle - 1) * KP], *of_right = &from_start[(end - 1) * KP];
    for (int64_t j = first; j < middle; j++)
      multiply(&to_end[j * KP], of_right, 1, &to_end[j * KP], KP);
    for (int64_t i = middle; i < end; i++)
      multiply(&from_start[i * KP], of_left, 1, &from_start[i * KP], KP);
  }

  // u | w = (I + lower)^-1 (beta v | beta k decayed), row by row.
  void solve() {
    for (int64_t first = 0; first < rows; first += 4) {
      product<true>(
          4, W, first, -1, &lower[first * CHUNK], CHUNK, 1, uw.data(), W, &uw[first * W], W);
      for (int64_t i = first + 1; i < first + 4; i++)
        for (int64_t j = first; j < i; j++) {
          const Vec factor(-lower[i * CHUNK + j]);
          for (int64_t x = 0; x < W; x += LANES)
            fmadd(factor, Vec::loadu(&uw[j * W + x]), Vec::loadu(&uw[i * W + x]))
                .store(&uw[i * W + x]);
        }
    }
  }

  // From the loaded rows, and S before them, the rows of `out` and S after them.
  void run() {
    std::fill(scores.begin(), scores.end(), 0.f);
    std::fill(lower.begin(), lower.end(), 0.f);
    for (int64_t first = 0; first < rows; first += TILE) block(first);
    for (int64_t size = TILE; size < CHUNK; size *= 2)
      for (int64_t first = 0; first + size < rows; first += 2 * size) join(first, size);
    for (int64_t i = 0; i < rows; i++) {
      multiply(&k[i * KP], &from_start[i * KP], beta[i], &uw[i * W + VP], KP);
      multiply(&q[i * KP], &from_start[i * KP], 1, &q[i * KP], KP);
      multiply(&k[i * KP], &to_end[i * KP], 1, &k[i * KP], KP);
    }
    solve();
    product<true>(rows, VP, KP, -1, &uw[VP], W, 1, S.data(), VP, uw.data(), W);
    product<false>(rows, VP, KP, 1, q.data(), KP, 1, S.data(), VP, out.data(), VP);
    for (int64_t i = 0; i < rows; i += 4)
      product<true>(4, VP, i + 4, 1, &scores[i * CHUNK], CHUNK, 1, uw.data(), W, &out[i * VP], VP);
    const float* whole = &from_start[(rows - 1) * KP];
    for (int64_t x = 0; x < KP; x++) {
      const Vec factor(whole[x]);
      for (int64_t y = 0; y < VP; y += LANES)
        (factor * Vec::loadu(&S[x * VP + y])).store(&S[x * VP + y]);
    }
    product<true>(KP, VP, rows, 1, k.data(), 1, KP, uw.data(), W, S.data(), VP);
  }
};

} // namespace

// o [tokens, HV, V], dense; state [N, HV, V, K], dense, from the initial to the final states. `raw`:
// g and beta are before the gate and the sigmoid; else g holds sums within chunks in log2. q and k
// are normalised where `norm_eps` is not negative. Sequences that are not `live` are not read and
// give nothing. kept [count, HV, V, K], dense, gets states within sequences: sequence [count], in
// order, and end [count], in order within a sequence, how many of its tokens are before.
EXPORT void chunk_kda(
    const float* q, int64_t q_token, int64_t q_head,
    const float* k, int64_t k_token, int64_t k_head,
    const float* v, int64_t v_token, int64_t v_head,
    const float* g, int64_t g_token, int64_t g_head,
    const float* beta, int64_t beta_token, int64_t beta_head,
    float* o, float* state, const int64_t* offsets, const bool* live,
    const float* A_log, const float* dt_bias,
    float* kept, const int64_t* sequence, const int64_t* end, int64_t kept_count,
    int64_t N, int64_t H, int64_t HV, int64_t K, int64_t V, int64_t raw, int64_t bounded,
    double bound, double beta_scale, double norm_eps, double scale, int64_t threads) {
  const Tokens qs{q, q_token, q_head}, ks{k, k_token, k_head}, vs{v, v_token, v_head};
  const Tokens gs{g, g_token, g_head}, betas{beta, beta_token, beta_head};
  const Gate gate{A_log, dt_bias, bounded, bound};
#pragma omp parallel num_threads(threads)
  {
    Chunk c(K, V);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < N * HV; task++) {
      const int64_t n = task / HV, h = task % HV, key = h / (HV / H);
      if (!live[n]) continue;
      float* page = state + task * V * K;
      const auto store = [&](float* to) {
        for (int64_t y = 0; y < V; y++)
          for (int64_t x = 0; x < K; x++) to[y * K + x] = c.S[x * c.VP + y];
      };
      int64_t place = std::lower_bound(sequence, sequence + kept_count, n) - sequence;
      std::fill(c.S.begin(), c.S.end(), 0.f);
      for (int64_t y = 0; y < V; y++)
        for (int64_t x = 0; x < K; x++) c.S[x * c.VP + y] = page[y * K + x];
      for (int64_t first = offsets[n]; first < offsets[n + 1]; first += CHUNK) {
        const int64_t count = std::min(CHUNK, offsets[n + 1] - first);
        c.rows = padded(count);
        for (int64_t i = 0; i < count; i++) {
          const int64_t t = first + i;
          float *qi = &c.q[i * c.KP], *ki = &c.k[i * c.KP], *d = &c.decay[i * c.KP];
          load_row(qs.at(t, key), K, 1, qi);
          load_row(ks.at(t, key), K, 1, ki);
          if (norm_eps >= 0) {
            normalize(qi, c.KP, norm_eps);
            normalize(ki, c.KP, norm_eps);
          }
          scale_row(qi, c.KP, scale);
          const float b = *betas.at(t, h);
          c.beta[i] = raw ? float(beta_scale) * sigmoid(b) : b;
          load_row(vs.at(t, h), V, c.beta[i], &c.uw[i * c.W]);
          if (raw) {
            gate.decay(gs.at(t, h), h, K, d);
            continue;
          }
          load_row(gs.at(t, h), K, 1, d);
          if (i > 0)
            for (int64_t x = 0; x < K; x++) d[x] -= gs.at(t - 1, h)[x];
          for (int64_t x = 0; x < c.KP; x += LANES) Vec::loadu(d + x).exp2().store(d + x);
        }
        for (int64_t i = count; i < c.rows; i++) { // rows that change nothing
          c.beta[i] = 0;
          std::fill_n(&c.q[i * c.KP], c.KP, 0.f);
          std::fill_n(&c.k[i * c.KP], c.KP, 0.f);
          std::fill_n(&c.decay[i * c.KP], c.KP, 1.f);
          std::fill_n(&c.uw[i * c.W], c.W, 0.f);
        }
        // rows lie a whole token apart, where no hardware expects them
        const int64_t next = std::min(first + 2 * CHUNK, offsets[n + 1]);
        for (int64_t t = first + CHUNK; t < next; t++) {
          for (const float* row : {qs.at(t, key), ks.at(t, key), gs.at(t, h)}) prefetch(row, K);
          prefetch(vs.at(t, h), V);
        }
        c.run();
        for (int64_t i = 0; i < count; i++)
          std::copy_n(&c.out[i * c.VP], V, o + ((first + i) * HV + h) * V);
        const int64_t done = first + count - offsets[n];
        if (place < kept_count && sequence[place] == n && end[place] == done)
          store(kept + (place++ * HV + h) * V * K);
      }
      store(page);
    }
  }
}
