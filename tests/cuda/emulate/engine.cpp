// Runs the blocks and threads of a launch in an order that a seed picks; barriers and collectives of warps.
#include "engine.h"
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <unordered_map>

namespace emulate {
Thread* self = nullptr;
uint32_t launch_number = 0, threads_per_block = 0;
size_t dynamic_bytes = 0;
bool quiet = false;
std::map<const char*, Buffer> buffers;

namespace {
// Which ready thread runs next. SKEWED lets a few warps run far ahead of the others.
enum Order { IN_TURN, LAST_FIRST, RANDOM, SKEWED };
dim3 grid, shape;
std::deque<Thread*> ready;
std::vector<Block*> resident, spare_blocks;
std::unordered_map<const void*, int> shared_allowed;
std::string message;
bool failed = false;
uint64_t seed = 0, random_state = 1;
Body body;
const void* closure;

uint32_t draw(uint32_t below) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return uint32_t((random_state >> 33) % below);
}
Order order() { return Order(seed % 4); }

void report(const std::string& text) {
  if (!failed) message = text;
  failed = true;
}

void wake(Thread* t) {
  t->state = State::ready;
  ready.push_back(t);
}

void thread_main() {
  body(closure);
  Block* b = self->block;
  if (b->arrived) fail("a thread returned while %u others wait at the __syncthreads of line %d", b->arrived, b->line);
  if (self->warp->arrived && self->warp->mask >> self->lane & 1)
    fail("a thread returned while its warp waits in %s", self->warp->doing);
  self->state = State::finished;
  b->running--;
  park();
}

Block* start_block(uint32_t id) {
  Block* b = spare_blocks.empty() ? new Block : spare_blocks.back();
  if (!spare_blocks.empty()) spare_blocks.pop_back();
  unsigned char* memory = b->memory;
  if (!memory) memory = static_cast<unsigned char*>(aligned_alloc(1024, (MOST_SHARED / 1024 + 8) * 1024));
  *b = Block();
  b->memory = memory;
  const size_t bytes = dynamic_bytes + GAP + STATIC_SHARED;
  std::memset(memory, POISON, bytes);
  new_shared_memory(memory, bytes);
  b->used = (dynamic_bytes + GAP + 15) / 16 * 16;
  b->id = id;
  b->index = dim3(id % grid.x, id / grid.x % grid.y, id / grid.x / grid.y);
  b->running = threads_per_block;
  b->threads.resize(threads_per_block);
  b->warps.resize((threads_per_block + 31) / 32);
  if (emulate_on_access) b->cells.resize(bytes / 2 + 8);
  for (size_t w = 0; w < b->warps.size(); w++) {
    b->warps[w].id = uint32_t(id * b->warps.size() + w);
    b->warps[w].priority = draw(1 << 16);
  }
  for (uint32_t i = 0; i < threads_per_block; i++) {
    Thread& t = b->threads[i];
    t.block = b;
    t.warp = &b->warps[i / 32];
    t.lane = i % 32;
    t.warp->lanes[t.lane] = &t;
    t.id = id * threads_per_block + i;
    t.index = dim3(i % shape.x, i / shape.x % shape.y, i / shape.x / shape.y);
    give_stack(t, &thread_main);
    wake(&t);
  }
  return b;
}

void end_block(Block* b) {
  for (size_t i = dynamic_bytes; i < dynamic_bytes + GAP; i++)
    if (b->memory[i] != POISON) {
      report("a block wrote beyond its " + std::to_string(dynamic_bytes) + " bytes of dynamic shared memory");
      break;
    }
  for (Thread& t : b->threads) take_stack(t);
  spare_blocks.push_back(b);
}

Thread* next_thread() {
  if (order() >= RANDOM) {
    size_t chosen = draw(uint32_t(ready.size()));
    for (int tries = 0; order() == SKEWED && tries < 6; tries++) {
      const size_t other = draw(uint32_t(ready.size()));
      if (ready[other]->warp->priority > ready[chosen]->warp->priority) chosen = other;
    }
    std::swap(ready[chosen], ready.back());
  } else if (order() == IN_TURN) {
    Thread* t = ready.front();
    ready.pop_front();
    return t;
  }
  Thread* t = ready.back();
  ready.pop_back();
  return t;
}

std::string whereabouts() {
  std::map<std::string, int> count;
  for (Block* b : resident)
    for (Thread& t : b->threads) {
      if (t.state == State::at_barrier) count["at the __syncthreads of line " + std::to_string(b->line)]++;
      if (t.state == State::in_collective) count[std::string("in ") + t.warp->doing]++;
    }
  std::string text;
  for (const auto& [where, n] : count) text += " " + std::to_string(n) + " threads " + where + ";";
  return text;
}

// Runs until a block ends or nobody can run.
void run_threads() {
  while (!failed && !ready.empty()) {
    self = next_thread();
    const Block* block = self->block;
    resume();
    if (!block->running) break;
  }
  self = nullptr;
  quiet = false;
}

void run_blocks(std::vector<uint32_t>& waiting, size_t most) {
  while (!failed) {
    const auto ended = std::stable_partition(resident.begin(), resident.end(), [](Block* b) { return b->running > 0; });
    std::for_each(ended, resident.end(), end_block);
    resident.erase(ended, resident.end());
    for (; resident.size() < most && !waiting.empty(); waiting.pop_back())
      resident.push_back(start_block(waiting.back()));
    if (resident.empty()) return;
    run_threads();
    const bool stuck = std::all_of(resident.begin(), resident.end(), [](Block* b) { return b->running > 0; });
    if (!failed && ready.empty() && stuck) report("deadlock:" + whereabouts());
  }
}
}  // namespace

