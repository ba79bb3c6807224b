//! What this machine can do at most with an instruction set: bytes read, and multiplications and additions, per second.
//!
//! ```text
//!   time of a product >= max( bytes of its weights / read , operations / peak )        peak: int8 or float
//! ```
//!
//! Every figure is the best of several short runs of all threads together; [`Gauge`] makes one run at a time, to be set against
//! what was measured just before or after it, on a machine whose speed changes. Reading adds what it reads, as a product of
//! one row does; the peaks work on registers alone, with enough independent chains to hide the latency of the instruction.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use super::isa::Isa;
use super::simd::{Kernel, LANES, Simd, dispatch, prefetch_line};
use crate::Result;
use crate::memory::Arena;

/// Bytes that no cache holds, over all threads.
const COLD: usize = 256 << 20;
/// Bytes of each thread that its second-level cache holds.
const CACHED: usize = 192 << 10;
/// One run.
const RUN: Duration = Duration::from_millis(40);
const RUNS: usize = 6;
/// Bytes ahead of the reading that are asked for, as the products ask for their weights.
const AHEAD: usize = 4096;

/// The limits of the machine, for all threads together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Roofline {
    /// Bytes read per second from memory.
    pub read: f64,
    /// Bytes read per second from each thread's second-level cache.
    pub cached_read: f64,
    /// Multiplications and additions of 8-bit numbers per second; `None` where the set has no such instruction.
    pub int8: Option<f64>,
    /// Multiplications and additions of f32 per second.
    pub float: f64,
}

impl Roofline {
    /// Measures with `threads` threads; takes about a second.
    ///
    /// # Errors
    /// [`crate::Error::Isa`] when this CPU does not have the set, [`crate::Error::OutOfMemory`] for what is read.
    pub fn measure(isa: Isa, threads: usize) -> Result<Self> {
        let gauge = Gauge::new(isa, threads)?;
        let cached = Gauge::reading(gauge.isa, gauge.threads, CACHED, 0)?;
        Ok(Self {
            read: best(|| gauge.read()),
            cached_read: best(|| cached.read()),
            int8: int8_pass(gauge.isa).map(|pass| best(|| rate(gauge.threads, &|_| pass()))),
            float: best(|| gauge.float()),
        })
    }

    /// Least seconds for something that reads `bytes` from memory and does `operations`, in 8-bit numbers or in f32.
    pub fn seconds(&self, bytes: f64, operations: f64, int8: bool) -> f64 {
        let peak = self.int8.filter(|_| int8).unwrap_or(self.float);
        (bytes / self.read).max(operations / peak)
    }
}

/// [`Roofline::read`] alone, in a quarter of the time.
///
/// # Errors
/// As [`Roofline::measure`].
pub fn read_bandwidth(isa: Isa, threads: usize) -> Result<f64> {
    let gauge = Gauge::new(isa, threads)?;
    Ok(best(|| gauge.read()))
}

fn best(run: impl Fn() -> f64) -> f64 {
    (0..RUNS).map(|_| run()).fold(0.0, f64::max)
}

/// Measures a limit in one short run, of some hundredths of a second.
pub struct Gauge {
    isa: Isa,
    threads: usize,
    /// What each thread reads.
    parts: Vec<Arena<f32>>,
    ahead: usize,
}

impl Gauge {
    /// Takes the memory that is read.
    ///
    /// # Errors
    /// As [`Roofline::measure`].
    pub fn new(isa: Isa, threads: usize) -> Result<Self> {
        let threads = threads.max(1);
        Self::reading(Isa::choose(Some(isa))?, threads, COLD / threads, AHEAD)
    }

    /// With an instruction set that this CPU has, and `bytes` of its own for each thread.
    fn reading(isa: Isa, threads: usize, bytes: usize, ahead: usize) -> Result<Self> {
        let parts = (0..threads)
            .map(|_| {
                let mut part = Arena::<f32>::zeroed(bytes / size_of::<f32>(), "the memory to read")?;
                part.fill(0.0);
                Ok(part)
            })
            .collect::<Result<_>>()?;
        Ok(Self { isa, threads, parts, ahead })
    }

