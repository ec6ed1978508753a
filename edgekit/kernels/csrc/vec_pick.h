// Lanes that a mask chooses, where no instruction moves them together.

// The numbers of the chosen lanes, one after the other; up to sixteen may be written.
template <class T>
inline void pick(unsigned lanes, const T* from, T* to) {
  for (; lanes != 0; lanes &= lanes - 1) *to++ = from[__builtin_ctz(lanes)];
}
inline void pick(unsigned lanes, Ints x, int32_t* to) {
  if (lanes == 0) return;
  int32_t numbers[kLanes];
  store(numbers, x);
  pick(lanes, numbers, to);
}
inline void pick_places(unsigned lanes, int32_t first, int32_t* to) {
  for (; lanes != 0; lanes &= lanes - 1) *to++ = first + __builtin_ctz(lanes);
}
