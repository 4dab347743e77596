// The last line of a source that sets an instruction set: clang, unlike GCC, wants to be told where it ends.
#ifdef __clang__
#pragma clang attribute pop
#endif
