// One compile command builds every file: what a file may use beyond the baseline is set in it.
// Standard headers come before T16_TARGET_BEGIN, so that their inline functions stay baseline code.
#pragma once

#define T16_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define T16_TARGET_BEGIN(features) \
  T16_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define T16_TARGET_END _Pragma("clang attribute pop")
#else
#define T16_TARGET_BEGIN(features) T16_PRAGMA(GCC push_options) T16_PRAGMA(GCC target(features))
#define T16_TARGET_END _Pragma("GCC pop_options")
#endif
