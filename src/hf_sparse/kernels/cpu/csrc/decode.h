// Dense rows of whole tiles, written once over an instruction set's `Isa` traits, see vector_path.h.
// Included after it.
//
// For transposed rows a few columns of eight tiles are decoded to scratch in L1 and written from
// there, in stretches of whole cache lines: columns of the output that are a power of two apart share
// few sets of a cache, and would push each other's half-written lines out.

template <class Isa>
struct Decoder {
  using Walk = VectorPath<Isa>;

  // What is decoded at once.
  struct Block {
    int64_t tiles, pairs;
    int64_t tile_floats() const { return pairs * 2 * kRows; }
  };
  static constexpr Block kForRows = {1, kBlockPairs}, kForColumns = {8, 32};

  // Where a tile's block of columns goes: rows or, transposed, columns of the output are contiguous.
  struct Out {
    void* data;
    int32_t dtype;
    int64_t stride;
    bool transposed;
  };

  // From decoded[tile][columns][16]; `rows` are those of the tiles that the weight has.
  static void write_rows(const float* decoded, const Out& out, int64_t row, int64_t rows,
                         int64_t column, int64_t columns) {
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = decoded + r / kRows * kForRows.tile_floats() + r % kRows;
      const int64_t to = (row + r) * out.stride + column;
      int64_t c = 0;
      for (; c + 16 <= columns; c += 16) {
        float part[16];
        for (int i = 0; i < 16; ++i) part[i] = from[(c + i) * kRows];
        Isa::store16(out.data, to + c, out.dtype, part);
      }
      for (; c < columns; ++c) store_from_float(out.data, to + c, out.dtype, from[c * kRows]);
    }
  }

  static void write_columns(const float* decoded, const Out& out, int64_t row, int64_t rows,
                            int64_t column, int64_t columns) {
    for (int64_t c = 0; c < columns; ++c) {
      const float* from = decoded + c * kRows;
      const int64_t to = (column + c) * out.stride + row;
      int64_t r = 0;
      for (; r + kRows <= rows; r += kRows, from += kForColumns.tile_floats()) {
        Isa::store16(out.data, to + r, out.dtype, from);
      }
      for (; r < rows; ++r) store_from_float(out.data, to + r, out.dtype, from[r % kRows]);
    }
  }

  template <int32_t D>
  static void decode_values(const Weight& w, int64_t tile_begin, int64_t tile_end, const Out& out) {
    const Block block = out.transposed ? kForColumns : kForRows;
    float* decoded = scratch_of<float>(kScratchTile, block.tiles * block.tile_floats());
    if (!decoded) return report_no_memory();
    for (int64_t first = tile_begin; first < tile_end; first += block.tiles) {
      const int64_t count = min64(block.tiles, tile_end - first);
      const int64_t row = (first - tile_begin) * kRows;
      const int64_t rows = min64(count * kRows, w.n - first * kRows);
      typename Walk::template Cursor<D> cursors[kForColumns.tiles];
      for (int64_t t = 0; t < count; ++t) {
        cursors[t] = {w.tile_values<D>(first + t), w.tile_masks(first + t)};
      }
      for (int64_t at = 0; at < w.pairs(); at += block.pairs) {
        const int64_t pairs = min64(block.pairs, w.pairs() - at);
        const int64_t columns = min64(2 * pairs, w.k - 2 * at);
        for (int64_t t = 0; t < count; ++t) {
          Walk::template decode_block<D>(w, first + t, at, pairs, cursors[t],
                                         decoded + t * block.tile_floats());
        }
        (out.transposed ? write_columns : write_rows)(decoded, out, row, rows, 2 * at, columns);
      }
    }
  }

  static void decode(const Weight& w, int64_t tile_begin, int64_t tile_end, void* data,
                     int32_t dtype, int64_t stride, bool transposed) {
    const Out out = {data, dtype, stride, transposed};
    switch (w.value_dtype) {
      case kF32: return decode_values<kF32>(w, tile_begin, tile_end, out);
      case kBF16: return decode_values<kBF16>(w, tile_begin, tile_end, out);
      case kF16: return decode_values<kF16>(w, tile_begin, tile_end, out);
      case kI8: return decode_values<kI8>(w, tile_begin, tile_end, out);
      default: return decode_values<kI4>(w, tile_begin, tile_end, out);
    }
  }
};
