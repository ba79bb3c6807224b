//! Tests of panels against plain references, on every instruction set that this CPU has.

use half::f16;

use super::{GROUP, Group, Lanes, multiply};
use crate::WeightType;
use crate::cpu::act::{Act, Form};
use crate::cpu::isa::Isa;
use crate::cpu::products::{scratch_bytes, tile_rows};
use crate::cpu::simd::tests::runnable;
use crate::cpu::simd::{Kernel, Simd, dispatch};
use crate::cpu::weights::Run;
use crate::format::ggml::BLOCK;
use crate::format::pack::{PANEL, pack_panel, panel_bytes, panel_row};
use crate::memory::Arena;

const ROWS: [usize; 14] = [1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 31, 33, 131];

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// Where a block has its halves: scale, then minimum.
fn header(ty: WeightType) -> &'static [usize] {
    match ty {
        WeightType::Q4_1 | WeightType::Q5_1 | WeightType::Q4K | WeightType::Q5K => &[0, 2],
        WeightType::Q2K => &[80, 82],
        WeightType::Q3K => &[108],
        WeightType::Q6K => &[208],
        _ => &[0],
    }
}

/// A packed panel of random weights of plausible size.
fn random_panel(ty: WeightType, cols: usize, rng: &mut Rng) -> Arena<u8> {
    let row_bytes = ty.row_bytes(cols).unwrap();
    let mut file: Vec<u8> = (0..row_bytes * PANEL).map(|_| rng.next() as u8).collect();
    for block in file.chunks_exact_mut(ty.block_bytes()) {
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        let (a, b) = (rng.unit() * 0.05, rng.unit() * 0.3);
        match ty {
            WeightType::F32 => put(0, &b.to_le_bytes()),
            WeightType::F16 => put(0, &f16::from_f32(b).to_le_bytes()),
            WeightType::Bf16 => put(0, &half::bf16::from_f32(b).to_le_bytes()),
            _ => {
                for (at, value) in header(ty).iter().zip([a, b]) {
                    put(*at, &f16::from_f32(value).to_le_bytes());
                }
            }
        }
    }
    packed(ty, cols, &file)
}

fn packed(ty: WeightType, cols: usize, file: &[u8]) -> Arena<u8> {
    let mut panel = Arena::zeroed(panel_bytes(ty, cols).unwrap(), "test").unwrap();
    pack_panel(ty, cols, file, &mut panel);
    panel
}

/// Activations in both forms.
fn activations(isa: Isa, rows: &[Vec<f32>], form: Form) -> Act {
    struct Fill<'a>(&'a mut Act, &'a [Vec<f32>], Form);
    impl Kernel for Fill<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let writer = self.0.begin("test", self.1.len(), self.2).unwrap();
            for (i, row) in self.1.iter().enumerate() {
                // SAFETY: one thread.
                unsafe { writer.write(s, i, 0, row) };
            }
        }
    }
    let mut act = Act::new(rows.len(), rows[0].len(), tile_rows(isa)).unwrap();
    dispatch(isa, Fill(&mut act, rows, form));
    act
}

fn product(isa: Isa, ty: WeightType, panel: &[u8], x: &[Vec<f32>]) -> Vec<Lanes> {
    let form = Form { int8: !ty.is_float(), float: ty.is_float() };
    let act = activations(isa, x, form);
    let acts = act.read("test", x.len(), form).unwrap();
    let mut scratch = Arena::zeroed(scratch_bytes(isa, acts.cols), "test").unwrap();
    let mut out = vec![[f32::NAN; PANEL]; x.len()];
    for group in Group::split(acts) {
        let out = &mut out[group.first()..][..group.len()];
        multiply(isa, Run::of_panel(ty, panel), group, (&mut scratch, out));
    }
    out
}

/// What a kernel reads of a row: for block weights, the row after quantisation.
fn as_read(ty: WeightType, row: &[f32]) -> Vec<f64> {
    if ty.is_float() {
        return row.iter().map(|&x| f64::from(x)).collect();
    }
    let mut out = Vec::new();
    for block in row.chunks_exact(BLOCK) {
        let largest = block.iter().fold(0f32, |m, x| m.max(x.abs()));
        let (d, inverse) = if largest > 1e-36 { (largest * (1.0 / 127.0), 127.0 / largest) } else { (0.0, 0.0) };
        out.extend(block.iter().map(|x| f64::from(d) * f64::from((x * inverse).round_ties_even())));
    }
    out
}

