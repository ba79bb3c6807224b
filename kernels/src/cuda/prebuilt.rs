//! The compiled kernels, embedded: one fatbin per unit of `cu/`, made by `prebuild.sh` and committed.
//!
//! `prebuilt/sources.sha256` says which sources they were made from; a test fails when those have changed since.

/// `(unit, fatbin)`: machine code for compute capability 8.0 and 9.0, and PTX that later devices compile.
pub(super) const UNITS: &[(&str, &[u8])] = include!("prebuilt/units.rs");

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use sha2::{Digest, Sha256};

    use super::UNITS;

    fn sources() -> BTreeMap<String, String> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cuda/cu");
        let files = std::fs::read_dir(folder).expect("the folder of the sources").map(|entry| entry.unwrap().path());
        files
            .filter(|path| path.extension().is_some_and(|ending| ending == "cu" || ending == "cuh"))
            .map(|path| {
                let digest = Sha256::digest(std::fs::read(&path).unwrap());
                let name = path.file_name().unwrap().to_string_lossy().into_owned();
                (name, digest.iter().map(|byte| format!("{byte:02x}")).collect())
            })
            .collect()
    }

    #[test]
    fn the_embedded_kernels_are_of_these_sources() {
        let recorded: BTreeMap<String, String> = include_str!("prebuilt/sources.sha256")
            .lines()
            .filter_map(|line| line.split_once("  "))
            .map(|(digest, name)| (name.to_owned(), digest.to_owned()))
            .collect();
        assert_eq!(sources(), recorded, "run kernels/src/cuda/prebuild.sh and commit what it writes");
    }

    #[test]
    fn every_unit_is_embedded_as_a_fatbin() {
        let units: Vec<String> =
            sources().into_keys().filter_map(|name| name.strip_suffix(".cu").map(str::to_owned)).collect();
        assert_eq!(units, UNITS.iter().map(|(name, _)| name.to_string()).collect::<Vec<_>>());
        for (name, image) in UNITS {
            assert_eq!(image[..4], 0xba55_ed50_u32.to_le_bytes(), "{name}");
        }
    }
}
