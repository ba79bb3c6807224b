//! Device memory of the emulated driver; see `memory.hpp`.
#include "memory.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace emu {
namespace {

constexpr int INVALID_VALUE = 1, OUT_OF_MEMORY = 2;
constexpr unsigned char POISON = 0xff;

struct Allocation {
  Guarded guarded;
  size_t bytes;
};

std::mutex lock;
std::map<uintptr_t, Allocation> allocations;
size_t used = 0;

size_t from_environment(const char* name, size_t otherwise) {
  const char* set = std::getenv(name);
  return set ? (size_t)std::strtoull(set, nullptr, 10) : otherwise;
}

size_t page() {
  static const size_t bytes = (size_t)sysconf(_SC_PAGESIZE);
  return bytes;
}

}  // namespace

Guarded Guarded::reserve(size_t bytes) {
  size_t whole = (bytes + page() - 1) / page() * page();
  void* start = mmap(nullptr, whole + page(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) return {};
  Guarded guarded{static_cast<unsigned char*>(start), static_cast<unsigned char*>(start) + whole};
  mprotect(guarded.end, page(), PROT_NONE);
  return guarded;
}

void Guarded::release() { munmap(start, (size_t)(end - start) + page()); }

size_t total_memory() {
  static const size_t bytes = from_environment("CUPOLA_EMULATOR_MEMORY", (size_t)1 << 30);
  return bytes;
}

size_t free_memory() {
  std::lock_guard<std::mutex> held(lock);
  return total_memory() - used;
}

int allocate(size_t bytes, uintptr_t* at) {
  if (bytes == 0) return INVALID_VALUE;
  std::lock_guard<std::mutex> held(lock);
  size_t rounded = (bytes + 15) / 16 * 16;
  static const size_t others = from_environment("CUPOLA_EMULATOR_OTHERS", 0);
  if (rounded > total_memory() - std::min(used + others, total_memory())) return OUT_OF_MEMORY;
  Guarded guarded = Guarded::reserve(rounded);
  if (!guarded.start) return OUT_OF_MEMORY;
  auto* start = guarded.end - rounded;
  std::memset(start, POISON, rounded);
  *at = reinterpret_cast<uintptr_t>(start);
  allocations[*at] = {guarded, bytes};
  used += rounded;
  return 0;
}

int release(uintptr_t at) {
  std::lock_guard<std::mutex> held(lock);
  auto found = allocations.find(at);
  if (found == allocations.end()) return INVALID_VALUE;
  auto& [guarded, bytes] = found->second;
  size_t rounded = (bytes + 15) / 16 * 16;
  auto* start = reinterpret_cast<unsigned char*>(at);
  // What rounding added belongs to nobody, and neither do the bytes before the start in its first page.
  bool torn = false;
  for (size_t i = bytes; i < rounded; i++) torn |= start[i] != POISON;
  for (auto* before = guarded.start; before < start; before++) torn |= *before != 0;
  if (torn) std::fprintf(stderr, "emulated driver: something was written just outside an allocation of %zu bytes\n", bytes);
  guarded.release();
  used -= rounded;
  allocations.erase(found);
  return torn ? 700 : 0;
}

bool allocation_of(uintptr_t at, uintptr_t* start, size_t* bytes) {
  std::lock_guard<std::mutex> held(lock);
  auto after = allocations.upper_bound(at);
  if (after == allocations.begin()) return false;
  auto& [first, allocation] = *--after;
  *start = first;
  *bytes = allocation.bytes;
  return at < first + allocation.bytes;
}

bool is_device_range(uintptr_t at, size_t bytes) {
  std::lock_guard<std::mutex> held(lock);
  auto after = allocations.upper_bound(at);
  if (after == allocations.begin()) return false;
  auto& [start, allocation] = *--after;
  return at + bytes <= start + allocation.bytes;
}

}  // namespace emu
