// Atomics, printing, and whole-tile operations.
#pragma once
#include "kx_base.h"
#include <stdio.h>
#include <stdlib.h>
#include <initializer_list>

namespace kx {

template <class T> AI T compare_and_swap(T *p, T expected, T desired, int order) {
  typedef typename sized_int<sizeof(T)>::s I;
  I old = bits<I>(expected);
  __atomic_compare_exchange_n((I *)p, &old, bits<I>(desired), false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  return bits<T>(old);
}
// never hoisted out of a loop, repeated or moved: another program may be waited for
template <class T> AI T load_volatile(const T *p) {
  typename sized_int<sizeof(T)>::s v;
  asm volatile("" ::: "memory");
  v = __atomic_load_n((const decltype(v) *)p, __ATOMIC_ACQUIRE);
  asm volatile("" ::: "memory");
  return bits<T>(v);
}
template <class T> AI T atomic_load(const T *p, int order) {
  typedef typename sized_int<sizeof(T)>::s I;
  return bits<T>(__atomic_load_n((const I *)p, order));
}
template <class T> AI T atomic_store(T *p, T value, int order) {
  typedef typename sized_int<sizeof(T)>::s I;
  __atomic_store_n((I *)p, bits<I>(value), order);
  return value;
}
template <class T> AI T atomic_poll(const T *p, T value, int order) {
  while (atomic_load(p, order) != value) {}
  return 1;
}
template <class T, class F> AI T update(T *p, int order, F f) {
  typedef typename sized_int<sizeof(T)>::s I;
  I old = __atomic_load_n((I *)p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n((I *)p, &old, bits<I>((T)f(bits<T>(old))), false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {}
  return bits<T>(old);
}
template <class T>
COLD void print_value(const int32_t *pid, std::initializer_list<int> index, int rank, const char *prefix, int operand, const char *format, T value) {
  char text[512], number[64];
  snprintf(number, sizeof number, format, value);
  int n = snprintf(text, sizeof text, "pid (%d, %d, %d) idx (", pid[0], pid[1], pid[2]);
  const char *comma = "";
  for (int i : index) { n += snprintf(text + n, sizeof text - n, "%s%d", comma, i); comma = ", "; }
  snprintf(text + n, sizeof text - n, ")%s(operand %d) %s\n", prefix, operand, number);
  fputs(text, stdout);
  fflush(stdout);
}

// scratch memory of the calling thread, grown and kept
inline char *scratch(size_t bytes) {
  static thread_local char *memory = nullptr;
  static thread_local size_t held = 0;
  if (held < bytes) {
    free(memory);
    memory = (char *)aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    held = bytes;
  }
  return memory;
}
} // namespace kx
