//! The CUDA driver API over fibers: the functions of libcuda.so.1 that the `cuda` backend reaches, by the public ABI.
//
//     cuLaunchKernel, copies, memsets ──> queue ──someone waits──> done, in the order of submission
//                │                          ^                        │ sticky error: a kernel's fault,
//                └─> graph, while captured ─┘ at each launch         v or the file of CUPOLA_EMULATOR_FAIL_FILE
//
// Work is done as late as the API allows: when the host waits for it, or when a lot has piled up. So what the host changes
// too early in memory that the device has yet to read, or reads before the device has written it, shows in the results.
//
// Settings, from the environment:
//     CUPOLA_EMULATOR_MEMORY      bytes of device memory (1 GiB)
//     CUPOLA_EMULATOR_OTHERS      bytes of it that cannot be had although they are said to be free (0)
//     CUPOLA_EMULATOR_DEVICES     number of devices, 0 for none (1)
//     CUPOLA_EMULATOR_FAIL_FILE   once this file exists, the next launch is an illegal access
//     CUPOLA_EMULATOR_NO_GRAPHS   set: streams cannot be captured
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fibers.hpp"
#include "memory.hpp"

using Result = int;
using Pointer = unsigned long long;

namespace {

enum : Result {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  NOT_INITIALIZED = 3,
  NO_DEVICE = 100,
  INVALID_DEVICE = 101,
  INVALID_IMAGE = 200,
  INVALID_HANDLE = 400,
  NOT_FOUND = 500,
  NOT_READY = 600,
  OUT_OF_RESOURCES = 701,
  CAPTURE_UNSUPPORTED = 900,
  CAPTURE_INVALIDATED = 901,
  CAPTURED_EVENT = 907,
};

/// What the smallest supported device allows one block (compute capability 8.6 and 8.9).
constexpr int SHARED_DEFAULT = 48 << 10, SHARED_OPT_IN = 99 << 10, PROCESSORS = 4;

/// What can wait in the queue before the device is taken to have done half of it by itself.
constexpr size_t QUEUE_WORK = 4096, QUEUE_BYTES = 64 << 20;

using Work = std::function<Result()>;
struct Graph {
  std::vector<Work> work;
};
struct Stream {
  Graph* captured = nullptr;
  bool invalid = false;
};
struct Event {
  std::chrono::steady_clock::time_point at;
  unsigned long long ticket = 0;  // of the work that it was recorded behind
  bool captured = false;
};
struct Function {
  const emu::Kernel* kernel;
  int dynamic_limit = SHARED_DEFAULT;
};

std::recursive_mutex lock;
bool initialised = false;
Result sticky = SUCCESS;
Stream default_stream;
/// Streams being captured, each restricting the thread that began it alone (CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).
std::vector<std::pair<Stream*, std::thread::id>> capturing;
/// Work of all streams, in the order of submission: with one device that is an order which every program has to expect.
std::deque<Work> queue;
unsigned long long submitted = 0, done = 0;
size_t queued_bytes = 0;  // of host memory that was copied on submission
/// Page-locked host memory: the device reads and writes it when the work is done, all other memory on submission.
std::map<uintptr_t, size_t> pinned;
int context, pool;
thread_local void* current = nullptr;

Stream& of(void* stream) { return reinterpret_cast<uintptr_t>(stream) <= 2 ? default_stream : *static_cast<Stream*>(stream); }

int devices() {
  const char* set = std::getenv("CUPOLA_EMULATOR_DEVICES");
  return set ? std::atoi(set) : 1;
}

/// Does the work up to a ticket.
Result wait_for(unsigned long long ticket) {
  while (done < ticket) {
    Work work = std::move(queue.front());
    queue.pop_front();
    done++;
    if (!sticky) sticky = work();
  }
  if (queue.empty()) queued_bytes = 0;
  return sticky;
}
Result wait_for_all() { return wait_for(submitted); }

/// Queues the work, or keeps it for the graph of a captured stream.
Result submit(void* stream, Work work) {
  std::lock_guard<std::recursive_mutex> held(lock);
  if (sticky) return sticky;
  Stream& on = of(stream);
  if (on.invalid) return CAPTURE_INVALIDATED;
  if (on.captured) return on.captured->work.push_back(std::move(work)), SUCCESS;
  queue.push_back(std::move(work));
  submitted++;
  if (queue.size() > QUEUE_WORK) wait_for(submitted - QUEUE_WORK / 2);
  return queued_bytes > QUEUE_BYTES ? wait_for_all() : sticky;
}

/// What a call that waits, allocates or loads may not do while a stream is captured; the capture is then of no use.
Result not_captured() {
  if (sticky) return sticky;
  Result result = SUCCESS;
  for (auto& [stream, thread] : capturing)
    if (thread == std::this_thread::get_id()) stream->invalid = true, result = CAPTURE_UNSUPPORTED;
  return result;
}

bool is_pinned(const void* at, size_t bytes) {
  auto after = pinned.upper_bound((uintptr_t)at);
  if (after == pinned.begin()) return false;
  auto& [start, size] = *--after;
  return (uintptr_t)at + bytes <= start + size;
}

bool file_says_fail() {
  static const char* file = std::getenv("CUPOLA_EMULATOR_FAIL_FILE");
  return file && access(file, F_OK) == 0;
}

bool on_device(Pointer at, size_t bytes) { return emu::is_device_range((uintptr_t)at, bytes); }
void* host(Pointer at) { return reinterpret_cast<void*>((uintptr_t)at); }

Result fill(void* stream, Pointer at, unsigned char value, size_t bytes) {
  if (bytes && !on_device(at, bytes)) return INVALID_VALUE;
  return submit(stream, [=] {
    std::memset(host(at), value, bytes);
    return SUCCESS;
  });
}
Result to_device(void* stream, Pointer to, const void* from, size_t bytes) {
  std::lock_guard<std::recursive_mutex> held(lock);
  if (bytes == 0) return SUCCESS;
  if (!on_device(to, bytes)) return INVALID_VALUE;
  if (is_pinned(from, bytes)) return submit(stream, [=] { return std::memcpy(host(to), from, bytes), SUCCESS; });
  // A graph would read the host's memory at each launch, long after the caller let go of it.
  if (of(stream).captured) return not_captured();
  auto* start = static_cast<const unsigned char*>(from);
  auto copy = std::make_shared<std::vector<unsigned char>>(start, start + bytes);
  queued_bytes += bytes;
  return submit(stream, [=] { return std::memcpy(host(to), copy->data(), bytes), SUCCESS; });
}
Result from_device(void* stream, void* to, Pointer from, size_t bytes) {
  std::lock_guard<std::recursive_mutex> held(lock);
  if (bytes == 0) return SUCCESS;
  if (!on_device(from, bytes)) return INVALID_VALUE;
  Work work = [=] { return std::memcpy(to, host(from), bytes), SUCCESS; };
  if (is_pinned(to, bytes)) return submit(stream, work);
  if (of(stream).captured) return not_captured();
  Result result = submit(stream, work);
  return result ? result : wait_for_all();
}
Result within_device(void* stream, Pointer to, Pointer from, size_t bytes) {
  if (bytes == 0) return SUCCESS;
  if (!on_device(to, bytes) || !on_device(from, bytes)) return INVALID_VALUE;
  return submit(stream, [=] { return std::memmove(host(to), host(from), bytes), SUCCESS; });
}
/// A call that returns when its work is done.
Result waiting(const std::function<Result()>& call) {
  std::lock_guard<std::recursive_mutex> held(lock);
  if (Result result = not_captured()) return result;
  Result result = call();
  return result ? result : wait_for_all();
}
Result allocate(Pointer* at, size_t bytes) {
  uintptr_t start = 0;
  Result result = emu::allocate(bytes, &start);
  // What is freed by work that was submitted is there once that is done.
  if (result == OUT_OF_MEMORY && !wait_for_all()) result = emu::allocate(bytes, &start);
  *at = start;
  return result;
}

}  // namespace

