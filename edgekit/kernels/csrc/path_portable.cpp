// Any processor that GCC or Clang compiles for.
#include <math.h>

#include <cstring>

#include "path.h"
#include "vec_portable.h"
#include "linear.inl"
#include "attention.inl"
#include "sparse.inl"
#include "adamas.inl"
#include "peak.inl"

namespace edgekit {
constexpr Path kPath{"portable", 1, kAbreast, quantize, multiply<VectorRows>, matrix_row, floats_to_half, attend, decode,
                     encode, encode_query, estimate, add_blocks, find_gains, select, weigh, mean, gather, round_row, hadamard,
                     planes, distances, near_peak};
extern const Path* const kPortable = &kPath;
}  // namespace edgekit
