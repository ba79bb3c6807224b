//! Every op of every instruction set that runs here, against the scalar lanes and f64 mathematics.

use super::{EXP_MIN, Kernel, LANES, Scalar, Simd, dispatch};
use crate::cpu::isa::Isa;
use half::f16;

/// The instruction sets to test: all that this machine can run, or the one that `CUPOLA_TEST_ISA` names, for an emulator that
/// has no time for the others. Printed so that a missing one is seen.
pub(crate) fn runnable() -> Vec<Isa> {
    let mut runnable = Isa::available();
    if let Ok(only) = std::env::var("CUPOLA_TEST_ISA") {
        runnable.retain(|isa| isa.name() == only);
        assert!(!runnable.is_empty(), "CUPOLA_TEST_ISA is {only:?}, which this CPU does not have");
    }
    println!("instruction sets covered: {runnable:?}");
    runnable
}

/// Results of all ops on one pair of inputs.
#[derive(Debug, PartialEq)]
struct AllOps {
    vectors: Vec<[f32; LANES]>,
    sums: Vec<f32>,
    halves: [u16; LANES],
    bytes: [i8; 32],
    byte_sums: [i32; 2],
    words: [i16; LANES],
}

struct RunAll {
    a: [f32; LANES],
    b: [f32; LANES],
    bits: [u16; LANES],
}

impl Kernel for RunAll {
    type Output = AllOps;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> AllOps {
        let (a, b) = (s.load(&self.a), s.load(&self.b));
        let mut vectors = Vec::new();
        let pair_bytes: [i8; 2 * LANES] = std::array::from_fn(|i| (self.bits[i % LANES] >> (i / LANES * 5)) as i8);
        let mut sums = [s.zero_sums(); 3];
        for pairs in [[[1, -1], [i16::MIN, i16::MAX], [-7, 12_345]], [[0, 3], [i16::MAX, i16::MAX], [1, 0]]] {
            s.dot_pairs(&pair_bytes, &pairs, &mut sums);
        }
        let mut words = [0; LANES];
        // Small integers and a power of two: exact, whether a product is rounded or not.
        let integers = self.bits.map(|bits| f16::from_f32(f32::from(bits as i8)).to_bits());
        let mut fma_f16 = [s.splat(3.0), s.splat(-0.5), s.splat(0.0)];
        s.fma_f16(&integers, &[0.5, 1.0, -2.0], &mut fma_f16);
        s.store_i16(s.mul(a, s.splat(3276.7)), &mut words);
        let results = [
            s.splat(self.a[0]),
            s.load_f16(&self.bits),
            s.load_bf16(&self.bits),
            s.add(a, b),
            s.sub(a, b),
            s.mul(a, b),
            s.div(a, b),
            s.max(a, b),
            s.min(a, b),
            s.abs(a),
            s.keep_lanes(a, 0, 16, -1.0),
            s.keep_lanes(a, 0, 0, -1.0),
            s.keep_lanes(a, 3, 11, -1.0),
            s.keep_lanes(a, 8, 9, f32::NEG_INFINITY),
            s.keep_lanes(a, 15, 99, 0.0),
            s.keep_lanes(a, 16, 16, 0.0),
            fma_f16[0],
            fma_f16[1],
            fma_f16[2],
            s.sums_to_f32(sums[0]),
            s.sums_to_f32(sums[1]),
            s.sums_to_f32(sums[2]),
        ];
        for v in results {
            let mut out = [0.0; LANES];
            s.store(v, &mut out);
            vectors.push(out);
        }
        let mut halves = [0; LANES];
        s.store_f16(a, &mut halves);
        let mut bytes = [0; 32];
        let scale = s.splat(12.7);
        let byte_sums = s.round_i8([s.mul(a, scale), s.mul(b, scale)], &mut bytes);
        AllOps {
            vectors,
            sums: vec![s.reduce_add(a), s.reduce_max(a), s.reduce_max(b)],
            halves,
            bytes,
            byte_sums,
            words,
        }
    }
}

