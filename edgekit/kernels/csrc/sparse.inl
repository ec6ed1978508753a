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
    Floats sums[4] = {zeros(), zeros(), zeros(), zeros()};  // `rows` is a multiple of 16
    for (int64_t i = 0; i < rows; i += 4) {
      for (int k = 0; k < 4; ++k) sums[k] = fma(all(x[i + k]), load(matrix + (i + k) * columns + c), sums[k]);
    }
    store(out + c, add(add(sums[0], sums[1]), add(sums[2], sums[3])));
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

// Estimates are whole numbers of 256ths of a power of two, and not beyond what an integer holds.
constexpr float kGrains = 256.0f;
constexpr float kMostGrains = 1e9f;

// The query as integers: estimates are factor * (sum of code * integer) + constant.
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
  const float most = kMostGrains / static_cast<float>(127 * 15 * coder.channels), unbound = peak / 127.0f * scale * kLog2E * kGrains;
  *factor = unbound < most ? unbound : most;
  const float middle = shift * scale * kLog2E * kGrains - 0.5f * static_cast<float>(zero) * *factor;
  *constant = !(middle > -kMostGrains) ? -kMostGrains : middle < kMostGrains ? middle : kMostGrains;
}

// Where position p of the sequence stands among the weights.
inline int64_t place(int64_t p) {
  return p / kBlockTokens * kBlockTokens + p % kPageTokens * kLanes + p % kBlockTokens / kPageTokens;
}

// One line of codes for each of some tiles, taken apart, meets the queries of some heads.
template <int Heads, int Tiles, class Part>
[[gnu::always_inline]] inline void add_runs(Ints (&acc)[Tiles][Heads], const int8_t* q, int64_t stride, const Part& part) {
  Bytes codes[Tiles][4];
#pragma GCC unroll 2
  for (int j = 0; j < Tiles; ++j) part(j, codes[j]);
#pragma GCC unroll 3
  for (int h = 0; h < Heads; ++h) {
#pragma GCC unroll 2
    for (int j = 0; j < Tiles; ++j) acc[j][h] = dot<4, 4>(acc[j][h], codes[j], q + h * stride);
  }
}

// What the bits of a float say, (1 + f) * 2^n, is within 4 % of 2^(n + f) this much higher, and right on average; what is weighed
// so is an estimate that is off by more.
constexpr int32_t kGrainsHigher = 15;

// The weights 2^(estimate - reference) of block b, 2^-126 at least, for `Heads` query heads from `head`; their sums, and the
// largest estimate, in each lane. References are whole powers, which change nothing but these. Runs: head_dim / 64, or 0 where
// it is not known here.
template <int Heads, int Runs>
void weigh_block(const SparseTask& t, int64_t head, int64_t b, const float* references, Floats* pages, Ints* highest) {
  constexpr int kTiles = kAtOnce >= 8 ? 2 : 1;  // as many as the registers hold
  constexpr int32_t kPower = static_cast<int32_t>(kGrains);
  Ints high[Heads], base[Heads];
  Floats total[Heads];
  for (int h = 0; h < Heads; ++h) {
    high[h] = all(INT32_MIN);
    total[h] = zeros();
    base[h] = all((static_cast<int32_t>(references[h]) - 127) * kPower + kGrainsHigher);
  }
  const int64_t bytes = Runs > 0 ? Runs * 256 : 4 * t.head_dim;
  const int64_t fine = Runs > 0 ? Runs * 16 : t.fine, stride = Runs > 0 ? Runs * 48 : t.channels;
  const uint8_t* tile = t.codes + b * kPageTokens * bytes;
  for (int64_t j = 0; j < kPageTokens; j += kTiles, tile += kTiles * bytes) {
    for (int64_t ahead = 0; ahead < kTiles * bytes; ahead += 64) prefetch(tile + kAhead + ahead);
    Ints acc[kTiles][Heads];
    for (int i = 0; i < kTiles; ++i) {
      for (int h = 0; h < Heads; ++h) acc[i][h] = all(int32_t{0});
    }
    const uint8_t* line = tile;
    const int8_t *q = t.q_codes + head * stride, *fine_end = q + fine, *end = q + stride;
#pragma GCC unroll 2
    for (; q < fine_end; q += 16, line += 128) {
      add_runs<Heads, kTiles>(acc, q, stride, [&](int i, Bytes (&codes)[4]) {
        const Bytes low = load_bytes(line + i * bytes), high = load_bytes(line + i * bytes + 64);
        codes[0] = field<0, 15>(low), codes[1] = field<4, 15>(low), codes[2] = field<0, 15>(high), codes[3] = field<4, 15>(high);
      });
    }
#pragma GCC unroll 2
    for (; q < end; q += 16, line += 64) {
      add_runs<Heads, kTiles>(acc, q, stride, [&](int i, Bytes (&codes)[4]) {
        const Bytes all4 = load_bytes(line + i * bytes);
        codes[0] = quarter<0>(all4), codes[1] = quarter<1>(all4), codes[2] = quarter<2>(all4), codes[3] = quarter<3>(all4);
      });
    }
    for (int h = 0; h < Heads; ++h) {
      float* to = t.weights + (head + h) * t.stride + (b * kPageTokens + j) * kLanes;
      for (int i = 0; i < kTiles; ++i) {
        const Ints estimate = nearest(fma(to_float(acc[i][h]), all(t.factors[head + h]), all(t.constants[head + h])));
        high[h] = max(high[h], estimate);
        const Floats weight = power_bits(max(sub(estimate, base[h]), all(kPower)));
        store(to + i * kLanes, weight);
        total[h] = add(total[h], weight);
      }
    }
  }
  for (int h = 0; h < Heads; ++h) highest[h] = high[h], pages[h] = total[h];
}

