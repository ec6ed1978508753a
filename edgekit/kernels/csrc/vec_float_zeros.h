// Included within the namespaces of a vec_*.h, where floats are as fast as integers.

// Zero points are subtracted from products as floats, with the scales.
constexpr bool kIntegerZeros = false;
struct Zeros {};
template <int Shift>
inline Zeros load_zeros(const uint8_t*) {
  return {};
}
inline Ints times(Zeros, const int32_t*) { return all(0); }

// kPlane * high + low, exact until it is rounded.
inline Floats joined(Ints high, Ints low) { return fma(to_float(high), all(static_cast<float>(kPlane)), to_float(low)); }
