//! Tests of panels against plain references, on every instruction set that this CPU has.

use half::f16;

use super::{GROUP, Group, Lanes, multiply, scalar};
use crate::WeightType;
use crate::cpu::act::{Act, Form};
use crate::cpu::isa::Isa;
use crate::cpu::products::{scratch_bytes, tile_rows};
use crate::cpu::simd::{Kernel, Simd, dispatch};
use crate::format::ggml::BLOCK;
use crate::format::pack::{Offset, PANEL, PanelBlock, Q4_0x16, Q4_1x16, Q8_0x16, pack_panel, panel_row};
use crate::memory::{Arena, cast};

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
            WeightType::Q4_0 | WeightType::Q8_0 => put(0, &f16::from_f32(a).to_le_bytes()),
            WeightType::Q4_1 => {
                put(0, &f16::from_f32(a).to_le_bytes());
                put(2, &f16::from_f32(b).to_le_bytes());
            }
        }
    }
    let mut panel = Arena::zeroed(row_bytes * PANEL, "test").unwrap();
    pack_panel(ty, cols, &file, &mut panel);
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
    let form = Form { int8: ty.block_len() != 1, float: ty.block_len() == 1 };
    let act = activations(isa, x, form);
    let acts = act.read("test", x.len(), form).unwrap();
    let mut scratch = Arena::zeroed(scratch_bytes(isa, acts.cols), "test").unwrap();
    let mut out = vec![[f32::NAN; PANEL]; x.len()];
    for group in Group::split(acts) {
        let out = &mut out[group.first()..][..group.len()];
        multiply(isa, ty, panel, group, (&mut scratch, out));
    }
    out
}

/// What a kernel reads of a row: for block weights, the row after quantisation.
fn as_read(ty: WeightType, row: &[f32]) -> Vec<f64> {
    if ty.block_len() == 1 {
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

const TYPES: [WeightType; 6] =
    [WeightType::F32, WeightType::F16, WeightType::Bf16, WeightType::Q4_0, WeightType::Q4_1, WeightType::Q8_0];

#[test]
fn every_type_and_tile_agrees_with_the_definition() {
    println!("instruction sets covered: {:?}", Isa::available());
    for isa in Isa::available() {
        for ty in TYPES {
            for cols in [32, 96, 576].into_iter().chain((ty.block_len() == 1).then_some(37)) {
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
                        let size = if ty == WeightType::Q8_0 { size * 4.0 } else { size * 2.0 };
                        assert!(
                            (f64::from(got) - sum).abs() <= 3e-6 * size + 1e-12,
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
    for isa in Isa::available() {
        for (ty, header) in [(WeightType::Q4_0, 2), (WeightType::Q4_1, 4), (WeightType::Q8_0, 2)] {
            let cols = 64;
            let row_bytes = ty.row_bytes(cols).unwrap();
            for fill in [0x00, 0x0f, 0xf0, 0xff, 0x7f, 0x80] {
                let mut file = vec![fill; row_bytes * PANEL];
                for block in file.chunks_exact_mut(ty.block_bytes()) {
                    block[..header].fill(0);
                    block[..2].copy_from_slice(&f16::ONE.to_le_bytes());
                }
                let mut panel = Arena::zeroed(file.len(), "test").unwrap();
                pack_panel(ty, cols, &file, &mut panel);
                let mut weights = vec![0.0; cols];
                panel_row(ty, &panel, 0, &mut weights);
                for sign in [1.0, -1.0f32] {
                    for rows in [1, 2, 4, 8, 16] {
                        // 127 in magnitude, so that the scale is exactly 1.
                        let x = vec![vec![sign * 127.0; cols]; rows];
                        let expected: f32 = weights.iter().map(|w| w * sign * 127.0).sum();
                        for lanes in product(isa, ty, &panel, &x) {
                            assert_eq!(lanes, [expected; PANEL], "{isa:?} {ty:?} {fill:#x} {sign} {rows}");
                        }
                    }
                }
            }
        }
    }
}

/// With scales of one and no offset, a product is its integer sum: the same bits on every instruction set.
#[test]
fn integer_sums_are_the_same_everywhere() {
    fn check<B: PanelBlock>(ty: WeightType) {
        let mut rng = Rng(77);
        let mut panel = random_panel(ty, BLOCK, &mut rng);
        for scale in panel[..2 * PANEL].as_chunks_mut::<2>().0 {
            *scale = f16::ONE.to_bits().to_ne_bytes();
        }
        if ty == WeightType::Q4_1 {
            panel[2 * PANEL..4 * PANEL].fill(0);
        }
        let x: Vec<Vec<f32>> = (0..9)
            .map(|_| {
                let mut row: Vec<f32> = (0..BLOCK).map(|_| (rng.unit() * 127.0).round()).collect();
                row[0] = 127.0;
                row
            })
            .collect();
        let block = cast::<B>(&panel)[0];
        for isa in Isa::available() {
            for (row, lanes) in x.iter().zip(product(isa, ty, &panel, &x)) {
                let mut quants = [0; BLOCK];
                for (q, x) in quants.iter_mut().zip(row) {
                    *q = *x as i8;
                }
                let sum: i32 = quants.iter().map(|&q| i32::from(q)).sum();
                for (lane, got) in lanes.into_iter().enumerate() {
                    let offset = if let Offset::Scales(times) = block.offset() { times * sum as f32 } else { 0.0 };
                    assert_eq!(got, scalar::dot(&block, lane, &quants) as f32 + offset, "{isa:?} {ty:?}");
                }
            }
        }
    }
    check::<Q4_0x16>(WeightType::Q4_0);
    check::<Q4_1x16>(WeightType::Q4_1);
    check::<Q8_0x16>(WeightType::Q8_0);
}

#[test]
fn zero_and_subnormal_scales_give_zero_and_small_products() {
    for isa in Isa::available() {
        for bits in [0u16, 1, 0x03ff] {
            let d = f16::from_bits(bits);
            let mut file = vec![0x99; WeightType::Q4_0.row_bytes(32).unwrap() * PANEL];
            for block in file.chunks_exact_mut(WeightType::Q4_0.block_bytes()) {
                block[..2].copy_from_slice(&d.to_le_bytes());
            }
            let mut panel = Arena::zeroed(file.len(), "test").unwrap();
            pack_panel(WeightType::Q4_0, 32, &file, &mut panel);
            for (x, expected) in [(127.0, d.to_f32() * 32.0 * 127.0), (0.0, 0.0)] {
                for lanes in product(isa, WeightType::Q4_0, &panel, &vec![vec![x; 32]; 9]) {
                    assert_eq!(lanes, [expected; PANEL], "{isa:?} {bits}");
                }
            }
        }
    }
}
