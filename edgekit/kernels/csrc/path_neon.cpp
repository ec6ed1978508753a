// NEON as every 64-bit Arm has it.
#include <math.h>

#include <cstring>

#include "path.h"

#if defined(__aarch64__)

#include "vec_neon.h"
#include "linear.inl"
#include "attention.inl"
#include "sparse.inl"
#include "adamas.inl"
#include "peak.inl"

namespace edgekit {
constexpr Path kPath{"neon", 1, kAbreast, quantize, multiply<VectorRows>, matrix_row, floats_to_half, attend, decode,
                     encode, encode_query, estimate, add_blocks, find_gains, select, weigh, mean, gather, round_row, hadamard,
                     planes, distances, near_peak};
extern const Path* const kNeon = &kPath;
}  // namespace edgekit

#else

namespace edgekit {
extern const Path* const kNeon = nullptr;  // not compiled for such a processor
}

#endif
