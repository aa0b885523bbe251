// Compiles the rest of a file for an instruction set that the build as a whole does not assume.
//
// A pragma and not a compiler flag per file, for three reasons: torch's build helper has one list of flags for all
// files; headers that come before it are compiled for the baseline, so that no inline function of the standard library
// can leak AVX-512 into the binary; and any compiler command line, the sanitizer test's for one, builds the same code.
#pragma once
#define QK_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define QK_TARGET_BEGIN(isa) QK_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define QK_TARGET_END QK_PRAGMA(clang attribute pop)
#else
#define QK_TARGET_BEGIN(isa) QK_PRAGMA(GCC push_options) QK_PRAGMA(GCC target(isa))
#define QK_TARGET_END QK_PRAGMA(GCC pop_options)
#endif

// Products and sums of the rest of a file are rounded one by one, never contracted to one operation: the same bits on
// every instruction set, and those of PyTorch.
#if defined(__clang__)
#define QK_UNCONTRACTED_BEGIN QK_PRAGMA(clang fp contract(off))
#define QK_UNCONTRACTED_END
#else
#define QK_UNCONTRACTED_BEGIN QK_PRAGMA(GCC push_options) QK_PRAGMA(GCC optimize("fp-contract=off"))
#define QK_UNCONTRACTED_END QK_PRAGMA(GCC pop_options)
#endif