extern "C" {

// ---- device and context ----

Result cuInit(unsigned) {
  if (devices() == 0) return NO_DEVICE;
  initialised = true;
  return SUCCESS;
}
Result cuDriverGetVersion(int* version) { return *version = 13000, SUCCESS; }
Result cuDeviceGetCount(int* count) { return *count = devices(), initialised ? SUCCESS : NOT_INITIALIZED; }
Result cuDeviceGet(int* device, int ordinal) {
  if (!initialised) return NOT_INITIALIZED;
  if (ordinal < 0 || ordinal >= devices()) return INVALID_DEVICE;
  return *device = ordinal, SUCCESS;
}
Result cuDeviceGetName(char* name, int length, int) { return std::snprintf(name, (size_t)length, "Emulated device (CPU)"), SUCCESS; }
Result cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = emu::total_memory(), SUCCESS; }
Result cuDeviceGetUuid_v2(char* uuid, int) { return std::memset(uuid, 0, 16), SUCCESS; }
Result cuDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case 1: return *value = 1024, SUCCESS;             // threads per block
    case 8: return *value = SHARED_DEFAULT, SUCCESS;   // shared memory per block
    case 10: return *value = 32, SUCCESS;              // warp
    case 13: return *value = 1000000, SUCCESS;         // clock, kHz
    case 16: return *value = PROCESSORS, SUCCESS;      // multiprocessors
    case 36: return *value = 1000000, SUCCESS;         // memory clock, kHz
    case 37: return *value = 128, SUCCESS;             // memory bus, bits
    case 38: return *value = 4 << 20, SUCCESS;         // second-level cache, bytes
    case 39: return *value = 2048, SUCCESS;            // threads per multiprocessor
    case 75: return *value = 8, SUCCESS;               // compute capability
    case 76: return *value = 0, SUCCESS;
    case 81: return *value = 100 << 10, SUCCESS;       // shared memory per multiprocessor
    case 97: return *value = SHARED_OPT_IN, SUCCESS;   // shared memory per block, on request
    case 115: return *value = 1, SUCCESS;              // memory pools
    default: return *value = 0, SUCCESS;
  }
}
Result cuDevicePrimaryCtxRetain(void** made, int) { return *made = &context, SUCCESS; }
Result cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
Result cuCtxSetCurrent(void* to) { return current = to, SUCCESS; }
Result cuCtxGetCurrent(void** is) { return *is = current, SUCCESS; }
Result cuCtxSynchronize() {
  return waiting([] { return SUCCESS; });
}
Result cuDeviceGetDefaultMemPool(void** made, int) { return *made = &pool, SUCCESS; }
Result cuMemPoolSetAttribute(void*, int, void*) { return SUCCESS; }
Result cuMemPoolTrimTo(void*, size_t) { return SUCCESS; }

