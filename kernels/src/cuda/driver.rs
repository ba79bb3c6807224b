//! One CUDA device: its memory, its stream, and its kernels by name.
//!
//! ```text
//!   Device ── context ── one stream ──┬── DeviceBytes   owned device memory, freed in stream order
//!                                     ├── Pinned        page-locked host memory, copied while the host goes on (`pinned.rs`)
//!                                     ├── Kernel        a function of an embedded fatbin, with the sizes of its parameters
//!                                     ├── launch        checked against those sizes
//!                                     └── Graph         launches that were recorded once, submitted as one
//! ```
//!
//! Everything runs on one stream, so work is done in the order in which it was submitted and no op waits for another one.
//! A launch returns before its kernel has run; an error of a kernel comes out of a later call and stays (`Error::Device`).

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use cudarc::driver::sys::{self, CUfunction_attribute as FunctionAttribute, CUresult};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaGraph, CudaModule, CudaSlice, CudaStream, DriverError, LaunchConfig, PushKernelArg,
};
use cudarc::nvrtc::Ptx;

use super::fields::Fields;
use super::prebuilt::UNITS;
use super::probe::DeviceInfo;
use crate::{Error, Result};

/// Dynamic shared memory that a kernel may use without asking, in bytes.
const SHARED_WITHOUT_ASKING: u32 = 48 << 10;

/// A CUDA device with a context, one stream, and the kernels loaded so far.
pub(crate) struct Device {
    info: DeviceInfo,
    pub(super) context: Arc<CudaContext>,
    pub(super) stream: Arc<CudaStream>,
    modules: HashMap<&'static str, Arc<CudaModule>>,
    kernels: HashMap<&'static str, Kernel>,
    allocated: Arc<AtomicU64>,
}

/// Memory on a device. It is freed behind the work submitted before.
pub(crate) struct DeviceBytes {
    pub(super) slice: CudaSlice<u8>,
    /// Where it starts, as kernels see it.
    address: u64,
    /// The device's count of what is allocated.
    allocated: Arc<AtomicU64>,
}

/// A kernel, ready to be launched.
#[derive(Clone)]
pub(crate) struct Kernel {
    name: &'static str,
    function: CudaFunction,
    /// Bytes of each parameter, in order.
    parameters: Arc<[usize]>,
}

/// Launches recorded once, with the arguments that they had. It must not be launched after memory that they name is freed.
pub(crate) struct Graph(CudaGraph);

// SAFETY: a graph may be used by one thread at a time, from any; it is reached through the backend that owns it alone.
unsafe impl Send for Graph {}

/// One argument of a launch.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Arg {
    /// An address in device memory: [`DeviceBytes::at`], or 0 for none.
    Pointer(u64),
    /// `unsigned` or `int`, by its bits.
    U32(u32),
    /// `float`.
    F32(f32),
    /// A struct by value.
    Fields(Fields),
}

/// How many threads a launch has, and their shared memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Launch {
    /// Blocks in x and y.
    pub(crate) grid: (u32, u32),
    /// Threads of a block, a multiple of 32.
    pub(crate) block: u32,
    /// Dynamic shared memory of a block in bytes.
    pub(crate) shared: u32,
}

/// Free memory of a device in bytes, with this process's context on it.
///
/// # Errors
/// [`Error::Device`] when the driver refuses.
pub fn free_memory(info: &DeviceInfo) -> Result<u64> {
    Device::open(info.clone())?.free_memory()
}

impl Device {
    /// Opens a device that the probe has found.
    ///
    /// # Errors
    /// [`Error::Device`] when the driver refuses.
    pub(crate) fn open(info: DeviceInfo) -> Result<Self> {
        let context = CudaContext::new(info.ordinal).map_err(|error| failed("opening the device", error))?;
        // SAFETY: all work of this context goes to the one stream made below, so there is nothing for events to order.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(|error| failed("making a stream", error))?;
        Ok(Self { info, context, stream, modules: HashMap::new(), kernels: HashMap::new(), allocated: Arc::default() })
    }

    /// What the probe said about this device.
    pub(crate) fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// Bytes of all [`DeviceBytes`] of this device.
    pub(crate) fn allocated(&self) -> u64 {
        self.allocated.load(Relaxed)
    }

    /// Free device memory in bytes, whoever uses the rest.
    ///
    /// # Errors
    /// [`Error::Device`] when the driver refuses.
    pub(crate) fn free_memory(&self) -> Result<u64> {
        let (free, _total) = self.context.mem_get_info().map_err(|error| failed("asking for free memory", error))?;
        Ok(free as u64)
    }

