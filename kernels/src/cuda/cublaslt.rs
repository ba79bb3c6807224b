//! cuBLASLt, found at run time: the library, and products of bf16 rows through it.
//!
//! ```text
//!   found() ── the variable · beside a named driver · the loader · toolkits' folders ──> Library   once a process
//!   Blas::new(&Library) ──> handle, operation ──> matmul: heuristics for a new shape, then the product on the device's stream
//! ```
//!
//! Not to have it is an ordinary answer with one line of reason: no library, one that lacks a function, one that finds no
//! device it knows. Names, numbers and layouts are those of `cublasLt.h`, the same in CUDA 12 and 13.

use std::collections::HashMap;
use std::ffi::{CStr, CString, OsString, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::ptr::null_mut;
use std::sync::{Arc, OnceLock};

use cudarc::driver::CudaContext;

use super::driver::{Arg, Device, DeviceBytes, failed};
use super::probe::{loader_says, named_driver};
use super::products::Input;

/// The environment variable that names the library, or says `off`.
pub(super) const VARIABLE: &str = "CUPOLA_CUBLASLT";

/// Names by which the loader knows it, newest first.
const NAMES: [&str; 2] = ["libcublasLt.so.13", "libcublasLt.so.12"];

/// Bytes of the workspace: what NVIDIA recommends for Hopper, more than what it does for others.
pub(super) const WORKSPACE: usize = 32 << 20;

/// Opaque things of the library.
type Opaque = *mut c_void;
/// 0 for success.
type Status = c_int;

/// `cublasLtMatmulAlgo_t`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Algorithm([u64; 8]);

/// `cublasLtMatmulHeuristicResult_t`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Heuristic {
    algorithm: Algorithm,
    workspace: usize,
    state: Status,
    waves: f32,
    reserved: [c_int; 4],
}

const _: () = assert!(size_of::<Heuristic>() == 96 && size_of::<Algorithm>() == 64);

/// `CUDA_R_32F`, `CUDA_R_16BF`.
const F32: c_int = 0;
const BF16: c_int = 14;
/// `CUBLAS_COMPUTE_32F`.
const COMPUTE_F32: c_int = 68;
/// `CUBLAS_OP_T`.
const TRANSPOSED: c_int = 1;
/// `CUBLASLT_MATMUL_DESC_TRANSA`; that of B is `CUBLAS_OP_N` by default.
const DESC_TRANSA: c_int = 3;
/// `CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES`, then `.._MIN_ALIGNMENT_A_BYTES` and so on.
const PREF_WORKSPACE: c_int = 1;
const PREF_ALIGNMENT_A: c_int = 5;
const PREF_ALIGNMENT_B: c_int = 6;
const PREF_ALIGNMENT_C: c_int = 7;
const PREF_ALIGNMENT_D: c_int = 8;

/// The functions of `cublasLt.h` that are called here.
struct Functions {
    create: unsafe extern "C" fn(*mut Opaque) -> Status,
    destroy: unsafe extern "C" fn(Opaque) -> Status,
    version: unsafe extern "C" fn() -> usize,
    status_name: unsafe extern "C" fn(Status) -> *const c_char,
    desc_create: unsafe extern "C" fn(*mut Opaque, c_int, c_int) -> Status,
    desc_destroy: unsafe extern "C" fn(Opaque) -> Status,
    desc_set: unsafe extern "C" fn(Opaque, c_int, *const c_void, usize) -> Status,
    layout_create: unsafe extern "C" fn(*mut Opaque, c_int, u64, u64, i64) -> Status,
    layout_destroy: unsafe extern "C" fn(Opaque) -> Status,
    preference_create: unsafe extern "C" fn(*mut Opaque) -> Status,
    preference_destroy: unsafe extern "C" fn(Opaque) -> Status,
    preference_set: unsafe extern "C" fn(Opaque, c_int, *const c_void, usize) -> Status,
    /// handle, operation, A, B, C, D, preference, wanted, results, found
    heuristic: unsafe extern "C" fn(
        Opaque,
        Opaque,
        Opaque,
        Opaque,
        Opaque,
        Opaque,
        Opaque,
        c_int,
        *mut Heuristic,
        *mut c_int,
    ) -> Status,
    /// handle, operation, alpha, A and its layout, B and its layout, beta, C and its layout, D and its layout, algorithm,
    /// workspace and its bytes, stream
    matmul: unsafe extern "C" fn(
        Opaque,
        Opaque,
        *const f32,
        u64,
        Opaque,
        u64,
        Opaque,
        *const f32,
        u64,
        Opaque,
        u64,
        Opaque,
        *const Algorithm,
        u64,
        usize,
        *mut c_void,
    ) -> Status,
}

/// The library, opened and never closed.
pub(super) struct Library {
    functions: Functions,
    version: usize,
}

