//! For tests: a device to run the kernels on, real where there is one, else emulated.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use super::probe::{self, DeviceInfo};

/// The device that tests use, said on stderr once: `CUPOLA_CUDA_DRIVER`'s, the GPU of this machine, or the emulated driver.
///
/// # Errors
/// One line that says why there is none: no GPU, and no g++ to build the emulated driver with.
pub fn device() -> Result<DeviceInfo, String> {
    static CHOSEN: OnceLock<Result<DeviceInfo, String>> = OnceLock::new();
    let choose = || {
        let gpu = ["/dev/nvidiactl", "/dev/dxg"].iter().any(|node| Path::new(node).exists());
        let named = std::env::var_os(probe::DRIVER_VARIABLE).is_some_and(|name| !name.is_empty());
        if !gpu && !named {
            probe::use_driver(&emulated_driver()?);
        }
        let device = probe::devices()?.into_iter().next().ok_or("the driver has no device")?;
        eprintln!("cuda tests run on {device}");
        Ok(device)
    };
    CHOSEN.get_or_init(choose).clone()
}

/// Builds the emulated driver if it is not up to date, and returns its path.
///
/// # Errors
/// What the compiler said.
pub fn emulated_driver() -> Result<PathBuf, String> {
    build_driver("cuda-emulator", &manifest("src/cuda/cu"))
}

/// Builds an emulated driver with the kernels of the folder `sources` into the folder `name` beside the build's own.
pub(crate) fn build_driver(name: &str, sources: &Path) -> Result<PathBuf, String> {
    // <target>/<profile>/deps/<this test>
    let test = std::env::current_exe().map_err(|error| error.to_string())?;
    let target = test.ancestors().nth(3).ok_or("a test that is not in a target folder")?;
    let out = target.join(name);
    let built = Command::new(manifest("cuda-emulator/build.sh"))
        .arg(&out)
        .arg(sources)
        .output()
        .map_err(|error| format!("cuda-emulator/build.sh: {error}"))?;
    if built.status.success() {
        return Ok(out.join("libcuda.so.1"));
    }
    Err(format!("the emulated driver cannot be built: {}", String::from_utf8_lossy(&built.stderr).trim()))
}

pub(crate) fn manifest(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}
