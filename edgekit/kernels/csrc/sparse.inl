// Hadamard sparse attention of one token: estimate all positions from codes of the keys.
//
// The cache of a key-value head is cut into blocks of 256 positions, and a block into 16 pages of 16 positions. The codes
// of a block stand in 16 tiles: tile j holds position j of every page, so that lanes are pages, and what belongs to a
// page (its weight) is found without crossing lanes. A tile is head_dim / 16 lines of 64 bytes. First come the channels of
// four bits, eight a line: byte 4 * lane + k of line r holds channels 8r + k and 8r + 4 + k. Then those of two bits, sixteen
// a line: byte 4 * lane + k holds channels 16r + k, 16r + 4 + k, 16r + 8 + k and 16r + 12 + k. The low bits come first. One
// load serves eight or sixteen channels of sixteen positions. See docs/sparse-attention.md.

namespace edgekit {
namespace {

constexpr float kLog2E = 1.44269504088896341f;

// out[c] = sum_i x[i] * matrix[i][c], for `columns` channels, a multiple of 16.
void project(const float* x, const float* matrix, int64_t rows, int64_t columns, float* out) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    Floats even = zeros(), odd = zeros();
    for (int64_t i = 0; i + 1 < rows; i += 2) {
      even = fma(all(x[i]), load(matrix + i * columns + c), even);
      odd = fma(all(x[i + 1]), load(matrix + (i + 1) * columns + c), odd);
    }
    store(out + c, add(even, odd));
  }
}

inline unsigned level(float x, int offset, int most) {
  const float at = floorf(x) + static_cast<float>(offset);
  return !(at > 0.0f) ? 0u : at >= static_cast<float>(most) ? static_cast<unsigned>(most) : static_cast<unsigned>(at);
}

// The code of one key, which may be changed, at `position` of a head's codes.
void encode(const KeyCoder& coder, float* key, int64_t position, float* spread, uint8_t* codes) {
  for (int64_t i = 0; i < coder.head_dim; ++i) key[i] -= read(coder.center + i);
  project(key, coder.encoder, coder.head_dim, coder.channels, spread);
  uint8_t* line = codes + (position / kBlockTokens * kPageTokens + position % kPageTokens) * 4 * coder.head_dim +
                  4 * (position % kBlockTokens / kPageTokens);
  for (int64_t c = 0; c < coder.fine; c += 8, line += 64) {
    for (int64_t k = 0; k < 4; ++k) {
      line[k] = static_cast<uint8_t>(level(spread[c + k], 8, 15) | level(spread[c + 4 + k], 8, 15) << 4);
    }
  }
  for (int64_t c = coder.fine; c < coder.channels; c += 16, line += 64) {
    for (int64_t k = 0; k < 4; ++k) {
      unsigned byte = 0;
      for (int64_t part = 0; part < 4; ++part) byte |= level(spread[c + 4 * part + k], 2, 3) << (2 * part);
      line[k] = static_cast<uint8_t>(byte);
    }
  }
}

// The query as integers: estimates are factor * (sum of code * integer) + constant, in powers of two.
void encode_query(const KeyCoder& coder, const float* q, float scale, float* spread, int8_t* codes, float* factor,
                  float* constant) {
  float shift = 0.0f, peak = 0.0f;
  for (int64_t i = 0; i < coder.head_dim; ++i) shift += q[i] * read(coder.center + i);
  project(q, coder.decoder, coder.head_dim, coder.channels, spread);
  for (int64_t c = 0; c < coder.channels; ++c) peak = fabsf(spread[c]) > peak ? fabsf(spread[c]) : peak;
  const float unit = peak > 0.0f ? 127.0f / peak : 0.0f;
  int32_t zero = 0;  // twice what a key at the center would give
  for (int64_t c = 0; c < coder.channels; ++c) {
    const float whole = nearbyintf(spread[c] * unit);
    codes[c] = static_cast<int8_t>(whole > 127.0f ? 127.0f : whole >= -127.0f ? whole : -127.0f);
    zero += codes[c] * (c < coder.fine ? 15 : 3);
  }
  *factor = peak / 127.0f * scale * kLog2E;
  *constant = shift * scale * kLog2E - 0.5f * static_cast<float>(zero) * *factor;
}

// 2^t within 1 %, 2^-125 at least: a parabola where `exponential` has a polynomial of degree six. What is weighed so is an
// estimate that is off by more. A whole number added to t changes nothing but the power.
inline Floats rough_power(Floats t) {
  t = max(t, all(-125.0f));
  const Floats n = round(t), f = sub(t, n);
  return scale_by_power(fma(fma(all(0.2402265f), f, all(0.6931472f)), f, all(1.0f)), n);
}