    /// Allocates `bytes`; what lies there is undefined.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] with `what` when the device has not so much left.
    pub(crate) fn alloc(&mut self, bytes: usize, what: &'static str) -> Result<DeviceBytes> {
        // SAFETY: bytes have no invalid value, and nothing on the host reads them before a copy from the device.
        let slice = unsafe { self.stream.alloc::<u8>(bytes.max(1)) }.map_err(|error| match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::OutOfMemory { bytes, what },
            _ => failed(what, error),
        })?;
        self.allocated.fetch_add(slice.len() as u64, Relaxed);
        let address = {
            use cudarc::driver::DevicePtr;
            slice.device_ptr(&self.stream).0
        };
        Ok(DeviceBytes { slice, address, allocated: Arc::clone(&self.allocated) })
    }

    /// Allocates `bytes` zeros.
    ///
    /// # Errors
    /// As [`Device::alloc`].
    pub(crate) fn alloc_zeroed(&mut self, bytes: usize, what: &'static str) -> Result<DeviceBytes> {
        let mut memory = self.alloc(bytes, what)?;
        self.stream.memset_zeros(&mut memory.slice).map_err(|error| failed("clearing memory", error))?;
        Ok(memory)
    }

    /// Copies `bytes` to `to`, from its byte `offset` on. `bytes` may be changed or freed as soon as this returns.
    ///
    /// # Errors
    /// [`Error::Shape`] when they do not fit, [`Error::Device`] when the device failed.
    pub(crate) fn upload(&self, to: &mut DeviceBytes, offset: usize, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let room = to.slice.len();
        let Some(mut view) = to.slice.try_slice_mut(offset..offset.saturating_add(bytes.len())) else {
            return Err(out_of_range("upload", offset..offset.saturating_add(bytes.len()), room));
        };
        self.stream.memcpy_htod(bytes, &mut view).map_err(|error| failed("copying to the device", error))
    }

    /// Copies from byte `offset` of `from` until `to` is full, after all work submitted before.
    ///
    /// # Errors
    /// As [`Device::upload`].
    pub(crate) fn download(&self, from: &DeviceBytes, offset: usize, to: &mut [u8]) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        let Some(view) = from.slice.try_slice(offset..offset.saturating_add(to.len())) else {
            return Err(out_of_range("download", offset..offset.saturating_add(to.len()), from.slice.len()));
        };
        self.stream.memcpy_dtoh(&view, to).map_err(|error| failed("copying from the device", error))?;
        self.synchronize()
    }

    /// Waits until all submitted work is done.
    ///
    /// # Errors
    /// [`Error::Device`] when some of it failed.
    pub(crate) fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().map_err(|error| failed("waiting for the device", error))
    }

    /// Records the launches of `work` without running them. `work` must not wait, allocate or load a kernel.
    ///
    /// # Errors
    /// Those of `work`, and [`Error::Device`] when the driver cannot record it; the stream can be used as before.
    pub(crate) fn record(stream: &Arc<CudaStream>, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.begin_capture(mode).map_err(|error| failed("recording a graph", error))?;
        let worked = work();
        // Also after a failure: a stream that is left recording is of no use.
        let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0));
        worked?;
        match graph.map_err(|error| failed("recording a graph", error))? {
            Some(graph) => Ok(Graph(graph)),
            None => Err(Error::Device { what: "recording a graph".into(), why: "the driver gave none".into() }),
        }
    }

    /// Submits what a graph has recorded.
    ///
    /// # Errors
    /// [`Error::Device`] as for [`Device::launch`].
    pub(crate) fn replay(&self, graph: &Graph) -> Result<()> {
        graph.0.launch().map_err(|error| failed("launching a graph", error))
    }

    /// Bytes that the device can copy within itself in a second, read and written ones counted, measured now.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] when there is no room for two times 256 MiB, [`Error::Device`].
    pub(crate) fn copy_bandwidth(&mut self) -> Result<f64> {
        /// More than the caches of any device hold.
        const BYTES: usize = 256 << 20;
        const ROUNDS: usize = 3;
        const COPIES: usize = 20;
        let from = self.alloc_zeroed(BYTES, "the memory to copy")?;
        let mut to = self.alloc_zeroed(BYTES, "the memory to copy")?;
        let mut best = f64::INFINITY;
        for _ in 0..ROUNDS {
            self.synchronize()?;
            let began = Instant::now();
            for _ in 0..COPIES {
                self.stream.memcpy_dtod(&from.slice, &mut to.slice).map_err(|error| failed("copying", error))?;
            }
            self.synchronize()?;
            best = best.min(began.elapsed().as_secs_f64());
        }
        Ok((2 * BYTES * COPIES) as f64 / best)
    }

    /// The kernel `name` of the unit `unit` (a `.cu` file without its ending), loaded on first use.
    ///
    /// # Errors
    /// [`Error::Device`] when the driver cannot load it.
    pub(crate) fn kernel(&mut self, unit: &'static str, name: &'static str) -> Result<Kernel> {
        if let Some(kernel) = self.kernels.get(name) {
            return Ok(kernel.clone());
        }
        let module = match self.modules.get(unit) {
            Some(module) => module.clone(),
            None => {
                let image =
                    UNITS.iter().find(|(known, _)| *known == unit).map(|(_, image)| *image).ok_or_else(|| {
                        Error::Device { what: "loading a kernel".into(), why: format!("there is no unit {unit}") }
                    })?;
                let module = self
                    .context
                    .load_module(Ptx::from_binary(image.to_vec()))
                    .map_err(|error| failed(&format!("loading the kernels of {unit}"), error))?;
                self.modules.insert(unit, module.clone());
                module
            }
        };
        let function = module
            .load_function(name)
            .map_err(|error| failed(&format!("finding the kernel {name} of {unit}"), error))?;
        let kernel = Kernel { name, parameters: parameter_sizes(&function)?.into(), function };
        self.kernels.insert(name, kernel.clone());
        Ok(kernel)
    }

    /// Lets `kernel` be launched with up to `bytes` of dynamic shared memory; needed above 48 KiB.
    ///
    /// # Errors
    /// [`Error::Device`] when the device has not so much.
    pub(crate) fn allow_shared(&self, kernel: &Kernel, bytes: u32) -> Result<()> {
        if bytes <= SHARED_WITHOUT_ASKING {
            return Ok(());
        }
        kernel
            .function
            .set_attribute(FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes as i32)
            .map_err(|error| failed(&format!("giving {} {bytes} bytes of shared memory", kernel.name), error))
    }

    /// Submits a kernel. A grid with no blocks does nothing.
    ///
    /// # Errors
    /// [`Error::Shape`] when `args` are not the kernel's parameters, [`Error::Device`] when the driver refuses, also
    /// because of work submitted before.
    pub(crate) fn launch(&self, kernel: &Kernel, shape: Launch, args: &[Arg]) -> Result<()> {
        let sizes = args.iter().map(Arg::bytes);
        if !sizes.eq(kernel.parameters.iter().copied()) {
            return Err(Error::Shape {
                op: kernel.name,
                expected: format!("parameters of {:?} bytes", kernel.parameters),
                got: format!("{args:?}"),
            });
        }
        if shape.grid.0 == 0 || shape.grid.1 == 0 {
            return Ok(());
        }
        let mut builder = self.stream.launch_builder(&kernel.function);
        for arg in args {
            match arg {
                Arg::Pointer(value) => builder.arg(value),
                Arg::U32(value) => builder.arg(value),
                Arg::F32(value) => builder.arg(value),
                Arg::Fields(value) => builder.arg(value),
            };
        }
        let config = LaunchConfig {
            grid_dim: (shape.grid.0, shape.grid.1, 1),
            block_dim: (shape.block, 1, 1),
            shared_mem_bytes: shape.shared,
        };
        // SAFETY: number and sizes of the arguments are the kernel's own, checked above, so the driver reads no host memory
        // but them, and copies them before it returns. A kernel reaches device memory only, which the host reads as bytes
        // through copies ordered by the one stream; memory that it names is freed in the order of that stream too.
        unsafe { builder.launch(config) }
            .map(drop)
            .map_err(|error| failed(&format!("launching {}", kernel.name), error))
    }
}

