// AVX-512 with VNNI.
#include <math.h>

#include <cstring>

#include "path.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)

#include "vec_avx512.h"
#include "linear.inl"
#include "panels.inl"
#include "attention.inl"
#include "sparse.inl"
#include "adamas.inl"
#include "peak.inl"

namespace edgekit {
constexpr Path kPath{"avx512", 1, kAbreast, quantize, multiply<PanelRows>, matrix_row, floats_to_half, attend, decode,
                     encode, encode_query, estimate, add_blocks, find_gains, select, weigh, mean, gather, round_row, hadamard,
                     planes, distances, near_peak};
extern const Path* const kAvx512 = &kPath;
}  // namespace edgekit

#else

namespace edgekit {
extern const Path* const kAvx512 = nullptr;  // not compiled for such a processor
}

#endif