// Where position p of the sequence stands among the weights.
inline int64_t place(int64_t p) {
  return p / kBlockTokens * kBlockTokens + p % kPageTokens * kLanes + p % kBlockTokens / kPageTokens;
}

// Estimates of block b, for `Heads` query heads from `head`.
template <int Heads>
void estimate_heads(const SparseTask& t, int64_t head, int64_t b) {
  const uint8_t* line = t.codes + b * kPageTokens * 4 * t.head_dim;
  for (int64_t j = 0; j < kPageTokens; ++j) {
    prefetch(line + 8 * t.head_dim);
    prefetch(line + 8 * t.head_dim + 64);
    Ints acc[Heads];
    for (int h = 0; h < Heads; ++h) acc[h] = all(int32_t{0});
    int64_t c = 0;
    for (; c < t.fine; c += 16, line += 128) {
      const Bytes low = load_bytes(line), high = load_bytes(line + 64);
      const Bytes codes[4] = {field<0, 15>(low), field<4, 15>(low), field<0, 15>(high), field<4, 15>(high)};
      for (int h = 0; h < Heads; ++h) acc[h] = dot<4, 4>(acc[h], codes, t.q_codes + (head + h) * t.channels + c);
    }
    for (; c < t.channels; c += 16, line += 64) {
      const Bytes all4 = load_bytes(line);
      const Bytes codes[4] = {quarter<0>(all4), quarter<1>(all4), quarter<2>(all4), quarter<3>(all4)};
      for (int h = 0; h < Heads; ++h) acc[h] = dot<4, 4>(acc[h], codes, t.q_codes + (head + h) * t.channels + c);
    }
    for (int h = 0; h < Heads; ++h) {
      const Floats estimate = fma(to_float(acc[h]), all(t.factors[head + h]), all(t.constants[head + h]));
      store(t.weights + (head + h) * t.stride + (b * kPageTokens + j) * kLanes, estimate);
    }
  }
}

// What is attended exactly anyway, and what lies ahead, is no candidate.
void hide(const SparseTask& t, int64_t b, float* row, float value) {
  const int64_t from = b * kBlockTokens, to = from + kBlockTokens;
  for (int64_t p = from; p < t.sinks && p < to; ++p) row[place(p)] = value;
  for (int64_t p = t.recent > from ? t.recent : from; p < to; ++p) row[place(p)] = value;
}

// The blocks' weights 2^(estimate - reference), and their sums; a block's reference is a whole number near its largest
// estimate.
void estimate(const SparseTask& t) {
  for (int64_t b = t.first_block; b < t.last_block; ++b) {
    int64_t h = 0;
    for (; h + 3 <= t.heads; h += 3) estimate_heads<3>(t, h, b);
    for (; h < t.heads; ++h) estimate_heads<1>(t, h, b);
    for (h = 0; h < t.heads; ++h) {
      float *row = t.weights + h * t.stride, *block = row + b * kBlockTokens;
      hide(t, b, row, kHidden);
      Floats even = load(block), odd = load(block + kLanes);
      for (int64_t i = 2; i < kPageTokens; i += 2) {
        even = max(load(block + i * kLanes), even);
        odd = max(load(block + (i + 1) * kLanes), odd);
      }
      const float reference = nearbyintf(largest(max(even, odd)));
      even = odd = zeros();
      for (int64_t i = 0; i < kPageTokens; i += 2) {
        const Floats a = rough_power(sub(load(block + i * kLanes), all(reference)));
        const Floats c = rough_power(sub(load(block + (i + 1) * kLanes), all(reference)));
        store(block + i * kLanes, a);
        store(block + (i + 1) * kLanes, c);
        even = add(even, a);
        odd = add(odd, c);
      }
      hide(t, b, row, 0.0f);
      t.references[h * t.blocks + b] = reference;
      t.sums[h * t.blocks + b] = sum(add(even, odd));
    }
  }
}

// How many of `count` numbers, a multiple of 16, are at least `limit`.
int64_t above(const float* x, int64_t count, float limit) {
  const Floats least = all(limit);
  int64_t found = 0;
  for (int64_t i = 0; i < count; i += kLanes) found += __builtin_popcount(at_most(least, load(x + i)));
  return found;
}

constexpr float kSmallest = 1e-37f;  // a share that is smaller counts as none

// A limit that at least `least` of the shares reach, or the smallest; and no more than `most` unless equal ones forbid it.
// Positive floats are in the order of their bits, which are halved until few enough reach it.
float limit_of(const float* x, int64_t count, int64_t least, int64_t most) {
  const auto bits = [](float value) {
    int32_t i;
    std::memcpy(&i, &value, sizeof i);
    return i;
  };
  int32_t limit = bits(kSmallest), beyond = bits(4.0f);
  float value = kSmallest;
  for (const float guess : {1e-2f, 1e-3f, 1e-4f, 1e-6f}) {  // most often it lies between
    if (above(x, count, guess) >= least) {
      value = guess;
      limit = bits(guess);
      break;
    }
    beyond = bits(guess);
  }
  while (beyond - limit > 1) {
    const int32_t middle = limit + (beyond - limit) / 2;
    float guess;
    std::memcpy(&guess, &middle, sizeof guess);
    const int64_t found = above(x, count, guess);
    if (found < least) {
      beyond = middle;
      continue;
    }
    limit = middle;
    value = guess;
    if (found <= most) break;
  }
  return value;
}

