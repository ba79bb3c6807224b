//! Drivers that cannot be used: each is a tiny library, probed in a process of its own.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{DRIVER_VARIABLE, devices};

/// Not a test: what the tests below start, with the variable set. Prints what the probe finds.
#[test]
#[ignore = "started by the other tests, as a process of its own"]
fn say_what_is_found() {
    match devices() {
        Ok(devices) => println!("\nfound: {}", devices.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")),
        Err(reason) => println!("\nnone: {reason}"),
    }
}

/// What the probe finds with this driver, and what it printed besides.
fn probed(driver: &Path, variables: &[(&str, &str)]) -> String {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--ignored", "--nocapture", "--test-threads=1", "cuda::probe::tests::say_what_is_found"])
        .env(DRIVER_VARIABLE, driver)
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    assert!(child.status.success(), "{child:?}");
    assert_eq!(String::from_utf8_lossy(&child.stderr), "", "a probe is silent");
    let printed = String::from_utf8(child.stdout).unwrap();
    printed.lines().find(|line| line.starts_with("none: ") || line.starts_with("found: ")).unwrap().to_owned()
}

/// A driver library, the folder of which is removed when this is dropped.
struct Driver {
    folder: PathBuf,
    library: PathBuf,
}

impl Drop for Driver {
    fn drop(&mut self) {
        // Left behind, it is the system's to clear.
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// A driver with just these C functions.
fn driver(name: &str, functions: &str) -> Driver {
    let folder = std::env::temp_dir().join(format!("cupola-probe-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let driver = Driver { library: folder.join("libcuda.so.1"), folder };
    let source = driver.folder.join("driver.c");
    std::fs::write(&source, functions).unwrap();
    let compiled = Command::new("gcc")
        .args(["-shared", "-fPIC", "-Wl,-soname,libcuda.so", "-w", "-o"])
        .args([&driver.library, &source])
        .output()
        .expect("gcc, which linked this test");
    assert!(compiled.status.success(), "{compiled:?}");
    driver
}

/// C source of a driver of this version, with every function that is needed first; `init` is what cuInit returns.
fn source(init: i32, version: i32) -> String {
    format!(
        "int cuInit(unsigned f) {{ return {init}; }}
         int cuDriverGetVersion(int *v) {{ *v = {version}; return 0; }}
         int cuGetErrorName(int e, const char **s) {{ *s = e == 100 ? \"CUDA_ERROR_NO_DEVICE\" : \"CUDA_ERROR_UNKNOWN\"; return 0; }}
         int cuGetErrorString(int e, const char **s) {{ *s = e == 100 ? \"no device is there\" : \"it broke\"; return 0; }}"
    )
}

#[test]
fn no_library_is_said_in_one_line() {
    let said = probed(Path::new("/nowhere/libcuda.so.1"), &[]);
    assert!(said.starts_with("none: the driver library cannot be opened: /nowhere/libcuda.so.1"), "{said}");
}

#[test]
fn a_broken_library_is_said_in_one_line() {
    let whole = driver("broken", &source(0, 13000));
    let bytes = std::fs::read(&whole.library).unwrap();
    std::fs::write(&whole.library, &bytes[..100]).unwrap();
    let said = probed(&whole.library, &[]);
    assert!(said.starts_with("none: the driver library cannot be opened") && said.contains("broken"), "{said}");
}

#[test]
fn a_library_that_is_no_driver_is_said_in_one_line() {
    assert_eq!(probed(&driver("other", "int other;").library, &[]), "none: the driver library lacks cuInit");
}

#[test]
fn a_driver_without_a_device_is_said_in_one_line() {
    let said = probed(&driver("no-device", &source(100, 13000)).library, &[]);
    assert_eq!(said, "none: cuInit: CUDA_ERROR_NO_DEVICE (no device is there)");
}

#[test]
fn an_old_driver_is_said_in_one_line() {
    let said = probed(&driver("old", &source(0, 12040)).library, &[]);
    assert_eq!(said, "none: the driver supports CUDA 12.4; the kernels need 13.0 or later (driver 580)");
}

#[test]
fn a_driver_that_lacks_a_function_is_said_in_one_line() {
    let said = probed(&driver("lacking", &source(0, 13000)).library, &[]);
    assert_eq!(said, "none: the driver library lacks cuCtxGetCurrent");
}

#[test]
fn the_emulated_driver_is_found_like_a_real_one() {
    let library = crate::cuda::testing::emulated_driver().unwrap();
    let said = probed(&library, &[]);
    assert_eq!(said, "found: cuda:0 Emulated device (CPU) (1.0 GiB, compute capability 8.0)");
    assert_eq!(
        probed(&library, &[("CUPOLA_EMULATOR_DEVICES", "0")]),
        "none: cuInit: CUDA_ERROR_NO_DEVICE (no CUDA-capable device is detected)"
    );
}