/// A repeatable value in `-10.0..10.0`.
pub(crate) fn noise(seed: u64) -> f32 {
    let mixed = (seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    ((mixed >> 40) as f32 / (1 << 24) as f32 - 0.5) * 20.0
}

#[test]
fn every_op_gives_the_bits_of_the_scalar_lanes() {
    let sets = runnable();
    for round in 0..64_u64 {
        let inputs = || RunAll {
            a: std::array::from_fn(|i| noise(round * 100 + i as u64)),
            b: std::array::from_fn(|i| noise(round * 100 + 50 + i as u64)),
            // Finite halves of both signs, subnormals among them; as bfloat16 these are ordinary numbers too.
            bits: std::array::from_fn(|i| {
                ((noise(round * 100 + 80 + i as u64).to_bits() >> 7) & 0xBBFF) as u16 >> (round % 2)
            }),
        };
        let expected = RunAll::run(inputs(), Scalar);
        for &isa in &sets {
            assert_eq!(dispatch(isa, inputs()), expected, "{isa:?}");
        }
    }
}

#[test]
fn rounding_to_bytes_goes_to_even_and_reaches_both_ends() {
    struct Round([f32; 32]);
    impl Kernel for Round {
        type Output = ([i8; 32], [i32; 2]);
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Output {
            let mut bytes = [0; 32];
            let [low, high] = self.0.as_chunks::<LANES>().0 else { unreachable!("32 is twice 16") };
            let sums = s.round_i8([s.load(low), s.load(high)], &mut bytes);
            (bytes, sums)
        }
    }
    let mut values = [0.0; 32];
    values[..8].copy_from_slice(&[0.5, 1.5, -0.5, -1.5, 2.5, 127.0, -127.0, -128.0]);
    values[16] = 3.4;
    values[31] = -90.6;
    for isa in runnable() {
        let (bytes, sums) = dispatch(isa, Round(values));
        assert_eq!(bytes[..8], [0, 2, 0, -2, 2, 127, -127, -128], "{isa:?}");
        assert_eq!(sums, [-126, 3 - 91]);
        assert_eq!(dispatch(isa, Round([127.0; 32])).1, [127 * 16; 2]);
        assert_eq!(dispatch(isa, Round([-128.0; 32])).1, [-128 * 16; 2]);
    }
}

#[derive(Clone, Copy)]
enum Function {
    Fma,
    Exp,
    Exp2Weight,
    Sigmoid,
    Tanh,
}

struct Apply(Function, [f32; LANES]);

impl Kernel for Apply {
    type Output = [f32; LANES];

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> [f32; LANES] {
        let x = s.load(&self.1);
        let y = match self.0 {
            Function::Fma => s.fma(x, x, x),
            Function::Exp => s.exp(x),
            Function::Exp2Weight => s.exp2_weight(x),
            Function::Sigmoid => s.sigmoid(x),
            Function::Tanh => s.tanh(x),
        };
        let mut out = [0.0; LANES];
        s.store(y, &mut out);
        out
    }
}

fn largest_error(isa: Isa, f: Function, range: (f32, f32), error: impl Fn(f64, f64) -> f64) -> f64 {
    const STEPS: usize = 4000;
    let mut worst = 0.0_f64;
    for step in 0..STEPS {
        let width = (range.1 - range.0) / (STEPS * LANES) as f32;
        let x: [f32; LANES] = std::array::from_fn(|i| range.0 + (step * LANES + i) as f32 * width);
        for (y, x) in dispatch(isa, Apply(f, x)).into_iter().zip(x) {
            worst = worst.max(error(f64::from(x), f64::from(y)));
        }
    }
    worst
}

#[test]
fn functions_are_accurate() {
    let ulp = f64::from(f32::EPSILON);
    for isa in runnable() {
        let exp = largest_error(isa, Function::Exp, (-86.9, 88.0), |x, y| (y / x.exp() - 1.0).abs());
        let exp2 = largest_error(isa, Function::Exp2Weight, (-86.9, 0.0), |x, y| (y / x.exp2() - 1.0).abs());
        assert!(exp2 < 3.0 * ulp, "{isa:?} {exp2}");
        let sigmoid = largest_error(isa, Function::Sigmoid, (-40.0, 40.0), |x, y| (y * (1.0 + (-x).exp()) - 1.0).abs());
        let tanh = largest_error(isa, Function::Tanh, (-50.0, 50.0), |x, y| (y - x.tanh()).abs());
        let fma = largest_error(isa, Function::Fma, (1.0, 50.0), |x, y| (y / (x * x + x) - 1.0).abs());
        println!("{isa:?}: exp {:.2} ulp, sigmoid {:.2} ulp, tanh {tanh:.1e}", exp / ulp, sigmoid / ulp);
        assert!(
            exp < 2.0 * ulp && sigmoid < 4.0 * ulp && tanh < 2e-7 && fma < ulp,
            "{isa:?} {exp} {sigmoid} {tanh} {fma}"
        );
    }
}

#[test]
fn exp_is_exact_where_attention_relies_on_it() {
    for isa in runnable() {
        let mut x = [0.0; LANES];
        x[..7].copy_from_slice(&[0.0, -0.0, f32::NEG_INFINITY, -1e30, EXP_MIN - 0.01, f32::INFINITY, 200.0]);
        let y = dispatch(isa, Apply(Function::Exp, x));
        assert_eq!(y[..5], [1.0, 1.0, 0.0, 0.0, 0.0], "{isa:?}");
        let z = dispatch(isa, Apply(Function::Exp2Weight, x));
        assert_eq!(z[..5], [1.0, 1.0, 0.0, 0.0, 0.0], "{isa:?}");
        assert!(y[5].is_finite() && y[6].is_finite() && y[5] > 1e38, "{isa:?} {y:?}");
    }
}

#[test]
fn integer_products_are_exact_at_both_ends() {
    struct Products([i8; 2 * LANES], [[i16; 2]; 2]);
    impl Kernel for Products {
        type Output = [[f32; LANES]; 2];
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Output {
            let mut sums = [s.zero_sums(); 2];
            for _ in 0..100 {
                s.dot_pairs(&self.0, &self.1, &mut sums);
            }
            let mut out = [[0.0; LANES]; 2];
            for (sums, out) in sums.into_iter().zip(&mut out) {
                s.store(s.sums_to_f32(sums), out);
            }
            out
        }
    }
    let bytes = std::array::from_fn(|i| [-128, 127, 3, -5][i % 4]);
    let pairs = [[i16::MIN, i16::MIN], [1000, -2000]];
    for isa in runnable() {
        for (sums, [x, y]) in dispatch(isa, Products(bytes, pairs)).iter().zip(pairs) {
            let expected = |a: i32, b: i32| (100 * (a * i32::from(x) + b * i32::from(y))) as f32;
            for lanes in sums.as_chunks::<2>().0 {
                assert_eq!(*lanes, [expected(-128, 127), expected(3, -5)], "{isa:?}");
            }
        }
    }
}
