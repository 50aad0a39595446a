// Calls of the native library with arguments that no caller should make: each is refused, or reads
// and writes inside its buffers. Built by sanitize.sh under the sanitizers, which see what isn't.
//
// What is changed is what the library can check: numbers, null pointers, and what a weight's arrays
// hold. How long the arrays are is the caller's to check.
#include <climits>
#include <cmath>
#include <cstring>
#include <map>

#include "convert.h"
#include "driver.h"

namespace {

std::map<std::string, int64_t> outcomes;

int32_t counted(const char* function, int32_t code) {
  ++outcomes[std::string(function) + ": " + tile_message(code)];
  return code;
}

int64_t number(int64_t usual) {
  if (chance(0.9)) return usual;
  const int64_t hostile[] = {0, 1, -1, 2, 3, -usual, usual - 1, usual + 1, kMaxDim, kMaxDim + 1,
                             kMaxStride, kMaxStride + 1, INT32_MAX, INT32_MIN, int64_t{1} << 62,
                             INT64_MAX, INT64_MAX - 1, INT64_MIN};
  return hostile[uniform(0, static_cast<int64_t>(std::size(hostile)) - 1)];
}

// A size that nothing may have.
int64_t no_size() {
  const int64_t sizes[] = {-1, INT64_MIN, kMaxDim + 1, INT64_MAX};
  return sizes[uniform(0, 3)];
}

int32_t dtype(int32_t usual) {
  return chance(0.9) ? usual : static_cast<int32_t>(chance(0.5) ? uniform(-1, 6) : number(0));
}

template <class T>
T* pointer(T* usual) {
  return chance(0.97) ? usual : nullptr;
}

// One token from a prepared row: what may be wrong of it are its numbers and missing arrays.
template <class W>
void one_row(const char* name, int32_t (*row)(const Row*, const void*, void*), const W& w,
             int32_t x_dtype) {
  Bytes x(w.k * item_size(x_dtype)), y(w.n * item_size(x_dtype)), bias(w.n * item_size(x_dtype));
  for (int64_t c = 0; c < w.k; ++c) store_from_float(x.data, c, x_dtype, 1.0f);
  for (int64_t i = 0; i < w.n; ++i) store_from_float(bias.data, i, x_dtype, 1.0f);
  const int32_t odd_dtypes[] = {kI8, kI4, 5, -1, INT32_MAX};
  const int32_t own_dtype = chance(0.9) ? x_dtype : odd_dtypes[uniform(0, 4)];
  const int32_t bias_dtype = chance(0.9) ? x_dtype : odd_dtypes[uniform(0, 4)];
  const Row made = {&w, chance(0.5) ? bias.data : nullptr, nullptr, own_dtype, bias_dtype};
  counted(name, row(&made, pointer(x.data), pointer(y.data)));
}

// A weight whose arrays have the lengths of its shape, and its products.
void one_weight() {
  const int64_t n = uniform(1, 60), k = uniform(1, 600);
  const int32_t usual = static_cast<int32_t>(uniform(0, 4));
  const int32_t packed_as = usual == kI4 ? kI8 : usual;
  Bytes dense(n * k * item_size(packed_as));
  for (int64_t i = 0; i < n * k; ++i) {
    const bool zero = chance(0.5);
    if (packed_as == kI8) {
      dense.data[i] = static_cast<uint8_t>(zero ? 0 : uniform(1, 7));
    } else {
      store_from_float(dense.data, i, packed_as, zero ? 0.0f : static_cast<float>(normal()));
    }
  }
  const int64_t count = tile_count_dense(n, k, dense.data, k, packed_as);
  const int64_t tiles = ceil_div(n, kRows), pairs = (k + 1) / 2, blocks = ceil_div(pairs, kBlockPairs);
  const int64_t bytes = count * item_size(packed_as) + kValuePadding;
  Bytes masks(tiles * pairs * 4), base((tiles + 1) * 8), off(tiles * blocks * 4), values(bytes);
  auto* mask_words = reinterpret_cast<uint32_t*>(masks.data);
  auto* bases = reinterpret_cast<uint64_t*>(base.data);
  auto* offsets = reinterpret_cast<uint32_t*>(off.data);

  // Packing with wrong numbers; where they are too small a buffer, the library says so.
  const int64_t own_n = chance(0.95) ? n : no_size(), own_stride = chance(0.95) ? k : uniform(-2, k - 1);
  if (counted("pack_dense", tile_pack_dense(own_n, k, pointer(dense.data), own_stride, packed_as,
                                            pointer(mask_words), pointer(bases), pointer(offsets),
                                            pointer(values.data), chance(0.9) ? bytes : uniform(-9, bytes),
                                            nullptr)) != kOk) {
    expect(tile_pack_dense(n, k, dense.data, k, packed_as, mask_words, bases, offsets, values.data,
                           bytes, nullptr) == kOk, "pack");
  }

  // Groups of any size, with as many scales as they need.
  const int64_t group = chance(0.5) ? number(k) : 2 * uniform(1, k);
  const int64_t groups = group < 1 ? 1 : ceil_div(k, group);
  Bytes scales(tiles * groups * kRows * 4);
  for (int64_t i = 0; i < tiles * groups * kRows; ++i) {
    store_from_float(scales.data, i, kF32, static_cast<float>(normal()));
  }
  Weight w = {n, k, pointer(mask_words), pointer(bases), pointer(offsets), pointer(values.data),
              reinterpret_cast<float*>(has_scales(usual) ? pointer(scales.data) : nullptr),
              bytes, group, usual, 0};
  if (chance(0.1)) w.n = chance(0.5) ? uniform(1, n) : no_size();
  if (chance(0.1)) w.k = no_size();
  if (chance(0.1)) w.value_bytes = uniform(-1, bytes);
  if (chance(0.1)) w.value_dtype = dtype(usual);
  if (has_scales(w.value_dtype) && !has_scales(usual)) w.scales = nullptr;
  // What the arrays hold.
  if (chance(0.3)) mask_words[uniform(0, tiles * pairs - 1)] ^= uint32_t{1} << uniform(0, 31);
  if (chance(0.1)) std::memset(masks.data, 0xff, static_cast<size_t>(tiles * pairs * 4));
  if (chance(0.1)) bases[uniform(0, tiles)] += static_cast<uint64_t>(number(1));
  if (chance(0.1)) offsets[uniform(0, tiles * blocks - 1)] += static_cast<uint32_t>(number(1));
  if (counted("check", tile_check(&w)) != kOk) return;

  const int64_t m = uniform(0, 40), x_stride = w.k + uniform(0, 5), y_stride = w.n + uniform(0, 3);
  const int32_t x_dtype = static_cast<int32_t>(uniform(0, 2));
  Bytes x(m ? ((m - 1) * x_stride + w.k) * item_size(x_dtype) : 0);
  Bytes y(m ? ((m - 1) * y_stride + w.n) * item_size(x_dtype) : 0);
  Bytes bias(w.n * item_size(x_dtype)), bits(w.n * ceil_div(w.k, 8)), kept(bytes);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t c = 0; c < w.k; ++c) store_from_float(x.data, i * x_stride + c, x_dtype, 1.0f);
  }
  for (int64_t i = 0; i < w.n; ++i) store_from_float(bias.data, i, x_dtype, 1.0f);
  one_row("row", tile_row, w, x_dtype);
  counted("unpack", tile_unpack(&w, pointer(bits.data), pointer(kept.data), nullptr));
  for (int32_t path = -3; path <= tile_path_count(); ++path) {
    // Fewer tokens and other strides stay inside; what is too large must be refused.
    const int64_t own_m = chance(0.9) ? m : chance(0.5) ? uniform(0, m) : no_size();
    const int64_t wrong[] = {x_stride, w.k - 1, 0, -1, INT64_MIN, kMaxStride + 1, INT64_MAX};
    const int64_t stride = chance(0.9) ? x_stride : wrong[uniform(0, 6)];
    const int32_t odd_dtypes[] = {kI8, kI4, 5, -1, INT32_MAX};
    const int32_t own_dtype = chance(0.95) ? x_dtype : odd_dtypes[uniform(0, 4)];
    counted("linear", tile_linear(&w, path, pointer(x.data), own_dtype, own_m, stride,
                                  chance(0.5) ? bias.data : nullptr, own_dtype, pointer(y.data),
                                  own_dtype, y_stride, nullptr));
    const int64_t begin = chance(0.9) ? uniform(0, w.tiles()) : number(0);
    const int64_t end = chance(0.9) ? uniform(0, w.tiles()) : number(w.tiles());
    const bool transposed = chance(0.5), valid = begin >= 0 && begin <= end && end <= w.tiles();
    const int64_t rows = valid ? min64(w.n, end * kRows) - min64(w.n, begin * kRows) : 0;
    Bytes out(rows * w.k * item_size(x_dtype));
    const int64_t usual_stride = transposed ? rows : w.k;
    counted("decode", tile_decode(&w, path, begin, end, pointer(out.data), own_dtype,
                                  chance(0.9) ? usual_stride : wrong[uniform(3, 6)], transposed,
                                  nullptr));
  }
}

