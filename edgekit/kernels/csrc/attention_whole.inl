// Rows of the cache in 8 and 4 bits: how they are rounded, and attention of one token over them.
//
// Scores are dot products of whole numbers: the query has 15 bits, in two planes as activations have, so that what is lost
// is the keys' rounding alone. Sixteen keys are turned at a time, so that lanes are positions: no sum crosses lanes. Four
// bits become bytes a few rows at a time.

namespace edgekit {
namespace {

constexpr int64_t kMostChannels = 1024;

// Butterflies in NumPy's order: what is rounded afterwards agrees to the bit.
void hadamard(float* x, int64_t rows, int64_t head_dim) {
  const int64_t run = head_dim & -head_dim;
  const float root = sqrtf(static_cast<float>(run));
  for (float* end = x + rows * head_dim; x < end; x += run) {
    for (int64_t half = 1; half < run; half *= 2) {
      for (int64_t i = 0; i < run; i += 2 * half) {
        for (int64_t j = i; j < i + half; ++j) {
          const float a = x[j], b = x[j + half];
          x[j] = a + b;
          x[j + half] = a - b;
        }
      }
    }
    for (int64_t i = 0; i < run; ++i) x[i] /= root;
  }
}

// A row as whole numbers; returns their scale. A row with something that is not a number has none either.
uint16_t round_whole(const float* x, int64_t count, int bits, int8_t* codes) {
  Floats peaks = zeros(), highs = zeros();
  unsigned numbers = 0xffff;
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats v = load(x + i);
    peaks = max(magnitude(v), peaks);
    highs = max(v, highs);
    numbers &= at_most(v, v);
  }
  // Of 4 bits the largest becomes -8, so that all sixteen numbers are used.
  const float peak = largest(peaks), step = bits == 8 ? peak / 127.0f : (largest(highs) == peak ? -peak : peak) / 8.0f;
  uint16_t halves[kLanes];
  store_half(halves, all(numbers == 0xffff ? step : NAN));
  float scales[kLanes];
  store(scales, load_half(halves));
  const Floats inverse = all(scales[0] > 0.0f || scales[0] < 0.0f ? 1.0f / scales[0] : 0.0f);
  const Floats most = all(bits == 8 ? 127.0f : 7.0f), least = all(bits == 8 ? -127.0f : -8.0f);
  for (int64_t i = 0; i < count; i += kLanes) store_codes(codes + i, max(min(round(mul(load(x + i), inverse)), most), least));
  return halves[0];
}

uint16_t round_row(const float* x, int64_t count, int bits, uint8_t* codes) {
  if (bits == 8) return round_whole(x, count, bits, reinterpret_cast<int8_t*>(codes));
  int8_t whole[kMostChannels];
  const uint16_t scale = round_whole(x, count, bits, whole);
  for (int64_t i = 0; i < count / 2; ++i) codes[i] = static_cast<uint8_t>((whole[i] + 8) | (whole[i + count / 2] + 8) << 4);
  return scale;
}

// Rows first..first + count - 1 of whole numbers, or those that `at` names, as bytes: as they are, or in `room`.
inline const int8_t* whole_rows(const Rows& from, int64_t first, int64_t count, int64_t head_dim, int8_t* room,
                                const int32_t* at = nullptr) {
  const auto* rows = static_cast<const uint8_t*>(from.data);
  if (from.bits == 8 && !at) return reinterpret_cast<const int8_t*>(rows) + first * head_dim;
  const int64_t half = head_dim / 2;
  for (int64_t j = 0; j < count; ++j) {
    const uint8_t* data = rows + (at ? at[first + j] : first + j) * from.bytes(head_dim);
    int8_t* low = room + j * head_dim;
    if (from.bits == 8) {
      for (int64_t i = 0; i < head_dim; i += kLanes) std::memcpy(low + i, data + i, kLanes);
      continue;
    }
    for (int64_t i = 0; i < half; ++i) low[i] = static_cast<int8_t>((data[i] & 15) - 8);
    for (int64_t i = 0; i < half; ++i) low[half + i] = static_cast<int8_t>((data[i] >> 4) - 8);
  }
  return room;
}

// The scales of up to sixteen rows, as in whole_rows; zeros past `count`.
inline Floats row_scales(const uint16_t* scales, int64_t first, int64_t count, const int32_t* at = nullptr) {
  if (count >= kLanes && !at) return load_half(scales + first);
  uint16_t some[kLanes] = {};
  for (int64_t i = 0; i < count && i < kLanes; ++i) some[i] = scales[at ? at[first + i] : first + i];
  return load_half(some);
}

// A query in two planes: value = unit * (kPlane * high + low).
struct WholeQuery {
  int8_t high[kMostChannels], low[kMostChannels];
  PlaneSums sums;
  float unit;
};

void round_query(const float* q, int64_t head_dim, WholeQuery& out) {
  constexpr float kMost = kPlane * 127 + 126;
  Floats peak = zeros();
  for (int64_t i = 0; i < head_dim; i += kLanes) peak = max(magnitude(load(q + i)), peak);
  const float top = largest(peak);
  out.unit = top / kMost;
  out.sums = store_planes(q, static_cast<int>(head_dim), top > 0.0f ? kMost / top : 0.0f, out.high, out.low);
}

// Scores of sixteen keys before they are scaled by the square root of the channels.
template <int Heads>
void whole_scores(const int8_t* keys, const WholeQuery* q, Floats scales, int64_t head_dim, float* scores, int64_t stride) {
  Ints high[Heads], low[Heads];
  for (int h = 0; h < Heads; ++h) {
    high[h] = all(-kWideZero * q[h].sums.high);
    low[h] = all(-kWideZero * q[h].sums.low);
  }
  for (int64_t c = 0; c < head_dim; c += 16) {
    Bytes codes[4];
    turn(reinterpret_cast<const uint8_t*>(keys) + c, head_dim, codes);
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

// Added to what is in `out`.
template <int Heads, int Runs>
void whole_values(const int8_t* values, int64_t count, int64_t head_dim, const float* weights, int64_t stride, float* out) {
  Floats acc[Heads][Runs];
  for (int h = 0; h < Heads; ++h) {
    for (int r = 0; r < Runs; ++r) acc[h][r] = load(out + h * head_dim + r * kLanes);
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
    store(scores + i, mul(weight, row_scales(t.values.scales, i, t.count - i, t.at)));
  }
  t.maxima[head] = maximum * t.scale;
  t.sums[head] = sum(total);
}

template <int Heads>
void decode_whole_heads(const DecodeTask& t, int64_t first_head) {
  const int64_t d = t.head_dim;
  float* scores = t.scratch;
  float* out = t.out + first_head * d;
  WholeQuery q[Heads];
  for (int h = 0; h < Heads; ++h) round_query(t.q + (first_head + h) * d, d, q[h]);
  int8_t room[kLanes * kMostChannels];
  for (int64_t j = 0; j < t.count; j += kLanes) {
    const int64_t count = kLanes < t.count - j ? kLanes : t.count - j;
    for (int64_t i = j; t.at && i < j + count; ++i) t.values.fetch(t.at[i], d);  // they are read once all scores are known
    const int8_t* keys = whole_rows(t.keys, j, count, d, room, t.at);
    if (count < kLanes) {
      if (keys != room) std::memcpy(room, keys, static_cast<size_t>(count * d));
      std::memset(room + count * d, 0, static_cast<size_t>((kLanes - count) * d));
      keys = room;
    }
    whole_scores<Heads>(keys, q, row_scales(t.keys.scales, j, count, t.at), d, scores + j, t.count_padded);
  }
  for (int h = 0; h < Heads; ++h) whole_softmax(t, first_head + h, scores + h * t.count_padded);
  constexpr int kRuns = kAtOnce >= 8 ? 4 : 1;  // as many as the registers hold
  std::memset(out, 0, sizeof(float) * static_cast<size_t>(Heads * d));
  const int64_t at_once = t.values.bits == 8 && !t.at ? t.count : kLanes;
  for (int64_t i = 0; i < t.count; i += at_once) {
    const int64_t rows = at_once < t.count - i ? at_once : t.count - i;
    const int8_t* values = whole_rows(t.values, i, rows, d, room, t.at);
    int64_t c = 0;
    for (; c + kRuns * kLanes <= d; c += kRuns * kLanes) {
      whole_values<Heads, kRuns>(values + c, rows, d, scores + i, t.count_padded, out + c);
    }
    for (; c < d; c += kLanes) whole_values<Heads, 1>(values + c, rows, d, scores + i, t.count_padded, out + c);
  }
}

void decode_whole(const DecodeTask& t) {
  int64_t h = 0;
  for (; h + 3 <= t.heads; h += 3) decode_whole_heads<3>(t, h);
  for (; h < t.heads; ++h) decode_whole_heads<1>(t, h);
}

}  // namespace
}  // namespace edgekit