    /// Bytes that all threads read per second.
    pub fn read(&self) -> f64 {
        rate(self.threads, &|thread| {
            black_box(dispatch(self.isa, Read { data: &self.parts[thread], ahead: self.ahead }));
            self.parts[thread].bytes() as f64
        })
    }

    /// See [`Roofline::int8`].
    pub fn int8(&self) -> Option<f64> {
        int8_pass(self.isa).map(|pass| rate(self.threads, &|_| pass()))
    }

    /// See [`Roofline::float`].
    pub fn float(&self) -> f64 {
        rate(self.threads, &|_| dispatch(self.isa, Fma))
    }
}

/// Amount per second of all threads together; a pass returns the amount that it did.
fn rate(threads: usize, pass: &(dyn Fn(usize) -> f64 + Sync)) -> f64 {
    let together = Barrier::new(threads);
    let work = |thread: usize| {
        pass(thread);
        together.wait();
        let (start, mut amount) = (Instant::now(), 0.0);
        while start.elapsed() < RUN {
            amount += pass(thread);
        }
        amount / start.elapsed().as_secs_f64()
    };
    let work = &work;
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|thread| scope.spawn(move || work(thread))).collect();
        // A thread that panicked has no rate; the panic itself was printed.
        work(0) + others.into_iter().map(|other| other.join().unwrap_or(0.0)).sum::<f64>()
    })
}

/// Reads everything once.
struct Read<'a> {
    data: &'a [f32],
    ahead: usize,
}

impl Kernel for Read<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut sums = [s.splat(0.0); 4];
        for block in self.data.as_chunks::<{ 4 * LANES }>().0 {
            if self.ahead > 0 {
                let ahead = block.as_ptr().cast::<u8>().wrapping_add(self.ahead);
                for line in 0..4 {
                    prefetch_line(ahead.wrapping_add(line * 64));
                }
            }
            for (sum, lanes) in sums.iter_mut().zip(block.as_chunks::<LANES>().0) {
                *sum = s.add(*sum, s.load(lanes));
            }
        }
        s.reduce_add(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
    }
}

const FMA_PASSES: usize = 4096;

/// Multiplies and adds floats in registers; returns the operations.
struct Fma;

impl Kernel for Fma {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f64 {
        // Sums beside two operands. Fewer registers a vector allow more vectors, and need them: each is one instruction.
        if S::TILE >= 12 { fma::<S, 10>(s) } else { fma::<S, 5>(s) }
    }
}

#[inline(always)]
fn fma<S: Simd, const CHAINS: usize>(s: S) -> f64 {
    let (factor, term) = (s.splat(black_box(0.999)), s.splat(black_box(0.001)));
    let mut sums = [s.splat(black_box(1.0)); CHAINS];
    for _ in 0..FMA_PASSES {
        for sum in &mut sums {
            *sum = s.fma(*sum, factor, term);
        }
    }
    for sum in sums {
        black_box(s.reduce_add(sum));
    }
    (FMA_PASSES * CHAINS * LANES * 2) as f64
}