static FOUND: OnceLock<Result<Library, String>> = OnceLock::new();

/// The library. The first call looks, others repeat what it found.
///
/// # Errors
/// A few words that say why there is none.
pub(super) fn found() -> Result<&'static Library, &'static str> {
    FOUND.get_or_init(find).as_ref().map_err(String::as_str)
}

fn find() -> Result<Library, String> {
    match std::env::var_os(VARIABLE).filter(|name| !name.is_empty()) {
        Some(off) if off == "off" => Err(format!("{VARIABLE}=off")),
        Some(named) => Library::open(&named)?.map_err(|reason| format!("cuBLASLt cannot be opened: {reason}")),
        None => {
            for name in places() {
                if let Ok(library) = Library::open(&name)? {
                    return Ok(library);
                }
            }
            Err("no cuBLASLt found".into())
        }
    }
}

/// Where it may be: beside a driver that was named, where the loader looks, and where toolkits are.
fn places() -> Vec<OsString> {
    let mut folders = vec![named_driver().and_then(|driver| driver.parent().map(PathBuf::from)), Some(PathBuf::new())];
    for variable in ["CUDA_HOME", "CUDA_PATH"] {
        folders.push(
            std::env::var_os(variable).filter(|home| !home.is_empty()).map(|home| PathBuf::from(home).join("lib64")),
        );
    }
    folders.extend(["/usr/local/cuda/lib64", "/opt/cuda/lib64"].map(|folder| Some(folder.into())));
    let folders = folders.into_iter().flatten();
    folders.flat_map(|folder| NAMES.map(|name| folder.join(name).into_os_string())).collect()
}

impl Library {
    /// The library of this name, or what the loader says.
    ///
    /// # Errors
    /// It can be opened and is no cuBLASLt.
    fn open(name: &OsString) -> Result<Result<Self, String>, String> {
        let Ok(name) = CString::new(name.as_bytes()) else { return Ok(Err("its name has a zero byte".into())) };
        // SAFETY: the name ends in a zero byte. Opening a library runs its initialisers; this one is cuBLASLt, or what the
        // user named as such.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() {
            return Ok(Err(loader_says()));
        }
        let functions = Functions {
            create: function(handle, c"cublasLtCreate")?,
            destroy: function(handle, c"cublasLtDestroy")?,
            version: function(handle, c"cublasLtGetVersion")?,
            status_name: function(handle, c"cublasLtGetStatusName")?,
            desc_create: function(handle, c"cublasLtMatmulDescCreate")?,
            desc_destroy: function(handle, c"cublasLtMatmulDescDestroy")?,
            desc_set: function(handle, c"cublasLtMatmulDescSetAttribute")?,
            layout_create: function(handle, c"cublasLtMatrixLayoutCreate")?,
            layout_destroy: function(handle, c"cublasLtMatrixLayoutDestroy")?,
            preference_create: function(handle, c"cublasLtMatmulPreferenceCreate")?,
            preference_destroy: function(handle, c"cublasLtMatmulPreferenceDestroy")?,
            preference_set: function(handle, c"cublasLtMatmulPreferenceSetAttribute")?,
            heuristic: function(handle, c"cublasLtMatmulAlgoGetHeuristic")?,
            matmul: function(handle, c"cublasLtMatmul")?,
        };
        // SAFETY: it takes nothing.
        let version = unsafe { (functions.version)() };
        Ok(Ok(Self { functions, version }))
    }

    /// `cuBLASLt 13.1`.
    pub(super) fn describe(&self) -> String {
        format!("cuBLASLt {}.{}", self.version / 10_000, self.version / 100 % 100)
    }

    /// `Ok` for success, else the library's name for what went wrong.
    fn check(&self, what: &str, status: Status) -> Result<(), String> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: any number may be asked for.
        let name = unsafe { (self.functions.status_name)(status) };
        if name.is_null() {
            return Err(format!("{what}: status {status}"));
        }
        // SAFETY: not null, so a text of the library that ends in a zero byte and stays.
        let name = unsafe { CStr::from_ptr(name) };
        Err(format!("{what}: {}", name.to_string_lossy()))
    }
}

/// A function of a library, as a function pointer of type `T`.
fn function<T: Copy>(library: *mut c_void, name: &CStr) -> Result<T, String> {
    const { assert!(size_of::<T>() == size_of::<*mut c_void>()) };
    // SAFETY: the handle is of a library that is never closed, and the name ends in a zero byte.
    let address = unsafe { libc::dlsym(library, name.as_ptr()) };
    if address.is_null() {
        return Err(format!("the library named cuBLASLt lacks {}", name.to_string_lossy()));
    }
    // SAFETY: not null, and every `T` that is asked for is the type that `cublasLt.h` gives to a function of this name.
    Ok(unsafe { std::mem::transmute_copy(&address) })
}

