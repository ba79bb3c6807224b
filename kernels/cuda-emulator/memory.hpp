//! Device memory of the emulated driver: each allocation ends where a page that cannot be touched begins.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emu {

/// Memory that ends at `end`, where touching a byte more is a fault.
struct Guarded {
  unsigned char* start = nullptr;  // of the mapping
  unsigned char* end = nullptr;
  static Guarded reserve(size_t bytes);
  void release();
};

/// Allocates `bytes` filled with 0xff (a NaN in every format), 16-byte aligned; returns 0 or a CUresult.
int allocate(size_t bytes, uintptr_t* at);
int release(uintptr_t at);

/// Start and size of the allocation that a byte lies in; false when there is none.
bool allocation_of(uintptr_t at, uintptr_t* start, size_t* bytes);

/// True when all of the range lies in one allocation.
bool is_device_range(uintptr_t at, size_t bytes);

/// The size of the device and what is left of it, in bytes.
size_t total_memory();
size_t free_memory();

}  // namespace emu