/// A pass over the instructions that the products of a set are made of; returns its operations.
fn int8_pass(isa: Isa) -> Option<fn() -> f64> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Isa::choose` saw the features of this set in `Roofline::measure`.
        Isa::Avx2 => Some(|| unsafe { x86::maddubs() }),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::AvxVnni => Some(|| unsafe { x86::dpbusd_256() }),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx512 => Some(|| unsafe { x86::dpbusd() }),
        #[cfg(target_arch = "aarch64")]
        // SAFETY: as above.
        Isa::Neon => Some(|| unsafe { neon::sdot() }),
        _ => None,
    }
}

/// Passes of [`int8_pass`] over its chains.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const INT8_PASSES: usize = 8192;
/// Independent chains of [`int8_pass`].
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const INT8_CHAINS: usize = 12;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        _mm256_add_epi16, _mm256_dpbusd_avx_epi32, _mm256_maddubs_epi16, _mm256_set1_epi8, _mm256_setzero_si256,
        _mm512_dpbusd_epi32, _mm512_set1_epi8, _mm512_setzero_si512,
    };
    use std::hint::black_box;

    use super::{INT8_CHAINS, INT8_PASSES};

    /// 32 products of bytes and 16 sums of two in one instruction, and one that adds them up.
    #[target_feature(enable = "avx2")]
    pub(super) fn maddubs() -> f64 {
        let (w, x) = (black_box(_mm256_set1_epi8(1)), black_box(_mm256_set1_epi8(2)));
        let mut sums = [_mm256_setzero_si256(); INT8_CHAINS];
        for _ in 0..INT8_PASSES {
            for sum in &mut sums {
                // The product depends on the sum, or else it would be computed once.
                *sum = _mm256_add_epi16(x, _mm256_maddubs_epi16(*sum, w));
            }
        }
        black_box(sums);
        (INT8_PASSES * INT8_CHAINS * 64) as f64
    }

    /// 32 products of bytes, added into 8 sums, in one instruction.
    #[target_feature(enable = "avx2,avxvnni")]
    pub(super) fn dpbusd_256() -> f64 {
        let (w, x) = (black_box(_mm256_set1_epi8(1)), black_box(_mm256_set1_epi8(2)));
        let mut sums = [_mm256_setzero_si256(); INT8_CHAINS];
        for _ in 0..INT8_PASSES {
            for sum in &mut sums {
                *sum = _mm256_dpbusd_avx_epi32(*sum, w, x);
            }
        }
        black_box(sums);
        (INT8_PASSES * INT8_CHAINS * 64) as f64
    }

    /// 64 products of bytes, added into 16 sums, in one instruction.
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn dpbusd() -> f64 {
        let (w, x) = (black_box(_mm512_set1_epi8(1)), black_box(_mm512_set1_epi8(2)));
        let mut sums = [_mm512_setzero_si512(); INT8_CHAINS];
        for _ in 0..INT8_PASSES {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, w, x);
            }
        }
        black_box(sums);
        (INT8_PASSES * INT8_CHAINS * 128) as f64
    }
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use std::arch::aarch64::{vdupq_n_s8, vdupq_n_s32};
    use std::arch::asm;
    use std::hint::black_box;

    use super::{INT8_CHAINS, INT8_PASSES};

    /// 16 products of bytes, added into 4 sums, in one instruction.
    #[target_feature(enable = "neon,dotprod")]
    pub(super) fn sdot() -> f64 {
        let (w, x) = (black_box(vdupq_n_s8(1)), black_box(vdupq_n_s8(2)));
        let mut sums = [vdupq_n_s32(0); INT8_CHAINS];
        for _ in 0..INT8_PASSES {
            for sum in &mut sums {
                // SAFETY: the instruction reads and writes only the registers named, and `dotprod` is enabled here.
                unsafe {
                    asm!(
                        "sdot {sum:v}.4s, {w:v}.16b, {x:v}.16b",
                        sum = inout(vreg) *sum,
                        w = in(vreg) w,
                        x = in(vreg) x,
                        options(pure, nomem, nostack, preserves_flags),
                    );
                }
            }
        }
        black_box(sums);
        (INT8_PASSES * INT8_CHAINS * 32) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_set_has_limits_in_a_sensible_order() {
        for isa in Isa::available() {
            let roof = Roofline::measure(isa, 1).unwrap();
            assert!(roof.read > 1e8 && roof.cached_read > roof.read / 4.0 && roof.float > 1e8, "{isa:?}: {roof:?}");
            assert_eq!(roof.int8.is_some(), isa != Isa::Scalar, "{isa:?}");
            // More bytes, or more operations, never take less time.
            assert!(roof.seconds(2e9, 1.0, true) > roof.seconds(1e9, 1.0, true));
            assert!(roof.seconds(1.0, 2e12, false) > roof.seconds(1.0, 1e12, false));
        }
    }
}
