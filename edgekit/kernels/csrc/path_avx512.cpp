#include <cmath>
#include <cstring>
#include <initializer_list>

#include "path.h"
#include "vec_avx512.h"
#include "linear.inl"
#include "attention.inl"

namespace edgekit {
extern const Path kAvx512{"avx512", quantize, multiply, matrix_row, floats_to_half, attend, decode};
}