Result cuGetErrorName(Result error, const char** name) {
  switch (error) {
    case SUCCESS: *name = "CUDA_SUCCESS"; break;
    case INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; break;
    case OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; break;
    case NO_DEVICE: *name = "CUDA_ERROR_NO_DEVICE"; break;
    case emu::ILLEGAL_ADDRESS: *name = "CUDA_ERROR_ILLEGAL_ADDRESS"; break;
    case emu::MISALIGNED_ADDRESS: *name = "CUDA_ERROR_MISALIGNED_ADDRESS"; break;
    case emu::LAUNCH_FAILED: *name = "CUDA_ERROR_LAUNCH_FAILED"; break;
    case OUT_OF_RESOURCES: *name = "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"; break;
    case CAPTURE_UNSUPPORTED: *name = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"; break;
    case CAPTURE_INVALIDATED: *name = "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"; break;
    default: *name = "CUDA_ERROR_UNKNOWN"; break;
  }
  return SUCCESS;
}
Result cuGetErrorString(Result error, const char** text) {
  switch (error) {
    case OUT_OF_MEMORY: *text = "out of memory"; break;
    case NO_DEVICE: *text = "no CUDA-capable device is detected"; break;
    case emu::ILLEGAL_ADDRESS: *text = "an illegal memory access was encountered"; break;
    case emu::MISALIGNED_ADDRESS: *text = "misaligned address"; break;
    case CAPTURE_UNSUPPORTED: *text = "operation not permitted when stream is capturing"; break;
    case CAPTURE_INVALIDATED: *text = "operation failed due to a previous error during capture"; break;
    default: *text = "an error of the emulated driver"; break;
  }
  return SUCCESS;
}

