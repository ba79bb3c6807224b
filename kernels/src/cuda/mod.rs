//! CUDA: found at run time, driven through the driver library alone, with kernels that are embedded as compiled code.
//!
//! ```text
//!   cu/*.cu ──nvcc, once, committed──> prebuilt/*.fatbin ──include_bytes──> driver::Device ──launch──> GPU
//!      └────g++, by the tests────────> emulated libcuda.so.1 (kernels/cuda-emulator) ──────────────────> CPU
//!   probe ── is there a driver, is it new enough, which devices?   one line why not, never a panic
//! ```
//!
//! A build needs neither nvcc nor a GPU. The library is opened when a device is asked for, never at link time.

mod arenas;
mod backend;
mod batch;
mod cublaslt;
mod driver;
mod fields;
mod graphs;
mod host_rows;
mod large;
mod pass;
mod pinned;
mod pool;
mod prebuilt;
pub mod probe;
mod products;
mod results;
mod sampling;
mod scratch;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod weights;

pub use backend::CudaBackend;
pub use driver::free_memory;
pub use pool::kv_block_bytes;
pub use probe::{DeviceInfo, devices};
pub use products::expanded_bytes;
pub use scratch::Steps;
pub use weights::weight_bytes;

// The emulated driver is for x86-64 Linux.
#[cfg(test)]
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod emulator_tests;
#[cfg(test)]
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod tests;