void yield() {
  self->state = State::ready;
  // In front, so that LAST_FIRST does not run the same thread again.
  if (order() == LAST_FIRST) ready.push_front(self);
  else ready.push_back(self);
  park();
}

void fail(const char* format, ...) {
  char text[700];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (!self) {
    fprintf(stderr, "emulator: %s\n", text);
    abort();
  }
  const dim3 b = self->block->index, t = self->index;
  char where[100];
  snprintf(where, sizeof where, "block (%u,%u,%u) thread (%u,%u,%u): ", b.x, b.y, b.z, t.x, t.y, t.z);
  report(where + std::string(text));
  park();
  abort();
}

dim3 thread_index() { return self->index; }
dim3 block_index() { return self->block->index; }
dim3 block_shape() { return shape; }
dim3 grid_shape() { return grid; }
unsigned char* shared_dynamic() { return self->block->memory; }
int lane() { return int(self->lane); }
void* shared(const void* identity, size_t bytes) {
  Block* b = self->block;
  const auto [place, fresh] = b->arrays.try_emplace(identity, b->used, bytes);
  if (fresh) b->used += (bytes + 31) / 16 * 16;  // 16 bytes or more between two arrays
  if (b->used > dynamic_bytes + GAP + STATIC_SHARED) fail("more than %zu bytes of static arrays", STATIC_SHARED);
  return b->at(place->second.first);
}

void barrier(int line) {
  Block* b = self->block;
  if (b->running != threads_per_block) fail("__syncthreads of line %d after threads have returned", line);
  if (b->arrived && b->line != line)
    fail("divergent __syncthreads: line %d here, line %d for %u others", line, b->line, b->arrived);
  b->line = line;
  self->state = State::at_barrier;
  if (++b->arrived == threads_per_block) {
    b->arrived = 0;
    b->answer = b->votes > 0;
    b->votes = 0;
    b->time++;
    for (Warp& w : b->warps) w.priority = draw(1 << 16);
    for (Thread& t : b->threads) {
      if (!t.knows.empty()) b->knows.join(t.knows);
      t.knows = {};
      wake(&t);
    }
  }
  park();
}