// ---- memory ----

Result cuMemAlloc_v2(Pointer* at, size_t bytes) {
  std::lock_guard<std::recursive_mutex> held(lock);
  Result result = not_captured();
  return result ? result : allocate(at, bytes);
}
Result cuMemFree_v2(Pointer at) {
  return waiting([=]() -> Result { return at ? sticky = emu::release((uintptr_t)at) : SUCCESS; });
}
Result cuMemAllocAsync(Pointer* at, size_t bytes, void*) { return cuMemAlloc_v2(at, bytes); }
Result cuMemFreeAsync(Pointer at, void* stream) {
  std::lock_guard<std::recursive_mutex> held(lock);
  if (Result result = not_captured()) return result;
  return submit(stream, [=]() -> Result { return at ? emu::release((uintptr_t)at) : SUCCESS; });
}
Result cuMemGetInfo_v2(size_t* left, size_t* total) {
  std::lock_guard<std::recursive_mutex> held(lock);
  wait_for_all();
  *left = emu::free_memory();
  *total = emu::total_memory();
  return sticky;
}
Result cuMemGetAddressRange_v2(Pointer* start, size_t* bytes, Pointer at) {
  uintptr_t first = 0;
  if (!emu::allocation_of((uintptr_t)at, &first, bytes)) return NOT_FOUND;
  return *start = first, SUCCESS;
}
Result cuMemHostAlloc(void** at, size_t bytes, unsigned) {
  std::lock_guard<std::recursive_mutex> held(lock);
  if (Result result = not_captured()) return result;
  *at = std::malloc(bytes);
  if (!*at) return OUT_OF_MEMORY;
  std::memset(*at, 0xff, bytes);
  return pinned[(uintptr_t)*at] = bytes, SUCCESS;
}
Result cuMemAllocHost_v2(void** at, size_t bytes) { return cuMemHostAlloc(at, bytes, 0); }
Result cuMemFreeHost(void* at) {
  std::lock_guard<std::recursive_mutex> held(lock);
  if (!pinned.count((uintptr_t)at)) return INVALID_VALUE;
  // A driver does not wait here: what still reads the memory is the caller's mistake, and shows.
  pinned.erase((uintptr_t)at);
  return std::free(at), sticky;
}

Result cuMemcpyHtoDAsync_v2(Pointer to, const void* from, size_t bytes, void* stream) { return to_device(stream, to, from, bytes); }
Result cuMemcpyDtoHAsync_v2(void* to, Pointer from, size_t bytes, void* stream) { return from_device(stream, to, from, bytes); }
Result cuMemcpyDtoDAsync_v2(Pointer to, Pointer from, size_t bytes, void* stream) { return within_device(stream, to, from, bytes); }
Result cuMemcpyHtoD_v2(Pointer to, const void* from, size_t bytes) {
  return waiting([=] { return to_device(nullptr, to, from, bytes); });
}
Result cuMemcpyDtoH_v2(void* to, Pointer from, size_t bytes) {
  return waiting([=] { return from_device(nullptr, to, from, bytes); });
}
Result cuMemcpyDtoD_v2(Pointer to, Pointer from, size_t bytes) { return cuMemcpyDtoDAsync_v2(to, from, bytes, nullptr); }
Result cuMemsetD8Async(Pointer at, unsigned char value, size_t bytes, void* stream) { return fill(stream, at, value, bytes); }
Result cuMemsetD8_v2(Pointer at, unsigned char value, size_t bytes) { return fill(nullptr, at, value, bytes); }

// ---- streams and events ----

