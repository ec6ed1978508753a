// Block-sparse attention of many tokens: which blocks of 64 keys a tile of 64 tokens attends to, from the keys' codes.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include "path.h"
#include "select.h"
#include "work.h"

namespace edgekit {
namespace {

constexpr int64_t kNearTokens = 256;  // keys before a tile that it attends to in any case
constexpr int64_t kAskEvery = 8;      // of a tile's tokens, the ones whose queries are asked

// The largest share of its past that a key block has for any query head of one token: `shares` grow to it.
inline void block_shares(const SparseTask& t, int64_t blocks, float* shares) {
  for (int64_t h = 0; h < t.heads; ++h) {
    const float *references = t.references + h * t.blocks, *sums = t.sums + h * t.blocks;
    const float top = *std::max_element(references, references + t.blocks);
    float whole = 0.0f;
    for (int64_t b = 0; b < t.blocks; ++b) whole += sums[b] * std::exp2(references[b] - top);
    constexpr int64_t kParts = kBlockTokens / kKeyBlock, kPages = kKeyBlock / kPageTokens;
    for (int64_t b = 0; b < t.blocks; ++b) {
      const float* pages = t.page_weights + (h * t.blocks + b) * kLanes;
      const float gain = std::exp2(references[b] - top) / whole;
      for (int64_t part = 0; part < kParts && b * kParts + part < blocks; ++part) {
        float share = 0.0f;
        for (int64_t page = part * kPages; page < (part + 1) * kPages; ++page) share += pages[page];
        float& most = shares[b * kParts + part];
        most = std::max(most, share * gain);
      }
    }
  }
}

// Writes the blocks that tokens first..first + tokens - 1 attend to, in ascending order, and returns their number, or 0
// where that is all: the first block, the near ones, and of the others the `wanted` with the largest shares. q: queries of
// the group's heads of each token, `stride` floats apart.
inline int64_t choose_blocks(const SparseShape& s, const float* q, int64_t stride, int64_t tokens, int64_t first, int64_t head,
                             const Summary& summary, int64_t wanted, int32_t* chosen) {
  const int64_t near = std::max<int64_t>(1, (first - kNearTokens) / kKeyBlock), end = first + tokens;
  if (near - 1 <= wanted) return 0;
  SparseTask t{};
  t.codes = summary.codes + head * summary.code_bytes;
  t.heads = s.group;
  t.head_dim = s.head_dim;
  t.channels = s.channels;
  t.fine = s.fine;
  t.blocks = t.last_block = (near * kKeyBlock + kBlockTokens - 1) / kBlockTokens;
  t.sinks = kKeyBlock;
  t.recent = near * kKeyBlock;
  t.stride = t.blocks * kBlockTokens;
  const auto heads = static_cast<size_t>(t.heads);
  int8_t* codes = scratch<int8_t, Use::kCodes>(heads * t.channels);
  float* factors = scratch<float, Use::kScales>(2 * heads);
  float* blockwise = scratch<float, Use::kSums>((2 + kLanes) * heads * t.blocks + near);
  float* shares = blockwise + (2 + kLanes) * heads * t.blocks;
  t.q_codes = codes;
  t.factors = factors;
  t.constants = factors + heads;
  t.references = blockwise;
  t.sums = blockwise + heads * t.blocks;
  t.page_weights = blockwise + 2 * heads * t.blocks;
  t.logs = scratch<uint16_t, Use::kDistances>(heads * t.stride);
  std::fill(shares, shares + near, 0.0f);
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
  for (int64_t token = std::min(kAskEvery, tokens) - 1; token < tokens; token += kAskEvery) {
    for (int64_t h = 0; h < t.heads; ++h) {
      float spread[Selection::kWidest];
      path().encode_query(s.coder(head), q + token * stride + h * s.head_dim, scale, spread, codes + h * t.channels,
                          factors + h, factors + heads + h);
    }
    path().estimate(t);
    block_shares(t, near, shares);
  }
  chosen[0] = 0;
  int32_t* others = chosen + 1;
  for (int64_t b = 1; b < near; ++b) others[b - 1] = static_cast<int32_t>(b);
  const auto larger = [&](int32_t a, int32_t b) { return shares[a] > shares[b] || (shares[a] == shares[b] && a < b); };
  if (wanted > 0) std::nth_element(others, others + wanted - 1, others + near - 1, larger);
  std::sort(others, others + wanted);
  int64_t count = 1 + wanted;
  for (int64_t b = near; b * kKeyBlock < end; ++b) chosen[count++] = static_cast<int32_t>(b);
  return count;
}

}  // namespace
}  // namespace edgekit