bool vote(int line, bool mine) {
  self->block->votes += mine;
  barrier(line);
  return self->block->answer;
}

void collective(const char* name, unsigned mask, void* operands, Apply apply, bool orders_memory) {
  Warp& w = *self->warp;
  if (!(mask >> self->lane & 1)) fail("%s: lane %u is not in its own mask %#x", name, self->lane, mask);
  if (!w.arrived) {
    w.doing = name;
    w.mask = mask;
  }
  if (std::strcmp(w.doing, name) || w.mask != mask)
    fail("divergent warp: %s with mask %#x here, %s with mask %#x in other lanes", name, mask, w.doing, w.mask);
  w.operands[self->lane] = operands;
  w.arrived |= 1u << self->lane;
  self->state = State::in_collective;
  if (w.arrived != mask) return park();
  quiet = true;
  apply(w.operands, mask);
  quiet = false;
  w.arrived = 0;
  if (orders_memory && mask == ~0u) {
    w.time++;
    Knowledge all;
    for (Thread* t : w.lanes) all.join(t->knows);
    if (!all.empty()) for (Thread* t : w.lanes) t->knows = all;
  }
  for (int l = 0; l < 32; l++)
    if (mask >> l & 1) wake(w.lanes[l]);
  park();
}

cudaError_t allow_shared(const void* kernel, int bytes) {
  if (size_t(bytes) > MOST_SHARED) return cudaErrorInvalidValue;
  shared_allowed[kernel] = bytes;
  return cudaSuccess;
}

void launch(const char* name, const void* kernel, dim3 g, dim3 b, size_t bytes, Body run, const void* with) {
  failed = false;
  message.clear();
  grid = g, shape = b, body = run, closure = with, dynamic_bytes = bytes;
  threads_per_block = b.x * b.y * b.z;
  const uint32_t blocks = g.x * g.y * g.z;
  const auto allowed = shared_allowed.find(kernel);
  const size_t limit = std::max<size_t>(49152, allowed == shared_allowed.end() ? 0 : allowed->second);
  if (!blocks || !threads_per_block || threads_per_block > 1024) return report(std::string(name) + ": bad grid or block");
  if (bytes > limit)
    return report(std::string(name) + ": dynamic shared memory beyond what cudaFuncSetAttribute allows");
  launch_number++;
  new_shared_memory(nullptr, SIZE_MAX);
  random_state = seed * 2654435761u + 12345;
  std::vector<uint32_t> waiting(blocks);
  for (uint32_t i = 0; i < blocks; i++) waiting[i] = order() == LAST_FIRST ? i : blocks - 1 - i;
  for (uint32_t i = blocks; order() >= RANDOM && i > 1; i--) std::swap(waiting[i - 1], waiting[draw(i)]);
  const size_t most = order() == IN_TURN ? 1 : std::min<size_t>(1 + draw(8), 4096 / threads_per_block + 1);
  ready.clear();
  run_blocks(waiting, most);
  if (failed) message = std::string(name) + ", " + message;
  for (Block* left : resident) end_block(left);
  resident.clear();
}
}  // namespace emulate

cudaError_t cudaGetLastError() { return emulate::failed ? cudaErrorLaunchFailure : cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return emulate::message.c_str(); }

extern "C" {
void emulate_seed(uint64_t s) { emulate::seed = s; }
uint64_t emulate_conflicts() { return emulate::take_conflicts(); }
uint64_t emulate_shared() { return emulate::dynamic_bytes; }
uint64_t emulate_launches() { return emulate::launch_number; }
void emulate_forget() { emulate::buffers.clear(); }
void emulate_buffer(const char* start, size_t bytes, int writable, int device) {
  emulate::Buffer b{bytes, writable != 0, device, {}};
  if (emulate_on_access) b.cells.resize(bytes / 2 + 2);
  emulate::buffers[start] = std::move(b);
}
}
