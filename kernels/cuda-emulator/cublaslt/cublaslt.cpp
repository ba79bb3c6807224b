//! A stand-in for libcublasLt.so on the emulated driver: the functions that the `cuda` backend calls, by the public ABI of
//! `cublasLt.h`, for products of bf16 factors with f32 sums. Whatever it does not know is an error, and so are arguments that
//! the library might have forgiven.
//
//     cublasLtMatmulAlgoGetHeuristic ──> an algorithm holds all that was asked: shapes, strides, alignments, workspace
//     cublasLtMatmul ── that, pointers and memory are checked ──cuLaunchHostFunc──> the product, when the stream gets there
//
// Settings, from the environment:
//     CUPOLA_EMULATOR_CUBLASLT   `create`: there is no handle; `heuristic`: no algorithm; a number: so many products, then none
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

// Of libcuda.so.1.
extern "C" int cuMemGetAddressRange_v2(unsigned long long* start, size_t* bytes, unsigned long long at);
extern "C" int cuLaunchHostFunc(void* stream, void (*function)(void*), void* data);
extern "C" int cuCtxGetCurrent(void** context);

namespace {

enum Status : int {
  SUCCESS = 0,
  NOT_INITIALIZED = 1,
  INVALID_VALUE = 7,
  EXECUTION_FAILED = 13,
  INTERNAL_ERROR = 14,
  NOT_SUPPORTED = 15,
};
enum Type : int { R_32F = 0, R_16BF = 14 };
enum Compute : int { COMPUTE_32F = 68 };
enum Operation : int { N = 0, T = 1 };

using Pointer = unsigned long long;

/// What each kind of object begins with, so that one is not taken for another, nor used after it was destroyed.
enum Kind : uint64_t { HANDLE = 0x48414e44, DESC = 0x44455343, LAYOUT = 0x4c41594f, PREFERENCE = 0x50524546 };
struct Handle {
  uint64_t kind = HANDLE;
};
struct Desc {
  uint64_t kind = DESC;
  int32_t transposed[2] = {N, N};
};
struct Layout {
  uint64_t kind = LAYOUT;
  int type;
  uint64_t rows, cols;
  int64_t stride;
};
struct Preference {
  uint64_t kind = PREFERENCE;
  uint64_t workspace = 0;
  uint32_t alignments[4] = {256, 256, 256, 256};
};

/// An algorithm, in the 64 bytes of `cublasLtMatmulAlgo_t`.
struct Algorithm {
  static constexpr uint32_t MAGIC = 0x616c676f;
  uint32_t magic;
  uint32_t workspace;
  uint32_t rows, cols, inner;  // of the result, and the sum's length
  uint32_t strides[4];
  uint16_t alignments[4];
  uint32_t transposed;
  uint32_t reserved[4];
};
static_assert(sizeof(Algorithm) == 64, "cublasLtMatmulAlgo_t");
struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  Status state;
  float waves;
  int reserved[4];
};
static_assert(sizeof(Heuristic) == 96, "cublasLtMatmulHeuristicResult_t");

/// What every product here wants to have, and spoils.
constexpr uint32_t WORKSPACE = 1 << 20;

template <class T>
T* as(void* object, uint64_t kind) {
  auto* typed = static_cast<T*>(object);
  return typed && typed->kind == kind ? typed : nullptr;
}
template <class T>
Status destroy(void* object, uint64_t kind) {
  auto* typed = as<T>(object, kind);
  if (!typed) return INVALID_VALUE;
  typed->kind = 0;
  return delete typed, SUCCESS;
}

Status refuse(Status status, const char* why) {
  std::fprintf(stderr, "emulated cuBLASLt: %s\n", why);
  return status;
}

const char* setting() {
  const char* set = std::getenv("CUPOLA_EMULATOR_CUBLASLT");
  return set ? set : "";
}