impl Drop for DeviceBytes {
    fn drop(&mut self) {
        self.allocated.fetch_sub(self.slice.len() as u64, Relaxed);
    }
}

impl DeviceBytes {
    /// Bytes it holds.
    pub(crate) fn len(&self) -> usize {
        self.slice.len()
    }

    /// The address of byte `offset`, as an argument of a launch.
    pub(crate) fn at(&self, offset: usize) -> Arg {
        debug_assert!(offset <= self.len(), "byte {offset} of {}", self.len());
        Arg::Pointer(self.address + offset as u64)
    }
}

impl Arg {
    fn bytes(&self) -> usize {
        match self {
            Arg::Pointer(_) => 8,
            Arg::U32(_) | Arg::F32(_) => 4,
            Arg::Fields(fields) => fields.bytes(),
        }
    }
}

/// Bytes of each parameter of a kernel, in order.
fn parameter_sizes(function: &CudaFunction) -> Result<Vec<usize>> {
    const MOST: usize = 64;
    let mut sizes = Vec::new();
    while sizes.len() < MOST {
        let (mut offset, mut size) = (0, 0);
        // SAFETY: the handle belongs to a loaded module, which `function` keeps, and both places outlive the call.
        let status = unsafe { sys::cuFuncGetParamInfo(function.cu_function(), sizes.len(), &mut offset, &mut size) };
        match status {
            CUresult::CUDA_SUCCESS => sizes.push(size),
            // There is no parameter of this number.
            CUresult::CUDA_ERROR_INVALID_VALUE => break,
            error => return Err(failed("asking for a kernel's parameters", DriverError(error))),
        }
    }
    Ok(sizes)
}