Result cuStreamCreateWithPriority(void** made, unsigned, int) { return *made = new Stream, SUCCESS; }
Result cuStreamCreate(void** made, unsigned flags) { return cuStreamCreateWithPriority(made, flags, 0); }
Result cuStreamDestroy_v2(void* stream) { return delete static_cast<Stream*>(stream), SUCCESS; }
Result cuStreamSynchronize(void* stream) {
  std::lock_guard<std::recursive_mutex> held(lock);
  if (!of(stream).captured) return wait_for_all();
  of(stream).invalid = true;
  return CAPTURE_UNSUPPORTED;
}
Result cuStreamQuery(void* stream) { return cuStreamSynchronize(stream); }
Result cuStreamWaitEvent(void*, void*, unsigned) { return sticky; }
Result cuEventCreate(void** made, unsigned) { return *made = new Event{std::chrono::steady_clock::now()}, SUCCESS; }
Result cuEventRecord(void* event, void* stream) {
  std::lock_guard<std::recursive_mutex> held(lock);
  auto* recorded = static_cast<Event*>(event);
  // In a graph it stands for an order of work and cannot be waited for.
  recorded->captured = of(stream).captured;
  if (recorded->captured) return SUCCESS;
  Result result = submit(stream, [recorded] { return recorded->at = std::chrono::steady_clock::now(), SUCCESS; });
  recorded->ticket = submitted;
  return result;
}
Result cuEventSynchronize(void* event) {
  std::lock_guard<std::recursive_mutex> held(lock);
  if (Result result = not_captured()) return result;
  auto* waited = static_cast<Event*>(event);
  return waited->captured ? CAPTURED_EVENT : wait_for(waited->ticket);
}
Result cuEventQuery(void* event) {
  std::lock_guard<std::recursive_mutex> held(lock);
  if (Result result = not_captured()) return result;
  auto* asked = static_cast<Event*>(event);
  if (asked->captured) return CAPTURED_EVENT;
  if (done >= asked->ticket) return sticky;
  // Whoever asks again and again gets there.
  Result result = wait_for(done + 1);
  return result ? result : NOT_READY;
}
Result cuEventElapsedTime_v2(float* milliseconds, void* start, void* end) {
  auto span = static_cast<Event*>(end)->at - static_cast<Event*>(start)->at;
  *milliseconds = std::chrono::duration<float, std::milli>(span).count();
  return sticky;
}
Result cuEventElapsedTime(float* milliseconds, void* start, void* end) { return cuEventElapsedTime_v2(milliseconds, start, end); }
Result cuEventDestroy_v2(void* event) {
  std::lock_guard<std::recursive_mutex> held(lock);
  wait_for(static_cast<Event*>(event)->ticket);
  return delete static_cast<Event*>(event), SUCCESS;
}

// ---- modules and launches ----

Result cuModuleLoadData(void** module, const void* image) {
  constexpr unsigned FATBIN_MAGIC = 0xba55ed50;
  unsigned magic;
  std::memcpy(&magic, image, sizeof magic);
  if (magic != FATBIN_MAGIC) return INVALID_IMAGE;
  std::lock_guard<std::recursive_mutex> held(lock);
  if (Result result = not_captured()) return result;
  return *module = &context, SUCCESS;
}
Result cuModuleUnload(void*) { return SUCCESS; }
Result cuModuleGetFunction(void** function, void*, const char* name) {
  const emu::Kernel* kernel = emu::find_kernel(name);
  if (!kernel) return NOT_FOUND;
  return *function = new Function{kernel}, SUCCESS;  // as long as its module, which is never unloaded
}
Result cuFuncSetAttribute(void* function, int attribute, int value) {
  constexpr int MAX_DYNAMIC_SHARED = 8;
  if (attribute != MAX_DYNAMIC_SHARED) return SUCCESS;
  if (value < 0 || value > SHARED_OPT_IN) return INVALID_VALUE;
  return static_cast<Function*>(function)->dynamic_limit = value, SUCCESS;
}
Result cuFuncGetAttribute(int* value, int attribute, void* function) {
  auto* of_kernel = static_cast<Function*>(function);
  *value = attribute == 0 ? (int)of_kernel->kernel->max_threads : attribute == 8 ? of_kernel->dynamic_limit : 0;
  return SUCCESS;
}
Result cuFuncGetParamInfo(void* function, size_t index, size_t* offset, size_t* bytes) {
  const auto& all = static_cast<Function*>(function)->kernel->parameter_bytes;
  if (index >= all.size()) return INVALID_VALUE;
  *offset = 0;  // not asked for
  return *bytes = all[index], SUCCESS;
}
Result cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, void*, int threads, size_t shared, unsigned) {
  int by_threads = 2048 / threads, by_memory = shared ? (int)((100 << 10) / shared) : by_threads;
  return *blocks = by_threads < by_memory ? by_threads : by_memory, SUCCESS;
}
Result cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* function, int threads, size_t shared) {
  return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}