// The same for the integer layout.
void one_integer_weight() {
  IntegerCase made(uniform(1, 40), uniform(1, 300));
  const int64_t usual_n = made.n, usual_k = made.k;
  counted("integer_measure",
          integer_measure(chance(0.9) ? usual_n : no_size(), chance(0.9) ? usual_k : no_size(),
                          pointer(made.code(0)), dtype(made.bits), dtype(made.kept),
                          pointer(made.bases()), nullptr));
  if (chance(0.5)) made.bases()[uniform(0, made.tiles)] += static_cast<uint64_t>(number(1));
  counted("integer_pack",
          integer_pack(usual_n, usual_k, made.code(0), made.bits, made.kept, pointer(made.bases()),
                       pointer(made.masks.data), pointer(made.values.data),
                       chance(0.8) ? made.bytes : uniform(-9, made.bytes), nullptr));
  expect(integer_measure(usual_n, usual_k, made.code(0), made.bits, made.kept, made.bases(),
                         nullptr) == kOk, "integer_measure");
  expect(integer_pack(usual_n, usual_k, made.code(0), made.bits, made.kept, made.bases(),
                      made.masks.data, made.values.data, made.bytes, nullptr) == kOk,
         "integer_pack");
  IntegerWeight w = made.weight();
  if (chance(0.1)) w.n = chance(0.5) ? uniform(1, usual_n) : no_size();
  if (chance(0.1)) w.k = no_size();
  if (chance(0.1)) w.value_bytes = uniform(-1, made.bytes);
  if (chance(0.1)) w.bits = dtype(kCodes4);
  if (chance(0.1)) w.kept = w.masks ? static_cast<int32_t>(uniform(-2, 10)) : made.kept;
  // Groups may be larger than they were, not smaller: there are no more scales.
  if (chance(0.2)) w.group_size = chance(0.5) ? made.group + uniform(1, 16) : number(0);
  if (w.group_size > 0 && w.group_size < made.group) w.group_size = made.group;
  if (chance(0.1)) w.masks = pointer(w.masks);
  if (chance(0.1)) w.scales = nullptr;
  if (chance(0.3)) made.masks.data[uniform(0, made.tiles * made.units * 8 - 1)] ^= uint8_t{4};
  if (chance(0.1)) made.bases()[uniform(0, made.tiles)] += static_cast<uint64_t>(number(1));
  if (counted("integer_check", integer_check(&w)) != kOk) return;

  const int64_t m = uniform(0, 12), x_stride = w.k + uniform(0, 5), y_stride = w.n + uniform(0, 3);
  const int32_t x_dtype = static_cast<int32_t>(uniform(0, 2));
  Bytes x(m ? ((m - 1) * x_stride + w.k) * item_size(x_dtype) : 0);
  Bytes y(m ? ((m - 1) * y_stride + w.n) * item_size(x_dtype) : 0);
  Bytes bias(w.n * item_size(x_dtype)), codes(w.n * w.k);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t c = 0; c < w.k; ++c) {  // infinities and NaNs among them
      store_from_float(x.data, i * x_stride + c, x_dtype, chance(0.01) ? INFINITY : 1.0f);
    }
  }
  for (int64_t i = 0; i < w.n; ++i) store_from_float(bias.data, i, x_dtype, 1.0f);
  one_row("integer_row", integer_row, w, x_dtype);
  counted("integer_unpack",
          integer_unpack(&w, pointer(reinterpret_cast<int8_t*>(codes.data)), nullptr));
  for (int32_t path = -3; path <= tile_path_count(); ++path) {
    const int64_t wrong[] = {w.k - 1, 0, -1, INT64_MIN, kMaxStride + 1, INT64_MAX};
    const int32_t own = chance(0.9) ? x_dtype : kI8;
    counted("integer_linear",
            integer_linear(&w, path, pointer(x.data), own, chance(0.9) ? m : no_size(),
                           chance(0.9) ? x_stride : wrong[uniform(0, 5)],
                           chance(0.5) ? bias.data : nullptr, own, pointer(y.data), own,
                           chance(0.9) ? y_stride : w.n - 1, nullptr));
  }
}

