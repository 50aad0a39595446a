// Which path runs, and the product itself: check the arguments, pack x, multiply, both through the
// caller's thread pool.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "abi.h"
#include "convert.h"
#include "target.h"

namespace tiles {
namespace {

// From the plainest to the one to prefer; the position is the ABI's number of a path.
const Path* const kPaths[] = {
    &kScalarPath,
#if defined(__x86_64__)
    &kAvx2Path,
#if defined(TILE_HAS_AVX_VNNI)
    &kAvxVnniPath,
#endif
    &kAvx512Path, &kAvx512Vbmi2Path, &kAmxPath,
#endif
#if defined(__aarch64__)
    &kNeonPath, &kNeonDotPath,
#endif
};
constexpr int32_t kPathCount = static_cast<int32_t>(sizeof(kPaths) / sizeof(kPaths[0]));

// Asking the CPU is slow (cpuid leaves the guest under a hypervisor) and the answer doesn't change.
// Those behind the one that HF_SPARSE_PATH names count as not there: so a machine can be measured as
// one that has less.
struct Availability {
  bool can[kPathCount] = {};
  Availability() {
    const char* last = std::getenv("HF_SPARSE_PATH");
    for (int32_t i = 0; i < kPathCount; ++i) {
      can[i] = kPaths[i]->available();
      if (last && std::strcmp(last, kPaths[i]->name) == 0) break;
    }
  }
};

bool available(int32_t path) {
  static const Availability availability;
  return path >= 0 && path < kPathCount && availability.can[path];
}

int32_t best_path() {
  int32_t path = kPathCount - 1;
  while (!available(path)) --path;  // the scalar path always is
  return path;
}

int32_t choose(const Product& p) {
  int32_t path = best_path();
  while (!available(path) || !kPaths[path]->fits(p)) --path;  // and fits
  return path;
}

struct Buffer {
  void* data = nullptr;
  int64_t bytes = 0;
  ~Buffer() { std::free(data); }
};

// A counter, not a flag: concurrent calls each compare it before and after, and none can take
// another's failure away.
std::atomic<uint64_t> memory_failures{0};

// Below this many multiplications, some 25 us of one thread, waking the pool costs more than it saves.
constexpr int64_t kSerialWork = 1 << 18;
// And below this many items of x, packing it on one thread costs less than a second barrier, which on
// a busy machine waits for whole time slices.
constexpr int64_t kSerialPacking = 1 << 20;

}  // namespace

void* scratch(ScratchSlot slot, int64_t bytes) {
  thread_local Buffer buffers[kScratchSlots];
  Buffer& buffer = buffers[slot];
  if (buffer.bytes < bytes) {
    std::free(buffer.data);
    buffer.bytes = round_up(bytes, 4096);
    buffer.data = std::aligned_alloc(64, static_cast<size_t>(buffer.bytes));
    if (!buffer.data) buffer.bytes = 0;
  }
  return buffer.data;
}

void report_no_memory() { memory_failures.fetch_add(1); }
uint64_t count_memory_failures() { return memory_failures.load(); }

const float* padded_bias(const void* bias, int32_t dtype, int64_t n, int64_t padded) {
  float* copy = scratch_of<float>(kScratchBias, padded);
  if (!copy) return nullptr;
  for (int64_t i = 0; i < n; ++i) copy[i] = load_as_float(bias, i, dtype);
  std::memset(copy + n, 0, static_cast<size_t>(padded - n) * sizeof(float));
  return copy;
}

bool can_run(const Path& path) {
  for (int32_t i = 0; i < kPathCount; ++i) {
    if (kPaths[i] == &path) return available(i);
  }
  return false;
}

const Path* path_for(int32_t path) {
  if (path == kAnyPath) path = best_path();
  return available(path) ? kPaths[path] : nullptr;
}

const Path* integer_path(int32_t path) {
  if (path == kAnyPath) path = best_path();
  if (!available(path)) return nullptr;
  while (!available(path) || !kPaths[path]->integer) --path;  // the scalar path always has them
  return kPaths[path];
}

}  // namespace tiles

using namespace tiles;

TILE_EXPORT int32_t tile_abi_version() { return 10; }

TILE_EXPORT int32_t tile_path_count() { return kPathCount; }

TILE_EXPORT const char* tile_path_name(int32_t path) {
  return path >= 0 && path < kPathCount ? kPaths[path]->name : nullptr;
}

// Of the path whose integer products a call with `path` gets; null if the CPU can't run that.
TILE_EXPORT const char* integer_path_name(int32_t path) {
  const Path* found = integer_path(path);
  return found ? found->name : nullptr;
}

TILE_EXPORT int32_t tile_path_available(int32_t path) { return available(path) ? 1 : 0; }

TILE_EXPORT const char* tile_message(int32_t code) {
  switch (code) {
    case kOk: return "no error";
    case kBadSize: return "a size or stride is out of range";
    case kBadDType: return "a dtype is not supported for this argument";
    case kBadGroup: return "group_size must be positive, and even unless it covers a whole row";
    case kCountMismatch: return "the mask's bits and the number of values differ";
    case kPaddingBits: return "mask bits outside the weight's shape are set";
    case kBufferTooSmall: return "the values buffer is too small for the masks";
    case kBadOffsets: return "the offsets contradict the masks";
    case kBadPath: return "this CPU cannot run that path for these arguments";
    case kNoMemory: return "out of memory";
    case kPoolFailed: return "the thread pool reported an error";
    case kNoArray: return "an array is missing";
    case kBadPanels: return "a weight held by column isn't in panels of its size";
    case kBadOctets: return "group_size must be a multiple of 8 unless it covers a whole row";
    default: return "unknown error";
  }
}

