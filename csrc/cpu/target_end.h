// Closes what target_begin.h opened.
#if FASTATTN_LEVEL > 0
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
