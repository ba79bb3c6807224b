//! Products of float weights with float activations: one fused multiply-add per column, in column order.

use super::{Group, Lanes, exact};
use crate::cpu::simd::{LANES, Simd};
use crate::format::pack::PANEL;
use crate::memory::Plain;

/// One column of a panel: 16 rows of float weights.
pub(in crate::cpu) trait Column: Plain {
    /// Reads the 16 weights.
    fn load<S: Simd>(&self, s: S) -> S::V;
}

macro_rules! column {
    ($(#[$doc:meta])* $name:ident, $element:ty, $load:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy)]
        #[repr(transparent)]
        pub(in crate::cpu) struct $name([$element; PANEL]);

        impl Plain for $name {}

        impl Column for $name {
            #[inline(always)]
            fn load<S: Simd>(&self, s: S) -> S::V {
                s.$load(&self.0)
            }
        }
    };
}

column!(
    /// 32-bit floats.
    AsF32, f32, load
);
column!(
    /// IEEE halves.
    AsF16, u16, load_f16
);
column!(
    /// bfloat16.
    AsBf16, u16, load_bf16
);

const _: () = assert!(PANEL == LANES);

/// Multiplies a panel with all rows of a group.
#[inline(always)]
pub(super) fn panel<S: Simd, C: Column>(s: S, panel: &[C], rows: Group<'_>, out: &mut [Lanes]) {
    for tile in rows.tiles() {
        let x = rows.acts.floats(tile);
        let out = &mut out[tile.row - rows.first..][..tile.len];
        match tile.len {
            8 => {
                // Eight accumulators would not fit the registers of every instruction set.
                let (low, high) = out.split_at_mut(4);
                let (x_low, x_high) = x.split_at(4 * panel.len());
                columns::<S, C, 4>(s, panel, x_low, exact(low));
                columns::<S, C, 4>(s, panel, x_high, exact(high));
            }
            4 => columns::<S, C, 4>(s, panel, x, exact(out)),
            2 => columns::<S, C, 2>(s, panel, x, exact(out)),
            _ => columns::<S, C, 1>(s, panel, x, exact(out)),
        }
    }
}

#[inline(always)]
fn columns<S: Simd, C: Column, const N: usize>(s: S, panel: &[C], x: &[f32], out: &mut [Lanes; N]) {
    let mut acc = [s.splat(0.0); N];
    let mut rows = [&x[..0]; N];
    for (n, row) in rows.iter_mut().enumerate() {
        *row = &x[n * panel.len()..][..panel.len()];
    }
    for (k, column) in panel.iter().enumerate() {
        let w = column.load(s);
        for n in 0..N {
            acc[n] = s.fma(s.splat(rows[n][k]), w, acc[n]);
        }
    }
    for n in 0..N {
        s.store(acc[n], &mut out[n]);
    }
}
