//! Whether CUDA can be used here: is there a driver library, does it work, which devices are there?
//!
//! Every way to have none of it is an ordinary answer with one line of reason: no library, a broken one, one that lacks a
//! function, no device, a driver or a device that is too old. Nothing here panics or prints.

use std::ffi::{CStr, CString, OsStr};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use cudarc::driver::sys::CUdevice_attribute as Attribute;
use cudarc::driver::{DriverError, result};

/// The environment variable that names the driver library, for a place where the loader does not look.
pub const DRIVER_VARIABLE: &str = "CUPOLA_CUDA_DRIVER";

/// Compute capability that the kernels need (Ampere).
pub const LEAST_CAPABILITY: (u32, u32) = (8, 0);

/// What `cuDriverGetVersion` must at least say: the toolkit that compiled the kernels.
const LEAST_DRIVER: i32 = 13000;

/// A CUDA device that can run the kernels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number, as in `--device cuda:N`.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Its memory in bytes.
    pub memory: u64,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub processors: u32,
    /// Shared memory that one block can have, in bytes.
    pub shared_memory: u32,
}

impl fmt::Display for DeviceInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.capability;
        let gib = self.memory as f64 / (1u64 << 30) as f64;
        write!(f, "cuda:{} {} ({gib:.1} GiB, compute capability {major}.{minor})", self.ordinal, self.name)
    }
}

/// Names the driver library for this process, as [`DRIVER_VARIABLE`] does, which goes before it. False when the driver has
/// been looked for already.
pub fn use_driver(library: &Path) -> bool {
    NAMED.get().is_none() && FOUND.get().is_none() && NAMED.set(library.to_owned()).is_ok()
}

/// The driver library that was named, if one was.
pub(super) fn named_driver() -> Option<PathBuf> {
    let variable = std::env::var_os(DRIVER_VARIABLE).filter(|name| !name.is_empty());
    variable.map(PathBuf::from).or_else(|| NAMED.get().cloned())
}

static NAMED: OnceLock<PathBuf> = OnceLock::new();
static FOUND: OnceLock<Result<Vec<DeviceInfo>, String>> = OnceLock::new();

/// Devices that can run the kernels, by number; at least one. The first call looks, others repeat what it found.
///
/// # Errors
/// One line that says why there is none.
pub fn devices() -> Result<Vec<DeviceInfo>, String> {
    FOUND.get_or_init(find).clone()
}

fn find() -> Result<Vec<DeviceInfo>, String> {
    let library = Library::open(named_driver().as_deref().map(Path::as_os_str))?;
    // cudarc looks a function up when it is first called and panics where it is missing. All that are called were looked
    // for before; this is for the case that cudarc has found another library than the one looked at.
    std::panic::catch_unwind(|| ask_driver(&library))
        .unwrap_or_else(|_| Err("the driver library lacks a function that was found before".into()))
}

fn ask_driver(library: &Library) -> Result<Vec<DeviceInfo>, String> {
    let say = |what: &'static str| move |error: DriverError| format!("{what}: {}", describe(error));
    library.require(FIRST)?;
    result::init().map_err(say("cuInit"))?;
    let version = driver_version().map_err(say("cuDriverGetVersion"))?;
    if version < LEAST_DRIVER {
        return Err(format!(
            "the driver supports CUDA {}.{}; the kernels need {}.{} or later (driver 580)",
            version / 1000,
            version % 1000 / 10,
            LEAST_DRIVER / 1000,
            LEAST_DRIVER % 1000 / 10
        ));
    }
    library.require(NEEDED)?;
    let count = result::device::get_count().map_err(say("cuDeviceGetCount"))?;
    let mut devices = Vec::new();
    let mut too_old = Vec::new();
    for ordinal in 0..count {
        let device = describe_device(ordinal).map_err(say("asking for a device's properties"))?;
        if device.capability >= LEAST_CAPABILITY {
            devices.push(device);
        } else {
            too_old.push(device.to_string());
        }
    }
    if !devices.is_empty() {
        return Ok(devices);
    }
    Err(match too_old.as_slice() {
        [] => "the driver has no device".into(),
        old => format!("{}: the kernels need compute capability 8.0 or later", old.join(", ")),
    })
}

