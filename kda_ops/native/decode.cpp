// A few tokens of each sequence between the projections of a layer, on both of its states in place.
//
// A thread computes a key head of a sequence, with its value heads: their channels and states are
// nobody else's.

namespace {

struct Channels { // q, k or v of the convolution
  const float* x;
  int64_t x_token;
  void* state;
  int64_t state_slot, state_row, state_channel;
  const float *weight, *bias; // bias may be null
};

struct Integers { // int32, or int64 where wide; null for none
  const void* data;
  int64_t wide;
  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

struct Step { // `_Step` of decode.py
  Channels channels[3];
  int64_t conv_dtype, state_dtype; // 0 fp32, 1 bf16, 2 fp16
  int64_t T, N, H, HV, K, V, W, L;
  int64_t activated, columns, per_token;
  Integers slots, accepted, offsets; // without slots sequence n is on page n
  Gate gate;
  const float *f, *beta, *z, *norm_weight; // f and z dense, by token
  int64_t beta_token;
  void* state;
  int64_t conv_slots, state_slots, state_slot, state_head, state_v, state_k;
  float* o; // [tokens, HV, V], dense
  double beta_scale, norm_eps, qk_norm_eps, scale;

  int64_t first(int64_t n) const { return offsets.data ? offsets[n] : n; }
  // -1 for none
  int64_t page(int64_t n, int64_t column) const {
    if (!slots.data) return n;
    const int64_t slot = slots[n * columns + column];
    return slot > 0 ? slot : -1;
  }
};

// Whether slots, counts and offsets are what the operator takes.
bool valid(const Step& s) {
  const int64_t most = s.L - s.W + 2;
  std::vector<std::pair<int64_t, int64_t>> owners;
  if (s.first(0) != 0 || s.first(s.N) > s.T) return false;
  for (int64_t n = 0; n < s.N; n++) {
    const int64_t tokens = s.first(n + 1) - s.first(n);
    if (tokens < 0 || tokens > most || (s.per_token && tokens > s.columns)) return false;
    bool padding = true;
    for (int64_t j = 0; j < s.columns; j++) {
      const int64_t page = s.page(n, j);
      if (page >= s.state_slots || (j == 0 && page >= s.conv_slots)) return false;
      if (page < 0) continue;
      padding = false;
      owners.push_back({page, n});
    }
    if (s.accepted.data && !padding) {
      const int64_t accepted = s.accepted[n];
      if (accepted < 1 || accepted > s.columns || accepted > most) return false;
    }
  }
  std::sort(owners.begin(), owners.end());
  for (size_t i = 1; i < owners.size(); i++)
    if (owners[i].first == owners[i - 1].first && owners[i].second != owners[i - 1].second)
      return false;
  return true;
}

template <typename From, typename To>
void copy(const From* x, int64_t step, int64_t n, To* y, int64_t y_step) {
  if (step == 1 && y_step == 1)
    for (int64_t i = 0; i < n; i++) y[i] = x[i];
  else
    for (int64_t i = 0; i < n; i++) y[i * y_step] = x[i * step];
}

// What a thread keeps from one sequence to the next.
struct Workspace {
  int64_t head = -1; // whose taps these are
  std::vector<float> taps[3]; // of q, k and v: [W + 1, padded], the bias last
  std::vector<float> window, rows, own, decay, o;
};

// The taps of a part for `size` channels from `base` on, channels side by side.
void load_taps(const Step& s, const Channels& c, int64_t base, int64_t size, std::vector<float>& taps) {
  const int64_t wide = padded(size);
  taps.assign((s.W + 1) * wide, 0.f);
  for (int64_t i = 0; i < size; i++) {
    for (int64_t w = 0; w < s.W; w++) taps[w * wide + i] = c.weight[(base + i) * s.W + w];
    if (c.bias) taps[s.W * wide + i] = c.bias[base + i];
  }
}

// The channels of one part and head, convolved: padded rows of `y`, `y_row` apart. `continued`: how
// many tokens the state is ahead.
template <typename State>
void convolve(
    const Step& s, const Channels& c, const std::vector<float>& taps, int64_t slot,
    int64_t continued, int64_t first, int64_t tokens, int64_t base, int64_t size,
    std::vector<float>& window, float* y, int64_t y_row) {
  const int64_t past = s.W - 1, wide = padded(size);
  State* state = static_cast<State*>(c.state) + slot * c.state_slot + base * c.state_channel;
  window.assign((past + tokens) * wide, 0.f);
  for (int64_t r = 0; r < past; r++)
    copy(state + (continued + r) * c.state_row, c.state_channel, size, &window[r * wide], 1);
  for (int64_t j = 0; j < tokens; j++) {
    std::copy_n(c.x + (first + j) * c.x_token + base, size, &window[(past + j) * wide]);
    float* out = y + j * y_row;
    for (int64_t i = 0; i < wide; i += LANES) {
      Vec total = Vec::loadu(&taps[s.W * wide + i]);
      for (int64_t w = 0; w < s.W; w++)
        total = fmadd(Vec::loadu(&taps[w * wide + i]), Vec::loadu(&window[(j + w) * wide + i]), total);
      total.store(out + i);
    }
    if (s.activated) silu(out, wide);
  }
  for (int64_t r = 0; r < std::min(s.L, past - 1 + tokens); r++)
    copy(&window[(r + 1) * wide], 1, size, state + r * c.state_row, c.state_channel);
}

// One token of a head with the state in `S`, rows of V, `S_row` apart; gives o [V].
void advance(
    const Step& s, float* S, int64_t S_row, const float* q, const float* k, const float* v,
    const float* decay, float beta, float* o) {
  const int64_t KP = padded(s.K);
  for (int64_t y = 0; y < s.V; y++) {
    float* line = S + y * S_row;
    Vec total(0.f);
    for (int64_t i = 0; i < KP; i += LANES)
      total = fmadd(Vec::loadu(line + i) * Vec::loadu(decay + i), Vec::loadu(k + i), total);
    const Vec step(beta * (v[y] - sum(total)));
    total = Vec(0.f);
    for (int64_t i = 0; i < KP; i += LANES) {
      const Vec kept = Vec::loadu(line + i) * Vec::loadu(decay + i);
      const Vec next = fmadd(step, Vec::loadu(k + i), kept);
      next.store(line + i);
      total = fmadd(next, Vec::loadu(q + i), total);
    }
    o[y] = float(s.scale) * sum(total);
  }
}

// out = norm * o * norm_weight * sigmoid(z) of one row
void gate_output(const float* o, float norm, const float* weight, const float* z, int64_t V, float* out) {
  const Vec n(norm);
  int64_t v = 0;
  for (; v + LANES <= V; v += LANES)
    (n * Vec::loadu(o + v) * Vec::loadu(weight + v) * sigmoid(Vec::loadu(z + v))).store(out + v);
  for (; v < V; v++) out[v] = norm * o[v] * weight[v] * sigmoid(z[v]);
}

template <typename State, typename ConvState>
void sequence_head(const Step& s, int64_t n, int64_t h, Workspace& work) {
  const int64_t K = s.K, V = s.V, KP = padded(K), groups = s.HV / s.H;
  const int64_t first = s.first(n), tokens = s.first(n + 1) - first;
  if (tokens == 0) return;
  const auto page = [&](int64_t column) { return s.page(n, column); };
  const int64_t continued =
      s.accepted.data ? std::clamp<int64_t>(s.accepted[n] - 1, 0, s.columns - 1) : 0;

  // q, k and v of each token, padded
  const int64_t sizes[3] = {K, K, groups * V}, places[3] = {0, KP, 2 * KP};
  const int64_t width = 2 * KP + padded(groups * V);
  if (work.head != h)
    for (int p = 0; p < 3; p++)
      load_taps(s, s.channels[p], h * sizes[p], sizes[p], work.taps[p]);
  work.head = h;
  auto& [head_of_taps, taps, window, rows, own, decay, o] = work;
  rows.assign(tokens * width, 0.f);
  for (int p = 0; p < 3 && page(0) >= 0; p++)
    convolve<ConvState>(
        s, s.channels[p], taps[p], page(0), continued, first, tokens, h * sizes[p], sizes[p],
        window, &rows[places[p]], width);
  for (int64_t j = 0; j < tokens; j++)
    for (int p = 0; p < 2; p++) normalize(&rows[j * width + places[p]], KP, s.qk_norm_eps);

  const int64_t source = page(continued);
  if (source < 0) return;
  const auto target = [&](int64_t j) {
    if (s.per_token) return j < s.columns ? page(j) : -1;
    return j + 1 == tokens ? source : -1;
  };
  const bool in_place = std::is_same_v<State, float> && tokens == 1 && target(0) == source &&
      s.state_k == 1 && K % TILE == 0;
  own.assign(in_place ? 0 : V * KP, 0.f);
  decay.resize(KP);
  o.assign(padded(V), 0.f);
  for (int64_t head = h * groups; head < (h + 1) * groups; head++) {
    State* pages = static_cast<State*>(s.state) + head * s.state_head;
    float* S = own.data();
    int64_t S_row = KP;
    if (in_place) {
      S = reinterpret_cast<float*>(pages + source * s.state_slot);
      S_row = s.state_v;
    } else {
      for (int64_t v = 0; v < V; v++)
        copy(pages + source * s.state_slot + v * s.state_v, s.state_k, K, S + v * KP, 1);
    }
    for (int64_t j = 0; j < tokens; j++) {
      const int64_t row = (first + j) * s.HV + head;
      const float* q = &rows[j * width];
      s.gate.decay(s.f + row * K, head, K, decay.data());
      const float beta = float(s.beta_scale) * sigmoid(s.beta[(first + j) * s.beta_token + head]);
      advance(s, S, S_row, q, q + KP, q + 2 * KP + (head - h * groups) * V, decay.data(), beta,
              o.data());
      const float squares = dot(o.data(), o.data(), padded(V));
      const float norm = 1 / std::sqrt(squares / V + float(s.norm_eps));
      gate_output(o.data(), norm, s.norm_weight, s.z + row * V, V, s.o + row * V);
      if (in_place || target(j) < 0) continue;
      for (int64_t v = 0; v < V; v++)
        copy(S + v * KP, 1, K, pages + target(j) * s.state_slot + v * s.state_v, s.state_k);
    }
  }
}

template <typename State>
void sequence_head(const Step& s, int64_t n, int64_t h, Workspace& work) {
  if (s.conv_dtype == 0) sequence_head<State, float>(s, n, h, work);
  if (s.conv_dtype == 1) sequence_head<State, c10::BFloat16>(s, n, h, work);
  if (s.conv_dtype == 2) sequence_head<State, c10::Half>(s, n, h, work);
}

} // namespace

// Returns whether the tables were valid; else nothing is written.
EXPORT int kda_decode(const Step* step, int64_t threads) {
  const Step& s = *step;
  if (!valid(s)) return 0;
#pragma omp parallel num_threads(threads)
  {
    Workspace work;
#pragma omp for schedule(static) // the sequences of a head in a row, as they share its taps
    for (int64_t task = 0; task < s.N * s.H; task++) {
      const int64_t h = task / s.N, n = task % s.N;
      if (s.state_dtype == 0) sequence_head<float>(s, n, h, work);
      if (s.state_dtype == 1) sequence_head<c10::BFloat16>(s, n, h, work);
    }
  }
  return 1;
}
