//! Tests of packed panels: what goes in comes out, to the bit.

use super::*;
use crate::format::ggml::dequantise_row;
use crate::memory::Arena;

#[test]
fn panels_hold_what_files_say() {
    for ty in WeightType::ALL {
        let block = ty.block_len().max(32);
        for (rows, cols) in [(16, block), (16, 3 * block), (5, 2 * block), (1, block)] {
            let row_bytes = ty.row_bytes(cols).unwrap();
            // Any bytes make blocks; two bits of each byte are kept low so that no float is NaN or infinite.
            let file: Vec<u8> = (0..rows * row_bytes).map(|i| ((i * 167 + i / 7) % 251) as u8 & 0xbb).collect();
            let mut panel = Arena::<u8>::zeroed(panel_bytes(ty, cols).unwrap(), "test").unwrap();
            pack_panel(ty, cols, &file, &mut panel);
            let (mut expected, mut got) = (vec![0.0; cols], vec![1.0; cols]);
            for lane in 0..PANEL {
                panel_row(ty, &panel, lane, &mut got);
                if lane < rows {
                    dequantise_row(ty, &file[lane * row_bytes..][..row_bytes], &mut expected);
                } else {
                    expected.fill(0.0);
                }
                assert_eq!(expected, got, "{} {rows} x {cols}, row {lane}", ty.name());
            }
        }
    }
}

#[test]
fn every_bit_of_a_code_reaches_its_place() {
    for ty in WeightType::ALL.into_iter().filter(|ty| !ty.is_float()) {
        let (cols, bytes) = (ty.block_len(), ty.block_bytes());
        for bit in 0..bytes * 8 {
            let mut file = vec![0; bytes];
            // Scales that are not zero wherever the format has them, then one bit flipped.
            file.fill(0x11);
            file[bit / 8] ^= 1 << (bit % 8);
            let mut panel = Arena::<u8>::zeroed(panel_bytes(ty, cols).unwrap(), "test").unwrap();
            pack_panel(ty, cols, &file, &mut panel);
            let (mut expected, mut got) = (vec![0.0; cols], vec![1.0; cols]);
            dequantise_row(ty, &file, &mut expected);
            panel_row(ty, &panel, 0, &mut got);
            assert_eq!(expected, got, "{} bit {bit}", ty.name());
        }
    }
}

#[test]
fn packed_matrices_are_little_larger_than_their_files() {
    for ty in WeightType::ALL {
        let (file, packed) = (ty.row_bytes(512).unwrap() * 32, ty.packed_bytes(32, 512).unwrap());
        assert!(packed >= file && packed * 100 <= file * 104, "{}: {packed} of {file}", ty.name());
        assert_eq!(ty.packed_bytes(17, 512), Some(packed));
    }
    assert_eq!(WeightType::Q4K.packed_bytes(16, 32), None);
}

/// Whole panels are packed another way than those with rows missing: to the same bytes.
#[test]
fn whole_panels_are_packed_as_row_by_row() {
    struct RowByRow<'a>(&'a [u8], usize, &'a mut [u8]);
    impl ForPacked for RowByRow<'_> {
        type Output = ();

        fn run<B: Packed>(self) {
            for (lane, row) in self.0.chunks_exact(self.1).enumerate() {
                let blocks = row.chunks_exact(B::TYPE.block_bytes());
                cast_mut::<B>(self.2).iter_mut().zip(blocks).for_each(|(unit, block)| unit.set_lane(lane, block));
            }
        }
    }
    for ty in WeightType::ALL {
        let cols = 3 * ty.block_len().max(37);
        let cols = cols / ty.block_len() * ty.block_len();
        let row_bytes = ty.row_bytes(cols).unwrap();
        let file: Vec<u8> = (0..PANEL * row_bytes).map(|i| (i * 131 % 253) as u8).collect();
        let panel = || Arena::<u8>::zeroed(panel_bytes(ty, cols).unwrap(), "test").unwrap();
        let (mut whole, mut rows) = (panel(), panel());
        pack_panel(ty, cols, &file, &mut whole);
        if for_packed(ty, RowByRow(&file, row_bytes, &mut rows)).is_none() {
            for (lane, row) in file.chunks_exact(row_bytes).enumerate() {
                let size = ty.block_bytes();
                for (column, value) in row.chunks_exact(size).enumerate() {
                    rows[(column * PANEL + lane) * size..][..size].copy_from_slice(value);
                }
            }
        }
        assert!(whole[..] == rows[..], "{}", ty.name());
    }
}