/// Shapes of a product that this library does: D = A * B, with C like D.
Status shape(const Desc& desc, const Layout& a, const Layout& b, const Layout& c, const Layout& d, Algorithm& out) {
  if (a.type != R_16BF || b.type != R_16BF || c.type != R_32F || d.type != R_32F)
    return refuse(NOT_SUPPORTED, "factors are bf16, sums are f32");
  const bool at = desc.transposed[0] == T, bt = desc.transposed[1] == T;
  const uint64_t rows = at ? a.cols : a.rows, inner = at ? a.rows : a.cols, cols = bt ? b.rows : b.cols;
  if ((bt ? b.cols : b.rows) != inner || d.rows != rows || d.cols != cols || c.rows != rows || c.cols != cols)
    return refuse(INVALID_VALUE, "shapes do not fit together");
  out.magic = Algorithm::MAGIC;
  out.rows = (uint32_t)rows, out.cols = (uint32_t)cols, out.inner = (uint32_t)inner;
  const Layout* all[4] = {&a, &b, &c, &d};
  for (int i = 0; i < 4; i++) out.strides[i] = (uint32_t)all[i]->stride;
  out.transposed = (uint32_t)(desc.transposed[0] | desc.transposed[1] << 1);
  return SUCCESS;
}

/// All of a matrix lies in one allocation.
bool holds(Pointer at, const Layout& layout) {
  const size_t element = layout.type == R_16BF ? 2 : 4;
  const size_t bytes = ((layout.cols - 1) * (size_t)layout.stride + layout.rows) * element;
  Pointer start = 0;
  size_t size = 0;
  return cuMemGetAddressRange_v2(&start, &size, at) == 0 && at + bytes <= start + size;
}

float value(uint16_t bits) {
  const uint32_t word = (uint32_t)bits << 16;
  float x;
  std::memcpy(&x, &word, sizeof x);
  return x;
}

struct Work {
  Algorithm algorithm;
  float alpha, beta;
  Pointer a, b, c, d, workspace;
};

/// Vectors of the sum as consecutive floats: `count` of them, `inner` long.
std::vector<float> gather(Pointer at, uint32_t stride, uint32_t count, uint32_t inner, bool inner_first) {
  const auto* from = reinterpret_cast<const uint16_t*>((uintptr_t)at);
  std::vector<float> out((size_t)count * inner);
  for (size_t i = 0; i < count; i++)
    for (size_t k = 0; k < inner; k++) out[i * inner + k] = value(inner_first ? from[i * stride + k] : from[k * stride + i]);
  return out;
}

void run(void* data) {
  // Not deleted: a graph would run it again.
  const Work& work = *static_cast<const Work*>(data);
  const Algorithm& shape = work.algorithm;
  std::memset(reinterpret_cast<void*>((uintptr_t)work.workspace), 0xff, shape.workspace);
  const auto a = gather(work.a, shape.strides[0], shape.rows, shape.inner, shape.transposed & 1);
  const auto b = gather(work.b, shape.strides[1], shape.cols, shape.inner, !(shape.transposed >> 1));
  const auto* c = reinterpret_cast<const float*>((uintptr_t)work.c);
  auto* d = reinterpret_cast<float*>((uintptr_t)work.d);
  constexpr size_t LANES = 16;
  for (size_t col = 0; col < shape.cols; col++) {
    const float* y = &b[col * shape.inner];
    for (size_t row = 0; row < shape.rows; row++) {
      const float* x = &a[row * shape.inner];
      float lanes[LANES] = {}, sum = 0;
      size_t k = 0;
      for (; k + LANES <= shape.inner; k += LANES)
        for (size_t i = 0; i < LANES; i++) lanes[i] += x[k + i] * y[k + i];
      for (float lane : lanes) sum += lane;
      for (; k < shape.inner; k++) sum += x[k] * y[k];
      // With a factor of 0 the old value is not read, whatever it is.
      const float old = work.beta == 0 ? 0 : work.beta * c[col * shape.strides[2] + row];
      d[col * shape.strides[3] + row] = work.alpha * sum + old;
    }
  }
}

}  // namespace

