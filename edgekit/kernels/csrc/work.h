// How operators share work between threads, and the memory that they work in.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

namespace edgekit {

inline int g_decode_threads = 1, g_prefill_threads = 1;

// Up to so many rows activations have 15 bits: what is set when a session makes its kernels is theirs.
constexpr int64_t kFineRows = 64;
inline int64_t g_fine_rows = kFineRows;

// Rows of activations in one plane that one piece of work multiplies.
constexpr int64_t kRowsAtOnce = 128;

constexpr int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// What scratch memory is for; pieces for different uses may be held at the same time.
enum class Use {
  kCodes, kScales, kSums, kQueries, kPartials, kScores, kDistances, kNear, kPlaces, kFound, kTails, kPositions,
  kChosen, kWholes, kLeft, kUnpacked, kLayer
};

// Memory of one thread that grows and stays, so that no step allocates.
template <class T, Use>
T* scratch(size_t count) {
  thread_local std::vector<T> memory;
  if (memory.size() < count) memory.resize(count);
  return memory.data();
}

// Between two looks at what others do.
inline void rest(int turns) {
  // Somebody may wait for a processor that another one has.
  if (turns % 4096 == 4095) return std::this_thread::yield();
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// What is left of some pieces, which are taken from both ends: first..end - 1, `first` in the lower half, `end` in the upper.
class Ends {
 public:
  explicit Ends(size_t count = 0) : left_(uint64_t{count} << 32) {}
  void reset(size_t count) { left_.store(uint64_t{count} << 32, std::memory_order_release); }
  void close() { left_.store(kClosed, std::memory_order_release); }
  bool closed() const { return left_.load(std::memory_order_acquire) == kClosed; }
  // The first or the last of them; -1 where none is left.
  int64_t take(bool first) {
    uint64_t left = left_.load(std::memory_order_relaxed);
    while (static_cast<uint32_t>(left) < left >> 32) {
      const uint64_t less = first ? left + 1 : left - (uint64_t{1} << 32);
      if (left_.compare_exchange_weak(left, less, std::memory_order_acquire, std::memory_order_relaxed)) {
        return static_cast<int64_t>(first ? static_cast<uint32_t>(left) : (left >> 32) - 1);
      }
    }
    return -1;
  }

 private:
  static constexpr uint64_t kClosed = ~uint64_t{0};  // nothing is left of it either
  std::atomic<uint64_t> left_;
};

// How many pieces to cut `units` of work into: a few a thread, so that none waits long for another.
inline size_t pieces(int64_t units, int threads, int64_t least_units) {
  if (threads <= 1) return 1;
  return static_cast<size_t>(std::clamp<int64_t>(units / least_units, 1, 4 * threads));
}

inline int64_t share(int64_t units, size_t piece, size_t pieces) {
  return units * static_cast<int64_t>(piece) / static_cast<int64_t>(pieces);
}

}  // namespace edgekit
