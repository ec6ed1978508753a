// One token over a long cache: what is attended exactly, what counts by its estimate, and how the parts are joined.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "path.h"
#include "work.h"

namespace edgekit {
namespace {

// Keys and values of all heads, [kv_heads][length][head_dim].
struct Cache {
  Rows keys, values;
  int64_t length;
  int64_t head_dim;
  Rows keys_from(int64_t head, int64_t position) const { return keys.from(head * length + position, head_dim); }
  Rows values_from(int64_t head, int64_t position) const { return values.from(head * length + position, head_dim); }
};

// What stands beside keys and values in a sparse cache.
struct Summary {
  uint8_t* codes;  // [kv_heads][code_bytes]
  uint8_t* means;  // [kv_heads][blocks][mean_bytes]
  int64_t code_bytes;
  int64_t blocks;
  int64_t budget;
};

// The attributes and calibrated constants of sparse attention.
struct SparseShape {
  int64_t kv_heads, group, head_dim;
  int64_t sinks, recent, followers;
  int64_t channels, fine;
  bool adamas;    // as published: center holds [kv_heads] thresholds of queries and of keys, and there is no tail
  int64_t heads;  // query heads that share a selection: the group, or one
  const float *center, *encoder, *decoder;
  int64_t units() const { return kv_heads * group / heads; }  // selections
  KeyCoder coder(int64_t head) const {
    const int64_t at = head * head_dim;
    return {center + at, encoder + at * channels, decoder + at * channels, head_dim, channels, fine};
  }
};

// A unit is `heads` query heads of one key-value head, which share what is selected. Blocks are cut into segments, by the
// length alone, so that results do not depend on the number of threads. Memory belongs to the thread that made the
// selection, which waits for the others.
class Selection {
 public:
  Selection(const SparseShape& shape, const float* q, const Cache& cache, int64_t total, const Summary& summary, float* out)
      : s_(shape), q_(q), out_(out), cache_(cache), total_(total), summary_(summary),
        blocks_((total + kBlockTokens - 1) / kBlockTokens),
        segments_(std::clamp<int64_t>(blocks_ / 4, 1, 4)),
        sinks_(std::min(s_.sinks, summary.budget - std::min(s_.recent, summary.budget))),
        recent_(total - std::min(s_.recent, summary.budget)),
        exact_(summary.budget - (total - recent_) - sinks_),
        following_((s_.followers + kLanes - 1) / kLanes * kLanes),
        scale_(1.0f / std::sqrt(static_cast<float>(s_.head_dim))) {
    const auto heads = static_cast<size_t>(s_.kv_heads * s_.group), units = static_cast<size_t>(s_.units());
    codes_ = scratch<int8_t, Use::kCodes>(heads * s_.channels);
    factors_ = scratch<float, Use::kScales>(2 * heads);
    logs_ = scratch<uint16_t, Use::kScores>(heads * stride());
    lowered_ = scratch<uint16_t, Use::kSums>(heads * blocks_);
    blockwise_ = scratch<float, Use::kSums>((3 + kLanes) * heads * blocks_);
    whole_ = scratch<float, Use::kWholes>(heads);
    places_ = scratch<int32_t, Use::kPlaces>(units * (exact_ + following_ + 2 * kLanes));
    kept_ = scratch<float, Use::kTails>(heads * following_);
    found_ = scratch<int64_t, Use::kFound>(2 * units);
    parts_ = scratch<float, Use::kPartials>(units * (2 * segments_ + 2) * part_size());
  }

  // The queries of one key-value head. All must be encoded before anything is estimated.
  void encode(int64_t kv_head) const {
    for (int64_t h = kv_head * s_.group; h < (kv_head + 1) * s_.group; ++h) {
      float spread[kWidest];
      const float* query = q_ + h * s_.head_dim;
      int8_t* codes = codes_ + h * s_.channels;
      if (s_.adamas) {
        std::copy(query, query + s_.head_dim, spread);
        path().planes(spread, s_.head_dim, read(s_.center + 2 * kv_head), reinterpret_cast<uint8_t*>(codes));
      } else {
        path().encode_query(s_.coder(kv_head), query, scale_, spread, codes, factors_ + h, factors_ + s_.kv_heads * s_.group + h);
      }
    }
  }

  int64_t segments() const { return segments_; }
  // From here on positions are attended to in any case, and need no codes.
  int64_t recent() const { return recent_; }

  void estimate(int64_t unit, int64_t segment) const {
    if (segment == 0) {  // who chooses will attend to these
      const Rows keys = keys_from(unit, 0), values = values_from(unit, 0);
      for (int64_t p = recent_; p < total_; ++p) keys.fetch(p, s_.head_dim), values.fetch(p, s_.head_dim);
    }
    if (s_.adamas) return path().distances(task(unit, segment));
    path().estimate(task(unit, segment));
  }

