// Adamas as published (arXiv 2510.18413): keys and queries are Hadamard-transformed and coded with 2 bits a channel; the
// distance of codes is L1, which the paper's fast kernel is not: it takes 3 for codes 1 and 2.
//
// A position's codes are two planes of head_dim bits, the high bits first. Of three bits [code >= 1], [code >= 2] and
// [code >= 3], the distance counts those that differ: high or low, high, high and low.

namespace edgekit {
namespace {

// The planes of x, which is changed; head_dim is a power of two.
void planes(float* x, int64_t head_dim, float threshold, uint8_t* out) {
  hadamard(x, 1, head_dim);
  const int64_t bytes = head_dim / 8;
  std::memset(out, 0, static_cast<size_t>(2 * bytes));
  for (int64_t i = 0; i < head_dim; ++i) {
    const unsigned high = x[i] > 0.0f, low = high ? x[i] > threshold : x[i] > -threshold;
    out[i / 8] = static_cast<uint8_t>(out[i / 8] | high << (i % 8));
    out[bytes + i / 8] = static_cast<uint8_t>(out[bytes + i / 8] | low << (i % 8));
  }
}

inline uint64_t some_bits(const uint8_t* p, int64_t bytes) {
  uint64_t word = 0;
  std::memcpy(&word, p, static_cast<size_t>(bytes < 8 ? bytes : 8));
  return word;
}

// Where position p stands in the order of tiles.
inline int64_t place(int64_t p) {
  return p / kBlockTokens * kBlockTokens + p % kPageTokens * kLanes + p % kBlockTokens / kPageTokens;
}

// Logarithms of the task's blocks that fall as distances grow, to 1, and none for what is no candidate.
void distances(const SparseTask& t) {
  const int64_t bytes = t.head_dim / 8, most = 3 * t.head_dim + 1;
  for (int64_t h = 0; h < t.heads; ++h) {
    const auto* query = reinterpret_cast<const uint8_t*>(t.q_codes) + h * 2 * bytes;
    uint16_t* row = t.logs + h * t.stride;
    for (int64_t b = t.first_block; b < t.last_block; ++b) {
      for (int64_t p = b * kBlockTokens; p < (b + 1) * kBlockTokens; ++p) {
        const uint8_t* key = t.codes + p * 2 * bytes;
        int distance = 0;
        for (int64_t w = 0; w < bytes; w += 8) {
          const uint64_t high = some_bits(query + w, bytes - w), low = some_bits(query + bytes + w, bytes - w);
          const uint64_t key_high = some_bits(key + w, bytes - w), key_low = some_bits(key + bytes + w, bytes - w);
          distance += __builtin_popcountll((high | low) ^ (key_high | key_low)) + __builtin_popcountll(high ^ key_high) +
                      __builtin_popcountll((high & low) ^ (key_high & key_low));
        }
        row[stored(place(p))] = static_cast<uint16_t>(most - distance);
      }
      hide(t, b, row);
    }
  }
}

}  // namespace
}  // namespace edgekit
