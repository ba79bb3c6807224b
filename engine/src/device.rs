//! Where a model runs: the CPU, or a CUDA device that was found at start.

use std::fmt;
use std::str::FromStr;

use cupola_kernels::Backend;
use cupola_kernels::cpu::{CpuBackend, CpuConfig};
#[cfg(unix)]
use cupola_kernels::cuda::{self, CudaBackend, DeviceInfo};

use crate::Error;

/// What an operator may ask for: `cpu`, `cuda`, `cuda:N` or `auto`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The CPU.
    #[default]
    Cpu,
    /// The CUDA device of this number.
    Cuda(usize),
    /// The first CUDA device, or the CPU where there is none.
    Auto,
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "cpu" => Ok(Self::Cpu),
            "auto" => Ok(Self::Auto),
            "cuda" => Ok(Self::Cuda(0)),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|number| number.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| format!("expected cpu, cuda, cuda:N or auto, got {text:?}")),
        }
    }
}

/// A place to run a model on.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Device {
    /// The CPU, with the settings of its backend.
    Cpu(CpuConfig),
    /// A CUDA device.
    #[cfg(unix)]
    Cuda(DeviceInfo),
}

impl Default for Device {
    fn default() -> Self {
        Self::Cpu(CpuConfig::default())
    }
}

impl DeviceChoice {
    /// Finds the device. Beside it, for [`DeviceChoice::Auto`] without a CUDA device, why there is none.
    ///
    /// # Errors
    /// [`Error::Device`] when the device asked for is not there.
    pub fn find(self, cpu: CpuConfig) -> Result<(Device, Option<String>), Error> {
        match self {
            Self::Cpu => Ok((Device::Cpu(cpu), None)),
            Self::Cuda(ordinal) => match found() {
                Ok(devices) => numbered(&devices, ordinal).map(|device| (device, None)),
                Err(why) => Err(Error::Device {
                    device: format!("cuda:{ordinal}"),
                    why,
                    instead: "cpu, or auto to fall back by itself".into(),
                }),
            },
            Self::Auto => match found().and_then(|devices| devices.into_iter().next().ok_or_else(String::new)) {
                Ok(device) => Ok((device, None)),
                Err(why) => Ok((Device::Cpu(cpu), Some(why))),
            },
        }
    }
}

/// CUDA devices that can be used, or why there is none.
#[cfg(unix)]
fn found() -> Result<Vec<Device>, String> {
    cuda::devices().map(|devices| devices.into_iter().map(Device::Cuda).collect())
}

#[cfg(not(unix))]
fn found() -> Result<Vec<Device>, String> {
    Err("CUDA is used on Linux only".into())
}

fn numbered(devices: &[Device], ordinal: usize) -> Result<Device, Error> {
    let name = format!("cuda:{ordinal}");
    let wanted = devices.iter().find(|device| device.name() == name);
    wanted.cloned().ok_or_else(|| Error::Device {
        device: name,
        why: "there is no such device".into(),
        instead: devices.iter().map(Device::name).collect::<Vec<_>>().join(", "),
    })
}

impl Device {
    /// `cpu` or `cuda:N`, as in [`DeviceChoice`].
    pub fn name(&self) -> String {
        match self {
            Self::Cpu(_) => "cpu".into(),
            #[cfg(unix)]
            Self::Cuda(info) => format!("cuda:{}", info.ordinal),
        }
    }

    /// A backend on it, without any weights yet.
    ///
    /// # Errors
    /// [`Error::Kernel`] when it cannot be started.
    pub fn backend(&self) -> Result<Box<dyn Backend>, Error> {
        Ok(match self {
            Self::Cpu(config) => Box::new(CpuBackend::new(*config)?),
            #[cfg(unix)]
            Self::Cuda(info) => Box::new(CudaBackend::new(info.clone())?),
        })
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu(_) => write!(f, "cpu"),
            #[cfg(unix)]
            Self::Cuda(info) => write!(f, "{info}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_read_as_they_are_written() {
        for (text, choice) in [
            ("cpu", DeviceChoice::Cpu),
            ("auto", DeviceChoice::Auto),
            ("cuda", DeviceChoice::Cuda(0)),
            ("cuda:3", DeviceChoice::Cuda(3)),
        ] {
            assert_eq!(text.parse(), Ok(choice));
        }
        for text in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CPU"] {
            let error = text.parse::<DeviceChoice>().unwrap_err();
            assert!(error.contains("cpu, cuda, cuda:N or auto"), "{error}");
        }
    }

    #[test]
    fn the_cpu_is_always_there() {
        let (device, why) = DeviceChoice::Cpu.find(CpuConfig::default()).unwrap();
        assert_eq!((device.name().as_str(), why), ("cpu", None));
    }
}