fn out_of_range(op: &'static str, range: Range<usize>, room: usize) -> Error {
    Error::Shape { op, expected: format!("bytes within 0..{room}"), got: format!("{range:?}") }
}

/// The driver's own name and text of an error, with what was tried.
pub(super) fn failed(what: &str, error: DriverError) -> Error {
    Error::Device { what: what.into(), why: super::probe::describe(error) }
}

#[cfg(test)]
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::cuda::testing;

    fn device() -> Device {
        Device::open(testing::device().expect("tests need a GPU, or g++ for the emulated driver")).unwrap()
    }

    #[test]
    fn bytes_come_back_as_they_went() {
        let mut device = device();
        let mut memory = device.alloc(100, "test").unwrap();
        let sent: Vec<u8> = (0..100).collect();
        device.upload(&mut memory, 0, &sent).unwrap();
        device.upload(&mut memory, 40, &[200; 3]).unwrap();
        let mut got = [0; 50];
        device.download(&memory, 0, &mut got).unwrap();
        assert_eq!(got[..40], sent[..40]);
        assert_eq!(got[40..], [[200; 3].as_slice(), &sent[43..50]].concat());
        assert_eq!(device.allocated(), 100);
        drop(memory);
        assert_eq!(device.allocated(), 0);
        let zeroed = device.alloc_zeroed(50, "test").unwrap();
        device.download(&zeroed, 0, &mut got).unwrap();
        assert_eq!(got, [0; 50]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut device = device();
        let mut memory = device.alloc(16, "test").unwrap();
        for (offset, bytes) in [(0, 17), (16, 1), (usize::MAX, 2)] {
            let error = device.upload(&mut memory, offset, &vec![0; bytes]).unwrap_err();
            assert!(error.to_string().contains("bytes within 0..16"), "{error}");
            assert!(device.download(&memory, offset, &mut vec![0; bytes]).is_err());
        }
        let all = usize::try_from(device.info().memory).unwrap() + 1;
        let Err(error) = device.alloc(all, "everything") else { panic!("more than there is") };
        assert!(matches!(error, Error::OutOfMemory { what: "everything", .. }), "{error}");
    }

    #[test]
    fn captured_work_is_done_at_each_launch_and_not_before() {
        let mut device = device();
        let mut memory = device.alloc_zeroed(4, "test").unwrap();
        let read = |device: &Device, memory: &DeviceBytes| {
            let mut got = [0; 4];
            device.download(memory, 0, &mut got).unwrap();
            got
        };
        device.upload(&mut memory, 0, &[1; 4]).unwrap();
        let stream = Arc::clone(&device.stream);
        let graph = Device::record(&stream, || {
            stream.memset_zeros(&mut memory.slice).unwrap();
            Ok(())
        });
        let graph = graph.unwrap();
        assert_eq!(read(&device, &memory), [1; 4]);
        for _ in 0..2 {
            device.upload(&mut memory, 0, &[2; 4]).unwrap();
            device.replay(&graph).unwrap();
            assert_eq!(read(&device, &memory), [0; 4]);
        }
    }

    #[test]
    fn what_waits_cannot_be_recorded_and_the_stream_goes_on() {
        let mut device = device();
        let mut memory = device.alloc_zeroed(4, "test").unwrap();
        let stream = Arc::clone(&device.stream);
        let waits = Device::record(&stream, || device.synchronize());
        assert!(waits.is_err());
        let refused = Device::record(&stream, || Err(Error::Device { what: "a".into(), why: "b".into() }));
        assert!(refused.is_err());
        device.upload(&mut memory, 0, &[1; 4]).unwrap();
        let mut got = [0; 4];
        device.download(&memory, 0, &mut got).unwrap();
        assert_eq!(got, [1; 4]);
    }

    #[test]
    fn an_unknown_kernel_is_named() {
        let mut device = device();
        let Err(error) = device.kernel("elementwise", "no_such_kernel") else { panic!("not there") };
        assert!(error.to_string().contains("no_such_kernel"), "{error}");
        let Err(error) = device.kernel("no_such_unit", "argmax") else { panic!("not there") };
        assert!(error.to_string().contains("no_such_unit"), "{error}");
    }

    /// Not a test of right or wrong: what `benches/gpu.sh` holds decode speeds against.
    #[test]
    #[ignore = "measures a GPU"]
    fn copy_bandwidth() {
        println!("\ncopy bandwidth: {:.0} GB/s", device().copy_bandwidth().unwrap() / 1e9);
    }
}
