// Rows of the cache in 8 bits: how they are rounded, and attention of one token over them.
//
// Scores are dot products of whole numbers: the query has 15 bits, in two planes as activations have, so that what is lost
// is the keys' rounding alone. Sixteen keys are turned at a time, so that lanes are positions: no sum crosses lanes.

namespace edgekit {
namespace {

constexpr int64_t kMostChannels = 1024;

// A row as whole numbers of -127..127; returns their scale. A row with something that is not a number has none either.
uint16_t round_row(const float* x, int64_t count, int8_t* codes) {
  Floats peak = zeros();
  unsigned numbers = 0xffff;
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats v = load(x + i);
    peak = max(magnitude(v), peak);
    numbers &= at_most(v, v);
  }
  uint16_t halves[kLanes];
  store_half(halves, all(numbers == 0xffff ? largest(peak) / 127.0f : NAN));
  float scales[kLanes];
  store(scales, load_half(halves));
  const Floats inverse = all(scales[0] > 0.0f ? 1.0f / scales[0] : 0.0f), most = all(127.0f), least = all(-127.0f);
  for (int64_t i = 0; i < count; i += kLanes) store_codes(codes + i, max(min(round(mul(load(x + i), inverse)), most), least));
  return halves[0];
}

// Up to sixteen scales; zeros past `count`.
inline Floats row_scales(const uint16_t* scales, int64_t count) {
  if (count >= kLanes) return load_half(scales);
  uint16_t some[kLanes] = {};
  std::memcpy(some, scales, static_cast<size_t>(count) * sizeof(uint16_t));
  return load_half(some);
}

// A query in two planes: value = unit * (kPlane * high + low).
struct WholeQuery {
  int8_t high[kMostChannels], low[kMostChannels];
  int32_t high_sum, low_sum;
  float unit;
};

void round_query(const float* q, int64_t head_dim, WholeQuery& out) {
  constexpr float kMost = kPlane * 127 + 126;
  Floats peak = zeros();
  for (int64_t i = 0; i < head_dim; i += kLanes) peak = max(magnitude(load(q + i)), peak);
  const float top = largest(peak);
  out.unit = top / kMost;
  out.high_sum = out.low_sum = 0;
  const Floats inverse = all(top > 0.0f ? kMost / top : 0.0f), most = all(kMost), least = all(-kMost);
  for (int64_t i = 0; i < head_dim; i += kLanes) {
    const Floats whole = max(min(round(mul(load(q + i), inverse)), most), least);
    const Floats high = round(mul(whole, all(1.0f / kPlane)));
    out.high_sum += store_codes(out.high + i, high);
    out.low_sum += store_codes(out.low + i, fma(high, all(-static_cast<float>(kPlane)), whole));
  }
}

// Scores of sixteen keys before they are scaled by the square root of the channels.
template <int Heads>
void whole_scores(const uint8_t* keys, const WholeQuery* q, Floats scales, int64_t head_dim, float* scores, int64_t stride) {
  Ints high[Heads], low[Heads];
  for (int h = 0; h < Heads; ++h) {
    high[h] = all(-kWideZero * q[h].high_sum);
    low[h] = all(-kWideZero * q[h].low_sum);
  }
  for (int64_t c = 0; c < head_dim; c += 16) {
    Bytes codes[4];
    turn(keys + c, head_dim, codes);
    for (Bytes& four : codes) four = signed_wide(four);
    for (int h = 0; h < Heads; ++h) {
      high[h] = dot<8, 4>(high[h], codes, q[h].high + c);
      low[h] = dot<8, 4>(low[h], codes, q[h].low + c);
    }
  }
  for (int h = 0; h < Heads; ++h) {
    const Floats product = fma(to_float(high[h]), all(static_cast<float>(kPlane)), to_float(low[h]));
    store(scores + h * stride, mul(mul(product, all(q[h].unit)), scales));
  }
}

template <int Heads, int Runs>
void whole_values(const int8_t* values, int64_t count, int64_t head_dim, const float* weights, int64_t stride, float* out) {
  Floats acc[Heads][Runs];
  for (int h = 0; h < Heads; ++h) {
    for (int r = 0; r < Runs; ++r) acc[h][r] = zeros();
  }
  for (int64_t j = 0; j < count; ++j, values += head_dim) {
    Floats weight[Heads];
    for (int h = 0; h < Heads; ++h) weight[h] = all(weights[h * stride + j]);
    for (int r = 0; r < Runs; ++r) {
      const Floats v = widen(values + r * kLanes);
      for (int h = 0; h < Heads; ++h) acc[h][r] = fma(weight[h], v, acc[h][r]);
    }
  }
  for (int h = 0; h < Heads; ++h) {
    for (int r = 0; r < Runs; ++r) store(out + h * head_dim + r * kLanes, acc[h][r]);
  }
}

// The scores become weights that the values' scales multiply.
void whole_softmax(const DecodeTask& t, int64_t head, float* scores) {
  const int64_t left = t.count % kLanes;
  for (int64_t i = left ? left : kLanes; i < kLanes; ++i) scores[t.count - left + i] = -1e30f;
  Floats high = all(-1e30f), total = zeros();
  for (int64_t i = 0; i < t.count_padded; i += kLanes) high = max(high, load(scores + i));
  const float maximum = largest(high);
  const Floats top = all(maximum), scale = all(t.scale);
  for (int64_t i = 0; i < t.count_padded; i += kLanes) {
    const Floats weight = exponential(mul(sub(load(scores + i), top), scale));
    total = add(total, weight);
    store(scores + i, mul(weight, row_scales(t.values.scales + i, t.count - i)));
  }
  t.maxima[head] = maximum * t.scale;
  t.sums[head] = sum(total);
}

template <int Heads>
void decode_whole_heads(const DecodeTask& t, int64_t first_head) {
  const int64_t d = t.head_dim;
  const auto* keys = static_cast<const uint8_t*>(t.keys.data);
  const auto* values = static_cast<const int8_t*>(t.values.data);
  float* scores = t.scratch;
  WholeQuery q[Heads];
  for (int h = 0; h < Heads; ++h) round_query(t.q + (first_head + h) * d, d, q[h]);
  int64_t j = 0;
  for (; j + kLanes <= t.count; j += kLanes) {
    whole_scores<Heads>(keys + j * d, q, load_half(t.keys.scales + j), d, scores + j, t.count_padded);
  }
  if (j < t.count) {
    uint8_t rows[kLanes * kMostChannels];
    std::memcpy(rows, keys + j * d, static_cast<size_t>((t.count - j) * d));
    std::memset(rows + (t.count - j) * d, 0, static_cast<size_t>((j + kLanes - t.count) * d));
    whole_scores<Heads>(rows, q, row_scales(t.keys.scales + j, t.count - j), d, scores + j, t.count_padded);
  }
  for (int h = 0; h < Heads; ++h) whole_softmax(t, first_head + h, scores + h * t.count_padded);
  constexpr int kRuns = kAtOnce >= 8 ? 4 : 1;  // as many as the registers hold
  float* out = t.out + first_head * d;
  int64_t c = 0;
  for (; c + kRuns * kLanes <= d; c += kRuns * kLanes) {
    whole_values<Heads, kRuns>(values + c, t.count, d, scores, t.count_padded, out + c);
  }
  for (; c < d; c += kLanes) whole_values<Heads, 1>(values + c, t.count, d, scores, t.count_padded, out + c);
}

void decode_whole(const DecodeTask& t) {
  int64_t h = 0;
  for (; h + 3 <= t.heads; h += 3) decode_whole_heads<3>(t, h);
  for (; h < t.heads; ++h) decode_whole_heads<1>(t, h);
}

}  // namespace
}  // namespace edgekit
