//! Runs the threads of a block as fibers; see `fibers.hpp`.
#include "fibers.hpp"

#include <sys/mman.h>

#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "memory.hpp"

#if defined(__x86_64__)
// Saves what a call preserves and changes stacks: some ten nanoseconds, where swapcontext makes two system calls.
asm(R"(
.text
.type cupola_switch_stack, @function
cupola_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
extern "C" void cupola_switch_stack(void** save, void* to);
#else
#error "the emulated driver switches fibers on x86-64 only"
#endif

namespace emu {

Now now;

namespace {

constexpr size_t STACK_BYTES = 256 << 10;
constexpr unsigned LANES = 32;

struct Copy {
  void* to;
  const void* from;
  unsigned group;
};

enum class State { ready, waits_for_warp, waits_for_block, ended };

struct Fiber {
  void* stack_pointer = nullptr;
  State state = State::ended;
  Dim3 id{};
  unsigned warp = 0, lane = 0;
  unsigned waits_for = 0;  // the warp's meeting that it has come to
  unsigned group = 0;      // copy groups ended so far
  std::vector<Copy> copies;
};

struct Warp {
  unsigned meeting = 0, present = 0;
  Meeting what{};
  Slot slots[2][LANES];  // by the parity of `meeting`: a lane can be at most one meeting ahead of another
};

struct SharedVariable {
  const void* key;
  unsigned char* at;
  size_t bytes;
};

// State of the one launch that runs; the driver holds a lock around it.
std::vector<Fiber> fibers;
std::vector<unsigned char*> stacks;
std::vector<Warp> warps;
Fiber* running = nullptr;
void* scheduler_stack = nullptr;
sigjmp_buf abandon;
int fault_code = 0;
const Kernel* kernel_now = nullptr;
const std::function<void()>* body_now = nullptr;
size_t dynamic_bytes = 0;

// Static variables, each followed by a canary; dynamic memory ends where a page that cannot be touched begins.
constexpr size_t STATIC_LIMIT = 48 << 10, CANARY = 64;
std::vector<SharedVariable> shared_variables;
unsigned char* static_arena = nullptr;
size_t static_used = 0;
Guarded dynamic_arena;

std::unordered_map<std::string, Kernel>& kernels() {
  static std::unordered_map<std::string, Kernel> all;
  return all;
}

void pause(State state) {
  Fiber* self = running;
  self->state = state;
  cupola_switch_stack(&self->stack_pointer, scheduler_stack);
}

void fiber_main() {
  (*body_now)();
  pause(State::ended);
  std::abort();  // an ended fiber is never resumed
}

void resume(Fiber& fiber) {
  running = &fiber;
  now.thread = fiber.id;
  fiber.state = State::ready;
  cupola_switch_stack(&scheduler_stack, fiber.stack_pointer);
  running = nullptr;
}

void start(Fiber& fiber, unsigned char* stack) {
  auto* top = reinterpret_cast<void**>(stack + STACK_BYTES);
  *--top = nullptr;  // keeps the stack 16-byte aligned at entry, as after a call
  *--top = reinterpret_cast<void*>(&fiber_main);
  top -= 6;  // the registers that the switch pops
  std::memset(top, 0, 6 * sizeof(void*));
  fiber.stack_pointer = top;
  fiber.state = State::ready;
  fiber.copies.clear();
  fiber.group = 0;
}

void check_canaries() {
  for (const auto& variable : shared_variables)
    for (size_t i = 0; i < CANARY; i++)
      if (variable.at[variable.bytes + i] != 0xff) fault(ILLEGAL_ADDRESS, "a write past the end of a SHARED variable");
}

void prepare_block(unsigned threads) {
  shared_variables.clear();
  static_used = 0;
  std::memset(dynamic_arena.end - dynamic_bytes, 0xff, dynamic_bytes);
  for (auto& warp : warps) warp.meeting = warp.present = 0;
  for (unsigned i = 0; i < threads; i++) start(fibers[i], stacks[i]);
}

/// Runs the fibers of a warp until none of them can go on.
void run_warp(unsigned warp, bool backwards) {
  for (bool moved = true; moved;) {
    moved = false;
    for (unsigned i = 0; i < LANES; i++) {
      Fiber& fiber = fibers[warp * LANES + (backwards ? LANES - 1 - i : i)];
      bool met = fiber.state == State::waits_for_warp && warps[warp].meeting != fiber.waits_for;
      if (fiber.state != State::ready && !met) continue;
      resume(fiber);
      moved = true;
    }
  }
}

void run_block(unsigned threads, bool backwards) {
  prepare_block(threads);
  for (;;) {
    for (unsigned i = 0; i < warps.size(); i++) run_warp(backwards ? (unsigned)warps.size() - 1 - i : i, backwards);
    unsigned waiting = 0;
    for (auto& fiber : fibers) {
      if (fiber.state == State::waits_for_warp) {
        running = &fiber;
        now.thread = fiber.id;
        fault(LAUNCH_FAILED, "a warp operation that some lanes of the warp never reach");
      }
      if (fiber.state == State::waits_for_block) {
        fiber.state = State::ready;
        waiting++;
      }
    }
    if (waiting == 0) break;
  }
  check_canaries();
}

void reserve(unsigned threads) {
  while (stacks.size() < threads) {
    void* stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) std::abort();
    stacks.push_back(static_cast<unsigned char*>(stack));
  }
  if (!static_arena) static_arena = new unsigned char[STATIC_LIMIT + 64 * (CANARY + 16)];
  if (!dynamic_arena.start) dynamic_arena = Guarded::reserve(256 << 10);
  fibers.resize(threads);
  warps.resize(threads / LANES);
}

// A touch of a guard page while a kernel runs is that kernel's fault; any other is the process's own.
struct sigaction process_handler;
void on_bad_access(int signal, siginfo_t* info, void* context) {
  if (running) {
    char why[128];
    std::snprintf(why, sizeof why, "an access to %p, outside of every allocation", info->si_addr);
    fault(ILLEGAL_ADDRESS, why);
  }
  if (process_handler.sa_flags & SA_SIGINFO)
    process_handler.sa_sigaction(signal, info, context);
  else
    sigaction(signal, &process_handler, nullptr);  // the access happens again, with the default consequence
}

/// Handles bad accesses for as long as it lives.
struct BadAccesses {
  BadAccesses() {
    struct sigaction ours {};
    ours.sa_sigaction = on_bad_access;
    ours.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &ours, &process_handler);
  }
  ~BadAccesses() { sigaction(SIGSEGV, &process_handler, nullptr); }
};

}  // namespace

