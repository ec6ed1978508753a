// Which path this processor runs.
#include <atomic>
#include <cstring>

#include "path.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace edgekit {

// Null where the library was compiled without them.
extern const Path* const kAmx;
extern const Path* const kAvx512;
extern const Path* const kAvx2Vnni;
extern const Path* const kAvx2;
extern const Path* const kNeonI8mm;
extern const Path* const kNeonDotprod;
extern const Path* const kNeon;
extern const Path* const kPortable;

namespace {

enum Feature : unsigned { kNone = 0, kHasAvx2 = 1, kHasAvxVnni = 2, kHasAvx512 = 4, kHasNeon = 8, kHasDotprod = 16, kHasI8mm = 32, kHasAmx = 64 };

#if defined(__x86_64__)

// Linux keeps the matrix unit's large state for a process only after this request.
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// What the processor has and the system saves when it switches tasks. Not __builtin_cpu_supports: the runtime library
// that comes with zig says no to every question.
unsigned features() {
  constexpr unsigned kYmm = 0x6, kZmm = 0xe6;
  unsigned a = 0, b = 0, c = 0, d = 0, unused = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return kNone;
  const bool fma = c >> 12 & 1, saves = c >> 27 & 1, avx = c >> 28 & 1, f16c = c >> 29 & 1;
  if (!fma || !saves || !avx || !f16c) return kNone;
  unsigned saved = 0;
  __asm__("xgetbv" : "=a"(saved), "=d"(unused) : "c"(0));
  if ((saved & kYmm) != kYmm || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b >> 5 & 1)) return kNone;
  unsigned found = kHasAvx2;
  const bool avx512f = b >> 16 & 1, avx512bw = b >> 30 & 1, avx512vnni = c >> 11 & 1;
  if ((saved & kZmm) == kZmm && avx512f && avx512bw && avx512vnni) found |= kHasAvx512;
  constexpr unsigned kTiles = 0x60000;
  const bool amx = (d >> 22 & 1) && (d >> 24 & 1) && (saved & kTiles) == kTiles;
  const bool more = a >= 1;
  if (more && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
    if (a >> 4 & 1) found |= kHasAvxVnni;
    const bool avx512bf16 = a >> 5 & 1;
    if (amx && avx512bf16 && may_use_tiles()) found |= kHasAmx;
  }
  return found;
}

#elif defined(__aarch64__)

unsigned features() {
  constexpr unsigned long kAsimd = 1ul << 1, kAsimdDotprod = 1ul << 20, kI8mm = 1ul << 13;
  const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  if (!(first & kAsimd)) return kNone;
  return kHasNeon | (first & kAsimdDotprod ? kHasDotprod : kNone) | (second & kI8mm ? kHasI8mm : kNone);
}

#else

unsigned features() { return kNone; }

#endif

struct Choice {
  const Path* const& path;
  unsigned needs;
};

// The best first.
const Choice kChoices[] = {
    {kAmx, kHasAvx512 | kHasAmx},
    {kAvx512, kHasAvx512},
    {kAvx2Vnni, kHasAvx2 | kHasAvxVnni},
    {kAvx2, kHasAvx2},
    {kNeonI8mm, kHasNeon | kHasDotprod | kHasI8mm},
    {kNeonDotprod, kHasNeon | kHasDotprod},
    {kNeon, kHasNeon},
    {kPortable, kNone},
};

bool runs_here(const Choice& choice) {
  static const unsigned found = features();
  return choice.path && (choice.needs & ~found) == 0;
}

std::atomic<const Path*> g_path{nullptr};

const Path* best() {
  for (const Choice& choice : kChoices) {
    if (runs_here(choice)) return choice.path;
  }
  return kPortable;
}

}  // namespace

// Threads that call it first at the same time all find the same.
const Path& path() {
  const Path* chosen = g_path.load(std::memory_order_relaxed);
  if (!chosen) {
    chosen = best();
    g_path.store(chosen, std::memory_order_relaxed);
  }
  return *chosen;
}

bool choose_path(const char* name) {
  for (const Choice& choice : kChoices) {
    if (runs_here(choice) && std::strcmp(choice.path->name, name) == 0) {
      g_path.store(choice.path, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

int known_paths(const char** names, int most) {
  int count = 0;
  for (const Choice& choice : kChoices) {
    if (count < most && runs_here(choice)) names[count++] = choice.path->name;
  }
  return count;
}

}  // namespace edgekit