// Choose what is attended exactly, the `exact_count` candidates with the largest share in any head, and the
// `following_count` that come next: their places in ascending order. Of equal ones the first places are taken. Their
// weights become zero; the shares of those that follow are kept.
void select(const SparseTask& t, const SparseChoice& c) {
  const int64_t count = t.blocks * kBlockTokens, both = c.exact_count + c.following_count;
  *c.exact_found = *c.following_found = 0;
  if (both == 0) return;
  // As many groups of positions as are wanted have a largest share that many single ones reach, too.
  const int64_t together = count / 16 >= 4 * both ? 16 : count / 4 >= 4 * both ? 4 : 1;
  for (int64_t b = 0; b < t.blocks; ++b) {
    Floats high = zeros();
    for (int64_t j = 0; j < kPageTokens; ++j) {
      const int64_t i = (b * kPageTokens + j) * kLanes;
      Floats share = mul(load(t.weights + i), all(t.gains[b]));
      for (int64_t h = 1; h < t.heads; ++h) {
        share = max(mul(load(t.weights + h * t.stride + i), all(t.gains[h * t.blocks + b])), share);
      }
      store(c.shares + i, share);
      high = j % together == 0 ? share : max(share, high);
      if (j % together == together - 1) store(c.highest + i / together / kLanes * kLanes, high);
    }
  }
  const float limit = limit_of(c.highest, count / together, both, 2 * both);
  int64_t near = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    unsigned lanes = at_most(all(limit), load(c.shares + i));
    for (; lanes != 0; lanes &= lanes - 1) {
      const int64_t at = i + __builtin_ctz(lanes);
      c.places[near] = static_cast<int32_t>(at);
      c.shares[near++] = c.shares[at];
    }
  }
  int64_t padded = near;
  for (; padded % kLanes != 0; ++padded) c.shares[padded] = 0.0f;
  const float last = limit_of(c.shares, padded, both, both);
  const float first = c.exact_count > 0 ? limit_of(c.shares, padded, c.exact_count, c.exact_count) : INFINITY;
  int64_t equal_first = c.exact_count, equal_last = both;  // how many of those at the limits are taken
  for (int64_t i = 0; i < near; ++i) {
    equal_first -= c.shares[i] > first;
    equal_last -= c.shares[i] > last;
  }
  int64_t exact = 0, following = 0;
  for (int64_t i = 0; i < near; ++i) {
    const float share = c.shares[i];
    if (share < last || (share == last && equal_last-- <= 0)) continue;
    const bool chosen = share > first || (share == first && equal_first-- > 0);
    (chosen ? c.exact[exact++] : c.following[following++]) = c.places[i];
  }
  for (int64_t h = 0; h < t.heads; ++h) {
    float *row = t.weights + h * t.stride, *kept = c.kept + h * c.kept_stride;
    for (int64_t i = 0; i < exact; ++i) row[c.exact[i]] = 0.0f;
    for (int64_t i = 0; i < following; ++i) {
      const int32_t at = c.following[i];
      kept[i] = row[at] * t.gains[h * t.blocks + at / kBlockTokens];
      row[at] = 0.0f;
    }
  }
  *c.exact_found = exact;
  *c.following_found = following;
}

// The heads' tails: means of a block's pages times their shares.
template <int Heads>
void add_means(const SparseTask& t, int64_t head, const int8_t* means) {
  for (int64_t i = 0; i < t.head_dim; i += kLanes) {
    Floats acc[Heads];
    for (int h = 0; h < Heads; ++h) acc[h] = load(t.out + (head + h) * t.head_dim + i);
    for (int64_t l = 0; l < kLanes; ++l) {
      const Floats mean = widen(means + l * t.head_dim + i);
      for (int h = 0; h < Heads; ++h) acc[h] = fma(all(t.pages[(head + h) * kLanes + l]), mean, acc[h]);
    }
    for (int h = 0; h < Heads; ++h) store(t.out + (head + h) * t.head_dim + i, acc[h]);
  }
}

