// Checked mode: bounds, races between programs and reads of unwritten memory, access by access.
//
// Races are found by happens-before (Flanagan, Freund, FastTrack, PLDI 2009): every program has a
// clock, an acquiring atomic learns what the releasing ones before it knew. Programs run one after
// another, so a report does not depend on timing. Shadow memory is kept per element: 32 bytes for the
// widest piece that every access to its page so far was a multiple of.
#pragma once
#include "kx_base.h"
#include <stdio.h>
#include <stdlib.h>

namespace kx {

// a map from numbers by open addressing; nothing is ever removed, and new values are zero
template <class T> struct Table {
  struct Slot { uint64_t key; bool used; T value; };
  Slot *slots = nullptr;
  size_t size = 0, count = 0;

  ~Table() { free(slots); }
  Slot *place(uint64_t key) const {
    size_t at = (key * 0x9e3779b97f4a7c15u) >> 20;
    while (slots[at & (size - 1)].used && slots[at & (size - 1)].key != key) at++;
    return slots + (at & (size - 1));
  }
  T *find(uint64_t key) const {
    Slot *slot = size ? place(key) : nullptr;
    return slot && slot->used ? &slot->value : nullptr;
  }
  T &operator[](uint64_t key) {
    if (2 * count >= size) grow();
    Slot *slot = place(key);
    if (!slot->used) { slot->used = true; slot->key = key; count++; }
    return slot->value;
  }
  __attribute__((noinline, cold)) void grow() {
    Slot *old = slots;
    size_t n = size;
    size = n ? 2 * n : 16;
    slots = (Slot *)calloc(size, sizeof(Slot));
    for (size_t i = 0; i < n; i++) if (old[i].used) *place(old[i].key) = old[i];
    free(old);
  }
  template <class F> void each(F f) const { for (size_t i = 0; i < size; i++) if (slots[i].used) f(slots[i].key, slots[i].value); }
  void clear() { if (count) memset(slots, 0, size * sizeof(Slot)); count = 0; }
};

// programs are numbered from 1; 0 is none
struct Stamp { int32_t program, clock; };
struct Cell { Stamp writer, atomic, reader, other_reader; };
struct Page { Cell *cells; int shift; }; // 4096 bytes of memory in cells of 1 << shift bytes
typedef Table<int32_t> Clocks;

struct Checker {
  Context *context;
  const char *const *names;
  Table<Page> pages;
  Table<Clocks *> released;
  Clocks known;
  int32_t program = 0, clock = 1;

  Checker(Context *c, const char *const *n) : context(c), names(n) {}
  ~Checker() {
    pages.each([](uint64_t, Page &p) { free(p.cells); });
    released.each([](uint64_t, Clocks *c) { delete_clocks(c); });
  }
  static void delete_clocks(Clocks *c) { c->~Clocks(); free(c); }
  void start(int32_t p) { program = p + 1; clock = 1; known.clear(); }