  // The window and the sinks exactly, then each head's whole, and what is selected.
  void choose(int64_t unit) const {
    const SparseTask t = task(unit, 0);
    exactly(unit, keys_from(unit, 0), values_from(unit, 0), sinks_, sink_part(unit));
    exactly(unit, keys_from(unit, recent_), values_from(unit, recent_), total_ - recent_, sink_part(unit) + part_size());
    if (s_.adamas) {
      std::fill(lowered_ + unit * t.heads * blocks_, lowered_ + (unit + 1) * t.heads * blocks_, uint16_t{0});
      std::fill(whole_ + unit * t.heads, whole_ + (unit + 1) * t.heads, kNone);
    } else {
      find_wholes(t, unit);
    }
    SparseChoice c{};
    c.exact_count = exact_;
    c.following_count = s_.followers;
    c.shares = scratch<int32_t, Use::kDistances>(static_cast<size_t>(stride() + kLanes));
    c.places = scratch<int32_t, Use::kNear>(static_cast<size_t>(stride() + kLanes));
    c.exact = exact_places(unit);
    c.following = following_places(unit);
    c.exact_found = found_ + 2 * unit;
    c.following_found = c.exact_found + 1;
    path().select(t, c);
  }

  // What is left of a segment by its shares, and what was chosen there exactly.
  void attend(int64_t unit, int64_t segment) const {
    SparseTask t = task(unit, segment);
    const int64_t d = t.head_dim;
    t.out = tail_part(unit, segment);
    t.totals = t.out + t.heads * d;
    const auto [from, to] = inside(t, exact_places(unit), found_[2 * unit]);
    const auto [first, last] = inside(t, following_places(unit), found_[2 * unit + 1]);
    int32_t* at = scratch<int32_t, Use::kPositions>(static_cast<size_t>(to - from + last - first));
    int32_t* next = at + (to - from);
    float* shares = kept_ + unit * t.heads * following_ + first;
    // Rows that lie anywhere are sent for before anything else is done.
    const Rows keys = keys_from(unit, 0), values = values_from(unit, 0);
    take_out(t, exact_places(unit) + from, to - from, keys, at, nullptr);
    for (int64_t i = 0; i < to - from; ++i) values.fetch(at[i], s_.head_dim);
    take_out(t, following_places(unit) + first, last - first, values, next, shares);
    if (s_.adamas) {
      std::fill(t.out, t.out + part_size(), 0.0f);
    } else {
      path().weigh(t);
    }
    exactly(unit, keys, values, to - from, t.out + part_size(), at);
    if (first == last) return;
    for (int64_t h = 0; h < t.heads; ++h) {
      for (int64_t i = 0; i < last - first; ++i) t.totals[h] += shares[h * following_ + i];
    }
    path().gather(values, next, last - first, t.heads, shares, following_, t.head_dim, t.out);
  }

  // A unit's parts are joined; the tails' maximum is the logarithm of the whole that they are shares of.
  void join(int64_t unit) const {
    const int64_t d = s_.head_dim, parts = 2 * segments_ + 2;
    const auto is_tail = [&](int64_t i) { return i < 2 * segments_ && i % 2 == 0; };
    for (int64_t own = 0; own < s_.heads; ++own) {
      const float *first = tail_part(unit, 0), *maxima = first + s_.heads * d + own;
      float* out = out_ + (unit * s_.heads + own) * d;
      float top = whole_[unit * s_.heads + own], total = 0.0f;
      const float whole = top;
      for (int64_t i = 0; i < parts; ++i) {
        if (!is_tail(i)) top = std::max(top, maxima[i * part_size()]);
      }
      std::fill(out, out + d, 0.0f);
      const float tails = std::exp(whole - top);
      for (int64_t i = 0; i < parts; ++i) {
        const float *part = first + i * part_size(), maximum = part[s_.heads * d + own], sum = part[s_.heads * (d + 1) + own];
        const float factor = is_tail(i) ? tails : std::exp(maximum - top);
        total += factor * (is_tail(i) ? maximum : sum);
        for (int64_t c = 0; c < d; ++c) out[c] += factor * part[own * d + c];
      }
      for (int64_t c = 0; c < d; ++c) out[c] /= total;
    }
  }

  static constexpr int64_t kWidest = 1024;

 private:
  SparseTask task(int64_t unit, int64_t segment) const {
    const int64_t first = unit * s_.heads, heads = s_.kv_heads * s_.group, head = first / s_.group;
    SparseTask t{};
    t.q_codes = codes_ + first * s_.channels;
    t.factors = factors_ + first;
    t.constants = factors_ + heads + first;
    t.codes = summary_.codes + head * summary_.code_bytes;
    t.means = summary_.means + head * summary_.blocks * mean_bytes(s_.head_dim);
    t.heads = s_.heads;
    t.head_dim = s_.head_dim;
    t.channels = s_.channels;
    t.fine = s_.fine;
    t.first_block = blocks_ * segment / segments_;
    t.last_block = blocks_ * (segment + 1) / segments_;
    t.blocks = blocks_;
    t.sinks = sinks_;
    t.recent = recent_;
    t.stride = stride();
    t.logs = logs_ + first * stride();
    t.lowered = lowered_ + first * blocks_;
    t.references = blockwise_ + first * blocks_;
    t.sums = t.references + heads * blocks_;
    t.gains = t.sums + heads * blocks_;
    t.page_weights = blockwise_ + 3 * heads * blocks_ + first * blocks_ * kLanes;
    return t;
  }