/// Products by cuBLASLt on one device.
pub(super) struct Blas {
    library: &'static Library,
    context: Arc<CudaContext>,
    handle: Opaque,
    operation: Opaque,
    preference: Opaque,
    known: HashMap<Shape, Heuristic>,
}

// SAFETY: the library's objects may be used by one thread at a time, from any; they are reached through the backend alone.
unsafe impl Send for Blas {}

/// All that the choice of an algorithm depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    features: usize,
    rows: usize,
    cols: usize,
    x_stride: usize,
    out_stride: usize,
    /// Of weights, activations and output, in bytes.
    alignments: [u32; 3],
}

/// `out = x * weights^T`, or that added to `out`.
pub(super) struct Matmul<'a> {
    /// bf16 `[features, cols]`, without gaps.
    pub(super) weights: &'a DeviceBytes,
    pub(super) features: usize,
    pub(super) cols: usize,
    /// Of at least `cols` columns.
    pub(super) x: Input<'a>,
    /// f32, `[rows, features]`, the first of them at element `first`.
    pub(super) out: &'a DeviceBytes,
    pub(super) first: usize,
    pub(super) out_stride: usize,
    pub(super) add: bool,
    /// Of [`WORKSPACE`] bytes.
    pub(super) workspace: &'a DeviceBytes,
}

impl Blas {
    /// Opens the library on a device.
    ///
    /// # Errors
    /// One line that says what failed.
    pub(super) fn new(library: &'static Library, device: &Device) -> Result<Self, String> {
        let functions = &library.functions;
        // What exists so far is destroyed by `drop`.
        let mut blas = Self {
            library,
            context: Arc::clone(&device.context),
            handle: null_mut(),
            operation: null_mut(),
            preference: null_mut(),
            known: HashMap::new(),
        };
        blas.bind()?;
        // SAFETY: the device's context is current, and the handle is written to a place that outlives the call.
        library.check("cublasLtCreate", unsafe { (functions.create)(&mut blas.handle) })?;
        // SAFETY: the operation is written to a place that outlives the call.
        let status = unsafe { (functions.desc_create)(&mut blas.operation, COMPUTE_F32, F32) };
        library.check("cublasLtMatmulDescCreate", status)?;
        let transposed = TRANSPOSED;
        // SAFETY: the operation was made above, and this attribute is an `int32_t`.
        let status = unsafe {
            (functions.desc_set)(blas.operation, DESC_TRANSA, (&raw const transposed).cast(), size_of::<c_int>())
        };
        library.check("cublasLtMatmulDescSetAttribute", status)?;
        // SAFETY: the preference is written to a place that outlives the call.
        let status = unsafe { (functions.preference_create)(&mut blas.preference) };
        library.check("cublasLtMatmulPreferenceCreate", status)?;
        blas.prefer(PREF_WORKSPACE, WORKSPACE as u64)?;
        Ok(blas)
    }

    pub(super) fn describe(&self) -> String {
        self.library.describe()
    }

    /// Makes the device's context that of this thread, as the library expects.
    fn bind(&self) -> Result<(), String> {
        self.context.bind_to_thread().map_err(|error| failed("choosing the device", error).to_string())
    }

    /// Sets a preference; `T` must be the type that the header gives it.
    fn prefer<T: Copy>(&self, attribute: c_int, value: T) -> Result<(), String> {
        // SAFETY: the preference is one of the library's, and it reads the bytes of `value` before it returns; it compares
        // their number with its own.
        let status = unsafe {
            (self.library.functions.preference_set)(
                self.preference,
                attribute,
                (&raw const value).cast(),
                size_of::<T>(),
            )
        };
        self.library.check("cublasLtMatmulPreferenceSetAttribute", status)
    }

