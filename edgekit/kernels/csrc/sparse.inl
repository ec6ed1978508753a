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

// The codes of one key, which may be changed; `line` is its first.
void encode_key(const KeyCoder& coder, float* key, uint8_t* line) {
  float spread[kMostChannels];
  for (int64_t i = 0; i < coder.head_dim; ++i) key[i] -= read(coder.center + i);
  project(key, coder.encoder, coder.head_dim, coder.channels, spread);
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

// The codes of up to a page of keys, which stand at `position` and behind it, among a head's codes.
void encode(const KeyCoder& coder, const Rows& keys, int64_t count, int64_t position, uint8_t* codes) {
  float wide[kPageTokens * kMostChannels];
  widen_rows(keys, count, coder.head_dim, wide);
  for (int64_t j = 0; j < count; ++j, ++position) {
    encode_key(coder, wide + j * coder.head_dim,
               codes + (position / kBlockTokens * kPageTokens + position % kPageTokens) * 4 * coder.head_dim +
                   4 * (position % kBlockTokens / kPageTokens));
  }
}

constexpr float kMostGrains = 1e9f;  // so that integers hold estimates and their differences

// The query as integers: estimates are factor * (sum of code * integer) + constant, in grains.
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
  const float grains = scale * kLog2E * static_cast<float>(kGrains), unbound = peak / 127.0f * grains;
  const float most = kMostGrains / static_cast<float>(127 * 15 * coder.channels);
  *factor = unbound < most ? unbound : most;
  const float middle = shift * grains - 0.5f * static_cast<float>(zero) * *factor;
  *constant = !(middle > -kMostGrains) ? -kMostGrains : middle < kMostGrains ? middle : kMostGrains;
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

// Logarithms of the weights 2^(estimate - reference) of block b, 2^-126 at least, for `Heads` query heads from `head`; sums of
// the weights, and the largest estimate, in each lane. References are whole powers, which change nothing but these. Runs:
// head_dim / 64, or 0 where it is not known here.
template <int Heads, int Runs>
void weigh_block(const SparseTask& t, int64_t head, int64_t b, const float* references, Floats* pages, Ints* highest) {
  constexpr int kTiles = kAtOnce >= 8 ? 2 : 1;  // as many as the registers hold
  Ints high[Heads], base[Heads];
  Floats total[Heads];
  for (int h = 0; h < Heads; ++h) {
    high[h] = all(INT32_MIN);
    total[h] = zeros();
    base[h] = all((static_cast<int32_t>(references[h]) - 127) * kGrains + kGrainsHigher);
  }
  const int64_t bytes = Runs > 0 ? Runs * 256 : 4 * t.head_dim;
  const int64_t fine = Runs > 0 ? Runs * 16 : t.fine, stride = Runs > 0 ? Runs * 48 : t.channels;
  const uint8_t* tile = t.codes + b * kPageTokens * bytes;
  for (int64_t j = 0; j < kPageTokens; j += 2) {
    Ints logs[2][Heads];
    for (int from = 0; from < 2; from += kTiles, tile += kTiles * bytes) {
      for (int64_t ahead = 0; ahead < kTiles * bytes; ahead += 64) prefetch(tile + kAhead + ahead);
      Ints acc[kTiles][Heads];
      for (int i = 0; i < kTiles; ++i) {
        for (int h = 0; h < Heads; ++h) acc[i][h] = all(int32_t{0});
      }
      const uint8_t* line = tile;
      const int8_t *q = t.q_codes + head * stride, *fine_end = q + fine, *end = q + stride;
      for (; q < fine_end; q += 16, line += 128) {
        add_runs<Heads, kTiles>(acc, q, stride, [&](int i, Bytes (&codes)[4]) {
          const Bytes low = load_bytes(line + i * bytes), high = load_bytes(line + i * bytes + 64);
          codes[0] = field<0, 15>(low), codes[1] = field<4, 15>(low), codes[2] = field<0, 15>(high), codes[3] = field<4, 15>(high);
        });
      }
      for (; q < end; q += 16, line += 64) {
        add_runs<Heads, kTiles>(acc, q, stride, [&](int i, Bytes (&codes)[4]) {
          const Bytes all4 = load_bytes(line + i * bytes);
          codes[0] = quarter<0>(all4), codes[1] = quarter<1>(all4), codes[2] = quarter<2>(all4), codes[3] = quarter<3>(all4);
        });
      }
      for (int h = 0; h < Heads; ++h) {
        for (int i = 0; i < kTiles; ++i) {
          const Ints estimate = nearest(fma(to_float(acc[i][h]), all(t.factors[head + h]), all(t.constants[head + h])));
          high[h] = max(high[h], estimate);
          logs[from + i][h] = max(sub(estimate, base[h]), all(kGrains));
          total[h] = add(total[h], power_bits(logs[from + i][h]));
        }
      }
    }
    for (int h = 0; h < Heads; ++h) {
      store_halves(t.logs + (head + h) * t.stride + (b * kPageTokens + j) * kLanes, logs[0][h], logs[1][h]);
    }
  }
  for (int h = 0; h < Heads; ++h) highest[h] = high[h], pages[h] = total[h];
}

// What is attended exactly anyway, and what lies ahead, is no candidate and has no weight.
[[gnu::noinline]] void hide(const SparseTask& t, int64_t b, uint16_t* row) {
  const auto lanes_before = [&](int64_t p, int64_t j) {  // whose position j is before p
    const int64_t lanes = (p - b * kBlockTokens - j + kPageTokens - 1) / kPageTokens;
    return p <= b * kBlockTokens + j ? 0 : lanes < kLanes ? lanes : kLanes;
  };
  for (int64_t j = 0; j < kPageTokens; ++j) {
    uint16_t* tile = row + stored(b * kBlockTokens + j * kLanes);
    for (int64_t lane = 0; lane < lanes_before(t.sinks, j); ++lane) tile[2 * lane] = 0;
    for (int64_t lane = lanes_before(t.recent, j); lane < kLanes; ++lane) tile[2 * lane] = 0;
  }
}

Floats sum_of_pages(const uint16_t* block) {
  Floats pages = zeros();
  for (int64_t i = 0; i < kBlockTokens; i += 2 * kLanes) {
    const Ints two = load_halves(block + i);
    pages = add(pages, add(power_bits(low_half(two)), power_bits(high_half(two))));
  }
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
      next[h] = nearbyintf(largest(to_float(highest[h])) / static_cast<float>(kGrains));
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
        uint16_t* row = t.logs + (head + h) * t.stride;
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
  constexpr int kUsual = kAtOnce >= 8 ? 1 : 0;  // unrolled where registers hold it
  int64_t h = 0;
  for (; h + 3 <= t.heads; h += 3) t.head_dim == 64 ? estimate_heads<3, kUsual>(t, h) : estimate_heads<3, 0>(t, h);
  for (; h < t.heads; ++h) estimate_heads<1, 0>(t, h);
}

// How many of `count` numbers, a multiple of 16, are at least `limit`.
int64_t above(const int32_t* x, int64_t count, int32_t limit) {
  const Ints least = all(limit);
  int64_t found = 0;
  for (int64_t i = 0; i < count; i += kLanes) found += __builtin_popcount(at_least(load(x + i), least));
  return found;
}

// The lanes above a limit, and the first `equal` of those at it, of which so many fewer are left.
inline unsigned reaching(Ints x, int32_t limit, int64_t* equal) {
  const unsigned above = at_least(x, all(limit + 1));
  unsigned level = at_least(x, all(limit)) & ~above;
  int64_t extra = __builtin_popcount(level) - *equal;
  *equal -= __builtin_popcount(level);
  if (extra > 0) {
    *equal = 0;
    for (; extra > 0; --extra) level &= ~(1u << (31 - __builtin_clz(level)));
  }
  return above | level;
}

// A limit that at least `least` of the shares reach, or 1, which all do that are any; and no more than `most` unless equal ones
// forbid it.
int32_t limit_of(const int32_t* x, int64_t count, int64_t least, int64_t most) {
  int32_t limit = 1, beyond = 1 << 16;
  while (beyond - limit > 1) {
    const int32_t middle = (limit + beyond) / 2;
    const int64_t found = above(x, count, middle);
    if (found < least) {
      beyond = middle;
      continue;
    }
    limit = middle;
    if (found <= most) break;
  }
  return limit;
}

// work(b, some) for every sixteenth b, with so many numbers to come: sixteen, or what is left.
template <class Work>
void each_lanes(int64_t count, const Work& work) {
  for (int64_t b = 0; b < count; b += kLanes) work(b, static_cast<size_t>(kLanes < count - b ? kLanes : count - b));
}

float add_blocks(const float* references, const float* sums, int64_t blocks, float* most) {
  float top = references[0];
  for (int64_t b = 1; b < blocks; ++b) top = references[b] > top ? references[b] : top;
  *most = top;
  Floats whole = zeros();
  each_lanes(blocks, [&](int64_t b, size_t some) {
    float reference[kLanes] = {}, sum_of[kLanes] = {};
    std::memcpy(reference, references + b, some * sizeof(float));
    std::memcpy(sum_of, sums + b, some * sizeof(float));
    const Floats gain = scale_by_power(all(1.0f), max(sub(load(reference), all(top)), all(-125.0f)));
    whole = fma(gain, load(sum_of), whole);
  });
  return sum(whole);
}

// Only a power of two differs between blocks, so that equal estimates keep equal shares.
void find_gains(const float* references, int64_t blocks, float whole, float* gains, uint16_t* lowered) {
  const float power = nearbyintf(whole), rest = exp2f(power - whole), grains = static_cast<float>(kGrains);
  const float lowest = nearbyintf(whole * grains) + (127 + kLeastShare) * grains;
  each_lanes(blocks, [&](int64_t b, size_t some) {
    float numbers[kLanes] = {};
    std::memcpy(numbers, references + b, some * sizeof(float));
    const Floats reference = load(numbers);
    store(numbers, scale_by_power(all(rest), min(max(sub(reference, all(power)), all(-125.0f)), all(126.0f))));
    std::memcpy(gains + b, numbers, some * sizeof(float));
    int32_t less[kLanes];
    store(less, nearest(min(max(fma(reference, all(-grains), all(lowest)), zeros()), all(65535.0f))));
    for (size_t i = 0; i < some; ++i) lowered[b + static_cast<int64_t>(i)] = static_cast<uint16_t>(less[i]);
  });
}

// The largest share that the positions of two tiles have in any head, from the tile at place `at` on.
inline Ints largest_shares(const SparseTask& t, int64_t b, int64_t at) {
  Ints share = lower_halves(load_halves(t.logs + at), t.lowered[b]);
  for (int64_t h = 1; h < t.heads; ++h) {
    share = max_halves(share, lower_halves(load_halves(t.logs + h * t.stride + at), t.lowered[h * t.blocks + b]));
  }
  return share;
}

// Positions whose share reaches a limit, in the order of their places; returns their number.
int64_t find_near(const SparseTask& t, const SparseChoice& c, int32_t limit) {
  int64_t near = 0;
  for (int64_t b = 0; b < t.blocks; ++b) {
    for (int64_t at = b * kBlockTokens; at < (b + 1) * kBlockTokens; at += 2 * kLanes) {
      const Ints both = largest_shares(t, b, at), low = low_half(both), high = high_half(both);
      const unsigned first = at_least(low, all(limit)), second = at_least(high, all(limit));
      if ((first | second) == 0) continue;
      pick(first, low, c.shares + near);
      pick_places(first, static_cast<int32_t>(at), c.places + near);
      near += __builtin_popcount(first);
      pick(second, high, c.shares + near);
      pick_places(second, static_cast<int32_t>(at + kLanes), c.places + near);
      near += __builtin_popcount(second);
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
    for (int64_t j = 0; j < kPageTokens; j += step > 1 ? step : 2) {
      const Ints two = largest_shares(t, b, (b * kPageTokens + j) * kLanes);
      store(c.shares + sampled, low_half(two));
      sampled += kLanes;
      if (step > 1) continue;
      store(c.shares + sampled, high_half(two));
      sampled += kLanes;
    }
  }
  const int64_t wanted = step == 1 ? both : both / step + 4 * static_cast<int64_t>(sqrtf(static_cast<float>(both / step))) + 4;
  int32_t limit = limit_of(c.shares, sampled, wanted, wanted + wanted / 4);
  int64_t near = find_near(t, c, limit);
  while (near < both && limit > 1) {  // the sample was not like the rest
    limit = limit > 4 * kGrains ? limit - 4 * kGrains : 1;
    near = find_near(t, c, limit);
  }
  int64_t padded = near;
  for (; padded % kLanes != 0; ++padded) c.shares[padded] = 0;
  const int32_t last = limit_of(c.shares, padded, both, both);
  const int32_t first = c.exact_count > 0 ? limit_of(c.shares, padded, c.exact_count, c.exact_count) : INT32_MAX - 1;
  int64_t exact = 0, following = 0;
  int64_t equal_first = c.exact_count - above(c.shares, padded, first + 1);  // how many of those at the limits are taken
  int64_t equal_last = both - above(c.shares, padded, last + 1);
  for (int64_t i = 0; i < near; i += kLanes) {
    const Ints share = load(c.shares + i);
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
    }
    for (int64_t c = 0; c < d; c += kLanes, means += 4 * 64) {
      Bytes codes[4];
      for (int k = 0; k < 4; ++k) codes[k] = load_bytes(means + 64 * k);
      for (int h = 0; h < Heads; ++h) {
        float* out = t.out + (head + h) * d + c;
        store(out, fma(to_float(dot_signed<4>(all(int32_t{0}), codes, whole[h])), all(units[h]), load(out)));
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
