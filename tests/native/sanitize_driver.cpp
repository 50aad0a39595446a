// Random weights through every path that this CPU has, against double: the program that
// sanitize.sh builds under the sanitizers, and runs under valgrind and qemu.
//
// All buffers are allocated at their exact sizes, so that a read or write beyond one is seen.
#include <cmath>
#include <cstring>
#include <vector>

#include "convert.h"
#include "driver.h"

namespace {

// A pool that cuts the range in odd places, to show that the cuts don't matter.
int32_t uneven(int64_t begin, int64_t end, int64_t grain, Body body, void* context) {
  while (begin < end) {
    const int64_t next = min64(end, begin + grain + uniform(0, 3));
    body(begin, next, context);
    begin = next;
  }
  return 0;
}

// A prepared row gives what the call with all arguments gives.
template <class W, class Row_, class Linear>
void same_row(Row_ row, Linear linear, const W& w, const void* x, const void* bias, int32_t x_dtype,
              int32_t bias_dtype) {
  const int64_t bytes = w.n * item_size(x_dtype);
  Bytes y(bytes), expected(bytes);
  const Row made = {&w, bias, chance(0.5) ? uneven : nullptr, x_dtype, bias_dtype};
  expect(row(&made, x, y.data) == kOk, "row");
  expect(linear(&w, kAnyPath, x, x_dtype, 1, w.k, bias, bias_dtype, expected.data, x_dtype, w.n,
                nullptr) == kOk, "linear of one token");
  expect(std::memcmp(y.data, expected.data, static_cast<size_t>(bytes)) == 0, "row differs");
}

void one_case() {
  const int64_t n = uniform(1, 300), k = uniform(1, 300);
  // Now and then enough tokens for every level of blocking.
  const int64_t m = chance(0.04) ? uniform(71, 700) : uniform(0, 70);
  // int4 is packed as int8 and then narrowed, as pack.py does.
  const int32_t value_dtype = static_cast<int32_t>(uniform(0, 4));
  const int32_t dtype = value_dtype == kI4 ? kI8 : value_dtype;
  const int64_t top = value_dtype == kI4 ? 7 : 127;
  const double sparsities[] = {0.0, 0.3, 0.5, 0.9, 1.0};
  const double sparsity = sparsities[uniform(0, 4)];
  const int64_t groups_of[] = {k, k, 2, 32, 64, 128, 1000};
  const int64_t group = groups_of[uniform(0, 6)];

  Bytes dense(n * k * item_size(dtype));
  std::vector<bool> empty_column(static_cast<size_t>(k));
  for (int64_t c = 0; c < k; ++c) empty_column[static_cast<size_t>(c)] = chance(0.05);
  for (int64_t r = 0; r < n; ++r) {
    const bool empty = chance(0.05);
    for (int64_t c = 0; c < k; ++c) {
      const bool zero = empty || empty_column[static_cast<size_t>(c)] || chance(sparsity);
      const int64_t i = r * k + c;
      if (dtype == kI8) {
        reinterpret_cast<int8_t*>(dense.data)[i] = zero ? 0 : static_cast<int8_t>(uniform(-top - 1, top));
      } else {
        store_from_float(dense.data, i, dtype, zero ? 0.0f : static_cast<float>(normal()));
      }
    }
  }

  const int64_t tiles = ceil_div(n, 16), pairs = (k + 1) / 2, blocks = ceil_div(pairs, 128);
  const int64_t count = tile_count_dense(n, k, dense.data, k, dtype);
  const int64_t value_bytes = count * item_size(dtype) + kValuePadding;
  Bytes masks(tiles * pairs * 4), base((tiles + 1) * 8), off(tiles * blocks * 4);
  Bytes values(value_bytes);
  const int64_t groups = ceil_div(k, group);
  Bytes scales(tiles * groups * 16 * 4);
  auto* scale = reinterpret_cast<float*>(scales.data);
  for (int64_t i = 0; i < tiles * groups * 16; ++i) scale[i] = static_cast<float>(normal());
  expect(tile_pack_dense(n, k, dense.data, k, dtype, reinterpret_cast<uint32_t*>(masks.data),
                        reinterpret_cast<uint64_t*>(base.data),
                        reinterpret_cast<uint32_t*>(off.data), values.data, value_bytes,
                        uneven) == kOk,
         "pack_dense");
  Weight w = {n, k, reinterpret_cast<uint32_t*>(masks.data),
              reinterpret_cast<uint64_t*>(base.data), reinterpret_cast<uint32_t*>(off.data),
              values.data, dtype == kI8 ? scale : nullptr, value_bytes, group, dtype, 0};
  expect(tile_check(&w) == kOk, "check");

  // To the file's layout and back: the same bytes.
  Bytes bitmask(n * ceil_div(k, 8)), kept(count * item_size(dtype));
  expect(tile_unpack(&w, bitmask.data, kept.data, uneven) == kOk, "unpack");
  {
    Bytes masks2(tiles * pairs * 4), base2((tiles + 1) * 8), off2(tiles * blocks * 4);
    Bytes values2(value_bytes);
    expect(tile_pack_bitmask(n, k, bitmask.data, kept.data, count, dtype,
                            reinterpret_cast<uint32_t*>(masks2.data),
                            reinterpret_cast<uint64_t*>(base2.data),
                            reinterpret_cast<uint32_t*>(off2.data), values2.data, value_bytes,
                            uneven) == kOk,
           "pack_bitmask");
    expect(std::memcmp(masks.data, masks2.data, static_cast<size_t>(tiles * pairs * 4)) == 0 &&
               std::memcmp(values.data, values2.data, static_cast<size_t>(value_bytes)) == 0,
           "unpack and pack again");
  }

  Bytes nibbles(values_size(kI4, count) + kValuePadding);
  if (value_dtype == kI4) {
    std::memset(nibbles.data, 0, static_cast<size_t>(values_size(kI4, count) + kValuePadding));
    for (int64_t i = 0; i < count; ++i) {
      nibbles.data[i / 2] |= static_cast<uint8_t>((values.data[i] & 15) << i % 2 * 4);
    }
    w.values = nibbles.data;
    w.value_bytes = values_size(kI4, count) + kValuePadding;
    w.value_dtype = kI4;
    expect(tile_check(&w) == kOk, "check of int4");
    w.value_bytes -= 1;
    expect(tile_check(&w) == kBufferTooSmall, "check of a short buffer");
    w.value_bytes += 1;
    expect(tile_unpack(&w, bitmask.data, kept.data, uneven) == kBadDType, "unpack of int4");
  }

  std::vector<double> weight(static_cast<size_t>(n * k));
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t c = 0; c < k; ++c) {
      double v = load_as_float(dense.data, r * k + c, dtype);
      if (dtype == kI8) v *= scale[(r / 16 * groups + c / group) * 16 + r % 16];
      weight[static_cast<size_t>(r * k + c)] = v;
    }
  }

  const int32_t x_dtype = static_cast<int32_t>(uniform(0, 2));
  const int64_t x_stride = k + uniform(0, 5), y_stride = n + uniform(0, 3);
  // The last row ends where its columns do.
  Bytes x(m ? ((m - 1) * x_stride + k) * item_size(x_dtype) : 0);
  Bytes y(m ? ((m - 1) * y_stride + n) * item_size(x_dtype) : 0);
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t c = 0; c < k; ++c) {
      store_from_float(x.data, r * x_stride + c, x_dtype, static_cast<float>(normal()));
    }
  }
  const bool with_bias = chance(0.5);
  const int32_t bias_dtype = static_cast<int32_t>(uniform(0, 2));
  Bytes bias(n * item_size(bias_dtype));
  for (int64_t r = 0; r < n; ++r) {
    store_from_float(bias.data, r, bias_dtype, static_cast<float>(normal()));
  }
  if (m > 0) {
    same_row(tile_row, tile_linear, w, x.data, with_bias ? bias.data : nullptr, x_dtype, bias_dtype);
  }
  // Half a unit in the last place of the output.
  const double unit = x_dtype == kF32 ? 0x1p-24 : x_dtype == kBF16 ? 0x1p-8 : 0x1p-11;
  if (dtype == kI8 && group < k && group % 2 != 0) fail("the driver's groups are even");

  for (int32_t path = 0; path < tile_path_count(); ++path) {
    if (!tile_path_available(path)) continue;
    const std::string name = tile_path_name(path);
    const int32_t code = tile_linear(&w, path, x.data, x_dtype, m, x_stride,
                                    with_bias ? bias.data : nullptr, bias_dtype, y.data, x_dtype,
                                    y_stride, chance(0.5) ? uneven : nullptr);
    if (code == kBadPath && name == "amx") continue;
    expect(code == kOk, name + ": linear");
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t r = 0; r < n; ++r) {
        double sum = 0, size = 0;
        for (int64_t c = 0; c < k; ++c) {
          const double term = weight[static_cast<size_t>(r * k + c)] *
                              load_as_float(x.data, i * x_stride + c, x_dtype);
          sum += term;
          size += std::fabs(term);
        }
        if (with_bias) {
          const double b = load_as_float(bias.data, r, bias_dtype);
          sum += b;
          size += std::fabs(b);
        }
        const double got = load_as_float(y.data, i * y_stride + r, x_dtype);
        double allowed = 1.01 * unit * std::fabs(sum) +
                         0x1p-23 * (std::sqrt(static_cast<double>(k)) + 4) * size + 1e-37;
        if (x_dtype == kF16) allowed += 0x1p-25;
        const bool overflow = x_dtype == kF16 && std::fabs(sum) > 65500;
        if (!overflow && !(std::fabs(got - sum) <= allowed)) {
          std::fprintf(stderr, "n=%ld k=%ld m=%ld dtype=%d x=%d group=%ld: [%ld][%ld] %g not %g\n",
                       long(n), long(k), long(m), value_dtype, x_dtype, long(group), long(i), long(r),
                       got, sum);
          fail(name + ": linear differs");
        }
      }
    }
    const int64_t begin = uniform(0, tiles - 1), end = uniform(begin, tiles);
    const int64_t rows = min64(n, end * 16) - min64(n, begin * 16);
    Bytes decoded(rows * k * 4);
    for (const bool transposed : {false, true}) {
      expect(tile_decode(&w, path, begin, end, decoded.data, kF32, transposed ? rows : k,
                              transposed, uneven) == kOk,
             name + ": decode");
      for (int64_t i = 0; i < rows * k; ++i) {
        const int64_t at = transposed ? i % k * rows + i / k : i;
        const double v = weight[static_cast<size_t>(begin * 16 * k + i)];
        expect(std::fabs(load_as_float(decoded.data, at, kF32) - v) <= 0x1p-23 * std::fabs(v),
               name + ": decode differs");
      }
    }
  }
}