void one_dense_row() {
  const int64_t n = uniform(1, 30), k = uniform(1, 90), stride = k + uniform(0, 5);
  Bytes w(((n - 1) * stride + k) * 2), x(k * 4), y(n * 4);
  std::memset(w.data, 0, static_cast<size_t>(((n - 1) * stride + k) * 2));
  std::memset(x.data, 0, static_cast<size_t>(k * 4));
  const int64_t wrong[] = {k - 1, 0, -1, INT64_MIN, kMaxStride + 1, INT64_MAX};
  counted("dense_row",
          tile_dense_row(chance(0.9) ? n : chance(0.5) ? uniform(-2, n) : kMaxDim + 1,
                         chance(0.95) ? k : no_size(), pointer(w.data), dtype(kBF16),
                         chance(0.9) ? stride : wrong[uniform(0, 5)],
                         static_cast<int32_t>(uniform(-2, tile_path_count())), pointer(x.data),
                         dtype(kF32), pointer(y.data), dtype(kF32), nullptr));
}

// A weight by column: wrong numbers and missing arrays, what it is checked for.
void one_column_weight() {
  ColumnCase made(uniform(1, 150), uniform(1, 60));
  ColumnWeight w = made.weight();
  if (chance(0.1)) w.n = chance(0.5) ? uniform(1, made.n) : no_size();
  if (chance(0.1)) w.k = made.packs ? number(made.k) : chance(0.5) ? uniform(1, made.k) : no_size();
  if (chance(0.1)) w.panel_rows = number(made.panel_rows);
  if (chance(0.1)) w.dense_dtype = w.dense ? dtype(kI8) : dtype(kF32);
  if (w.dense && w.dense_dtype == kF32 && made.dtype != kF32) w.dense_dtype = made.dtype;
  if (chance(0.05)) w.dense = nullptr;
  if (chance(0.05)) w.offsets = nullptr;
  if (chance(0.1)) made.packed.value_dtype = chance(0.5) ? kI8 : kI4;
  const int32_t good = counted("columns_check", columns_check(&w));
  Bytes index(made.panels * made.k * 4);
  const int32_t indexed = columns_index(&w, reinterpret_cast<int32_t*>(index.data));
  if (counted("columns_index", indexed) == kOk) expect(good == kOk, "an index of what is refused");

  const int64_t k = good == kOk ? w.k : made.k, n = good == kOk ? w.n : made.n;
  const int64_t m = uniform(0, 5), x_stride = k + uniform(0, 5), y_stride = n + uniform(0, 3);
  const int32_t x_dtype = static_cast<int32_t>(uniform(0, 2));
  Bytes x(m ? ((m - 1) * x_stride + k) * item_size(x_dtype) : 0);
  Bytes y(m ? ((m - 1) * y_stride + n) * item_size(x_dtype) : 0), bias(n * item_size(x_dtype));
  const float odd[] = {NAN, INFINITY, -0.0f, 0.0f};
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t c = 0; c < k; ++c) {
      store_from_float(x.data, i * x_stride + c, x_dtype, chance(0.7) ? 1.0f : odd[uniform(0, 3)]);
    }
  }
  for (int64_t i = 0; i < n; ++i) store_from_float(bias.data, i, x_dtype, 1.0f);
  if (good == kOk) one_row("columns_row", columns_row, w, x_dtype);
  for (int32_t path = -3; path <= tile_path_count(); ++path) {
    const int64_t wrong[] = {k - 1, 0, -1, INT64_MIN, kMaxStride + 1, INT64_MAX};
    const int32_t odd_dtypes[] = {kI8, kI4, 5, -1, INT32_MAX};
    const int32_t own = chance(0.9) ? x_dtype : odd_dtypes[uniform(0, 4)];
    counted("columns_linear",
            columns_linear(&w, path, pointer(x.data), own, chance(0.9) ? m : no_size(),
                           chance(0.9) ? x_stride : wrong[uniform(0, 5)],
                           chance(0.5) ? bias.data : nullptr, own, pointer(y.data), own,
                           chance(0.9) ? y_stride : n - 1, nullptr));
  }
}

