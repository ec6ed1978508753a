// AVX-512 with VNNI, and the matrix unit for many rows.
#include <math.h>

#include <cstring>

#include "path.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__) && defined(__AVX512BF16__) && defined(__AMX_BF16__)

#include "vec_avx512.h"
#include "linear.inl"
#include "panels.inl"
#include "amx.inl"
#include "attention.inl"
#include "amx_attention.inl"
#include "sparse.inl"
#include "adamas.inl"
#include "peak.inl"

namespace edgekit {
constexpr Path kPath{"amx", 0, kAbreast, quantize_rows, multiply<MatrixRows>, matrix_row, floats_to_half, attend_squares, decode,
                     encode, encode_query, estimate, add_blocks, find_gains, select, weigh, mean, gather, round_row, hadamard,
                     planes, distances, near_peak};
extern const Path* const kAmx = &kPath;
}  // namespace edgekit

#else

namespace edgekit {
extern const Path* const kAmx = nullptr;  // not compiled for such a processor
}

#endif