// Codes times rounded activations: the same in all paths but the scalar one, whose sums are not fused,
// and within what rounding x may change.
void one_integer_case() {
  IntegerCase made(uniform(1, 70), uniform(1, 600));
  const int64_t n = made.n, k = made.k, m = chance(0.3) ? 1 : uniform(1, 20);
  const IntegerWeight w = made.weight();
  expect(integer_check(&w) == kOk, "integer_check");
  Bytes again(n * k);
  expect(integer_unpack(&w, reinterpret_cast<int8_t*>(again.data), uneven) == kOk, "integer_unpack");
  expect(std::memcmp(again.data, made.codes.data, static_cast<size_t>(n * k)) == 0,
         "integers come back");
  const int32_t x_dtype = static_cast<int32_t>(uniform(0, 2));
  const int64_t x_stride = k + uniform(0, 5), y_stride = n + uniform(0, 3);
  Bytes x(((m - 1) * x_stride + k) * item_size(x_dtype)), y(((m - 1) * y_stride + n) * 4);
  for (int64_t i = 0; i < (m - 1) * x_stride + k; ++i) {
    store_from_float(x.data, i, x_dtype, static_cast<float>(normal()));
  }
  same_row(integer_row, integer_linear, w, x.data, nullptr, x_dtype, 0);
  for (int32_t path = 0; path < tile_path_count(); ++path) {
    if (!tile_path_available(path)) continue;
    const std::string name = tile_path_name(path);
    expect(integer_linear(&w, path, x.data, x_dtype, m, x_stride, nullptr, 0, y.data, kF32, y_stride,
                          chance(0.5) ? uneven : nullptr) == kOk,
           name + ": integer_linear");
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t r = 0; r < n; ++r) {
        double sum = 0, size = 0, allowed = 0;
        for (int64_t first = 0; first < k; first += w.block_columns()) {
          double largest = 0, weights = 0;
          for (int64_t c = first; c < min64(k, first + w.block_columns()); ++c) {
            const int64_t group = c / made.group;
            const double weight =
                *made.code(r * k + c) *
                static_cast<double>(from_bf16(w.scales[(r / 8 * made.groups + group) * 8 + r % 8]));
            const double input = load_as_float(x.data, i * x_stride + c, x_dtype);
            sum += weight * input;
            size += std::fabs(weight * input);
            weights += std::fabs(weight);
            largest = std::fmax(largest, std::fabs(input));
          }
          allowed += 0.5001 * largest / 127 * weights;
        }
        const double got = load_as_float(y.data, i * y_stride + r, kF32);
        expect(std::fabs(got - sum) <= allowed + 1e-5 * size, name + ": integer_linear differs");
      }
    }
  }
}

