// How operators share work between threads, and the memory that they work in.
#pragma once

#include <algorithm>
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

// How many pieces to cut `units` of work into: a few a thread, so that none waits long for another.
inline size_t pieces(int64_t units, int threads, int64_t least_units) {
  if (threads <= 1) return 1;
  return static_cast<size_t>(std::clamp<int64_t>(units / least_units, 1, 4 * threads));
}

inline int64_t share(int64_t units, size_t piece, size_t pieces) {
  return units * static_cast<int64_t>(piece) / static_cast<int64_t>(pieces);
}

}  // namespace edgekit
