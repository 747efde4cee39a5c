// Global buffers, asynchronous copies, fences and atomics.
#include <unordered_map>
#include "engine.h"

namespace emulate {
namespace {
std::unordered_map<const void*, Clock> left_at;  // what threads published through an atomic variable

void hear(const void* p, size_t bytes, Access kind) {
  if (emulate_on_access && bytes) emulate_on_access(p, bytes, kind, nullptr);
}

// What the running thread publishes with a fence: all that happened before it.
Clock present() {
  Clock c = self->knows.known;
  c.join(self->block->knows.known);
  c.see(BLOCK, self->block->id, self->block->time);
  c.see(WARP, self->warp->id, self->warp->time);
  c.see(THREAD, self->id, ++self->time);
  return c;
}
}  // namespace

void new_shared_memory(const void* start, size_t bytes) {
  const char* first = static_cast<const char*>(start);
  for (auto it = left_at.begin(); it != left_at.end();)
    it = size_t(static_cast<const char*>(it->first) - first) < bytes ? left_at.erase(it) : std::next(it);
}

void read_constant(const void* from, size_t bytes) { hear(from, bytes, READ_CONSTANT); }

// Nothing is there while the copy is under way: its target is poison from the issue to the wait of the thread that
// issued it. A wait too few reads poison, and so does whoever still needed what was there before.
void copy_async(void* to, const void* from, int bytes) {
  const char* shared = reinterpret_cast<const char*>(self->block->memory);
  const char* target = static_cast<char*>(to);
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) fail("cp.async: misaligned");
  if (bytes < 0 || bytes > 16) fail("cp.async of %d bytes", bytes);
  if (target < shared || target + 16 > shared + dynamic_bytes) fail("cp.async outside dynamic shared memory");
  hear(from, bytes, READ);
  hear(to, 16, ISSUE);
  std::memset(to, POISON, 16);
  self->copies.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes});
}

void copy_commit() {
  self->groups.push_back(std::move(self->copies));
  self->copies.clear();
}

void copy_wait(int groups_left) {
  for (; int(self->groups.size()) > groups_left; self->groups.pop_front())
    for (const Copy& c : self->groups.front()) {
      std::memset(c.to, 0, 16);
      std::memcpy(c.to, c.from, c.bytes);
      hear(c.to, 16, LAND);
    }
  yield();
}

// PTX: what happened before a fence happens before what follows another fence, if an atomic after the first is read by an
// atomic before the second. Barriers may lie between a fence and its atomic, which may be another thread's.
void fence() {
  if (emulate_on_access) {
    Knowledge& mine = self->knows;
    mine.known.join(mine.heard);
    mine.known.join(self->block->knows.heard);
    mine.heard = {};
    mine.published = present();
  }
  yield();
}

unsigned atomic(unsigned* place, unsigned operand, unsigned (*operation)(unsigned, unsigned)) {
  yield();
  if (emulate_on_access) {
    hear(place, sizeof *place, ATOMIC);
    Clock& there = left_at[place];
    self->knows.heard.join(there);
    there.join(self->knows.published);
    there.join(self->block->knows.published);
  }
  const unsigned old = *place;
  *place = operation(old, operand);
  return old;
}
}  // namespace emulate

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// Memory of the device is what the harness has declared.
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  const char* p = static_cast<const char*>(pointer);
  auto after = emulate::buffers.upper_bound(p);
  const bool inside = after != emulate::buffers.begin() && p < std::prev(after)->first + std::prev(after)->second.bytes;
  *attributes = {inside ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered, inside ? std::prev(after)->second.device : 0};
  return cudaSuccess;
}

// Four multiprocessors of sm_80, or of what a test asks for. sm_86 and its like have blocks of 99 KiB.
static int capability = 80;
extern "C" void emulate_capability(int asked) { capability = asked; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 4; break;
    case cudaDevAttrComputeCapabilityMajor: *value = capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = capability % 10; break;
    default: *value = capability % 10 ? 99 << 10 : int(emulate::MOST_SHARED);
  }
  return cudaSuccess;
}
