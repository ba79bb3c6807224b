//! Which instruction sets this CPU has, and which one the kernels use.

#[cfg(target_arch = "aarch64")]
use super::simd::Neon;
#[cfg(target_arch = "x86_64")]
use super::simd::{Avx2, Avx512, AvxVnni};
use crate::{Error, Result};

/// Environment variable that forces an instruction set by name.
pub const ISA_VARIABLE: &str = "CUPOLA_ISA";

/// An instruction set that the kernels are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// Plain Rust, on any CPU: the reference.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with all that and AVX-VNNI.
    AvxVnni,
    /// x86-64 with AVX-512 F, BW, VL, DQ and VNNI.
    Avx512,
    /// 64-bit Arm with the dot-product extension.
    Neon,
}

impl Isa {
    const ALL: [Isa; 5] = [Isa::Scalar, Isa::Avx2, Isa::AvxVnni, Isa::Neon, Isa::Avx512];

    /// Name as `CUPOLA_ISA` takes it.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::AvxVnni => "avxvnni",
            Isa::Avx512 => "avx512",
            Isa::Neon => "neon",
        }
    }

    /// True when this CPU can run it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Avx2::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => AvxVnni::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Avx512::detect().is_some(),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => Neon::detect().is_some(),
            _ => false,
        }
    }

    /// The instruction sets of this CPU, slowest first.
    pub fn available() -> Vec<Isa> {
        Self::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// The fastest instruction set of this CPU.
    pub fn best() -> Isa {
        Self::ALL.into_iter().rev().find(|isa| isa.is_available()).unwrap_or(Isa::Scalar)
    }

    /// The set to use: `asked`, else what `CUPOLA_ISA` names, else the best.
    ///
    /// # Errors
    /// [`Error::Isa`] when the set is unknown or this CPU does not have it.
    pub fn choose(asked: Option<Isa>) -> Result<Isa> {
        match asked {
            Some(isa) => isa.checked(),
            None => match std::env::var_os(ISA_VARIABLE).filter(|name| !name.is_empty()) {
                Some(name) => Self::from_name(&name.to_string_lossy()),
                None => Ok(Self::best()),
            },
        }
    }

    fn from_name(name: &str) -> Result<Isa> {
        match Self::ALL.into_iter().find(|isa| isa.name().eq_ignore_ascii_case(name)) {
            Some(isa) => isa.checked(),
            None => Err(Self::refuse(name)),
        }
    }

    fn checked(self) -> Result<Isa> {
        if self.is_available() { Ok(self) } else { Err(Self::refuse(self.name())) }
    }

    fn refuse(name: &str) -> Error {
        let available: Vec<_> = Self::available().into_iter().map(Isa::name).collect();
        Error::Isa { asked: name.to_owned(), available: available.join(", ") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_understood_or_refused_with_what_would_work() {
        assert_eq!(Isa::from_name("Scalar").unwrap(), Isa::Scalar);
        assert_eq!(Isa::available().last(), Some(&Isa::best()));
        let error = Isa::from_name("mmx").unwrap_err().to_string();
        assert!(error.contains("mmx") && error.contains("scalar"), "{error}");
        let foreign = if cfg!(target_arch = "aarch64") { "avx2" } else { "neon" };
        assert!(Isa::from_name(foreign).is_err());
    }
}