    /// Submits a product to the device's stream. Nothing was submitted when it fails.
    ///
    /// # Errors
    /// One line that says what failed.
    pub(super) fn matmul(&mut self, device: &Device, op: &Matmul<'_>) -> Result<(), String> {
        /// More shapes than the steps of one engine have; forgetting them all costs asking again.
        const MOST_KNOWN: usize = 4096;
        let Matmul { features, cols, x, first, out_stride, .. } = *op;
        if features == 0 || cols == 0 || x.rows == 0 {
            return Ok(());
        }
        let fits = !std::ptr::eq(op.out, op.weights)
            && !std::ptr::eq(op.out, x.memory)
            && features * cols * 2 <= op.weights.len()
            && cols <= x.stride
            && ((x.rows - 1) * x.stride + cols) * 2 <= x.memory.len()
            && features <= out_stride
            && (first + (x.rows - 1) * out_stride + features) * 4 <= op.out.len()
            && WORKSPACE <= op.workspace.len();
        if !fits {
            return Err(format!(
                "a product of {} rows, {features} features, {cols} columns does not fit its memory",
                x.rows
            ));
        }
        let addresses = [op.weights.at(0), x.memory.at(0), op.out.at(4 * first), op.workspace.at(0)];
        let [weights, activations, out, workspace] = addresses.map(|arg| match arg {
            Arg::Pointer(address) => address,
            _ => unreachable!("memory gives addresses"),
        });
        let alignments = [weights, activations, out].map(alignment);
        let shape = Shape { features, rows: x.rows, cols, x_stride: x.stride, out_stride, alignments };
        self.bind()?;
        // Column by column, as the library counts: weights [cols, features] transposed, activations [cols, rows], sums
        // [features, rows].
        let a = Layout::new(self.library, BF16, (cols, features), cols)?;
        let b = Layout::new(self.library, BF16, (cols, x.rows), x.stride)?;
        let d = Layout::new(self.library, F32, (features, x.rows), out_stride)?;
        let chosen = match self.known.get(&shape) {
            Some(known) => *known,
            None => {
                let chosen = self.choose(&shape, [&a, &b, &d])?;
                if self.known.len() >= MOST_KNOWN {
                    self.known.clear();
                }
                self.known.insert(shape, chosen);
                chosen
            }
        };
        let (alpha, beta) = (1.0, if op.add { 1.0 } else { 0.0 });
        // SAFETY: handle, operation and layouts are the library's own; all factors lie in memory of this device that is as
        // large as the layouts say, checked above, and is freed in the order of the stream that the product is submitted to;
        // the output is other memory than the factors, also checked. alpha, beta and the algorithm are
        // read before the call returns.
        let status = unsafe {
            (self.library.functions.matmul)(
                self.handle,
                self.operation,
                &alpha,
                weights,
                a.layout,
                activations,
                b.layout,
                &beta,
                out,
                d.layout,
                out,
                d.layout,
                &chosen.algorithm,
                workspace,
                WORKSPACE,
                device.stream.cu_stream().cast(),
            )
        };
        self.library.check("cublasLtMatmul", status)
    }

    /// The algorithm that the library takes for the best.
    fn choose(&self, shape: &Shape, [a, b, d]: [&Layout; 3]) -> Result<Heuristic, String> {
        let [weights, activations, out] = shape.alignments;
        self.prefer(PREF_ALIGNMENT_A, weights)?;
        self.prefer(PREF_ALIGNMENT_B, activations)?;
        self.prefer(PREF_ALIGNMENT_C, out)?;
        self.prefer(PREF_ALIGNMENT_D, out)?;
        let (mut best, mut count) = (Heuristic::default(), 0);
        // SAFETY: all objects are the library's own, and there is room for the one result that is asked for.
        let status = unsafe {
            (self.library.functions.heuristic)(
                self.handle,
                self.operation,
                a.layout,
                b.layout,
                d.layout,
                d.layout,
                self.preference,
                1,
                &mut best,
                &mut count,
            )
        };
        const WHAT: &str = "cublasLtMatmulAlgoGetHeuristic";
        self.library.check(WHAT, status)?;
        self.library.check(WHAT, best.state)?;
        if count < 1 || best.workspace > WORKSPACE {
            return Err(format!("{WHAT}: nothing for {shape:?}"));
        }
        Ok(best)
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // Whatever comes of it, the objects are of no use any more.
        let _ = self.bind();
        let functions = &self.library.functions;
        let objects = [
            (self.preference, functions.preference_destroy),
            (self.operation, functions.desc_destroy),
            (self.handle, functions.destroy),
        ];
        for (object, destroy) in objects.into_iter().filter(|(object, _)| !object.is_null()) {
            // SAFETY: it was made by the function that this one undoes, and is not used again.
            unsafe { destroy(object) };
        }
    }
}

/// A `cublasLtMatrixLayout_t`.
struct Layout {
    library: &'static Library,
    layout: Opaque,
}

impl Layout {
    /// `rows` consecutive elements in each of `cols` columns that are `stride` apart.
    fn new(library: &'static Library, ty: c_int, (rows, cols): (usize, usize), stride: usize) -> Result<Self, String> {
        let mut layout = null_mut();
        // SAFETY: the layout is written to a place that outlives the call.
        let status =
            unsafe { (library.functions.layout_create)(&mut layout, ty, rows as u64, cols as u64, stride as i64) };
        library.check("cublasLtMatrixLayoutCreate", status)?;
        Ok(Self { library, layout })
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: it was made by the library, and is not used again.
        unsafe { (self.library.functions.layout_destroy)(self.layout) };
    }
}

/// Bytes that an address is a multiple of, up to what the library knows to make use of.
fn alignment(address: u64) -> u32 {
    1 << address.trailing_zeros().min(8)
}

#[cfg(test)]
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[path = "cublaslt_tests.rs"]
mod tests;
