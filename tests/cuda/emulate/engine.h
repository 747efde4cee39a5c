// What the emulator's files share: threads, warps and blocks in flight, and what each knows of the others' accesses.
#pragma once
#include <deque>
#include <map>
#include <string>
#include <vector>
#include "emulate.h"

namespace emulate {
constexpr size_t STACK = 64 << 10, STATIC_SHARED = 4096, GAP = 1024, MOST_SHARED = 166912;
constexpr int POISON = 0xff;  // NaN in bf16, fp16 and fp32; -1 as an integer

// Scopes of agents whose accesses are ordered together, widest last.
enum Scope : uint8_t { THREAD, WARP, BLOCK, GRID };

// For agents of each scope: the time up to which their accesses happened before.
struct Clock {
  std::map<uint64_t, uint32_t> until;
  static uint64_t key(Scope scope, uint32_t id) { return uint64_t(scope) << 32 | id; }
  void see(Scope scope, uint32_t id, uint32_t time) {
    uint32_t& known = until[key(scope, id)];
    known = std::max(known, time);
  }
  bool after(Scope scope, uint32_t id, uint32_t time) const {
    const auto found = until.find(key(scope, id));
    return found != until.end() && found->second > time;
  }
  void join(const Clock& other) {
    for (const auto& [agent, time] : other.until) {
      uint32_t& known = until[agent];
      known = std::max(known, time);
    }
  }
};
// What an agent knows; what it had published at its last fence; what its atomics have read since.
struct Knowledge {
  Clock known, published, heard;
  bool empty() const { return known.until.empty() && published.until.empty() && heard.until.empty(); }
  void join(const Knowledge& other) {
    known.join(other.known);
    published.join(other.published);
    heard.join(other.heard);
  }
};

// When and by whom: `launch` 0 is "never".
struct Stamp { uint32_t launch = 0, thread = 0, time[3] = {}; };
struct Cell {  // two bytes of memory
  Stamp write, read;
  Scope readers = THREAD;  // the narrowest scope that holds all threads that read since they were last ordered
  bool in_flight = false, atomically_written = false, atomically_read = false;
};
struct Copy { char* to; const char* from; int bytes; };
enum class State { ready, at_barrier, in_collective, finished };

struct Block;
struct Warp;
struct Thread {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  dim3 index;
  uint32_t lane = 0, id = 0, time = 1;
  State state = State::ready;
  std::vector<Copy> copies;              // not committed yet
  std::deque<std::vector<Copy>> groups;  // committed, not waited for
  Knowledge knows;
};
struct Warp {
  Thread* lanes[32] = {};
  void* operands[32] = {};
  unsigned arrived = 0, mask = 0;
  const char* doing = nullptr;
  uint32_t id = 0, time = 1, priority = 0;
};
struct Block {
  dim3 index;
  uint32_t id = 0, time = 1, running = 0, arrived = 0, votes = 0;
  int line = 0;  // of the barrier that threads wait at
  bool answer = false;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned char* memory = nullptr;  // dynamic shared memory, GAP bytes that belong to nobody, static arrays
  size_t used = 0;
  std::map<const void*, std::pair<size_t, size_t>> arrays;  // offset and size of static arrays
  Knowledge knows;
  std::vector<Cell> cells;
  unsigned char* at(size_t offset) { return memory + offset; }
};
struct Buffer { size_t bytes; bool writable; int device; std::vector<Cell> cells; };

extern Thread* self;
extern uint32_t launch_number, threads_per_block;
extern size_t dynamic_bytes;
extern bool quiet;  // the engine itself touches memory
extern std::map<const char*, Buffer> buffers;

void give_stack(Thread& t, void (*entry)());
void take_stack(Thread& t);
void resume();  // the scheduler goes on in `self`, until
void park();    // `self` goes back to the scheduler
void yield();   // another thread may run now
using Apply = void (*)(void** operands, unsigned mask);
// Every lane of `mask` brings its operands; the last one to come applies the instruction for all of them.
void collective(const char* name, unsigned mask, void* operands, Apply apply, bool orders_memory = false);
void new_shared_memory(const void* start, size_t bytes);
uint64_t take_conflicts();
}  // namespace emulate

enum Access { READ, WRITE, ATOMIC, ISSUE, LAND, READ_CONSTANT };
// Defined where race.cpp is linked.
extern "C" __attribute__((weak)) void emulate_on_access(const void* p, size_t bytes, int kind, const void* site);
