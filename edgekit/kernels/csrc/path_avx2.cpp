// AVX2 with FMA and F16C.
#include <math.h>

#include <cstring>

#include "path.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include "vec_avx2.h"
#include "linear.inl"
#include "attention.inl"
#include "sparse.inl"
#include "adamas.inl"
#include "peak.inl"

namespace edgekit {
constexpr Path kPath{"avx2", 1, kAbreast, quantize, multiply<VectorRows>, matrix_row, floats_to_half, attend, decode,
                     encode, encode_query, estimate, add_blocks, find_gains, select, weigh, mean, gather, round_row, hadamard,
                     planes, distances, near_peak};
extern const Path* const kAvx2 = &kPath;
}  // namespace edgekit

#else

namespace edgekit {
extern const Path* const kAvx2 = nullptr;  // not compiled for such a processor
}

#endif
