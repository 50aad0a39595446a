// What the drivers of the native library share: its C ABI, chance, and buffers of exact size.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

#include "abi.h"

using namespace tiles;

extern "C" {
int32_t tile_path_count();
const char* tile_path_name(int32_t);
int32_t tile_path_available(int32_t);
const char* tile_message(int32_t);
int32_t tile_check(Weight*);
int64_t tile_count_dense(int64_t, int64_t, const void*, int64_t, int32_t);
int32_t tile_pack_dense(int64_t, int64_t, const void*, int64_t, int32_t, uint32_t*, uint64_t*,
                        uint32_t*, void*, int64_t, ParallelFor);
int32_t tile_pack_bitmask(int64_t, int64_t, const uint8_t*, const void*, int64_t, int32_t,
                          uint32_t*, uint64_t*, uint32_t*, void*, int64_t, ParallelFor);
int32_t tile_unpack(const Weight*, uint8_t*, void*, ParallelFor);
int32_t tile_linear(const Weight*, int32_t, const void*, int32_t, int64_t, int64_t, const void*,
                    int32_t, void*, int32_t, int64_t, ParallelFor);
int32_t tile_decode(const Weight*, int32_t, int64_t, int64_t, void*, int32_t, int64_t, int32_t,
                    ParallelFor);
int32_t tile_dense_row(int64_t, int64_t, const void*, int32_t, int64_t, int32_t, const void*,
                       int32_t, void*, int32_t, ParallelFor);
}

inline std::mt19937_64 rng(1);

inline int64_t uniform(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(rng);
}
inline double normal() { return std::normal_distribution<double>()(rng); }
inline bool chance(double p) { return std::bernoulli_distribution(p)(rng); }

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::exit(1);
}
inline void expect(bool condition, const std::string& what) {
  if (!condition) fail(what);
}

// Exactly `bytes`, and aligned no better than malloc or the offset makes it.
struct Bytes {
  explicit Bytes(int64_t count) : data(static_cast<uint8_t*>(std::malloc(count ? count : 1))) {}
  ~Bytes() { std::free(data); }
  Bytes(const Bytes&) = delete;
  uint8_t* data;
};
