// Which path this processor runs.
#include <cstring>

#include "path.h"

namespace edgekit {

extern const Path kAvx512;

namespace {

struct Choice {
  const Path* path;
  bool (*runs_here)();
};

// The best first.
const Choice kChoices[] = {
    {&kAvx512, [] { return bool(__builtin_cpu_supports("avx512vnni")) && __builtin_cpu_supports("avx512bw"); }},
};

const Path* g_path = nullptr;

const Path* best() {
  for (const Choice& choice : kChoices) {
    if (choice.runs_here()) return choice.path;
  }
  return nullptr;
}

}  // namespace

const Path& path() {
  if (!g_path) g_path = best();
  return *g_path;
}

bool choose_path(const char* name) {
  for (const Choice& choice : kChoices) {
    if (std::strcmp(choice.path->name, name) == 0 && choice.runs_here()) {
      g_path = choice.path;
      return true;
    }
  }
  return false;
}

int known_paths(const char** names, int most) {
  int count = 0;
  for (const Choice& choice : kChoices) {
    if (count < most && choice.runs_here()) names[count++] = choice.path->name;
  }
  return count;
}

}  // namespace edgekit
