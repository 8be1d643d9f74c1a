// Checked mode: bounds, races between programs and reads of unwritten memory, access by access.
//
// Races are found by happens-before (Flanagan, Freund, FastTrack, PLDI 2009): every program has a
// clock, an acquiring atomic learns what the releasing ones before it knew. Programs run one after
// another, so a report does not depend on timing. Shadow memory takes 32 bytes per touched byte.
#pragma once
#include "kx_base.h"
#include <stdio.h>
#include <stdlib.h>
#include <unordered_map>
#include <vector>

namespace kx {

struct Stamp { int32_t program = -1, clock = 0; };
struct Cell { Stamp writer, atomic, reader, other_reader; };
typedef std::unordered_map<int32_t, int32_t> Clocks;

struct Checker {
  Context *context;
  const char *const *names;
  int arguments;
  std::unordered_map<uint64_t, std::vector<Cell>> pages; // shadow of 4096 bytes each, when touched
  std::unordered_map<uint64_t, Clocks> released;
  Clocks known;
  int32_t program = -1, clock = 1;

  Checker(Context *c, const char *const *n, int count) : context(c), names(n), arguments(count) {}
  void start(int32_t p) { program = p; clock = 1; known.clear(); }

  bool ordered(Stamp s) {
    if (s.program < 0 || s.program == program) return true;
    auto at = known.find(s.program);
    return at != known.end() && s.clock <= at->second;
  }
  __attribute__((noinline)) void report(const char *what, const char *site, const int32_t *pid, int argument, uint64_t address, int size, int other) {
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
  Cell &cell(uint64_t address) {
    std::vector<Cell> &page = pages[address >> 12];
    if (page.empty()) page.resize(4096);
    return page[address & 4095];
  }
  void race(const char *what, Stamp s, const char *site, const int32_t *pid, int argument, uint64_t address, int size) {
    if (!ordered(s)) report(what, site, pid, argument, address, size, s.program);
  }
  void reads(const char *site, const int32_t *pid, int argument, uint64_t address, int size) {
    for (int i = 0; i < size; i++) {
      Cell &c = cell(address + i);
      race("race, read of what another program writes", c.writer, site, pid, argument, address, size);
      race("race, plain read of what another program changes atomically", c.atomic, site, pid, argument, address, size);
      if (!ordered(c.reader)) c.other_reader = c.reader;
      c.reader = {program, clock};
    }
  }
  void writes(const char *site, const int32_t *pid, int argument, uint64_t address, int size) {
    for (int i = 0; i < size; i++) {
      Cell &c = cell(address + i);
      race("race, two programs write", c.writer, site, pid, argument, address, size);
      race("race, plain write of what another program changes atomically", c.atomic, site, pid, argument, address, size);
      race("race, write of what another program reads", c.reader, site, pid, argument, address, size);
      race("race, write of what another program reads", c.other_reader, site, pid, argument, address, size);
      c.writer = {program, clock};
    }
  }
  void updates(const char *site, const int32_t *pid, int argument, uint64_t address, int size, int order) {
    if (order == __ATOMIC_ACQUIRE || order == __ATOMIC_ACQ_REL)
      for (auto &k : released[address]) if (known[k.first] < k.second) known[k.first] = k.second;
    for (int i = 0; i < size; i++) {
      Cell &c = cell(address + i);
      race("race, atomic access to what another program writes", c.writer, site, pid, argument, address, size);
      race("race, atomic access to what another program reads", c.reader, site, pid, argument, address, size);
      c.atomic = {program, clock};
    }
    if (order == __ATOMIC_RELEASE || order == __ATOMIC_ACQ_REL) {
      Clocks &to = released[address];
      for (auto &k : known) if (to[k.first] < k.second) to[k.first] = k.second;
      to[program] = clock++;
    }
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
template <class T> AI T checked_load(Context *c, i64 address, const int32_t *pid, int argument, const char *site) {
  Checker &check = *(Checker *)c->check;
  if (!check.inside("load out of bounds", site, pid, argument, address, sizeof(T))) return T{};
  T v = *(const T *)address;
  if (is_poison(v)) check.report("load of memory that nothing wrote", site, pid, argument, address, sizeof(T), -1);
  check.reads(site, pid, argument, address, sizeof(T));
  return v;
}
template <class T> AI void checked_store(Context *c, i64 address, T value, const int32_t *pid, int argument, const char *site) {
  Checker &check = *(Checker *)c->check;
  if (!check.inside("store out of bounds", site, pid, argument, address, sizeof(T))) return;
  check.writes(site, pid, argument, address, sizeof(T));
  *(T *)address = value;
}
template <class T> AI bool checked_atomic(Context *c, i64 address, const int32_t *pid, int argument, const char *site, int order) {
  Checker &check = *(Checker *)c->check;
  if (!check.inside("atomic access out of bounds", site, pid, argument, address, sizeof(T))) return false;
  check.updates(site, pid, argument, address, sizeof(T), order);
  return true;
}
} // namespace kx