// A weight by column times tokens of which some inputs are 0.
void one_column_case() {
  const ColumnCase made(uniform(1, 300), uniform(1, 90));
  const int64_t n = made.n, k = made.k, m = uniform(1, 4);
  const ColumnWeight w = made.weight();
  expect(columns_check(&w) == kOk, "columns_check");
  const int32_t x_dtype = static_cast<int32_t>(uniform(0, 2));
  const int64_t x_stride = k + uniform(0, 5), y_stride = n + uniform(0, 3);
  Bytes x(((m - 1) * x_stride + k) * item_size(x_dtype)), y(((m - 1) * y_stride + n) * 4);
  const double share = chance(0.2) ? 1.0 : 0.5;
  for (int64_t i = 0; i < (m - 1) * x_stride + k; ++i) {
    const float v = chance(share) ? 0.0f : static_cast<float>(normal());
    store_from_float(x.data, i, x_dtype, v);
  }
  Bytes bias(n * 4);
  for (int64_t r = 0; r < n; ++r) {
    store_from_float(bias.data, r, kF32, static_cast<float>(normal()));
  }
  const bool with_bias = chance(0.5);
  same_row(columns_row, columns_linear, w, x.data, with_bias ? bias.data : nullptr, x_dtype, kF32);
  for (int32_t path = 0; path < tile_path_count(); ++path) {
    if (!tile_path_available(path)) continue;
    const std::string name = tile_path_name(path);
    expect(columns_linear(&w, path, x.data, x_dtype, m, x_stride, with_bias ? bias.data : nullptr,
                          kF32, y.data, kF32, y_stride, chance(0.5) ? uneven : nullptr) == kOk,
           name + ": columns_linear");
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t r = 0; r < n; ++r) {
        double sum = with_bias ? load_as_float(bias.data, r, kF32) : 0, size = std::fabs(sum);
        for (int64_t c = 0; c < k; ++c) {
          const double term = made.at(r, c) * load_as_float(x.data, i * x_stride + c, x_dtype);
          sum += term;
          size += std::fabs(term);
        }
        const double got = load_as_float(y.data, i * y_stride + r, kF32);
        expect(std::fabs(got - sum) <= 0x1p-23 * (std::sqrt(static_cast<double>(k)) + 4) * size,
               name + ": columns_linear differs");
      }
    }
  }
}