// The shares that are left in the blocks, in all, and times the pages' mean values.
void weigh(const SparseTask& t) {
  const int64_t d = t.head_dim;
  std::memset(t.out, 0, sizeof(float) * t.heads * d);
  for (int64_t h = 0; h < t.heads; ++h) t.totals[h] = 0.0f;
  for (int64_t b = t.first_block; b < t.last_block; ++b) {
    const uint8_t* means = t.means + b * mean_bytes(d);
    uint16_t halves[kLanes];
    std::memcpy(halves, means + kLanes * d, sizeof halves);
    const Floats scales = load_half(halves);
    for (int64_t h = 0; h < t.heads; ++h) {
      const float* block = t.weights + h * t.stride + b * kBlockTokens;
      Floats even = load(block), odd = load(block + kLanes);
      for (int64_t j = 2; j < kPageTokens; j += 2) {
        even = add(even, load(block + j * kLanes));
        odd = add(odd, load(block + (j + 1) * kLanes));
      }
      const Floats pages = mul(add(even, odd), all(t.gains[h * t.blocks + b]));
      t.totals[h] += sum(pages);
      store(t.pages + h * kLanes, mul(pages, scales));
    }
    const auto* rows = reinterpret_cast<const int8_t*>(means);
    int64_t h = 0;
    for (; h + 3 <= t.heads; h += 3) add_means<3>(t, h, rows);
    for (; h < t.heads; ++h) add_means<1>(t, h, rows);
  }
}

void mean(const Rows& rows, int64_t count, int64_t head_dim, int64_t page, uint8_t* means) {
  float values[kPageTokens * kMostChannels];
  const Floats share = all(1.0f / static_cast<float>(count));
  widen_rows(rows, count, head_dim, values);
  for (int64_t i = 0; i < head_dim; i += kLanes) {
    Floats total = zeros();
    for (int64_t j = 0; j < count; ++j) total = add(total, load(values + j * head_dim + i));
    store(values + i, mul(total, share));
  }
  const uint16_t scale = round_row(values, head_dim, 8, means + page * head_dim);
  std::memcpy(means + kLanes * head_dim + page * sizeof scale, &scale, sizeof scale);
}

inline Floats widen(const uint16_t* p) { return load_half(p); }

template <int Heads, class Row>
void gather_heads(const Row* rows, const int32_t* at, int64_t count, const float* weights, int64_t stride,
                  int64_t head_dim, float* out) {
  for (int64_t c = 0; c < head_dim; c += kLanes) {
    Floats acc[Heads];
    for (int h = 0; h < Heads; ++h) acc[h] = load(out + h * head_dim + c);
    for (int64_t i = 0; i < count; ++i) {
      if (c == 0 && i + 8 < count) prefetch(rows + at[i + 8] * head_dim);
      const Floats row = widen(rows + at[i] * head_dim + c);
      for (int h = 0; h < Heads; ++h) acc[h] = fma(all(weights[h * stride + i]), row, acc[h]);
    }
    for (int h = 0; h < Heads; ++h) store(out + h * head_dim + c, acc[h]);
  }
}

// Rows of whole numbers, 64 at a time: their scales go into the weights.
template <int Heads>
void gather_whole(const Rows& rows, const int32_t* at, int64_t count, const float* weights, int64_t stride,
                  int64_t head_dim, float* out) {
  constexpr int64_t kMost = 64;
  for (int64_t first = 0; first < count; first += kMost, at += kMost, weights += kMost) {
    const int64_t some = count - first < kMost ? count - first : kMost;
    uint16_t scales[kMost] = {};
    float scaled[Heads * kMost] = {};
    for (int64_t i = 0; i < some; ++i) scales[i] = rows.scales[at[i]];
    for (int h = 0; h < Heads; ++h) std::memcpy(scaled + h * kMost, weights + h * stride, static_cast<size_t>(some) * sizeof(float));
    for (int64_t i = 0; i < Heads * kMost; i += kLanes) store(scaled + i, mul(load(scaled + i), load_half(scales + i % kMost)));
    gather_heads<Heads>(static_cast<const int8_t*>(rows.data), at, some, scaled, kMost, head_dim, out);
  }
}

template <int Heads>
void gather_some(const Rows& rows, const int32_t* at, int64_t count, const float* weights, int64_t stride, int64_t head_dim,
                 float* out) {
  if (rows.scales) return gather_whole<Heads>(rows, at, count, weights, stride, head_dim, out);
  gather_heads<Heads>(static_cast<const uint16_t*>(rows.data), at, count, weights, stride, head_dim, out);
}

void gather(const Rows& rows, const int32_t* at, int64_t count, int64_t heads, const float* weights, int64_t stride,
            int64_t head_dim, float* out) {
  int64_t h = 0;
  for (; h + 3 <= heads; h += 3) gather_some<3>(rows, at, count, weights + h * stride, stride, head_dim, out + h * head_dim);
  for (; h < heads; ++h) gather_some<1>(rows, at, count, weights + h * stride, stride, head_dim, out + h * head_dim);
}

}  // namespace
}  // namespace edgekit