Result cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                      unsigned shared, void* stream, void** arguments, void**) {
  if (!function) return INVALID_HANDLE;
  auto& launched = *static_cast<Function*>(function);
  const emu::Kernel& kernel = *launched.kernel;
  unsigned long long threads = (unsigned long long)bx * by * bz;
  if (gx == 0 || gx > 0x7fffffffu || gy == 0 || gy > 65535 || gz == 0 || gz > 65535 || threads == 0 || threads > 1024 ||
      shared > (unsigned)launched.dynamic_limit) {
    std::fprintf(stderr, "emulated driver: %s cannot be launched with grid (%u, %u, %u), block (%u, %u, %u), %u bytes of shared memory\n",
                 kernel.name, gx, gy, gz, bx, by, bz, shared);
    return INVALID_VALUE;
  }
  if (threads > kernel.max_threads) return OUT_OF_RESOURCES;
  emu::Shape shape{{gx, gy, gz}, {bx, by, bz}, shared};
  return submit(stream, [&kernel, shape, body = kernel.bind(arguments)]() -> Result {
    if (file_says_fail()) return emu::ILLEGAL_ADDRESS;
    return emu::run_grid(kernel, body, shape);
  });
}

/// A function of the host, called when the stream gets there.
Result cuLaunchHostFunc(void* stream, void (*function)(void*), void* data) {
  return submit(stream, [=] { return function(data), SUCCESS; });
}

// ---- graphs: the work of a captured stream, done again at each launch ----

Result cuStreamBeginCapture_v2(void* stream, int) {
  std::lock_guard<std::recursive_mutex> held(lock);
  if (of(stream).captured) return INVALID_VALUE;
  if (std::getenv("CUPOLA_EMULATOR_NO_GRAPHS")) return CAPTURE_UNSUPPORTED;
  of(stream) = {new Graph, false};
  capturing.emplace_back(&of(stream), std::this_thread::get_id());
  return sticky;
}
Result cuStreamEndCapture(void* stream, void** graph) {
  std::lock_guard<std::recursive_mutex> held(lock);
  Stream& on = of(stream);
  *graph = nullptr;
  if (!on.captured) return INVALID_VALUE;
  for (size_t i = 0; i < capturing.size(); i++)
    if (capturing[i].first == &on) capturing.erase(capturing.begin() + (long)i--);
  Stream ended = std::exchange(on, {});
  if (ended.invalid) return delete ended.captured, CAPTURE_INVALIDATED;
  return *graph = ended.captured, sticky;
}
Result cuStreamIsCapturing(void* stream, int* status) {
  return *status = of(stream).invalid ? 2 : of(stream).captured ? 1 : 0, SUCCESS;
}
using Executable = std::shared_ptr<Graph>;
Result cuGraphInstantiateWithFlags(void** made, void* graph, unsigned long long) {
  std::lock_guard<std::recursive_mutex> held(lock);
  if (Result result = not_captured()) return result;
  return *made = new Executable(new Graph(*static_cast<Graph*>(graph))), SUCCESS;
}
Result cuGraphUpload(void*, void*) { return sticky; }
Result cuGraphLaunch(void* graph, void* stream) {
  return submit(stream, [launched = *static_cast<Executable*>(graph)] {
    for (const auto& step : launched->work)
      if (Result result = step()) return result;
    return Result(SUCCESS);
  });
}
Result cuGraphExecDestroy(void* graph) { return delete static_cast<Executable*>(graph), SUCCESS; }
Result cuGraphDestroy(void* graph) { return delete static_cast<Graph*>(graph), SUCCESS; }

}  // extern "C"
