// One compile command builds every file: what a file may use beyond the baseline is set in it.
// Standard headers come before TILE_TARGET_BEGIN, so that their inline functions stay baseline code.
#pragma once

// Compilers before these have no intrinsics of AVX-VNNI.
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define TILE_HAS_AVX_VNNI
#endif

#define TILE_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define TILE_TARGET_BEGIN(features) \
  TILE_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define TILE_TARGET_END _Pragma("clang attribute pop")
#else
#define TILE_TARGET_BEGIN(features) TILE_PRAGMA(GCC push_options) TILE_PRAGMA(GCC target(features))
#define TILE_TARGET_END _Pragma("GCC pop_options")
#endif
