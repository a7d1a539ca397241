// Products of bfloat16 in AMX's tiles, registers of 16 rows of a vector each. Included by foreach_isa.h after simd.h.

// While it lives, tiles are there in this thread.
class AmxTiles {
 public:
  AmxTiles() {
    static constexpr Shape shape = {1, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~AmxTiles() { asm volatile("tilerelease"); }
  AmxTiles(const AmxTiles&) = delete;

 private:
  struct Shape {  // as the processor reads it
    uint8_t palette, reserved[15];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
};

// c = start + a b, for 16 rows and Vectors vectors; in units of 32 bits: of a and b pairs of bfloat16 that are neighbours
// along the summed axis, of start and c floats. c[r][v] = start[r][v] + sum over k < steps of a[r][k] b[k][v], where steps
// is a multiple of 16; a_step lies between blocks of 16 steps, and a_row, b_row, start_row and c_row between rows.
// start: null for zeros; with start_row = 0 one row for all.
template <int Vectors>
DPDIFF_INLINE void multiply_in_tiles(
    int64_t steps, const void* a, int64_t a_step, int64_t a_row, const void* b, int64_t b_row, const float* start,
    int64_t start_row, float* c, int64_t c_row) {
  static_assert(Vectors >= 1 && Vectors <= 4);
  asm volatile("" ::: "memory");  // GCC doesn't know that loads of tiles read memory
  const char *a_at = static_cast<const char*>(a), *b_at = static_cast<const char*>(b);
  if (start == nullptr) {
    _tile_zero(0);
    if (Vectors > 1) _tile_zero(1);
    if (Vectors > 2) _tile_zero(2);
    if (Vectors > 3) _tile_zero(3);
  } else {
    _tile_loadd(0, start, 4 * start_row);
    if (Vectors > 1) _tile_loadd(1, start + kWidth, 4 * start_row);
    if (Vectors > 2) _tile_loadd(2, start + 2 * kWidth, 4 * start_row);
    if (Vectors > 3) _tile_loadd(3, start + 3 * kWidth, 4 * start_row);
  }
  for (int64_t k = 0; k < steps; k += 16, a_at += 4 * a_step, b_at += 4 * 16 * b_row) {
    _tile_loadd(4, a_at, 4 * a_row);
    _tile_loadd(5, b_at, 4 * b_row);
    _tile_dpbf16ps(0, 4, 5);
    if (Vectors > 1) {
      _tile_loadd(6, b_at + 64, 4 * b_row);
      _tile_dpbf16ps(1, 4, 6);
    }
    if (Vectors > 2) {
      _tile_loadd(7, b_at + 128, 4 * b_row);
      _tile_dpbf16ps(2, 4, 7);
    }
    if (Vectors > 3) {
      _tile_loadd(5, b_at + 192, 4 * b_row);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, c, 4 * c_row);
  if (Vectors > 1) _tile_stored(1, c + kWidth, 4 * c_row);
  if (Vectors > 2) _tile_stored(2, c + 2 * kWidth, 4 * c_row);
  if (Vectors > 3) _tile_stored(3, c + 3 * kWidth, 4 * c_row);
}
