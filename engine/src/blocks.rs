//! Blocks of the key/value pool, and who holds them.
/// Blocks of the key/value pool by state; the three add up to the total.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvReport {
    /// All blocks.
    pub total: usize,
    /// Blocks without content.
    pub free: usize,
    /// Blocks that no request uses and the prefix cache remembers.
    pub cached: usize,
    /// Blocks that running requests use.
    pub leased: usize,
}
