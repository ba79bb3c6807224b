//! RMS norm of one row (Zhang and Sennrich, Root Mean Square Layer Normalization, <https://arxiv.org/abs/1910.07467>).
//!
//! All functions work on one row of any length. The order of the sum of squares depends on that length alone.

use super::act::ActWriter;
use super::isa::Isa;
use super::simd::{Kernel, LANES, Simd, dispatch, load_part, store_part};

/// Writes `x / sqrt(mean(x^2) + eps) * weight` to a row of `out`.
///
/// # Safety
/// No other thread writes that row at the same time.
///
/// # Panics
/// When the lengths differ.
pub(crate) unsafe fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], eps: f32, (out, row): (&ActWriter<'_>, usize)) {
    assert!(x.len() == weight.len() && x.len() == out.cols(), "{} {} {}", x.len(), weight.len(), out.cols());
    dispatch(isa, NormToAct { x, weight, eps, out, row });
}

/// `x = x / sqrt(mean(x^2) + eps) * weight`
///
/// # Panics
/// When the lengths differ.
pub(crate) fn rms_norm_in_place(isa: Isa, x: &mut [f32], weight: &[f32], eps: f32) {
    assert_eq!(x.len(), weight.len());
    dispatch(isa, Norm { x: None, weight, eps, out: x, add: false });
}

/// `x += y / sqrt(mean(y^2) + eps) * weight`
///
/// # Panics
/// When the lengths differ.
pub(crate) fn rms_norm_add(isa: Isa, y: &[f32], weight: &[f32], eps: f32, x: &mut [f32]) {
    assert!(y.len() == weight.len() && y.len() == x.len(), "{} {} {}", y.len(), weight.len(), x.len());
    dispatch(isa, Norm { x: Some(y), weight, eps, out: x, add: true });
}

struct NormToAct<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a ActWriter<'a>,
    row: usize,
}

impl Kernel for NormToAct<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // Some blocks of the activation at a time, so that the row as floats needs no memory beyond the stack.
        const PART: usize = 256;
        let mut buffer = [0.0; PART];
        let scale = scale(s, self.x, self.eps);
        for (i, (x, weight)) in self.x.chunks(PART).zip(self.weight.chunks(PART)).enumerate() {
            let part = &mut buffer[..x.len()];
            normalise(s, Norm { x: Some(x), weight, eps: self.eps, out: part, add: false }, scale);
            // SAFETY: `rms_norm` demands that its caller is alone with the row.
            unsafe { self.out.write(s, self.row, i * PART, part) };
        }
    }
}

struct Norm<'a> {
    /// The row, unless it is `out` itself.
    x: Option<&'a [f32]>,
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
    add: bool,
}

impl Kernel for Norm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let scale = scale(s, self.x.unwrap_or(self.out), self.eps);
        normalise(s, self, scale);
    }
}

/// `1 / sqrt(mean(x^2) + eps)`
#[inline(always)]
fn scale<S: Simd>(s: S, x: &[f32], eps: f32) -> S::V {
    s.splat(1.0 / (sum_of_squares(s, x) / x.len() as f32 + eps).sqrt())
}

#[inline(always)]
fn normalise<S: Simd>(s: S, norm: Norm<'_>, scale: S::V) {
    let (out, out_tail) = norm.out.as_chunks_mut::<LANES>();
    let (weight, weight_tail) = norm.weight.as_chunks::<LANES>();
    let (x, x_tail) = norm.x.map(|x| x.as_chunks::<LANES>()).unzip();
    for (i, (out, weight)) in out.iter_mut().zip(weight).enumerate() {
        let value = s.mul(s.mul(s.load(x.map_or(&*out, |x| &x[i])), scale), s.load(weight));
        let value = if norm.add { s.add(s.load(out), value) } else { value };
        s.store(value, out);
    }
    if !out_tail.is_empty() {
        let x = load_part(s, x_tail.unwrap_or(out_tail));
        let value = s.mul(s.mul(x, scale), load_part(s, weight_tail));
        let value = if norm.add { s.add(load_part(s, out_tail), value) } else { value };
        store_part(s, value, out_tail);
    }
}

/// Four running sums hide the latency of the additions.
#[inline(always)]
fn sum_of_squares<S: Simd>(s: S, x: &[f32]) -> f32 {
    let (vectors, tail) = x.as_chunks::<LANES>();
    let (quads, singles) = vectors.as_chunks::<4>();
    let mut sums = [s.splat(0.0); 4];
    for quad in quads {
        for (sum, values) in sums.iter_mut().zip(quad) {
            let v = s.load(values);
            *sum = s.fma(v, v, *sum);
        }
    }
    for (sum, values) in sums.iter_mut().zip(singles) {
        let v = s.load(values);
        *sum = s.fma(v, v, *sum);
    }
    let v = load_part(s, tail);
    sums[3] = s.fma(v, v, sums[3]);
    s.reduce_add(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::act::{Act, Form, Tile};
    use crate::cpu::simd::tests::{noise, runnable};

    fn reference(x: &[f32], weight: &[f32], eps: f32) -> Vec<f64> {
        let mean = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / x.len() as f64;
        let scale = 1.0 / (mean + f64::from(eps)).sqrt();
        x.iter().zip(weight).map(|(&x, &w)| f64::from(x) * scale * f64::from(w)).collect()
    }

    fn to_act(isa: Isa, x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
        let form = Form { int8: false, float: true };
        let mut act = Act::new(1, x.len(), 4).unwrap();
        let writer = act.begin("test", 1, form).unwrap();
        // SAFETY: only this thread writes.
        unsafe { rms_norm(isa, x, weight, eps, (&writer, 0)) };
        act.read("test", 1, form).unwrap().floats(Tile { row: 0, len: 1 }).to_vec()
    }

    #[test]
    fn all_lengths_agree_with_the_definition() {
        for isa in runnable() {
            for len in [1, 2, 15, 16, 17, 31, 48, 63, 64, 65, 127, 128, 576, 577, 1000] {
                let x: Vec<f32> = (0..len).map(noise).collect();
                let weight: Vec<f32> = (0..len).map(|i| noise(i + 7000)).collect();
                let expected = reference(&x, &weight, 1e-5);
                let close = |got: f32, expected: f64| (f64::from(got) - expected).abs() <= 1e-6 * expected.abs();

                let out = to_act(isa, &x, &weight, 1e-5);
                assert!(out.iter().zip(&expected).all(|(&a, &b)| close(a, b)), "{isa:?} {len}");

                let mut in_place = x.clone();
                rms_norm_in_place(isa, &mut in_place, &weight, 1e-5);
                assert_eq!(in_place, out);

                let mut sum = weight.clone();
                rms_norm_add(isa, &x, &weight, 1e-5, &mut sum);
                let expected: Vec<f32> = weight.iter().zip(&out).map(|(a, b)| a + b).collect();
                assert_eq!(sum, expected);
            }
        }
    }

    #[test]
    fn a_row_of_zeroes_stays_zero() {
        for isa in runnable() {
            assert_eq!(to_act(isa, &[0.0; 20], &[3.0; 20], 1e-6), [0.0; 20]);
        }
    }
}