// A dense weight of 16-bit floats times one token.
void one_dense_row() {
  const int64_t n = uniform(1, 70), k = uniform(1, 300), stride = k + uniform(0, 5);
  const int32_t w_dtype = chance(0.5) ? kBF16 : kF16;
  const int32_t x_dtype = static_cast<int32_t>(uniform(0, 2));
  Bytes w(((n - 1) * stride + k) * 2), x(k * item_size(x_dtype)), y(n * 4);
  for (int64_t i = 0; i < (n - 1) * stride + k; ++i) {
    store_from_float(w.data, i, w_dtype, static_cast<float>(normal()));
  }
  for (int64_t c = 0; c < k; ++c) {
    store_from_float(x.data, c, x_dtype, static_cast<float>(normal()));
  }
  for (int32_t path = 0; path < tile_path_count(); ++path) {
    if (!tile_path_available(path)) continue;
    const std::string name = tile_path_name(path);
    expect(tile_dense_row(n, k, w.data, w_dtype, stride, path, x.data, x_dtype, y.data, kF32,
                    chance(0.5) ? uneven : nullptr) == kOk,
           name + ": dense row");
    for (int64_t r = 0; r < n; ++r) {
      double sum = 0, size = 0;
      for (int64_t c = 0; c < k; ++c) {
        const double term = static_cast<double>(load_as_float(w.data, r * stride + c, w_dtype)) *
                            load_as_float(x.data, c, x_dtype);
        sum += term;
        size += std::fabs(term);
      }
      const double got = load_as_float(y.data, r, kF32);
      expect(std::fabs(got - sum) <= 0x1p-23 * (std::sqrt(static_cast<double>(k)) + 4) * size,
             name + ": dense row differs");
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 300;
  std::printf("paths:");
  for (int32_t path = 0; path < tile_path_count(); ++path) {
    if (tile_path_available(path)) std::printf(" %s", tile_path_name(path));
  }
  std::printf("\n");
  for (int i = 0; i < cases; ++i) one_case();
  for (int i = 0; i < cases; ++i) one_integer_case();
  for (int i = 0; i < cases; ++i) one_dense_row();
  for (int i = 0; i < cases; ++i) one_column_case();
  std::printf("%d cases passed\n", cases);
}
