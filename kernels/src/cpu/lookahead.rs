//! Memory that will be read soon: threads that have nothing to do ask the caches for it.
//!
//! A decoding step reads all weights once, and between two matrix products the memory would idle: while one thread norms a
//! row, while another waits for the last chunk of a job. What is asked for then, nobody waits for later.

use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use super::simd::{LINE, prefetch_l2};

/// Bytes that are asked for before a waiting thread looks again whether its wait is over.
const STEP: usize = 8 * LINE;

/// Ranges of memory, and how far each was asked for. Any number of threads may do so; addresses are only ever prefetched, so
/// a range that is replaced meanwhile, or freed, does no harm.
#[derive(Default)]
pub(super) struct Lookahead([Range; 2]);

/// Addresses.
#[derive(Default)]
struct Range {
    next: AtomicUsize,
    end: AtomicUsize,
}

impl Lookahead {
    /// Replaces what will be read: first the one, then the other.
    pub(super) fn set(&self, bytes: [&[u8]; 2]) {
        for (range, bytes) in self.0.iter().zip(bytes) {
            let start = bytes.as_ptr().addr();
            range.end.store(0, Relaxed);
            range.next.store(start, Relaxed);
            range.end.store(start + bytes.len(), Relaxed);
        }
    }

    /// Asks for the next bytes; false when all were asked for.
    #[inline(always)]
    pub(super) fn fetch(&self) -> bool {
        for Range { next, end } in &self.0 {
            let end = end.load(Relaxed);
            if next.load(Relaxed) < end {
                let start = next.fetch_add(STEP, Relaxed);
                for line in (start..end.min(start + STEP)).step_by(LINE) {
                    prefetch_l2(std::ptr::without_provenance(line));
                }
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_asked_for_once() {
        let (first, second) = ([0; 3 * STEP], [0; STEP + 1]);
        let lookahead = Lookahead::default();
        assert!(!lookahead.fetch());
        for _ in 0..2 {
            lookahead.set([&first, &second]);
            assert_eq!((0..9).filter(|_| lookahead.fetch()).count(), 5);
        }
        lookahead.set([&[], &second]);
        assert!(lookahead.fetch());
        lookahead.set([&[], &[]]);
        assert!(!lookahead.fetch());
    }
}
