// What the sanitizers must be told about fibers. Each is an empty inline function in a build without that sanitizer.
//
// TSan sees every CUDA thread as a thread of its own: a fiber of its own, switched to with flag 1, which means "no
// synchronisation". The order in which one OS thread happens to run the fibers then orders nothing; only what the
// barriers acquire and release does. So a missing barrier is a data race although nothing ever runs at the same time.
#pragma once
#include <cstddef>

#ifdef __SANITIZE_THREAD__
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_acquire(void* sync);
void __tsan_release(void* sync);
}
// For the emulator's own state: registers that lanes exchange and the scheduler's notes are not memory of the GPU.
// noinline, because an inlined body would be instrumented with its caller.
#define QK_UNSEEN __attribute__((no_sanitize("thread"), noinline))
#else
#define QK_UNSEEN
#endif
#ifdef __SANITIZE_ADDRESS__
extern "C" {
void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* saved, const void** old_bottom, size_t* old_size);
}
#endif

namespace qkernels::host {

#ifdef __SANITIZE_THREAD__
constexpr bool kThreadSanitizer = true;
inline void* tsan_create() { return __tsan_create_fiber(0); }
inline void tsan_destroy(void* fiber) { __tsan_destroy_fiber(fiber); }
inline void* tsan_current() { return __tsan_get_current_fiber(); }
// To be inlined into the function that switches: TSan keeps a shadow call stack per fiber.
__attribute__((always_inline)) inline void tsan_switch(void* fiber) { __tsan_switch_to_fiber(fiber, 1); }
inline void tsan_acquire(void* sync) { __tsan_acquire(sync); }
inline void tsan_release(void* sync) { __tsan_release(sync); }
#else
constexpr bool kThreadSanitizer = false;
inline void* tsan_create() { return nullptr; }
inline void tsan_destroy(void*) {}
inline void* tsan_current() { return nullptr; }
inline void tsan_switch(void*) {}
inline void tsan_acquire(void*) {}
inline void tsan_release(void*) {}
#endif

// ASan keeps the bounds of the current stack, and a fake stack per fiber (`fake`; nullptr when the fiber ends here).
#ifdef __SANITIZE_ADDRESS__
constexpr bool kAddressSanitizer = true;
__attribute__((always_inline)) inline void asan_leave(void** fake, const void* bottom, size_t size) {
  __sanitizer_start_switch_fiber(fake, bottom, size);
}
__attribute__((always_inline)) inline void asan_arrive(void* fake, const void** old_bottom, size_t* old_size) {
  __sanitizer_finish_switch_fiber(fake, old_bottom, old_size);
}
#else
constexpr bool kAddressSanitizer = false;
inline void asan_leave(void**, const void*, size_t) {}
inline void asan_arrive(void*, const void**, size_t*) {}
#endif

}  // namespace qkernels::host
