// Rounds x to int8 by block, see integer.h. Included inside an anonymous namespace, after the file's
// target pragma: plain loops that compilers turn into the file's instructions.

// To int8 with one step for all; writes `columns` of q, zeros from `count` on.
inline void round_block(const float* x, int64_t count, int64_t columns, int8_t* q,
                        RoundedBlock& out) {
  uint32_t largest = 0;  // magnitudes compare as their bits do, NaN above infinity above all
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t size = bits_of(x[i]) & 0x7fffffffu;
    largest = largest > size ? largest : size;
  }
  const bool finite = largest < 0x7f800000u;
  float most = finite ? float_of(largest) : 1.0f;
  if (most < kLeastLargest) most = kLeastLargest;
  const float factor = finite ? 127.0f / most : 0.0f;
  out.step = finite ? most / 127.0f : float_of(0x7fc00000u);
  for (int64_t i = 0; i < count; ++i) {
    // Adding 1.5 * 2^23 puts the unit at the last bit: the FPU rounds to nearest even.
    q[i] = static_cast<int8_t>(bits_of(x[i] * factor + 12582912.0f));
  }
  std::memset(q + (finite ? count : 0), 0, static_cast<size_t>(finite ? columns - count : columns));
  out.sum = 0;
  for (int64_t i = 0; i < columns; ++i) out.sum += q[i];
}

// load(x, index, dtype, out) gives 16 items as fp32.
template <class Load16>
void round_tokens(const IntegerProduct& p, int64_t begin, int64_t end, Load16 load) {
  const IntegerWeight& w = *p.weight;
  const int64_t columns = w.block_columns();
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t b = 0; b < w.spans() * w.span_blocks(); ++b) {
      const int64_t span = b / w.span_blocks(), block = b % w.span_blocks();
      const int64_t at = token * p.x_stride + b * columns, left = w.k - b * columns;
      const int64_t count = min64(columns, left > 0 ? left : 0);
      float x[kLargestBlock];
      int64_t i = 0;
      for (; i + 16 <= count; i += 16) load(p.x, at + i, p.x_dtype, x + i);
      for (; i < count; ++i) x[i] = load_as_float(p.x, at + i, p.x_dtype);
      round_block(x, count, columns, p.span_q(span, token) + block * columns,
                  p.span_blocks(span, token)[block]);
    }
  }
}
