// The C ABI, which library.py mirrors. Every function that can fail returns a Code; arrays are the
// caller's and their lengths are those of tiles.h, which the caller has checked.
#pragma once

#include "tiles.h"

#if defined(__GNUC__)
#define TILE_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define TILE_EXPORT extern "C"
#endif

namespace tiles {

enum Code : int32_t {
  kOk = 0,
  kBadSize,          // a dimension is out of range
  kBadDType,         // a dtype isn't one that this argument may have
  kBadGroup,         // group_size isn't positive, or odd below K, or there are no scales
  kCountMismatch,    // the mask's bits and the values' count differ
  kPaddingBits,      // a mask bit outside N x K is set
  kBufferTooSmall,   // the values buffer lacks room for the values or its padding
  kBadOffsets,       // tile_base or block_off contradict the masks
  kBadPath,          // no such path, or this CPU can't run it
  kNoMemory,
  kPoolFailed,       // the thread pool reported an error
  kNoArray,          // a pointer is null
  kBadOctets,        // group_size isn't positive, or below K no multiple of 8
  kBadPanels,        // a weight held by column isn't in panels of its size
};

constexpr int32_t kAnyPath = -1;  // lets the CPU and the sizes decide

// libtorch's torch_parallel_for, or null to stay on the calling thread.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Body body,
                                void* context);

// What stays the same in all products of one token with a weight; library.py mirrors the fields.
struct Row {
  const void* weight;  // of the function's layout; it has been checked
  const void* bias;    // null if there is none
  ParallelFor pool;
  int32_t dtype;  // of x and y
  int32_t bias_dtype;
};

template <class F>
int32_t run(ParallelFor pool, int64_t count, int64_t grain, F& body) {
  if (count <= 0) return kOk;
  if (!pool || count <= grain) {
    body(0, count);
    return kOk;
  }
  const Body call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<F*>(context))(begin, end);
  };
  return pool(0, count, grain, call, &body) == 0 ? kOk : kPoolFailed;
}

// The numbers of a weight and its pointers; tile_check says whether the arrays are sound.
int32_t check_shape(const Weight& w);

// Can this CPU run a path, and may it?
bool can_run(const Path& path);

// The path of a number, or the best one for -1. Null if the CPU can't run it.
const Path* path_for(int32_t path);

// The path whose integer products serve a path's number, or -1 for the best: itself, or the next lower
// one that has them. Null if the CPU can't run that path.
const Path* integer_path(int32_t path);

// A bias as fp32[padded], zeros from n on; null if there is no memory. Valid until the thread's next.
const float* padded_bias(const void* bias, int32_t dtype, int64_t n, int64_t padded);

// How often a kernel had no memory, so far: callers compare it before and after.
uint64_t count_memory_failures();

inline bool is_float(int32_t dtype) { return dtype == kF32 || dtype == kBF16 || dtype == kF16; }
inline bool is_dim(int64_t size) { return size >= 1 && size <= kMaxDim; }
// Can rows of that many columns lie a stride apart?
inline bool is_stride(int64_t stride, int64_t columns) {
  return stride >= columns && stride <= kMaxStride;
}

}  // namespace tiles
