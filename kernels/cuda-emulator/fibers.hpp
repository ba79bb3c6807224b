//! The threads of one block as fibers: who runs, where they meet, and what stops a kernel.
//
//     launch ──block by block──> run_block ──warp by warp, lane by lane──> fiber
//                                    ^                                        │
//                                    └── waits at a barrier or a warp operation, ends, or faults
//
// One fiber runs at a time, until it has to wait; the order of warps and lanes turns round with every block. So a value
// that is read without the barrier it needs is poison in one of two blocks, and a meeting that some thread never
// reaches is noticed instead of hanging.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace emu {

struct Dim3 {
  unsigned x, y, z;
};

/// Where the running thread stands. Kernels read it as threadIdx and so on.
struct Now {
  Dim3 thread, block, block_dim, grid_dim;
};
extern Now now;

/// What lanes of a warp meet for; lanes that meet for different things are a fault.
enum class Meeting { sync, shuffle, vote, matrices, multiply };

/// What one lane brings to a meeting and takes away from it.
struct alignas(16) Slot {
  unsigned words[16];
};

/// Waits until all 32 lanes have brought `words` words; the slots stay valid until the lane's next meeting. The lane that
/// comes last runs `finish` (may be null) on the slots first.
const Slot* meet(Meeting what, const void* mine, size_t words, void (*finish)(Slot*) = nullptr);

/// Waits for every thread of the block that has not ended.
void meet_block();

/// Memory of the block behind a SHARED variable, told apart by its `key`; filled with 0xff for each block.
void* shared_memory(const void* key, size_t bytes);
void* dynamic_shared_memory();

/// A copy to shared memory that happens when its thread waits for its group; `from` null writes zeros.
void copy_later(void* to, const void* from);
void copy_group_end();
void copy_group_wait(unsigned pending);

/// Stops the kernel; the device is then in error, as CUDA's sticky errors are. `code` is a CUresult.
[[noreturn]] void fault(int code, const char* why);

constexpr int ILLEGAL_ADDRESS = 700, MISALIGNED_ADDRESS = 716, LAUNCH_FAILED = 719;

/// A kernel as the driver knows it: its name, and how arguments are copied from a launch's list of pointers.
struct Kernel {
  const char* name;
  unsigned max_threads;
  std::function<void()> (*bind)(void** arguments);
  std::vector<size_t> parameter_bytes;
};
void add_kernel(const Kernel& kernel);
const Kernel* find_kernel(const char* name);

struct Shape {
  Dim3 grid, block;
  size_t dynamic_shared_bytes;
};
/// Runs every block of a launch; returns 0 or the CUresult of the fault.
int run_grid(const Kernel& kernel, const std::function<void()>& body, const Shape& shape);

}  // namespace emu
