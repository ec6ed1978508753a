// NEON with dot products of unsigned and signed numbers.
#include <math.h>

#include <cstring>

#include "path.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD) && defined(__ARM_FEATURE_MATMUL_INT8)

#include "vec_neon.h"
#include "linear.inl"
#include "attention.inl"
#include "sparse.inl"
#include "adamas.inl"
#include "peak.inl"

namespace edgekit {
constexpr Path kPath{"neon_i8mm", 1, kAbreast, quantize, multiply<VectorRows>, matrix_row, floats_to_half, attend, decode,
                     encode, encode_query, estimate, add_blocks, find_gains, select, weigh, mean, gather, round_row, hadamard,
                     planes, distances, near_peak};
extern const Path* const kNeonI8mm = &kPath;
}  // namespace edgekit

#else

namespace edgekit {
extern const Path* const kNeonI8mm = nullptr;  // not compiled for such a processor
}

#endif
