// Hadamard sparse attention of one token: estimate all positions from 2-bit codes of the keys.
//
// The cache of a key-value head is cut into blocks of 256 positions, and a block into 16 pages of 16 positions. The codes
// of a block stand in 16 tiles: tile j holds position j of every page, so that lanes are pages, and what belongs to a
// page (its largest estimate, its weight) is found without crossing lanes. A tile is `width` / 16 runs of 64 bytes; in
// run r, byte 4 * lane + k holds channels 16r + k, 16r + 4 + k, 16r + 8 + k and 16r + 12 + k, two bits each, the low
// bits first: one load serves sixteen channels of sixteen positions. See docs/sparse-attention.md.

namespace edgekit {
namespace {

// x in place times the normalised Hadamard matrix of `width`, a power of two.
void hadamard(float* x, int64_t width) {
  for (int64_t half = 1; half < width; half *= 2) {
    for (int64_t from = 0; from < width; from += 2 * half) {
      for (int64_t i = from; i < from + half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
    }
  }
  const float norm = 1.0f / sqrtf(static_cast<float>(width));
  for (int64_t i = 0; i < width; ++i) x[i] *= norm;
}

// Codes of one key at `position` of a head's codes: clamp(floor(h / step) + 2, 0, 3) of h = hadamard(key - center).
void encode(const float* key, const float* center, float step, int64_t head_dim, int64_t width, int64_t position,
            float* spread, uint8_t* codes) {
  for (int64_t i = 0; i < width; ++i) spread[i] = i < head_dim ? key[i] - read(center + i) : 0.0f;
  hadamard(spread, width);
  uint8_t* tile = codes + (position / kBlockTokens * kPageTokens + position % kPageTokens) * 4 * width;
  const int64_t lane = position % kBlockTokens / kPageTokens;
  for (int64_t r = 0; r < width / 16; ++r) {
    for (int64_t k = 0; k < 4; ++k) {
      unsigned byte = 0;
      for (int64_t p = 0; p < 4; ++p) {
        const float level = floorf(spread[16 * r + 4 * p + k] / step) + 2.0f;
        const unsigned code = !(level > 0.0f) ? 0u : level >= 3.0f ? 3u : static_cast<unsigned>(level);
        byte |= code << (2 * p);
      }
      tile[64 * r + 4 * lane + k] = static_cast<uint8_t>(byte);
    }
  }
}

// The mean squared error of the code of a normal variable, in steps of its deviation.
constexpr float kCodeError = 0.1188f;

// The query as integers: estimates are factor * (sum of code * integer) + constant. An estimate that is off by a normal
// error of variance v has e^(v / 2) too small a weight on average, which the constant makes up for.
void encode_query(const float* q, const float* center, float step, float scale, int64_t head_dim, int64_t width,
                  float* spread, int8_t* codes, float* factor, float* constant) {
  float shift = 0.0f, peak = 0.0f, squares = 0.0f;
  for (int64_t i = 0; i < width; ++i) spread[i] = i < head_dim ? q[i] : 0.0f;
  for (int64_t i = 0; i < head_dim; ++i) shift += q[i] * read(center + i);
  hadamard(spread, width);
  for (int64_t i = 0; i < width; ++i) {
    peak = fabsf(spread[i]) > peak ? fabsf(spread[i]) : peak;
    squares += spread[i] * spread[i];
  }
  const float unit = peak > 0.0f ? 127.0f / peak : 0.0f;
  int32_t total = 0;
  for (int64_t i = 0; i < width; ++i) {
    const float whole = nearbyintf(spread[i] * unit);
    codes[i] = static_cast<int8_t>(whole > 127.0f ? 127.0f : whole >= -127.0f ? whole : -127.0f);
    total += codes[i];
  }
  *factor = peak / 127.0f * step * scale;
  const float variance = kCodeError * squares * step * scale * step * scale;
  *constant = shift * scale - 1.5f * static_cast<float>(total) * *factor + 0.5f * variance;
}

// Estimates of the blocks first..last, for `Heads` query heads from `head`.
template <int Heads>
void estimate_heads(const SparseTask& t, int64_t head, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) {
    for (int64_t j = 0; j < kPageTokens; ++j) {
      const uint8_t* tile = t.codes + (b * kPageTokens + j) * 4 * t.width;
      prefetch(tile + 8 * t.width);
      prefetch(tile + 8 * t.width + 64);
      Ints acc[Heads];
      for (int h = 0; h < Heads; ++h) acc[h] = all(int32_t{0});
      for (int64_t c = 0; c < t.width; c += 32) {
        const Bytes low = load_bytes(tile + 4 * c), high = load_bytes(tile + 4 * c + 64);
        const Bytes codes[8] = {quarter<0>(low),  quarter<1>(low),  quarter<2>(low),  quarter<3>(low),
                                quarter<0>(high), quarter<1>(high), quarter<2>(high), quarter<3>(high)};
        for (int h = 0; h < Heads; ++h) acc[h] = dot<4>(acc[h], codes, t.q_codes + (head + h) * t.width + c);
      }
      for (int h = 0; h < Heads; ++h) {
        const Floats estimate = fma(to_float(acc[h]), all(t.factors[head + h]), all(t.constants[head + h]));
        store(t.estimates + (head + h) * t.stride + (b * kPageTokens + j) * kLanes, estimate);
      }
    }
  }
}

// Where position p of the sequence stands among the estimates.
inline int64_t place(int64_t p) {
  return p / kBlockTokens * kBlockTokens + p % kPageTokens * kLanes + p % kBlockTokens / kPageTokens;
}

void estimate(const SparseTask& t) {
  int64_t h = 0;
  for (; h + 3 <= t.heads; h += 3) estimate_heads<3>(t, h, t.first_block, t.last_block);
  for (; h < t.heads; ++h) estimate_heads<1>(t, h, t.first_block, t.last_block);
  for (h = 0; h < t.heads; ++h) {
    float* row = t.estimates + h * t.stride;
    // What is attended exactly anyway, and what lies ahead, is no candidate.
    const int64_t from = t.first_block * kBlockTokens, to = t.last_block * kBlockTokens;
    for (int64_t p = from; p < t.sinks && p < to; ++p) row[place(p)] = kHidden;
    for (int64_t p = t.recent > from ? t.recent : from; p < to; ++p) row[place(p)] = kHidden;
    Floats top = all(kHidden);
    for (int64_t i = from; i < to; i += kLanes) top = max(load(row + i), top);
    t.peaks[h] = largest(top);
  }
}

// e^x within 1 % for x <= 0, 0 in effect below -87: a parabola for 2^f where `exponential` has a polynomial of degree six. What
// is weighed so is an estimate that is off by more.
inline Floats rough_exponential(Floats x) {
  const Floats t = mul(max(x, all(-87.0f)), all(1.44269504088896341f)), n = round(t), f = sub(t, n);
  return scale_by_power(fma(fma(all(0.2402265f), f, all(0.6931472f)), f, all(1.0f)), n);
}

constexpr float kFarthest = 1e29f;  // what is hidden lies farther

// How many of `count` distances, a multiple of 16, are at most `limit`.
int64_t within(const float* distance, int64_t count, float limit) {
  const Floats most = all(limit);
  int64_t found = 0;
  for (int64_t i = 0; i < count; i += kLanes) found += __builtin_popcount(at_most(load(distance + i), most));
  return found;
}

// A limit within which at least `least` of the distances lie, or the farthest; and no more than `most` unless equal ones
// forbid it. Positive floats are in the order of their bits, which are halved until few enough lie within.
float enough(const float* distance, int64_t count, int64_t least, int64_t most) {
  const auto bits = [](float x) {
    int32_t i;
    std::memcpy(&i, &x, sizeof i);
    return i;
  };
  int32_t below = -1, limit = bits(kFarthest);
  float value = kFarthest;
  for (const float guess : {0.5f, 4.0f, 32.0f}) {  // most often it lies between 4 and 32
    if (within(distance, count, guess) >= least) {
      value = guess;
      limit = bits(guess);
      break;
    }
    below = bits(guess);
  }
  while (limit - below > 1) {
    const int32_t middle = below + (limit - below) / 2;
    float guess;
    std::memcpy(&guess, &middle, sizeof guess);
    const int64_t found = within(distance, count, guess);
    if (found < least) {
      below = middle;
      continue;
    }
    limit = middle;
    value = guess;
    if (found <= most) break;
  }
  return value;
}

// Choose what is attended exactly, the `exact_count` candidates nearest to the peak of any head, and the `following_count`
// that come next: their places in ascending order. Of equally near ones the first places are taken. Their estimates are
// hidden; the weights of those that follow are kept.
void select(const SparseTask& t, const SparseChoice& c) {
  const int64_t count = t.last_block * kBlockTokens, both = c.exact_count + c.following_count;
  *c.exact_found = *c.following_found = 0;
  if (both == 0) return;
  for (int64_t i = 0; i < count; i += kLanes) {
    Floats least = sub(all(t.peaks[0]), load(t.estimates + i));
    for (int64_t h = 1; h < t.heads; ++h) least = min(sub(all(t.peaks[h]), load(t.estimates + h * t.stride + i)), least);
    store(c.distance + i, least);
  }
  // First about twice as many as are wanted, in one place; then exactly.
  const float limit = enough(c.distance, count, both, 2 * both);
  int64_t near = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    unsigned lanes = at_most(load(c.distance + i), all(limit));
    for (; lanes != 0; lanes &= lanes - 1) {
      const int64_t at = i + __builtin_ctz(lanes);
      c.places[near] = static_cast<int32_t>(at);
      c.distance[near++] = c.distance[at];
    }
  }
  int64_t padded = near;
  for (; padded % kLanes != 0; ++padded) c.distance[padded] = -kHidden;
  const float last = enough(c.distance, padded, both, both);
  const float first = c.exact_count > 0 ? enough(c.distance, padded, c.exact_count, c.exact_count) : -1.0f;
  int64_t equal_first = c.exact_count, equal_last = both;  // how many of those at the limits are taken
  for (int64_t i = 0; i < near; ++i) {
    equal_first -= c.distance[i] < first;
    equal_last -= c.distance[i] < last;
  }
  int64_t exact = 0, following = 0;
  for (int64_t i = 0; i < near; ++i) {
    const float distance = c.distance[i];
    if (distance > last || (distance == last && equal_last-- <= 0)) continue;
    const bool chosen = distance < first || (distance == first && equal_first-- > 0);
    (chosen ? c.exact[exact++] : c.following[following++]) = c.places[i];
  }
  for (int64_t h = 0; h < t.heads; ++h) {
    float *row = t.estimates + h * t.stride, *weights = c.weights + h * c.weights_stride;
    for (int64_t i = 0; i < exact; ++i) row[c.exact[i]] = kHidden;
    for (int64_t i = 0; i < following; ++i) {
      weights[i] = row[c.following[i]];
      row[c.following[i]] = kHidden;
    }
    for (int64_t i = 0; i < following; i += kLanes) {
      store(weights + i, rough_exponential(sub(load(weights + i), all(t.peaks[h]))));
    }
  }
  *c.exact_found = exact;
  *c.following_found = following;
}

// The heads' tails: means of a block's pages times their weights.
template <int Heads>
void add_means(const SparseTask& t, int64_t head, const uint16_t* means) {
  for (int64_t i = 0; i < t.head_dim; i += kLanes) {
    Floats acc[Heads];
    for (int h = 0; h < Heads; ++h) acc[h] = load(t.out + (head + h) * t.head_dim + i);
    for (int64_t l = 0; l < kLanes; ++l) {
      const Floats mean = load_half(means + l * t.head_dim + i);
      for (int h = 0; h < Heads; ++h) acc[h] = fma(all(t.pages[(head + h) * kLanes + l]), mean, acc[h]);
    }
    for (int h = 0; h < Heads; ++h) store(t.out + (head + h) * t.head_dim + i, acc[h]);
  }
}

// The blocks' sums of weights e^(estimate - peak), and of weights times the pages' mean values.
void weigh(const SparseTask& t) {
  const int64_t d = t.head_dim;
  std::memset(t.out, 0, sizeof(float) * t.heads * d);
  for (int64_t h = 0; h < t.heads; ++h) t.sums[h] = 0.0f;
  for (int64_t b = t.first_block; b < t.last_block; ++b) {
    for (int64_t h = 0; h < t.heads; ++h) {
      const float* row = t.estimates + h * t.stride + b * kBlockTokens;
      const Floats peak = all(t.peaks[h]);
      Floats even = zeros(), odd = zeros();
      for (int64_t j = 0; j < kPageTokens; j += 2) {
        even = add(even, rough_exponential(sub(load(row + j * kLanes), peak)));
        odd = add(odd, rough_exponential(sub(load(row + (j + 1) * kLanes), peak)));
      }
      const Floats pages = add(even, odd);
      t.sums[h] += sum(pages);
      store(t.pages + h * kLanes, pages);
    }
    const uint16_t* means = t.means + b * kLanes * d;
    int64_t h = 0;
    for (; h + 3 <= t.heads; h += 3) add_means<3>(t, h, means);
    for (; h < t.heads; ++h) add_means<1>(t, h, means);
  }
}

void mean(const uint16_t* rows, int64_t count, int64_t head_dim, uint16_t* out) {
  const Floats share = all(1.0f / static_cast<float>(count));
  for (int64_t i = 0; i < head_dim; i += kLanes) {
    Floats total = zeros();
    for (int64_t j = 0; j < count; ++j) total = add(total, load_half(rows + j * head_dim + i));
    store_half(out + i, mul(total, share));
  }
}

template <int Heads>
void gather_heads(const uint16_t* rows, const int32_t* at, int64_t count, const float* weights, int64_t stride,
                  int64_t head_dim, float* out) {
  for (int64_t c = 0; c < head_dim; c += kLanes) {
    Floats acc[Heads];
    for (int h = 0; h < Heads; ++h) acc[h] = load(out + h * head_dim + c);
    for (int64_t i = 0; i < count; ++i) {
      if (c == 0 && i + 8 < count) prefetch(rows + at[i + 8] * head_dim);
      const Floats row = load_half(rows + at[i] * head_dim + c);
      for (int h = 0; h < Heads; ++h) acc[h] = fma(all(weights[h * stride + i]), row, acc[h]);
    }
    for (int h = 0; h < Heads; ++h) store(out + h * head_dim + c, acc[h]);
  }
}

void gather(const uint16_t* rows, const int32_t* at, int64_t count, int64_t heads, const float* weights, int64_t stride,
            int64_t head_dim, float* out) {
  int64_t h = 0;
  for (; h + 3 <= heads; h += 3) {
    gather_heads<3>(rows, at, count, weights + h * stride, stride, head_dim, out + h * head_dim);
  }
  for (; h < heads; ++h) gather_heads<1>(rows, at, count, weights + h * stride, stride, head_dim, out + h * head_dim);
}

}  // namespace
}  // namespace edgekit