fn driver_version() -> Result<i32, DriverError> {
    let mut version = 0;
    // SAFETY: the function was found when the library was opened, and it writes one int to a place that outlives the call.
    unsafe { cudarc::driver::sys::cuDriverGetVersion(&mut version) }.result()?;
    Ok(version)
}

fn describe_device(ordinal: i32) -> Result<DeviceInfo, DriverError> {
    let device = result::device::get(ordinal)?;
    let attribute = |attribute| {
        // SAFETY: `device` came from the driver, for a number below its count.
        unsafe { result::device::get_attribute(device, attribute) }.map(|value| u32::try_from(value).unwrap_or(0))
    };
    // SAFETY: as above.
    let memory = unsafe { result::device::total_mem(device) }?;
    Ok(DeviceInfo {
        ordinal: usize::try_from(ordinal).unwrap_or(0),
        name: result::device::get_name(device)?,
        memory: memory as u64,
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        processors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_memory: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
    })
}

/// The driver's own name and text of an error.
pub(super) fn describe(error: DriverError) -> String {
    let text = |text: Result<&CStr, DriverError>| text.map_or("?".into(), |text| text.to_string_lossy().into_owned());
    format!("{} ({})", text(error.error_name()), text(error.error_string()))
}

/// The driver library, opened and never closed.
struct Library(*mut libc::c_void);

impl Library {
    /// Opens the driver library, so that cudarc's own look for it finds this one.
    fn open(named: Option<&OsStr>) -> Result<Self, String> {
        let name = CString::new(named.map_or(&b"libcuda.so.1"[..], OsStrExt::as_bytes))
            .map_err(|_| format!("{DRIVER_VARIABLE} has a zero byte"))?;
        // SAFETY: the name ends in a zero byte. Opening a library runs its initialisers; this one is the driver, or what
        // the user named as such.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if !handle.is_null() {
            return Ok(Self(handle));
        }
        let reason = loader_says();
        Err(match named {
            None if reason.contains("No such file") => "libcuda.so.1 is not installed (no NVIDIA driver)".into(),
            _ => format!("the driver library cannot be opened: {reason}"),
        })
    }

    /// An error that names the first of `functions` that the library lacks.
    fn require(&self, functions: &[&CStr]) -> Result<(), String> {
        // SAFETY: the handle is of a library that is never closed, and the name ends in a zero byte.
        let lacks = |function: &&&CStr| unsafe { libc::dlsym(self.0, function.as_ptr()) }.is_null();
        match functions.iter().find(lacks) {
            Some(function) => Err(format!("the driver library lacks {}", function.to_string_lossy())),
            None => Ok(()),
        }
    }
}

/// What the loader says about the last thing that failed.
pub(super) fn loader_says() -> String {
    // SAFETY: takes no argument; the text belongs to this thread until its next call of the loader.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return "the loader gives no reason".into();
    }
    // SAFETY: not null, so a text that ends in a zero byte, copied before another call.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// Enough to ask for the version. Then all that is called through cudarc here and in `driver`.
const FIRST: &[&CStr] = &[c"cuInit", c"cuDriverGetVersion", c"cuGetErrorName", c"cuGetErrorString"];
const NEEDED: &[&CStr] = &[
    c"cuCtxGetCurrent",
    c"cuCtxSetCurrent",
    c"cuCtxSynchronize",
    c"cuDeviceGet",
    c"cuDeviceGetAttribute",
    c"cuDeviceGetCount",
    c"cuDeviceGetName",
    c"cuDevicePrimaryCtxRelease_v2",
    c"cuDevicePrimaryCtxRetain",
    c"cuDeviceTotalMem_v2",
    c"cuFuncGetParamInfo",
    c"cuFuncSetAttribute",
    c"cuLaunchKernel",
    c"cuMemAllocAsync",
    c"cuMemAlloc_v2",
    c"cuMemFreeAsync",
    c"cuMemFree_v2",
    c"cuMemGetInfo_v2",
    c"cuMemcpyDtoHAsync_v2",
    c"cuMemcpyHtoDAsync_v2",
    c"cuMemsetD8Async",
    c"cuModuleGetFunction",
    c"cuModuleLoadData",
    c"cuModuleUnload",
    c"cuStreamCreate",
    c"cuStreamDestroy_v2",
    c"cuStreamSynchronize",
];

#[cfg(test)]
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[path = "probe_tests.rs"]
mod tests;