// What is attended exactly anyway, and what lies ahead, is no candidate: its weights are none.
[[gnu::noinline]] void hide(const SparseTask& t, int64_t b, float* row) {
  const int64_t from = b * kBlockTokens, to = from + kBlockTokens;
  for (int64_t p = from; p < t.sinks && p < to; ++p) row[place(p)] = 0.0f;
  for (int64_t p = t.recent > from ? t.recent : from; p < to; ++p) row[place(p)] = 0.0f;
}

Floats sum_of_pages(const float* block) {
  Floats pages = load(block);
  for (int64_t i = 1; i < kPageTokens; ++i) pages = add(pages, load(block + i * kLanes));
  return pages;
}

// Blocks of some heads. A block's reference is the largest estimate of the block before it, so that weights are at hand as
// soon as estimates are; or its own, where these lie far apart.
template <int Heads, int Runs>
void estimate_heads(const SparseTask& t, int64_t head) {
  constexpr float kFar = 32.0f;  // weights are 2^kFar at most, then
  float references[Heads] = {};
  for (int64_t b = t.first_block; b < t.last_block; ++b) {
    Floats pages[Heads];
    Ints highest[Heads];
    weigh_block<Heads, Runs>(t, head, b, references, pages, highest);
    float next[Heads];
    bool near = true;
    for (int h = 0; h < Heads; ++h) {
      next[h] = nearbyintf(largest(to_float(highest[h])) / kGrains);
      near &= fabsf(next[h] - references[h]) <= kFar;
    }
    if (!near) {
      std::memcpy(references, next, sizeof next);
      weigh_block<Heads, Runs>(t, head, b, references, pages, highest);
    }
    const bool hides = b * kBlockTokens < t.sinks || (b + 1) * kBlockTokens > t.recent;
    for (int h = 0; h < Heads; ++h) {
      const int64_t at = (head + h) * t.blocks + b;
      if (hides) {
        float* row = t.weights + (head + h) * t.stride;
        hide(t, b, row);
        pages[h] = sum_of_pages(row + b * kBlockTokens);
      }
      store(t.page_weights + at * kLanes, pages[h]);
      t.references[at] = references[h];
      t.sums[at] = sum(pages[h]);
    }
    std::memcpy(references, next, sizeof next);
  }
}

void estimate(const SparseTask& t) {
  int64_t h = 0;
  for (; h + 3 <= t.heads; h += 3) {
    if (t.head_dim == 64) {
      estimate_heads<3, 1>(t, h);
    } else {
      estimate_heads<3, 0>(t, h);
    }
  }
  for (; h < t.heads; ++h) estimate_heads<1, 0>(t, h);
}