  bool ordered(Stamp s) {
    if (!s.program || s.program == program) return true;
    int32_t *at = known.find(s.program);
    return at && s.clock <= *at;
  }
  __attribute__((noinline, cold)) void report(const char *what, const char *site, const int32_t *pid, int argument, uint64_t address, int size, int other) {
    if (context->fault) return;
    char index[96] = "", rival[64] = "";
    if (argument >= 0) snprintf(index, sizeof index, ", argument '%s', index %lld", names[argument], (long long)(int64_t)(address - context->extents[2 * argument]) / size);
    if (other >= 0) snprintf(rival, sizeof rival, ", other program (%d, %d, %d)", other % context->grid[0], other / context->grid[0] % context->grid[1], other / context->grid[0] / context->grid[1]);
    snprintf(context->message, sizeof context->message, "%s: %s: program (%d, %d, %d)%s%s", site, what, pid[0], pid[1], pid[2], index, rival);
    context->fault = context->message;
  }
  // whether the access may go ahead
  bool inside(const char *what, const char *site, const int32_t *pid, int argument, uint64_t address, int size) {
    if (context->fault) return false;
    if (argument < 0) return true;
    uint64_t low = context->extents[2 * argument], high = context->extents[2 * argument + 1];
    if (address >= low && address + size <= high) return true;
    report(what, site, pid, argument, address, size, -1);
    return false;
  }
  // the page of an address, in cells of at most 1 << shift bytes
  Page &page(uint64_t address, int shift) {
    Page &p = pages[address >> 12];
    if (!p.cells || p.shift > shift) split(p, shift);
    return p;
  }
  __attribute__((noinline, cold)) void split(Page &p, int shift) {
    Cell *cells = (Cell *)calloc(4096 >> shift, sizeof(Cell));
    for (int i = 0; p.cells && i < 4096 >> shift; i++) cells[i] = p.cells[i >> (p.shift - shift)];
    free(p.cells);
    p = {cells, shift};
  }
  template <class F> void cells(uint64_t address, int size, F f) {
    if ((address & 4095) + size > 4096) {
      for (int i = 0; i < size; i++) cells(address + i, 1, f);
      return;
    }
    Page &p = page(address, __builtin_ctzll(address | (uint64_t)size));
    for (int i = 0; i < size; i += 1 << p.shift) f(p.cells[((address & 4095) + i) >> p.shift]);
  }
  void race(const char *what, Stamp s, const char *site, const int32_t *pid, int argument, uint64_t address, int size) {
    if (!ordered(s)) report(what, site, pid, argument, address, size, s.program - 1);
  }
  void reads(const char *site, const int32_t *pid, int argument, uint64_t address, int size) {
    cells(address, size, [&](Cell &c) {
      race("race, read of what another program writes", c.writer, site, pid, argument, address, size);
      race("race, plain read of what another program changes atomically", c.atomic, site, pid, argument, address, size);
      if (!ordered(c.reader)) c.other_reader = c.reader;
      c.reader = {program, clock};
    });
  }
  void writes(const char *site, const int32_t *pid, int argument, uint64_t address, int size) {
    cells(address, size, [&](Cell &c) {
      race("race, two programs write", c.writer, site, pid, argument, address, size);
      race("race, plain write of what another program changes atomically", c.atomic, site, pid, argument, address, size);
      race("race, write of what another program reads", c.reader, site, pid, argument, address, size);
      race("race, write of what another program reads", c.other_reader, site, pid, argument, address, size);
      c.writer = {program, clock};
    });
  }
  // an atomic load (which changes nothing), store or update
  void atomic(const char *site, const int32_t *pid, int argument, uint64_t address, int size, int order, bool changes) {
    if (order == __ATOMIC_ACQUIRE || order == __ATOMIC_ACQ_REL)
      if (Clocks **from = released.find(address)) join(**from, known);
    cells(address, size, [&](Cell &c) {
      race("race, atomic access to what another program writes", c.writer, site, pid, argument, address, size);
      if (!changes) return;
      race("race, atomic access to what another program reads", c.reader, site, pid, argument, address, size);
      c.atomic = {program, clock};
    });
    if (order == __ATOMIC_RELEASE || order == __ATOMIC_ACQ_REL) {
      Clocks *&to = released[address];
      if (!to) to = (Clocks *)calloc(1, sizeof(Clocks));
      join(known, *to);
      (*to)[program] = clock++;
    }
  }
  static void join(const Clocks &from, Clocks &to) {
    from.each([&](uint64_t p, int32_t c) { int32_t &held = to[p]; if (held < c) held = c; });
  }
};

// fresh memory is filled with this byte pattern: a NaN in every float format of 16 bits and more
template <class T> AI bool is_poison(T v) {
  if (sizeof(T) < 2) return false;
  uint8_t bytes[sizeof(T)];
  memcpy(bytes, &v, sizeof v);
  for (unsigned i = 0; i < sizeof(T); i++) if (bytes[i] != (i % 2 ? 0x7f : 0xf5)) return false;
  return true;
}
template <class T> static __attribute__((noinline)) T checked_load(Context *c, i64 address, const int32_t *pid, int argument, const char *site) {
  Checker &check = *(Checker *)c->check;
  if (!check.inside("load out of bounds", site, pid, argument, address, sizeof(T))) return T{};
  T v = *(const T *)address;
  if (is_poison(v)) check.report("load of memory that nothing wrote", site, pid, argument, address, sizeof(T), -1);
  check.reads(site, pid, argument, address, sizeof(T));
  return v;
}
template <class T> static __attribute__((noinline)) void checked_store(Context *c, i64 address, T value, const int32_t *pid, int argument, const char *site) {
  Checker &check = *(Checker *)c->check;
  if (!check.inside("store out of bounds", site, pid, argument, address, sizeof(T))) return;
  check.writes(site, pid, argument, address, sizeof(T));
  *(T *)address = value;
}
template <class T, bool CHANGES> static __attribute__((noinline)) bool checked_atomic(Context *c, i64 address, const int32_t *pid, int argument, const char *site, int order) {
  Checker &check = *(Checker *)c->check;
  if (!check.inside("atomic access out of bounds", site, pid, argument, address, sizeof(T))) return false;
  check.atomic(site, pid, argument, address, sizeof(T), order, CHANGES);
  return true;
}
} // namespace kx