void add_kernel(const Kernel& kernel) {
  if (!kernels().emplace(kernel.name, kernel).second) {
    std::fprintf(stderr, "emulated driver: two kernels are called %s\n", kernel.name);
    std::abort();
  }
}

const Kernel* find_kernel(const char* name) {
  auto found = kernels().find(name);
  return found == kernels().end() ? nullptr : &found->second;
}

void fault(int code, const char* why) {
  std::fprintf(stderr, "emulated driver: %s (error %d) in kernel %s, block (%u, %u, %u), thread %u\n", why, code,
               kernel_now ? kernel_now->name : "?", now.block.x, now.block.y, now.block.z, now.thread.x);
  fault_code = code;
  running = nullptr;
  siglongjmp(abandon, 1);
}

const Slot* meet(Meeting what, const void* mine, size_t words, void (*finish)(Slot*)) {
  Fiber* self = running;
  Warp& warp = warps[self->warp];
  unsigned meeting = warp.meeting;
  Slot* slots = warp.slots[meeting % 2];
  if (words) std::memcpy(slots[self->lane].words, mine, 4 * words);
  if (warp.present == 0) warp.what = what;
  if (warp.what != what) fault(LAUNCH_FAILED, "lanes of one warp meet in different warp operations");
  if (++warp.present == LANES) {
    if (finish) finish(slots);
    warp.present = 0;
    warp.meeting++;
  } else {
    self->waits_for = meeting;
    pause(State::waits_for_warp);
  }
  return slots;
}

void meet_block() { pause(State::waits_for_block); }

void* shared_memory(const void* key, size_t bytes) {
  for (const auto& variable : shared_variables)
    if (variable.key == key) return variable.at;
  size_t at = (static_used + 15) / 16 * 16;
  if (at + bytes > STATIC_LIMIT + shared_variables.size() * CANARY || shared_variables.size() == 64)
    fault(LAUNCH_FAILED, "more than 48 KiB of static shared memory");
  std::memset(static_arena + at, 0xff, bytes + CANARY);
  shared_variables.push_back({key, static_arena + at, bytes});
  static_used = at + bytes + CANARY;
  return static_arena + at;
}

void* dynamic_shared_memory() { return dynamic_arena.end - dynamic_bytes; }

void copy_later(void* to, const void* from) { running->copies.push_back({to, from, running->group}); }

void copy_group_end() { running->group++; }

void copy_group_wait(unsigned pending) {
  Fiber* self = running;
  size_t kept = 0;
  for (size_t i = 0; i < self->copies.size(); i++) {
    Copy copy = self->copies[i];
    if (copy.group + pending >= self->group)
      self->copies[kept++] = copy;
    else if (copy.from)
      std::memcpy(copy.to, copy.from, 16);
    else
      std::memset(copy.to, 0, 16);
  }
  self->copies.resize(kept);
}

int run_grid(const Kernel& kernel, const std::function<void()>& body, const Shape& shape) {
  const unsigned threads = shape.block.x * shape.block.y * shape.block.z;
  static bool backwards = false;
  fault_code = 0;
  kernel_now = &kernel;
  body_now = &body;
  dynamic_bytes = (shape.dynamic_shared_bytes + 15) / 16 * 16;
  now = {{}, {}, shape.block, shape.grid};
  reserve(threads);
  BadAccesses handled;
  if (sigsetjmp(abandon, 1) != 0) return fault_code;
  if (threads % LANES != 0 || shape.block.y != 1 || shape.block.z != 1)
    fault(LAUNCH_FAILED, "a block that is not a row of whole warps");
  for (unsigned i = 0; i < threads; i++) {
    fibers[i].id = {i, 0, 0};
    fibers[i].warp = i / LANES;
    fibers[i].lane = i % LANES;
  }
  for (now.block.z = 0; now.block.z < shape.grid.z; now.block.z++)
    for (now.block.y = 0; now.block.y < shape.grid.y; now.block.y++)
      for (now.block.x = 0; now.block.x < shape.grid.x; now.block.x++) {
        run_block(threads, backwards);
        backwards = !backwards;
      }
  return 0;
}

}  // namespace emu