extern "C" {

size_t cublasLtGetVersion() { return 130000; }
const char* cublasLtGetStatusName(Status status) {
  switch (status) {
    case SUCCESS: return "CUBLAS_STATUS_SUCCESS";
    case NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
    case INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
    case EXECUTION_FAILED: return "CUBLAS_STATUS_EXECUTION_FAILED";
    case INTERNAL_ERROR: return "CUBLAS_STATUS_INTERNAL_ERROR";
    case NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
    default: return "<unknown>";
  }
}

Status cublasLtCreate(void** made) {
  void* context = nullptr;
  if (!made) return INVALID_VALUE;
  if (cuCtxGetCurrent(&context) != 0 || !context || std::strcmp(setting(), "create") == 0) return NOT_INITIALIZED;
  return *made = new Handle, SUCCESS;
}
Status cublasLtDestroy(void* handle) { return destroy<Handle>(handle, HANDLE); }

Status cublasLtMatmulDescCreate(void** made, int compute, int scale) {
  if (!made || compute != COMPUTE_32F || scale != R_32F) return refuse(INVALID_VALUE, "sums and scales are f32");
  return *made = new Desc, SUCCESS;
}
Status cublasLtMatmulDescDestroy(void* desc) { return destroy<Desc>(desc, DESC); }
Status cublasLtMatmulDescSetAttribute(void* object, int attribute, const void* from, size_t bytes) {
  constexpr int TRANSA = 3, TRANSB = 4;
  auto* desc = as<Desc>(object, DESC);
  if (!desc || !from || (attribute != TRANSA && attribute != TRANSB) || bytes != sizeof(int32_t))
    return refuse(INVALID_VALUE, "an attribute of an operation that is not known here");
  int32_t operation;
  std::memcpy(&operation, from, sizeof operation);
  if (operation != N && operation != T) return INVALID_VALUE;
  return desc->transposed[attribute - TRANSA] = operation, SUCCESS;
}

Status cublasLtMatrixLayoutCreate(void** made, int type, uint64_t rows, uint64_t cols, int64_t stride) {
  if (!made || (type != R_16BF && type != R_32F) || rows == 0 || cols == 0 || stride < (int64_t)rows || stride > 0x7fffffff)
    return refuse(INVALID_VALUE, "a layout that no matrix has");
  return *made = new Layout{LAYOUT, type, rows, cols, stride}, SUCCESS;
}
Status cublasLtMatrixLayoutDestroy(void* layout) { return destroy<Layout>(layout, LAYOUT); }

Status cublasLtMatmulPreferenceCreate(void** made) { return made ? *made = new Preference, SUCCESS : INVALID_VALUE; }
Status cublasLtMatmulPreferenceDestroy(void* preference) { return destroy<Preference>(preference, PREFERENCE); }
Status cublasLtMatmulPreferenceSetAttribute(void* object, int attribute, const void* from, size_t bytes) {
  constexpr int MAX_WORKSPACE_BYTES = 1, MIN_ALIGNMENT_A_BYTES = 5, MIN_ALIGNMENT_D_BYTES = 8;
  auto* preference = as<Preference>(object, PREFERENCE);
  if (!preference || !from) return INVALID_VALUE;
  if (attribute == MAX_WORKSPACE_BYTES && bytes == sizeof(uint64_t))
    return std::memcpy(&preference->workspace, from, bytes), SUCCESS;
  if (attribute < MIN_ALIGNMENT_A_BYTES || attribute > MIN_ALIGNMENT_D_BYTES || bytes != sizeof(uint32_t))
    return refuse(INVALID_VALUE, "a preference that is not known here");
  uint32_t alignment;
  std::memcpy(&alignment, from, bytes);
  if (alignment == 0 || (alignment & (alignment - 1)) || alignment > 256)
    return refuse(INVALID_VALUE, "an alignment that is no power of two up to 256");
  return preference->alignments[attribute - MIN_ALIGNMENT_A_BYTES] = alignment, SUCCESS;
}

Status cublasLtMatmulAlgoGetHeuristic(void* handle, void* operation, void* a, void* b, void* c, void* d, void* wanted, int most,
                                      Heuristic* results, int* found) {
  auto* desc = as<Desc>(operation, DESC);
  auto* preference = as<Preference>(wanted, PREFERENCE);
  const Layout* layouts[4] = {as<Layout>(a, LAYOUT), as<Layout>(b, LAYOUT), as<Layout>(c, LAYOUT), as<Layout>(d, LAYOUT)};
  if (!as<Handle>(handle, HANDLE)) return NOT_INITIALIZED;
  if (!desc || !preference || most < 1 || !results || !found) return INVALID_VALUE;
  for (auto* layout : layouts)
    if (!layout) return INVALID_VALUE;
  *found = 0;
  results[0] = {};
  Algorithm algorithm = {};
  if (Status status = shape(*desc, *layouts[0], *layouts[1], *layouts[2], *layouts[3], algorithm)) return status;
  if (preference->workspace < WORKSPACE || std::strcmp(setting(), "heuristic") == 0) return NOT_SUPPORTED;
  algorithm.workspace = WORKSPACE;
  for (int i = 0; i < 4; i++) algorithm.alignments[i] = (uint16_t)preference->alignments[i];
  results[0].algorithm = algorithm;
  results[0].workspace = WORKSPACE;
  results[0].waves = 1;
  return *found = 1, SUCCESS;
}

Status cublasLtMatmul(void* handle, void* operation, const float* alpha, Pointer a, void* a_layout, Pointer b, void* b_layout,
                      const float* beta, Pointer c, void* c_layout, Pointer d, void* d_layout, const Algorithm* algorithm,
                      Pointer workspace, size_t workspace_bytes, void* stream) {
  static int left = *setting() >= '0' && *setting() <= '9' ? std::atoi(setting()) : -1;
  const Pointer pointers[4] = {a, b, c, d};
  const Layout* layouts[4] = {as<Layout>(a_layout, LAYOUT), as<Layout>(b_layout, LAYOUT), as<Layout>(c_layout, LAYOUT),
                              as<Layout>(d_layout, LAYOUT)};
  auto* desc = as<Desc>(operation, DESC);
  void* context = nullptr;
  if (!as<Handle>(handle, HANDLE) || cuCtxGetCurrent(&context) != 0 || !context) return NOT_INITIALIZED;
  if (!desc || !alpha || !beta || !algorithm || algorithm->magic != Algorithm::MAGIC) return INVALID_VALUE;
  for (auto* layout : layouts)
    if (!layout) return INVALID_VALUE;
  if (left == 0) return EXECUTION_FAILED;
  if (left > 0) left--;

  Algorithm asked = {};
  if (Status status = shape(*desc, *layouts[0], *layouts[1], *layouts[2], *layouts[3], asked)) return status;
  asked.workspace = algorithm->workspace;
  std::memcpy(asked.alignments, algorithm->alignments, sizeof asked.alignments);
  if (std::memcmp(&asked, algorithm, sizeof asked) != 0) return refuse(NOT_SUPPORTED, "an algorithm for another product");
  for (int i = 0; i < 4; i++) {
    if (pointers[i] % algorithm->alignments[i]) return refuse(INVALID_VALUE, "a matrix is not aligned as was said");
    if (!holds(pointers[i], *layouts[i])) return refuse(INVALID_VALUE, "a matrix reaches beyond its memory");
  }
  if (c == d && layouts[2]->stride != layouts[3]->stride) return refuse(INVALID_VALUE, "C and D lie differently in one place");
  Pointer start = 0;
  size_t size = 0;
  if (workspace % 16 || workspace_bytes < algorithm->workspace ||
      cuMemGetAddressRange_v2(&start, &size, workspace) != 0 || workspace + workspace_bytes > start + size)
    return refuse(INVALID_VALUE, "the workspace is not there, or is too small");
  auto* work = new Work{*algorithm, *alpha, *beta, a, b, c, d, workspace};
  return cuLaunchHostFunc(stream, run, work) == 0 ? SUCCESS : EXECUTION_FAILED;
}

}  // extern "C"