// Functions over whole weights, in buffers of exact size.
void one_whole_weight() {
  const int64_t rows = uniform(1, 20), k = chance(0.7) ? uniform(1, 70) : uniform(70, 700);
  const int64_t sizes[] = {1, 2, 4, 8}, size = sizes[uniform(0, 3)], row_bytes = ceil_div(k, 8);
  Bytes items(rows * k * size), bits(rows * row_bytes), mask(rows * k), scores(rows * k * 4);
  for (int64_t i = 0; i < rows * k * size; ++i) {
    items.data[i] = static_cast<uint8_t>(chance(0.5) ? 0 : uniform(0, 255));
  }
  for (int64_t i = 0; i < rows * k; ++i) {
    const float odd[] = {NAN, INFINITY, -INFINITY, -0.0f};
    store_from_float(scores.data, i, kF32,
                     chance(0.9) ? static_cast<float>(uniform(-3, 3)) : odd[uniform(0, 3)]);
  }
  const auto own = [](int64_t usual) {
    const int64_t no_count[] = {0, -1, INT64_MIN, kMaxStride + 1, INT64_MAX};
    return chance(0.95) ? usual : no_count[uniform(0, 4)];
  };
  const auto own_size = [&] { return chance(0.9) ? size : uniform(-1, 20) * 16 + 3; };
  counted("keep_highest",
          whole_keep_highest(own(rows), own(k), pointer(reinterpret_cast<float*>(scores.data)),
                             chance(0.9) ? uniform(1, k) : number(k), pointer(mask.data), nullptr));
  for (int64_t i = 0; i < rows * k; ++i) mask.data[i] = static_cast<uint8_t>(chance(0.5));
  const int32_t sign = static_cast<int32_t>(number(1));
  counted("nonzero_bits", whole_nonzero_bits(own(rows), own(k), pointer(items.data), own_size(),
                                             sign, pointer(bits.data), nullptr));
  expect(whole_nonzero_bits(rows, k, items.data, size, 1, bits.data, nullptr) == kOk, "bits");
  if (chance(0.2)) bits.data[uniform(0, rows * row_bytes - 1)] ^= uint8_t{0x81};
  int64_t count = 0;
  for (int64_t i = 0; i < rows * row_bytes; ++i) count += __builtin_popcount(bits.data[i]);
  if (chance(0.1)) count = chance(0.5) ? uniform(0, count) : -1;
  Bytes kept(count < 0 || count > rows * k ? 0 : count * size);
  counted("kept_items", whole_kept_items(own(rows), own(k), pointer(items.data), own_size(),
                                         pointer(bits.data), count, pointer(kept.data), nullptr));
  const int32_t finite = whole_all_finite(own(rows * k), pointer(scores.data), dtype(kF32));
  ++outcomes[finite < 0 ? "all_finite: refused" : "all_finite: answered"];
  counted("zero_outside", whole_zero_outside(own(rows * k), pointer(items.data), own_size(),
                                             pointer(mask.data), pointer(items.data), nullptr));
  const int64_t width = uniform(1, k), groups = k / width;
  Bytes scales(rows * groups * 4), zeros(rows * groups * 2), factors(groups * width * 4);
  Bytes errors(rows * groups * width * 4);
  const auto floats = [](const Bytes& bytes) { return reinterpret_cast<float*>(bytes.data); };
  const auto* points = chance(0.5) ? nullptr : reinterpret_cast<const int16_t*>(zeros.data);
  counted("rounding_errors",
          whole_rounding_errors(own(rows), own(groups), own(width), pointer(floats(scores)),
                                pointer(floats(scales)), points,
                                static_cast<int32_t>(uniform(-1, 255)),
                                chance(0.5) ? nullptr : floats(factors), pointer(floats(errors)),
                                nullptr));
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 300;
  for (int i = 0; i < cases; ++i) one_weight();
  for (int i = 0; i < cases; ++i) one_integer_weight();
  for (int i = 0; i < cases; ++i) one_dense_row();
  for (int i = 0; i < cases; ++i) one_column_weight();
  for (int i = 0; i < cases; ++i) one_whole_weight();
  int64_t calls = 0;
  for (const auto& [outcome, count] : outcomes) {
    std::printf("%8lld  %s\n", static_cast<long long>(count), outcome.c_str());
    calls += count;
  }
  std::printf("%lld hostile calls\n", static_cast<long long>(calls));
}
