// Checks every load and store: bounds, alignment, shared memory that nobody wrote, copies in flight, races. The kernels are
// compiled with -fsanitize=thread, whose hooks stand at the end of this file; the real runtime of it is not linked.
//
// Two accesses to one place, one of them a write, must be ordered by __syncthreads (in a block), by __syncwarp (in a warp)
// or by fence, atomic, fence (anywhere). In which order the emulator ran them does not matter: no lucky schedule is needed.
#include <cstdio>
#include "engine.h"

extern "C" __attribute__((visibility("hidden"))) char __ehdr_start, _end;  // the library's first byte, and one past it

namespace emulate {
namespace {
struct Place {
  Cell* cells;
  const char* memory;
  size_t offset;
  bool writable, shared;
};

uint32_t block_of(const Stamp& s) { return s.thread / threads_per_block; }
uint32_t warp_of(const Stamp& s) {
  return block_of(s) * uint32_t(self->block->warps.size()) + s.thread % threads_per_block / 32;
}

// Did what the stamp stands for, by threads within a scope, happen before the running thread's present?
bool before(const Stamp& s, Scope scope) {
  if (s.launch != launch_number) return true;
  if (scope == GRID) return false;
  const bool here = block_of(s) == self->block->id;
  if (scope == THREAD && s.thread == self->id) return true;
  if (scope <= WARP && here && warp_of(s) == self->warp->id && s.time[WARP] < self->warp->time) return true;
  if (here && s.time[BLOCK] < self->block->time) return true;
  for (const Clock* c : {&self->knows.known, &self->block->knows.known}) {
    if (c->after(BLOCK, block_of(s), s.time[BLOCK])) return true;
    if (scope <= WARP && c->after(WARP, warp_of(s), s.time[WARP])) return true;
    if (scope == THREAD && c->after(THREAD, s.thread, s.time[THREAD])) return true;
  }
  return false;
}

bool find(const char* p, size_t bytes, Place& place) {
  Block& b = *self->block;
  const char* memory = reinterpret_cast<const char*>(b.memory);
  if (p >= memory && p < memory + MOST_SHARED) {
    const size_t offset = p - memory;
    bool inside = offset + bytes <= dynamic_bytes;
    for (const auto& [identity, array] : b.arrays)
      inside |= offset >= array.first && offset + bytes <= array.first + array.second;
    if (!inside) fail("%zu bytes at offset %zu of shared memory are outside every array", bytes, offset);
    place = {&b.cells[offset / 2], "shared memory", offset, true, true};
    return true;
  }
  auto after = buffers.upper_bound(p);
  if (after == buffers.begin()) return false;
  auto& [start, buffer] = *std::prev(after);
  const size_t offset = p - start;
  if (offset >= buffer.bytes) return false;
  if (offset + bytes > buffer.bytes) fail("%zu bytes cross the end of a buffer of %zu bytes", bytes, buffer.bytes);
  place = {&buffer.cells[offset / 2], "global memory", offset, buffer.writable, false};
  return true;
}

std::string line_of(const void* site) {
  if (!site) return "";
  char text[40];
  snprintf(text, sizeof text, " [pc %#zx]", size_t(static_cast<const char*>(site) - &__ehdr_start) - 1);
  return text;
}

struct Check {
  const Place& place;
  int kind;
  const void* site;
  size_t i;

  const char* name() const {
    return kind == READ ? "read" : kind == ATOMIC ? "atomic" : kind == ISSUE ? "cp.async" : "write";
  }
  size_t offset() const { return place.offset / 2 * 2 + 2 * i; }
  [[noreturn]] void race(const char* other, const Stamp& s) const {
    fail("race in %s at offset %zu: this %s and the %s of block %u thread %u are not ordered%s", place.memory, offset(),
         name(), other, block_of(s), s.thread % threads_per_block, line_of(site).c_str());
  }
  void against_writes(const Cell& c) const {
    const bool current = c.write.launch == launch_number;
    if (c.in_flight && current && kind != LAND)
      fail("%s at offset %zu is touched while a cp.async to it is under way%s", place.memory, offset(), line_of(site).c_str());
    if (place.shared && kind == READ && !current)
      fail("read of shared memory that was never written, offset %zu%s", offset(), line_of(site).c_str());
    const bool both_atomic = kind == ATOMIC && c.atomically_written;
    if (!both_atomic && !before(c.write, THREAD)) race(c.atomically_written ? "atomic" : "write", c.write);
  }
  void against_reads(const Cell& c) const {
    const bool both_atomic = kind == ATOMIC && c.atomically_read;
    if (!both_atomic && !before(c.read, c.readers)) race("read", c.read);
  }
};

Scope joined(const Cell& c) {
  if (c.read.launch != launch_number || before(c.read, c.readers)) return THREAD;
  if (block_of(c.read) != self->block->id) return GRID;
  if (warp_of(c.read) != self->warp->id) return std::max(c.readers, BLOCK);
  return c.read.thread == self->id ? c.readers : std::max(c.readers, WARP);
}

void access(const char* p, size_t bytes, int kind, const void* site) {
  if (p >= self->stack && p < self->stack + STACK) return;
  Place place{};
  if (!find(p, bytes, place)) {
    if (p >= &__ehdr_start && p < &_end) return;  // constants
    fail("%zu bytes at %p are outside every buffer%s", bytes, static_cast<const void*>(p), line_of(site).c_str());
  }
  if (bytes <= 16 && (bytes & (bytes - 1)) == 0 && reinterpret_cast<uintptr_t>(p) % bytes)
    fail("misaligned access of %zu bytes%s", bytes, line_of(site).c_str());
  const Stamp now{launch_number, self->id, {self->time, self->warp->time, self->block->time}};
  const bool constant = kind == READ_CONSTANT, writes = !constant && kind != READ;
  if (writes && !place.writable)
    fail("write to a buffer that is only read, offset %zu%s", place.offset, line_of(site).c_str());
  Check check{place, constant ? READ : kind, site, 0};
  for (; check.i < (place.offset % 2 + bytes + 1) / 2; check.i++) {
    Cell& c = place.cells[check.i];
    if (constant && c.write.launch == launch_number)
      fail("a load through the read-only path of what this launch has written, offset %zu", check.offset());
    check.against_writes(c);
    if (writes) {
      check.against_reads(c);
      c.write = now;
      c.atomically_written = kind == ATOMIC;
      c.in_flight = kind == ISSUE;
    }
    if (!writes || kind == ATOMIC) {
      c.readers = joined(c);
      c.read = now;
      c.atomically_read = kind == ATOMIC;
    }
  }
}
}  // namespace
}  // namespace emulate

extern "C" {
void emulate_on_access(const void* p, size_t bytes, int kind, const void* site) {
  if (emulate::self && !emulate::quiet) emulate::access(static_cast<const char*>(p), bytes, kind, site);
}
#define HOOK(name, bytes, kind) \
  void name(void* p) { emulate_on_access(p, bytes, kind, __builtin_return_address(0)); }
#define HOOKS(n)                                                                       \
  HOOK(__tsan_read##n, n, READ) HOOK(__tsan_write##n, n, WRITE)                        \
  HOOK(__tsan_unaligned_read##n, n, READ) HOOK(__tsan_unaligned_write##n, n, WRITE)
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, long n) { emulate_on_access(p, n, READ, __builtin_return_address(0)); }
void __tsan_write_range(void* p, long n) { emulate_on_access(p, n, WRITE, __builtin_return_address(0)); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
