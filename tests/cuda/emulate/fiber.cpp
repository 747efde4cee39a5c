// Fibers: a stack for every thread in flight, and the switch between it and the scheduler.
#include <sys/mman.h>
#include <cstdlib>
#include "engine.h"

namespace emulate {
namespace {
void* scheduler_stack_pointer;
std::vector<char*> spare_stacks;

// x86-64: the callee-saved registers go on the old stack and come from the new one.
extern "C" void emulate_switch(void** save, void* load);
asm(R"(
.text
.hidden emulate_switch
.globl emulate_switch
.type emulate_switch, @function
emulate_switch:
  push %rbx
  push %rbp
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbp
  pop %rbx
  ret
.size emulate_switch, .-emulate_switch
)");
constexpr int SAVED_REGISTERS = 6;
}  // namespace

void give_stack(Thread& t, void (*entry)()) {
  if (spare_stacks.empty()) {
    constexpr int COUNT = 256;
    constexpr int FLAGS = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* fresh = mmap(nullptr, COUNT * STACK, PROT_READ | PROT_WRITE, FLAGS, -1, 0);
    if (fresh == MAP_FAILED) abort();
    for (int i = 0; i < COUNT; i++) spare_stacks.push_back(static_cast<char*>(fresh) + i * STACK);
  }
  t.stack = spare_stacks.back();
  spare_stacks.pop_back();
  // `ret` pops the entry, which then finds the stack as a call would leave it: 8 below a multiple of 16
  void** top = reinterpret_cast<void**>(t.stack + STACK) - 2;
  *top = reinterpret_cast<void*>(entry);
  t.stack_pointer = top - SAVED_REGISTERS;
}

void take_stack(Thread& t) { spare_stacks.push_back(t.stack); }
void resume() { emulate_switch(&scheduler_stack_pointer, self->stack_pointer); }
void park() { emulate_switch(&self->stack_pointer, scheduler_stack_pointer); }
}  // namespace emulate