// The weight must have passed tile_check.
TILE_EXPORT int32_t tile_linear(const Weight* weight, int32_t path, const void* x, int32_t x_dtype,
                              int64_t m, int64_t x_stride, const void* bias, int32_t bias_dtype,
                              void* y, int32_t y_dtype, int64_t y_stride, ParallelFor pool) {
  const Weight& w = *weight;
  const int32_t code = check_shape(w);
  if (code != kOk) return code;
  if (m < 0 || m > kMaxDim || !is_stride(x_stride, w.k) || !is_stride(y_stride, w.n)) {
    return kBadSize;
  }
  if (!is_float(x_dtype) || !is_float(y_dtype)) return kBadDType;
  if (bias && !is_float(bias_dtype)) return kBadDType;
  if (m == 0) return kOk;
  if (!x || !y) return kNoArray;

  Product p = {&w, x, x_stride, x_dtype, y_dtype, y, y_stride, nullptr, m, nullptr, 0};
  if (path == kAnyPath) path = choose(p);
  if (!available(path) || !kPaths[path]->fits(p)) return kBadPath;
  const Path& way = *kPaths[path];
  const uint64_t failures = count_memory_failures();

  if (bias) {
    p.bias = padded_bias(bias, bias_dtype, w.n, w.tiles() * kRows);
    if (!p.bias) return kNoMemory;
  }
  const int64_t packed_bytes = way.plan(p);
  if (w.n * w.k < kSerialWork / m) pool = nullptr;
  if (packed_bytes > 0) {
    p.packed_x = scratch(kScratchX, packed_bytes);
    if (!p.packed_x) return kNoMemory;
    auto pack = [&](int64_t begin, int64_t end) { way.pack_x(p, begin, end); };
    const int32_t packed =
        run(m * w.k < kSerialPacking ? nullptr : pool, way.pack_units(p), 1, pack);
    if (packed != kOk) return packed;
  }
  auto multiply = [&](int64_t begin, int64_t end) { way.multiply(p, begin, end); };
  const int32_t multiplied = run(pool, w.tiles(), way.grain(p), multiply);
  if (multiplied != kOk) return multiplied;
  return count_memory_failures() == failures ? kOk : kNoMemory;
}

// The same for one token and all that stays the same from call to call in one place: reading twelve
// arguments from Python takes as long as a small product.
TILE_EXPORT int32_t tile_row(const Row* row, const void* x, void* y) {
  const Weight& w = *static_cast<const Weight*>(row->weight);
  return tile_linear(&w, kAnyPath, x, row->dtype, 1, w.k, row->bias, row->bias_dtype, y, row->dtype,
                     w.n, row->pool);
}

// Dense rows of the tiles [begin, end) to out[rows][stride], or transposed to out[K][stride]. The
// weight must have passed tile_check.
TILE_EXPORT int32_t tile_decode(const Weight* weight, int32_t path, int64_t tile_begin,
                              int64_t tile_end, void* out, int32_t out_dtype, int64_t stride,
                              int32_t transposed, ParallelFor pool) {
  const Weight& w = *weight;
  const int32_t code = check_shape(w);
  if (code != kOk) return code;
  if (tile_begin < 0 || tile_end < tile_begin || tile_end > w.tiles()) return kBadSize;
  const int64_t rows = min64(w.n, tile_end * kRows) - tile_begin * kRows;
  if (!is_stride(stride, transposed ? rows : w.k)) return kBadSize;
  if (!is_float(out_dtype)) return kBadDType;
  if (!out && rows > 0) return kNoArray;
  if (path == kAnyPath) path = best_path();
  if (!available(path)) return kBadPath;
  const uint64_t failures = count_memory_failures();
  auto body = [&](int64_t begin, int64_t end) {
    const int64_t items = begin * kRows * (transposed ? 1 : stride);
    auto* at = static_cast<uint8_t*>(out) + items * item_size(out_dtype);
    kPaths[path]->decode(w, tile_begin + begin, tile_begin + end, at, out_dtype, stride,
                         transposed != 0);
  };
  const int32_t decoded = run(pool, tile_end - tile_begin, 1, body);
  if (decoded != kOk) return decoded;
  return count_memory_failures() == failures ? kOk : kNoMemory;
}

// y[N] = W x for a dense W[N][K] of bf16 or fp16.
TILE_EXPORT int32_t tile_dense_row(int64_t n, int64_t k, const void* w, int32_t w_dtype,
                                 int64_t w_stride, int32_t path, const void* x, int32_t x_dtype,
                                 void* y, int32_t y_dtype, ParallelFor pool) {
  if (!is_dim(n) || !is_dim(k) || !is_stride(w_stride, k)) return kBadSize;
  if (w_dtype != kBF16 && w_dtype != kF16) return kBadDType;
  if (!is_float(x_dtype) || !is_float(y_dtype)) return kBadDType;
  if (path == kAnyPath) path = best_path();
  if (!available(path)) return kBadPath;
  if (!w || !x || !y) return kNoArray;
  float* floats = scratch_of<float>(kScratchX, k);
  if (!floats) return kNoMemory;
  for (int64_t i = 0; i < k; ++i) floats[i] = load_as_float(x, i, x_dtype);
  const DenseProduct p = {k, w, w_stride, w_dtype, floats, y, y_dtype};
  auto multiply = [&](int64_t begin, int64_t end) { kPaths[path]->dense_row(p, begin, end); };
  return run(n < kSerialWork / k ? nullptr : pool, n, 4, multiply);
}
