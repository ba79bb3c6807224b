//! Memory of the kernels crate: aligned arenas and read-only mapped files.