// How many of `count` numbers, a multiple of 16, are at least `limit`.
int64_t above(const float* x, int64_t count, float limit) {
  const Floats least = all(limit);
  int64_t found = 0;
  for (int64_t i = 0; i < count; i += kLanes) found += __builtin_popcount(at_most(least, load(x + i)));
  return found;
}

// How many are above it.
int64_t beyond(const float* x, int64_t count, float limit) {
  const Floats most = all(limit);
  int64_t found = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats v = load(x + i);
    found += __builtin_popcount(at_most(most, v) & ~at_most(v, most));
  }
  return found;
}

// The lanes above a limit, and the first `equal` of those at it, of which so many fewer are left.
inline unsigned reaching(Floats x, float limit, int64_t* equal) {
  const unsigned reached = at_most(all(limit), x), above = reached & ~at_most(x, all(limit));
  unsigned level = reached & ~above;
  int64_t extra = __builtin_popcount(level) - *equal;
  *equal -= __builtin_popcount(level);
  if (extra > 0) {
    *equal = 0;
    for (; extra > 0; --extra) level &= ~(1u << (31 - __builtin_clz(level)));
  }
  return above | level;
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

// gains[b] = factor * 2^(references[b] - most), and the sum of the blocks' sums times these. Only a power of two differs, so
// that equal estimates keep equal shares.
float find_gains(const float* references, const float* sums, int64_t blocks, float most, float factor, float* gains) {
  Floats whole = zeros();
  for (int64_t b = 0; b < blocks; b += kLanes) {
    const auto count = static_cast<size_t>(kLanes < blocks - b ? kLanes : blocks - b) * sizeof(float);
    float reference[kLanes] = {}, sum_of[kLanes] = {};
    std::memcpy(reference, references + b, count);
    std::memcpy(sum_of, sums + b, count);
    const Floats gain = scale_by_power(all(factor), max(sub(load(reference), all(most)), all(-125.0f)));
    whole = fma(gain, load(sum_of), whole);
    store(reference, gain);
    std::memcpy(gains + b, reference, count);
  }
  return sum(whole);
}

// The largest share that sixteen positions have in any head.
inline Floats largest_share(const SparseTask& t, int64_t b, int64_t at) {
  Floats share = mul(load(t.weights + at), all(t.gains[b]));
  for (int64_t h = 1; h < t.heads; ++h) share = max(mul(load(t.weights + h * t.stride + at), all(t.gains[h * t.blocks + b])), share);
  return share;
}

// Positions whose share reaches a limit, in the order of their places; returns their number.
int64_t find_near(const SparseTask& t, const SparseChoice& c, float limit) {
  int64_t near = 0;
  for (int64_t b = 0; b < t.blocks; ++b) {
    for (int64_t at = b * kBlockTokens; at < (b + 1) * kBlockTokens; at += kLanes) {
      const Floats share = largest_share(t, b, at);
      const unsigned lanes = at_most(all(limit), share);
      if (lanes == 0) continue;
      pick(lanes, share, c.shares + near);
      pick_places(lanes, static_cast<int32_t>(at), c.places + near);
      near += __builtin_popcount(lanes);
    }
  }
  return near;
}

// Choose what is attended exactly, the `exact_count` candidates with the largest share in any head, and the
// `following_count` that come next: their places in ascending order. Of equal ones the first places are taken.
void select(const SparseTask& t, const SparseChoice& c) {
  const int64_t count = t.blocks * kBlockTokens, both = c.exact_count + c.following_count;
  *c.exact_found = *c.following_found = 0;
  if (both == 0) return;
  // A limit that some more than are wanted will reach, from every position or one of 4 or 16 in each page.
  const int64_t step = count / 16 >= 4 * both ? 16 : count / 4 >= 4 * both ? 4 : 1;
  int64_t sampled = 0;
  for (int64_t b = 0; b < t.blocks; ++b) {
    for (int64_t j = 0; j < kPageTokens; j += step, sampled += kLanes) {
      store(c.shares + sampled, largest_share(t, b, (b * kPageTokens + j) * kLanes));
    }
  }
  const int64_t wanted = step == 1 ? both : both / step + 4 * static_cast<int64_t>(sqrtf(static_cast<float>(both / step))) + 4;
  float limit = limit_of(c.shares, sampled, wanted, wanted + wanted / 4);
  int64_t near = find_near(t, c, limit);
  while (near < both && limit > kSmallest) {  // the sample was not like the rest
    limit = limit > 16 * kSmallest ? limit / 16 : kSmallest;
    near = find_near(t, c, limit);
  }
  int64_t padded = near;
  for (; padded % kLanes != 0; ++padded) c.shares[padded] = 0.0f;
  const float last = limit_of(c.shares, padded, both, both);
  const float first = c.exact_count > 0 ? limit_of(c.shares, padded, c.exact_count, c.exact_count) : INFINITY;
  int64_t exact = 0, following = 0;
  int64_t equal_first = c.exact_count - beyond(c.shares, padded, first);  // how many of those at the limits are taken
  int64_t equal_last = both - beyond(c.shares, padded, last);
  for (int64_t i = 0; i < near; i += kLanes) {
    const Floats share = load(c.shares + i);
    const unsigned taken = reaching(share, last, &equal_last), chosen = reaching(share, first, &equal_first) & taken;
    const unsigned others = taken & ~chosen;
    pick(chosen, c.places + i, c.exact + exact);
    pick(others, c.places + i, c.following + following);
    exact += __builtin_popcount(chosen);
    following += __builtin_popcount(others);
  }
  *c.exact_found = exact;
  *c.following_found = following;
}

// The shares that are left in the blocks, in all, and times the pages' mean values: a block's shares are whole numbers
// there, of which the largest is 127.
template <int Heads>
void weigh_heads(const SparseTask& t, int64_t head) {
  const int64_t d = t.head_dim;
  Floats totals[Heads];
  for (int h = 0; h < Heads; ++h) totals[h] = zeros();
  for (int64_t b = t.first_block; b < t.last_block; ++b) {
    const uint8_t* means = t.means + b * mean_bytes(d);
    for (int64_t ahead = 0; ahead < kLanes * d; ahead += 64) prefetch(means + 4 * mean_bytes(d) + ahead);
    uint16_t halves[kLanes];
    std::memcpy(halves, means + kLanes * d, sizeof halves);
    const Floats scales = load_half(halves);
    int8_t whole[Heads][kLanes];
    int32_t sums[Heads];
    float units[Heads];
    for (int h = 0; h < Heads; ++h) {
      const int64_t at = (head + h) * t.blocks + b;
      const Floats pages = mul(load(t.page_weights + at * kLanes), all(t.gains[at])), scaled = mul(pages, scales);
      totals[h] = add(totals[h], pages);
      const float peak = largest(scaled);
      // What is not a number becomes one: the totals say that it was none.
      const Floats numbers = min(round(mul(scaled, all(peak > 0.0f ? 127.0f / peak : 0.0f))), all(127.0f));
      units[h] = peak > 0.0f ? peak / 127.0f : 0.0f;
      store_codes(whole[h], numbers);
      sums[h] = kWideZero == 0 ? 0 : -kWideZero * static_cast<int32_t>(sum(numbers));
    }
    for (int64_t c = 0; c < d; c += kLanes, means += 4 * 64) {
      Bytes codes[4];
      for (int k = 0; k < 4; ++k) codes[k] = signed_wide(load_bytes(means + 64 * k));
      for (int h = 0; h < Heads; ++h) {
        float* out = t.out + (head + h) * d + c;
        store(out, fma(to_float(dot<8, 4>(all(sums[h]), codes, whole[h])), all(units[h]), load(out)));
      }
    }
  }
  for (int h = 0; h < Heads; ++h) t.totals[head + h] = sum(totals[h]);
}

void weigh(const SparseTask& t) {
  std::memset(t.out, 0, sizeof(float) * static_cast<size_t>(t.heads * t.head_dim));
  int64_t h = 0;
  for (; h + 3 <= t.heads; h += 3) weigh_heads<3>(t, h);
  for (; h < t.heads; ++h) weigh_heads<1>(t, h);
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
  uint8_t codes[kMostChannels];
  const uint16_t scale = round_row(values, head_dim, 8, codes);
  for (int64_t i = 0; i < head_dim; ++i) means[(i / kLanes * 4 + page / 4) * 64 + i % kLanes * 4 + page % 4] = codes[i];
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