  // Each head's whole, and the gains of its blocks.
  void find_wholes(const SparseTask& t, int64_t unit) const {
    const float *sinks = sink_part(unit) + t.heads * t.head_dim, *recent = sinks + part_size();
    for (int64_t h = 0; h < t.heads; ++h) {
      const float* references = t.references + h * blocks_;
      float most;
      const float tail = path().add_blocks(references, t.sums + h * blocks_, blocks_, &most);
      const float top = std::max({read(sinks + h), read(recent + h), most / kLog2E});
      float whole = tail * std::exp(most / kLog2E - top);
      for (const float* part : {sinks, recent}) whole += std::exp(part[h] - top) * part[t.heads + h];
      whole_[unit * t.heads + h] = top + std::log(whole);
      path().find_gains(references, blocks_, whole_[unit * t.heads + h] * kLog2E, const_cast<float*>(t.gains) + h * blocks_,
                        lowered_ + (unit * t.heads + h) * blocks_);
    }
  }

  static constexpr float kNone = -1e30f;  // the logarithm of no weight
  static constexpr float kLog2E = 1.44269504088896341f;

  int64_t stride() const { return blocks_ * kBlockTokens; }

  Rows keys_from(int64_t unit, int64_t position) const { return cache_.keys_from(unit * s_.heads / s_.group, position); }
  Rows values_from(int64_t unit, int64_t position) const { return cache_.values_from(unit * s_.heads / s_.group, position); }

  // Of a part: sums of values, [heads][head_dim], and [heads] maxima and [heads] sums of weights; or [heads] totals of
  // shares. A unit has a tail and an exact part for each segment, in turns, then the sinks and the newest positions.
  int64_t part_size() const { return s_.heads * (s_.head_dim + 2); }
  float* tail_part(int64_t unit, int64_t segment) const {
    return parts_ + (unit * (2 * segments_ + 2) + 2 * segment) * part_size();
  }
  float* sink_part(int64_t unit) const { return tail_part(unit, segments_); }
  int32_t* exact_places(int64_t unit) const { return places_ + unit * (exact_ + following_ + 2 * kLanes); }
  int32_t* following_places(int64_t unit) const { return exact_places(unit) + exact_ + kLanes; }

  static int32_t position(int32_t place) {
    constexpr int32_t kPage = kPageTokens, kBlock = kBlockTokens;
    return place / kBlock * kBlock + place % kLanes * kPage + place % kBlock / kLanes;
  }

  // Which of ascending places lie in the task's blocks.
  static std::pair<int64_t, int64_t> inside(const SparseTask& t, const int32_t* places, int64_t count) {
    const auto below = [&](int64_t block) { return std::lower_bound(places, places + count, block * kBlockTokens) - places; };
    return {below(t.first_block), below(t.last_block)};
  }

  // Pages lose the weights at some places, whose rows are sent for; `shares`, where they are wanted, get the weights times
  // their gains.
  void take_out(const SparseTask& t, const int32_t* places, int64_t count, const Rows& rows, int32_t* positions, float* shares) const {
    const int64_t heads = s_.adamas ? 0 : t.heads;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t at = places[i], block = at / int32_t{kBlockTokens};
      positions[i] = position(at);
      rows.fetch(positions[i], s_.head_dim);
      for (int64_t h = 0; h < heads; ++h) {
        const float weight = weight_of(t.logs[h * t.stride + stored(at)]);
        float& page = t.page_weights[(h * t.blocks + block) * kLanes + at % kLanes];
        page = std::max(0.0f, page - weight);
        if (shares) shares[h * following_ + i] = weight * t.gains[h * t.blocks + block];
      }
    }
  }

  // Exact attention of a unit's heads to `count` rows, or those that `at` names.
  void exactly(int64_t unit, const Rows& keys, const Rows& values, int64_t count, float* out, const int32_t* at = nullptr) const {
    DecodeTask task{};
    task.heads = s_.heads;
    task.head_dim = s_.head_dim;
    task.q = q_ + unit * task.heads * task.head_dim;
    task.keys = keys;
    task.values = values;
    task.count = count;
    task.at = at;
    task.count_padded = (count + kLanes - 1) / kLanes * kLanes;
    task.scale = scale_;
    task.out = out;
    task.maxima = out + task.heads * task.head_dim;
    task.sums = task.maxima + task.heads;
    task.scratch = scratch<float, Use::kChosen>(static_cast<size_t>(4 * task.count_padded));
    path().decode(task);
  }

  const SparseShape& s_;
  const float* q_;
  float* out_;
  const Cache& cache_;
  int64_t total_;
  const Summary& summary_;
  int64_t blocks_, segments_;
  int64_t sinks_, recent_;  // positions below and from here on are attended to in any case
  int64_t exact_, following_;
  float scale_;
  int8_t* codes_;
  float *factors_, *blockwise_, *whole_, *kept_, *parts_;
  uint16_t *logs_, *lowered_;
  int32_t* places_;  // [units][exact and following, 16 more of each]
  int64_t* found_;   // [units][2]
};

}  // namespace
}  // namespace edgekit