#[test]
fn every_type_and_tile_agrees_with_the_definition() {
    for isa in runnable() {
        for ty in WeightType::ALL {
            let block = ty.block_len().max(BLOCK);
            for cols in
                [block, 3 * block, 640_usize.next_multiple_of(block)].into_iter().chain(ty.is_float().then_some(37))
            {
                let mut rng = Rng(0x9e37_79b9_7f4a_7c15 + cols as u64);
                let panel = random_panel(ty, cols, &mut rng);
                let x: Vec<Vec<f32>> = (0..GROUP + 3).map(|_| (0..cols).map(|_| rng.unit()).collect()).collect();
                let mut weights = vec![vec![0.0; cols]; PANEL];
                for (lane, row) in weights.iter_mut().enumerate() {
                    panel_row(ty, &panel, lane, row);
                }
                let mut single = Vec::new();
                for row in &x {
                    single.extend(product(isa, ty, &panel, std::slice::from_ref(row)));
                }
                for (row, lanes) in x.iter().zip(&single) {
                    let read = as_read(ty, row);
                    for (weights, &got) in weights.iter().zip(lanes) {
                        let terms = weights.iter().zip(&read).map(|(&w, &x)| f64::from(w) * x);
                        let (sum, size) = terms.fold((0.0, 0.0), |(s, a), t| (s + t, a + t.abs()));
                        // The offset of unsigned weights cancels: its terms count towards the size too.
                        let cancels = matches!(ty, WeightType::Q8_0 | WeightType::Iq4Nl);
                        assert!(
                            (f64::from(got) - sum).abs() <= 3e-6 * size * if cancels { 4.0 } else { 2.0 } + 1e-12,
                            "{isa:?} {ty:?} {cols}: {got} {sum}"
                        );
                    }
                }
                for rows in ROWS {
                    assert!(product(isa, ty, &panel, &x[..rows]) == single[..rows], "{isa:?} {ty:?} {cols} x {rows}");
                }
            }
        }
    }
}

/// Every weight and activation at its extreme: nothing may saturate on the way.
#[test]
fn integer_sums_are_exact_at_the_extremes() {
    for isa in runnable() {
        for ty in WeightType::ALL.into_iter().filter(|ty| !ty.is_float()) {
            let cols = 2 * ty.block_len();
            let row_bytes = ty.row_bytes(cols).unwrap();
            for fill in [0x00, 0x0f, 0xf0, 0xff, 0x7f, 0x80] {
                let mut file = vec![fill; row_bytes * PANEL];
                for block in file.chunks_exact_mut(ty.block_bytes()) {
                    for (&at, value) in header(ty).iter().zip([f16::ONE, f16::ZERO]) {
                        block[at..at + 2].copy_from_slice(&value.to_le_bytes());
                    }
                }
                let panel = packed(ty, cols, &file);
                let mut weights = vec![0.0; cols];
                panel_row(ty, &panel, 0, &mut weights);
                for sign in [1.0, -1.0f32] {
                    for rows in [1, 2, 4, 8, 16, 32] {
                        // 127 in magnitude, so that the scale is exactly 1.
                        let x = vec![vec![sign * 127.0; cols]; rows];
                        let expected: f64 = weights.iter().map(|&w| f64::from(w * sign * 127.0)).sum();
                        for lanes in product(isa, ty, &panel, &x) {
                            for got in lanes {
                                // Scaled sums of Q6_K pass 2^24, where f32 has no place for every whole number.
                                let error = (f64::from(got) - expected).abs();
                                assert!(
                                    error <= 1e-6 * expected.abs(),
                                    "{isa:?} {ty:?} {fill:#x} {sign} {rows}: {got}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}

/// With scales of one, a product is a sum of whole numbers, exact in f32: the same bits on every instruction set, and those
/// of the definition.
#[test]
fn integer_sums_are_the_same_everywhere() {
    let sets = runnable();
    for ty in WeightType::ALL.into_iter().filter(|ty| !ty.is_float()) {
        let mut rng = Rng(77);
        let cols = ty.block_len();
        let mut file: Vec<u8> = (0..ty.block_bytes() * PANEL).map(|_| rng.next() as u8).collect();
        for block in file.chunks_exact_mut(ty.block_bytes()) {
            for &at in header(ty) {
                block[at..at + 2].copy_from_slice(&f16::ONE.to_le_bytes());
            }
        }
        let panel = packed(ty, cols, &file);
        let mut weights = vec![vec![0.0; cols]; PANEL];
        for (lane, row) in weights.iter_mut().enumerate() {
            panel_row(ty, &panel, lane, row);
        }
        let x: Vec<Vec<f32>> = (0..9)
            .map(|_| {
                // Few enough non-zero columns that eight blocks stay below 2^24.
                let mut row: Vec<f32> =
                    (0..cols).map(|i| if i % 32 < 20 { (rng.unit() * 15.0).round() } else { 0.0 }).collect();
                row.iter_mut().step_by(BLOCK).for_each(|first| *first = 127.0);
                row
            })
            .collect();
        for &isa in &sets {
            for (row, lanes) in x.iter().zip(product(isa, ty, &panel, &x)) {
                for (got, weights) in lanes.into_iter().zip(&weights) {
                    let expected: f64 = weights.iter().zip(row).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum();
                    assert_eq!(f64::from(got), expected, "{isa:?} {ty:?}");
                }
            }
        }
    }
}

#[test]
fn zero_and_subnormal_scales_give_zero_and_small_products() {
    for isa in runnable() {
        for bits in [0u16, 1, 0x03ff] {
            let d = f16::from_bits(bits);
            let mut file = vec![0x99; WeightType::Q4_0.row_bytes(32).unwrap() * PANEL];
            for block in file.chunks_exact_mut(WeightType::Q4_0.block_bytes()) {
                block[..2].copy_from_slice(&d.to_le_bytes());
            }
            let panel = packed(WeightType::Q4_0, 32, &file);
            for (x, expected) in [(127.0, d.to_f32() * 32.0 * 127.0), (0.0, 0.0)] {
                for lanes in product(isa, WeightType::Q4_0, &panel, &vec![vec![x; 32]; 9]) {
                    assert_eq!(lanes, [expected; PANEL], "{isa:?} {bits}");
                }
            }
        }
    }
}
