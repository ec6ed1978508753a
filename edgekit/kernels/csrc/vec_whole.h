// How linear.inl takes a tile apart where it need not: all rows at once. Included within the namespaces of a vec_*.h.

constexpr int kParts = 1;
using Part = Bytes;
using Row = const int8_t*;  // activations of 32 columns

inline Part load_part(const uint8_t* p) { return load_bytes(p); }
inline Row load_row(const int8_t* x) { return x; }
template <int Bits>
[[gnu::always_inline]] inline Ints dot_part(Ints acc, int, const Part* codes, Row x) {
  return dot<Bits>(acc, codes, x);
}
