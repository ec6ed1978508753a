// Exact attention over the cache, for the query heads that share one key-value head.
//
// Two shapes of work. `decode`: one token, lanes run over channels, every key is loaded once for all heads; it leaves
// partial sums, so that a long cache can be split over threads. `attend`: many tokens, lanes run over query rows
// (tokens x heads), so that scores, maxima and sums of a row never cross lanes; keys come in blocks, with the running
// maximum and rescaling of online softmax (Milakov and Gimelshein, arXiv 1805.02867).

#include "attention_whole.inl"

namespace edgekit {
namespace {

constexpr int kHeadsAtOnce = 4;
constexpr float kHidden = -1e30f;

// The scores of one key stand together, for a number of heads that divides the lanes.
template <int Heads>
constexpr int kTogether = Heads == 3 ? 4 : Heads;

// Scores before they are scaled. Runs: head_dim / 16, or 0 where it is not known here.
template <int Heads, int Runs>
void decode_scores(const DecodeTask& t, const float* q, float* scores) {
  const int64_t d = t.head_dim, runs = Runs > 0 ? Runs : d / kLanes, count = t.count;
  const auto* keys = static_cast<const uint16_t*>(t.keys.data);
  Floats queries[Heads][Runs > 0 ? Runs : 1];
  for (int h = 0; h < Heads; ++h) {
    for (int r = 0; r < Runs; ++r) queries[h][r] = load(q + h * d + r * kLanes);
  }
  for (int64_t j = 0; j < count; ++j) {
    const uint16_t* key = keys + (t.at ? t.at[j] : j) * d;
    Floats acc[4] = {zeros(), zeros(), zeros(), zeros()};
    for (int64_t r = 0; r < runs; ++r) {
      const Floats k = load_half(key + r * kLanes);
      for (int h = 0; h < Heads; ++h) acc[h] = fma(Runs > 0 ? queries[h][r] : load(q + h * d + r * kLanes), k, acc[h]);
    }
    if (Heads == 1) {
      scores[j] = sum(acc[0]);
    } else {
      store_sums(scores + j * kTogether<Heads>, acc);
    }
  }
}

template <int Heads, int Runs>
void decode_values(const DecodeTask& t, int64_t first_channel, const float* weights, float* out) {
  Floats acc[Heads][Runs];
  for (int h = 0; h < Heads; ++h) {
    for (int r = 0; r < Runs; ++r) acc[h][r] = zeros();
  }
  const int64_t d = t.head_dim, count = t.count;
  const uint16_t* values = static_cast<const uint16_t*>(t.values.data) + first_channel;
  for (int64_t j = 0; j < count; ++j) {
    const uint16_t* value = values + (t.at ? t.at[j] : j) * d;
    Floats weight[Heads];
    for (int h = 0; h < Heads; ++h) weight[h] = all(weights[j * kTogether<Heads> + h]);
    for (int r = 0; r < Runs; ++r) {
      const Floats v = load_half(value + r * kLanes);
      for (int h = 0; h < Heads; ++h) acc[h][r] = fma(weight[h], v, acc[h][r]);
    }
  }
  for (int h = 0; h < Heads; ++h) {
    for (int r = 0; r < Runs; ++r) store(out + h * d + first_channel + r * kLanes, acc[h][r]);
  }
}

template <int Heads>
void decode_heads(const DecodeTask& t, int64_t first_head) {
  constexpr int kWidth = kTogether<Heads>;
  const int64_t d = t.head_dim, size = t.count_padded * kWidth;
  const float* q = t.q + first_head * d;
  float* scores = t.scratch;
  if (d == 4 * kLanes) {
    decode_scores<Heads, 4>(t, q, scores);
  } else {
    decode_scores<Heads, 0>(t, q, scores);
  }
  for (int64_t i = t.count * kWidth; i < size; ++i) scores[i] = kHidden;
  Floats high = all(kHidden), total = zeros();
  for (int64_t i = 0; i < size; i += kLanes) high = max(high, load(scores + i));
  float lanes[kLanes], maxima[kWidth];
  store(lanes, high);
  for (int h = 0; h < kWidth; ++h) maxima[h] = lanes[h];
  for (int i = kWidth; i < kLanes; ++i) maxima[i % kWidth] = lanes[i] > maxima[i % kWidth] ? lanes[i] : maxima[i % kWidth];
  for (int i = 0; i < kLanes; ++i) lanes[i] = maxima[i % kWidth];
  const Floats top = load(lanes), scale = all(t.scale);
  for (int64_t i = 0; i < size; i += kLanes) {
    const Floats weight = exponential(mul(sub(load(scores + i), top), scale));
    store(scores + i, weight);
    total = add(total, weight);
  }
  store(lanes, total);
  for (int h = 0; h < Heads; ++h) {
    float sum = 0.0f;
    for (int i = h; i < kLanes; i += kWidth) sum += lanes[i];
    t.maxima[first_head + h] = maxima[h] * t.scale;
    t.sums[first_head + h] = sum;
  }
  constexpr int kRuns = kAtOnce >= 8 ? 4 : 1;  // as many as the registers hold
  float* out = t.out + first_head * d;
  int64_t c = 0;
  for (; c + kRuns * kLanes <= d; c += kRuns * kLanes) decode_values<Heads, kRuns>(t, c, scores, out);
  for (; c < d; c += kLanes) decode_values<Heads, 1>(t, c, scores, out);
}

void decode(const DecodeTask& t) {
  if (t.keys.scales) return decode_whole(t);
  int64_t h = 0;
  for (; h + kHeadsAtOnce <= t.heads; h += kHeadsAtOnce) decode_heads<kHeadsAtOnce>(t, h);
  switch (t.heads - h) {
    case 3: return decode_heads<3>(t, h);
    case 2: return decode_heads<2>(t, h);
    case 1: return decode_heads<1>(t, h);
    default: return;
  }
}

// Up to kKeyBlock rows as floats.
void widen_rows(const Rows& from, int64_t count, int64_t head_dim, float* to) {
  if (from.scales) {
    float scales[kKeyBlock];
    int8_t room[kMostChannels];
    for (int64_t j = 0; j < count; j += kLanes) store(scales + j, row_scales(from.scales, j, count - j));
    for (int64_t j = 0; j < count; ++j, to += head_dim) {
      const int8_t* row = whole_rows(from, j, 1, head_dim, room);
      for (int64_t i = 0; i < head_dim; i += kLanes) store(to + i, mul(widen(row + i), all(scales[j])));
    }
  } else {
    const auto* halves = static_cast<const uint16_t*>(from.data);
    for (int64_t i = 0; i < count * head_dim; i += kLanes) store(to + i, load_half(halves + i));
  }
}

// One block of keys or values, zeros past `count`.
void widen_block(const Rows& from, int64_t count, int64_t head_dim, float* to) {
  widen_rows(from, count, head_dim, to);
  std::memset(to + count * head_dim, 0, (kKeyBlock - count) * head_dim * sizeof(float));
}

// Sixteen query rows against one block of keys: scores[j] has a lane for each row.
void block_scores(const float* q, const float* keys, int64_t head_dim, float* scores) {
  for (int64_t j = 0; j < kKeyBlock; j += kAtOnce) {
    Floats acc[kAtOnce];
    for (int k = 0; k < kAtOnce; ++k) acc[k] = zeros();
    for (int64_t d = 0; d < head_dim; ++d) {
      const Floats rows = load(q + d * kLanes);
      for (int k = 0; k < kAtOnce; ++k) acc[k] = fma(rows, all(keys[(j + k) * head_dim + d]), acc[k]);
    }
    for (int k = 0; k < kAtOnce; ++k) store(scores + (j + k) * kLanes, acc[k]);
  }
}

// out[row] = out[row] * shrink[row] + sum_j weights[j][row] * values[j], for sixteen rows.
void block_values(const float* weights, const float* values, const float* shrink, int64_t head_dim, float* out) {
  constexpr int kRows = kAtOnce / 2;
  for (int r = 0; r < kLanes; r += kRows) {
    for (int64_t d = 0; d < head_dim; d += 2 * kLanes) {
      const bool both = d + kLanes < head_dim;
      Floats acc[kRows][2];
      for (int i = 0; i < kRows; ++i) {
        const Floats factor = all(shrink[r + i]);
        acc[i][0] = mul(load(out + (r + i) * head_dim + d), factor);
        acc[i][1] = both ? mul(load(out + (r + i) * head_dim + d + kLanes), factor) : zeros();
      }
      for (int64_t j = 0; j < kKeyBlock; ++j) {
        const Floats v0 = load(values + j * head_dim + d);
        const Floats v1 = both ? load(values + j * head_dim + d + kLanes) : zeros();
        for (int i = 0; i < kRows; ++i) {
          const Floats weight = all(weights[j * kLanes + r + i]);
          acc[i][0] = fma(weight, v0, acc[i][0]);
          acc[i][1] = fma(weight, v1, acc[i][1]);
        }
      }
      for (int i = 0; i < kRows; ++i) {
        store(out + (r + i) * head_dim + d, acc[i][0]);
        if (both) store(out + (r + i) * head_dim + d + kLanes, acc[i][1]);
      }
    }
  }
}

// Hides the keys of a block that rows at `position` do not see, and returns each row's largest score, or `top`.
Floats hide_and_peak(float* scores, Floats position, int64_t from, int64_t window, Floats top) {
  float first;
  std::memcpy(&first, &position, sizeof first);
  const bool hides = static_cast<float>(from + kKeyBlock - 1) > first || window > 0;
  for (int j = 0; j < kKeyBlock; ++j) {
    Floats s = load(scores + j * kLanes);
    if (hides) {
      const Floats ahead = sub(position, all(static_cast<float>(from + j)));
      s = fma(min(ahead, zeros()), all(1e30f), s);
      if (window > 0) s = fma(min(sub(all(static_cast<float>(window - 1)), ahead), zeros()), all(1e30f), s);
      store(scores + j * kLanes, s);
    }
    top = max(top, s);
  }
  return top;
}

// Row r of the work is token r / heads, head r % heads.
void attend(const AttentionTask& t) {
  const int64_t rows = t.tokens * t.heads, groups = (rows + kLanes - 1) / kLanes, d = t.head_dim;
  float* keys = t.scratch;
  float* values = keys + kKeyBlock * d;
  float* scores = values + kKeyBlock * d;
  float* q = scores + kKeyBlock * kLanes;         // [groups][head_dim][16]
  float* out = q + groups * d * kLanes;           // [groups * 16][head_dim]
  float* maxima = out + groups * kLanes * d;      // [groups * 16]
  float* sums = maxima + groups * kLanes;
  float* position = sums + groups * kLanes;
  std::memset(q, 0, sizeof(float) * groups * kLanes * d * 2);
  for (int64_t r = 0; r < groups * kLanes; ++r) {
    const int64_t token = r < rows ? r / t.heads : t.tokens - 1;
    position[r] = static_cast<float>(t.first + token);
    maxima[r] = kHidden;
    sums[r] = 0.0f;
    if (r >= rows) continue;
    const float* from = t.q + token * t.q_stride + (r % t.heads) * d;
    for (int64_t i = 0; i < d; ++i) q[(r / kLanes * d + i) * kLanes + r % kLanes] = from[i] * t.scale;
  }
  const int64_t end = t.first + t.tokens;
  int64_t begin = t.window > 0 && t.first >= t.window ? t.first - t.window + 1 : 0;
  begin -= begin % kKeyBlock;
  for (int64_t i = 0, from = begin;; ++i) {
    from = t.blocks ? (i < t.block_count ? t.blocks[i] * kKeyBlock : end) : begin + i * kKeyBlock;
    if (from >= end) break;
    const int64_t count = end - from < kKeyBlock ? end - from : kKeyBlock;
    widen_block(t.keys.from(from, d), count, d, keys);
    widen_block(t.values.from(from, d), count, d, values);
    for (int64_t g = 0; g < groups; ++g) {
      const Floats at = load(position + g * kLanes);
      if (static_cast<float>(from) > position[g * kLanes + kLanes - 1]) continue;  // all of it lies ahead
      block_scores(q + g * d * kLanes, keys, d, scores);
      const Floats top = hide_and_peak(scores, at, from, t.window, load(maxima + g * kLanes));
      const Floats before = load(maxima + g * kLanes), shrink = exponential(sub(before, top));
      Floats total = mul(load(sums + g * kLanes), shrink);
      for (int64_t j = 0; j < kKeyBlock; ++j) {
        const Floats weight = exponential(sub(load(scores + j * kLanes), top));
        store(scores + j * kLanes, weight);
        total = add(total, weight);
      }
      store(maxima + g * kLanes, top);
      store(sums + g * kLanes, total);
      float factors[kLanes];
      store(factors, shrink);
      block_values(scores, values, factors, d, out + g * kLanes * d);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* to = t.out + (r / t.heads) * t.q_stride + (r % t.heads) * d;
    const Floats inverse = all(1.0f / sums[r]);
    for (int64_t i = 0; i < d; i += kLanes) store(to + i, mul(load(out + r * d + i), inverse));
  }
}

}  // namespace
}  // namespace edgekit
