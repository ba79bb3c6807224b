//! A file with packed weights: mapped at the next start, instead of packing them again.
//!
//! ```text
//!   head     magic | layout | byte order | source | entries | length of the file | checksum of the table | of the head
//!   table    one entry a matrix part, in load order: type, rows, columns, samples of the file's bytes, where its panels lie,
//!            checksum of them
//!   panels   each part at a multiple of 64 bytes, as they lie in memory
//!
//!   open ──head, table, every checksum──> Reader ──take(part 0), take(part 1), ...──> places in the mapping
//!     └────────── anything else than expected ──> a reason; weights are packed, and save() writes the file anew
//! ```
//!
//! **Trust.** A file is used only when the head's checksum, the table's, and that of every part's panels fit what is read:
//! all of it is read once at start, by all workers, which also brings its pages in. The checksums see accidents (a write cut
//! short, a bad disk, a file of another machine); a person who may write the file may also write the model. Any bytes are
//! weights, so a forged file gives wrong numbers and nothing worse.
//!
//! **Writing.** Into a file beside it, renamed when complete: who reads sees the old one or the new one, and who has mapped the
//! old one keeps it. Without waiting for the disk: what a lost write leaves behind fails its checksum.
//!
//! Panels are the same for every instruction set, and different for the two byte orders.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use super::pool::Pool;
use crate::format::pack::{PANEL, panel_bytes};
use crate::memory::{ALIGN, MappedFile};
use crate::{Error, Result, WeightPart, WeightType};

/// Changes with the arrangement of any packed type, with the order in which decoders load their matrices, and with this file's
/// own form.
const LAYOUT: u32 = 1;

const MAGIC: [u8; 8] = *b"CUPOLAPK";
/// As a machine of the other byte order would not read it.
const BYTE_ORDER: u32 = 0x0102_0304;
const HEAD: usize = 56;
const ENTRY: usize = 56;
/// Bytes at either end of a part's source that tell it from others.
const SAMPLE: usize = 256;
/// Panels begin at a page.
const PAGE: usize = 4096;

/// Rows of one type in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) ty: WeightType,
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// Checksum of samples of what it was packed from.
    sample: u64,
    /// Where its panels begin.
    pub(super) offset: usize,
    /// Bytes of its panels.
    pub(super) len: usize,
    checksum: u64,
}

/// A file that was found to be whole.
pub(super) struct Reader {
    entries: Vec<Entry>,
    next: usize,
}

impl Reader {
    /// Maps a file and checks all of it; returns what it holds, and the mapping.
    ///
    /// # Errors
    /// Why it cannot be used, as a clause.
    pub(super) fn open(path: &Path, source: u64, pool: &mut Pool) -> std::result::Result<(Self, MappedFile), String> {
        let file = MappedFile::open(path).map_err(|error| error.to_string())?;
        let bytes = file.bytes();
        let mut head = Fields(bytes.get(..HEAD).ok_or("it is too short for a head")?);
        if head.take::<8>() != MAGIC {
            return Err("it is no file of packed weights".to_owned());
        }
        if (head.u32(), u32::from_ne_bytes(head.take())) != (LAYOUT, BYTE_ORDER) {
            return Err(format!("it is of another layout than {LAYOUT} or of another byte order"));
        }
        let (of, count, length, table_sum, head_sum) = (head.u64(), head.u64(), head.u64(), head.u64(), head.u64());
        if checksum(&bytes[..HEAD - 8]) != head_sum {
            return Err("its head does not have the checksum that it says".to_owned());
        }
        if of != source {
            return Err("it was packed from other files".to_owned());
        }
        if length != bytes.len() as u64 {
            return Err(format!("it has {} bytes, expected {length}", bytes.len()));
        }
        let table = usize::try_from(count).ok().and_then(|count| count.checked_mul(ENTRY)?.checked_add(HEAD));
        let table = table.and_then(|end| bytes.get(HEAD..end)).ok_or("it is too short for its table")?;
        if checksum(table) != table_sum {
            return Err("its table does not have the checksum that it says".to_owned());
        }
        let read = |entry: &[u8; ENTRY]| Entry::read(entry).filter(|entry| entry.fits(bytes.len()));
        let entries: Option<Vec<Entry>> = table.as_chunks::<ENTRY>().0.iter().map(read).collect();
        let entries = entries.ok_or("its table names panels that cannot be")?;
        let whole = AtomicBool::new(true);
        pool.run(entries.len(), &|index, _worker| {
            let entry = &entries[index];
            if checksum(&bytes[entry.offset..][..entry.len]) != entry.checksum {
                whole.store(false, Relaxed);
            }
        });
        if !whole.into_inner() {
            return Err("its panels do not have the checksums that it says".to_owned());
        }
        Ok((Self { entries, next: 0 }, file))
    }

    /// The next part, if it is this one.
    pub(super) fn take(&mut self, part: &WeightPart<'_>) -> Option<Entry> {
        let entry = *self.entries.get(self.next)?;
        self.next += 1;
        let same = (entry.ty, entry.rows, entry.cols) == (part.ty, part.rows, part.cols);
        (same && entry.sample == sample(part.data)).then_some(entry)
    }

    /// True when every part was taken.
    pub(super) fn is_used_up(&self) -> bool {
        self.next == self.entries.len()
    }
}

impl Entry {
    fn read(bytes: &[u8; ENTRY]) -> Option<Self> {
        let mut fields = Fields(bytes);
        let name = fields.take::<8>();
        let ty = WeightType::ALL.into_iter().find(|ty| name_of(*ty) == name)?;
        let mut size = || usize::try_from(fields.u64()).ok();
        let (rows, cols, offset, len) = (size()?, size()?, size()?, size()?);
        Some(Self { ty, rows, cols, offset, len, sample: fields.u64(), checksum: fields.u64() })
    }

    fn bytes(&self) -> [u8; ENTRY] {
        let mut out = [0; ENTRY];
        out[..8].copy_from_slice(&name_of(self.ty));
        let numbers =
            [self.rows as u64, self.cols as u64, self.offset as u64, self.len as u64, self.sample, self.checksum];
        for (field, number) in out[8..].as_chunks_mut().0.iter_mut().zip(numbers) {
            *field = number.to_le_bytes();
        }
        out
    }

    /// True when its panels are as large as they must be, aligned, and inside a file of so many bytes.
    fn fits(&self, file: usize) -> bool {
        let len = panel_bytes(self.ty, self.cols).and_then(|bytes| bytes.checked_mul(self.rows.div_ceil(PANEL)));
        self.rows > 0
            && len == Some(self.len)
            && self.offset.is_multiple_of(ALIGN)
            && self.offset.checked_add(self.len).is_some_and(|end| end <= file)
    }
}

/// Name of a type in eight bytes.
fn name_of(ty: WeightType) -> [u8; 8] {
    let mut out = [0; 8];
    for (to, from) in out.iter_mut().zip(ty.name().bytes()) {
        *to = from;
    }
    out
}

/// Reads numbers one after the other.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    /// # Panics
    /// Past the end: callers hold as many bytes as they read.
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) = self.0.split_first_chunk::<N>().expect("the head and entries have their full length");
        self.0 = rest;
        *field
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

/// Some bytes of a part's source in a number: parts of one shape are told apart by them, and so are two versions of a model.
pub(super) fn sample(data: &[u8]) -> u64 {
    let (first, last) = (&data[..data.len().min(SAMPLE)], &data[data.len().saturating_sub(SAMPLE)..]);
    checksum(first) ^ checksum(last).rotate_left(1)
}

/// Rows of one type to be written.
pub(super) struct Written<'a> {
    pub(super) ty: WeightType,
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// See [`sample`].
    pub(super) sample: u64,
    pub(super) panels: &'a [u8],
}

/// Writes a file; `source` is what its weights were packed from.
///
/// # Errors
/// [`Error::PackedFile`] with the system's reason.
pub(super) fn save(path: &Path, source: u64, parts: &[Written<'_>], pool: &mut Pool) -> Result<()> {
    let mut entries = Vec::with_capacity(parts.len());
    let mut end = (HEAD + parts.len() * ENTRY).next_multiple_of(PAGE);
    for &Written { ty, rows, cols, sample, panels } in parts {
        entries.push(Entry { ty, rows, cols, offset: end, len: panels.len(), sample, checksum: 0 });
        end = (end + panels.len()).next_multiple_of(ALIGN);
    }
    let sums: Vec<std::sync::atomic::AtomicU64> = parts.iter().map(|_| Default::default()).collect();
    pool.run(parts.len(), &|index, _worker| sums[index].store(checksum(parts[index].panels), Relaxed));
    entries.iter_mut().zip(sums).for_each(|(entry, sum)| entry.checksum = sum.into_inner());
    let table: Vec<u8> = entries.iter().flat_map(Entry::bytes).collect();

    let mut head = Vec::with_capacity(HEAD);
    head.extend(MAGIC);
    head.extend(LAYOUT.to_le_bytes());
    // Not in the file's own order, but in the machine's: that is what it tells.
    head.extend(BYTE_ORDER.to_ne_bytes());
    for number in [source, parts.len() as u64, end as u64, checksum(&table)] {
        head.extend(number.to_le_bytes());
    }
    head.extend(checksum(&head).to_le_bytes());

    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let beside = Temporary(path.with_file_name(format!(".{name}.{}.tmp", std::process::id())));
    let failed = |source| Error::PackedFile { path: path.to_owned(), source };
    let write = || -> std::io::Result<()> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let mut out = BufWriter::new(std::fs::File::create(&beside.0)?);
        out.write_all(&head)?;
        out.write_all(&table)?;
        let mut at = HEAD + table.len();
        for (entry, part) in entries.iter().zip(parts) {
            out.write_all(&[0; PAGE][..entry.offset - at])?;
            out.write_all(part.panels)?;
            at = entry.offset + entry.len;
        }
        out.write_all(&[0; PAGE][..end - at])?;
        out.into_inner().map_err(std::io::IntoInnerError::into_error)?;
        std::fs::rename(&beside.0, path)
    };
    write().map_err(failed)
}

/// A file that goes when it was not renamed.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // Not there any more once it was renamed.
        drop(std::fs::remove_file(&self.0));
    }
}

/// A checksum that runs at the speed of memory: eight sums over interleaved words of 8 bytes, mixed by multiplication.
pub fn checksum(bytes: &[u8]) -> u64 {
    const PRIME: u64 = 0x9e37_79b9_7f4a_7c15;
    let mix = |sum: u64, word: u64| {
        let mixed = (sum ^ word).wrapping_mul(PRIME);
        mixed ^ (mixed >> 29)
    };
    let mut sums: [u64; 8] = std::array::from_fn(|i| PRIME.rotate_left(8 * i as u32));
    let (blocks, rest) = bytes.as_chunks::<64>();
    for block in blocks {
        for (sum, word) in sums.iter_mut().zip(block.as_chunks().0) {
            *sum = mix(*sum, u64::from_le_bytes(*word));
        }
    }
    let mut last = [0; 64];
    last[..rest.len()].copy_from_slice(rest);
    for (sum, word) in sums.iter_mut().zip(last.as_chunks().0) {
        *sum = mix(*sum, u64::from_le_bytes(*word));
    }
    sums.into_iter().fold(bytes.len() as u64, mix)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::cpu::{CpuBackend, CpuConfig};
    use crate::testing::random_weights;
    use crate::{Backend, Epilogue, PartOrder, Rows};

    const SHAPES: [(WeightType, usize, usize); 4] = [
        (WeightType::Q4_1, 40, 256),
        (WeightType::Q6K, 40, 256),
        (WeightType::Bf16, 17, 64),
        (WeightType::Q8_0, 33, 64),
    ];

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("cupola-packed-{}-{name}", std::process::id()));
            drop(std::fs::remove_dir_all(&path));
            Self(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            drop(std::fs::remove_dir_all(&self.0));
        }
    }

    /// Loads the weights of `SHAPES`, those of `seed`, and returns their products, and what the file was said to lack.
    fn start(path: &Path, source: u64, seed: u64) -> (Vec<Vec<f32>>, std::result::Result<(), String>) {
        let mut backend = CpuBackend::new(CpuConfig { threads: Some(2), isa: None }).unwrap();
        let state = backend.use_packed_file(path.to_owned(), source);
        let data = SHAPES.map(|(ty, rows, cols)| random_weights(ty, (rows, cols), seed));
        let parts: Vec<WeightPart<'_>> =
            SHAPES.iter().zip(&data).map(|(&(ty, rows, cols), data)| WeightPart { ty, rows, cols, data }).collect();
        // The first two are parts of one matrix.
        let mut linears = vec![backend.load_linear(&parts[..2], PartOrder::Concat, None).unwrap()];
        linears.extend(parts[2..].iter().map(|part| backend.load_linear(&[*part], PartOrder::Concat, None).unwrap()));
        backend.weights_loaded().unwrap();
        let mut products = Vec::new();
        for (linear, (rows, cols)) in linears.into_iter().zip([(80, 256), (17, 64), (33, 64)]) {
            let x = backend.alloc_buffer(1, cols).unwrap();
            backend
                .for_each_row(x, 1, &|_, row| row.iter_mut().zip(1..).for_each(|(x, i)| *x = (i % 7) as f32))
                .unwrap();
            let (ones, act) = (backend.load_vector(&vec![1.0; cols]).unwrap(), backend.alloc_act(1, cols).unwrap());
            let out = backend.alloc_buffer(1, rows).unwrap();
            backend.rms_norm(x, Rows::First(1), (ones, 1e-5), linear, act).unwrap();
            backend.linear(act, 1, linear, Epilogue::Store, out).unwrap();
            let got = Mutex::new(Vec::new());
            backend.for_each_row(out, 1, &|_, row| *got.lock().unwrap() = row.to_vec()).unwrap();
            products.push(got.into_inner().unwrap());
        }
        (products, state)
    }

    #[test]
    fn the_second_start_maps_what_the_first_one_packed() {
        let scratch = Scratch::new("second");
        let path = scratch.0.join("folder/model.packed");
        let (packed, state) = start(&path, 7, 1);
        assert!(state.unwrap_err().contains("cannot map"));
        let written = std::fs::read(&path).unwrap();
        let (mapped, state) = start(&path, 7, 1);
        assert_eq!((&mapped, state), (&packed, Ok(())));
        assert_eq!(std::fs::read(&path).unwrap(), written, "nothing had to be written");
        let files = std::fs::read_dir(path.parent().unwrap()).unwrap().count();
        assert_eq!(files, 1, "no temporary file is left");
    }

    /// Every byte of the head and the table, and some of the panels: a changed one is seen, and the file made anew.
    #[test]
    fn damaged_files_are_never_used_and_replaced() {
        let scratch = Scratch::new("damaged");
        let path = scratch.0.join("model.packed");
        let (packed, _) = start(&path, 7, 1);
        let whole = std::fs::read(&path).unwrap();
        let table = HEAD + SHAPES.len() * ENTRY;
        let mut damaged: Vec<Vec<u8>> = Vec::new();
        let panels = (PAGE..whole.len() - ALIGN).step_by(1009);
        for at in (0..table).step_by(5).chain(panels) {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            damaged.push(bytes);
        }
        damaged.extend([0, 1, HEAD - 1, HEAD, table - 1, PAGE, whole.len() - 1].map(|len| whole[..len].to_vec()));
        damaged.push([&whole[..], b"more"].concat());
        damaged.push(b"#!/bin/sh\n".repeat(600));
        for (index, bytes) in damaged.iter().enumerate() {
            std::fs::write(&path, bytes).unwrap();
            let (got, state) = start(&path, 7, 1);
            assert!(state.is_err(), "damage {index} was not seen");
            assert_eq!(got, packed, "damage {index}");
            assert!(std::fs::read(&path).unwrap() == whole, "damage {index} was not repaired");
        }
    }

    #[test]
    fn files_of_other_weights_are_not_used() {
        let scratch = Scratch::new("others");
        let path = scratch.0.join("model.packed");
        let (first, _) = start(&path, 7, 1);
        let (_, state) = start(&path, 8, 1);
        assert!(state.unwrap_err().contains("other files"));
        // The same number by accident, but other weights: seen part by part.
        let (other, state) = start(&path, 8, 2);
        assert_eq!(state, Ok(()));
        assert_ne!(other, first);
        let (again, _) = start(&path, 8, 2);
        assert_eq!(again, other);
    }

    #[test]
    fn a_table_that_points_elsewhere_is_refused() {
        let len = panel_bytes(WeightType::Q8_0, 64).unwrap();
        let entry = Entry { ty: WeightType::Q8_0, rows: 5, cols: 64, sample: 1, offset: 4096, len, checksum: 3 };
        assert_eq!(Entry::read(&entry.bytes()), Some(entry));
        assert!(entry.fits(4096 + len));
        let wrong = [
            Entry { offset: 4097, ..entry },
            Entry { offset: usize::MAX - 63, ..entry },
            Entry { offset: 4096 + 64, ..entry },
            Entry { len: len + 64, ..entry },
            Entry { rows: 17, ..entry },
            Entry { rows: 0, ..entry },
            Entry { cols: 33, ..entry },
        ];
        for wrong in wrong {
            assert!(!wrong.fits(4096 + len), "{wrong:?}");
        }
        let mut unknown = entry.bytes();
        unknown[0] = b'?';
        assert_eq!(Entry::read(&unknown), None);
    }

    #[test]
    fn a_file_that_cannot_be_written_is_an_error_and_leaves_nothing() {
        let scratch = Scratch::new("unwritable");
        // A folder is where the file should go.
        std::fs::create_dir_all(scratch.0.join("model.packed/x")).unwrap();
        let mut pool = Pool::new(1).unwrap();
        let error = save(&scratch.0.join("model.packed"), 1, &[], &mut pool).unwrap_err().to_string();
        assert!(error.contains("cannot write packed weights to"), "{error}");
        assert_eq!(std::fs::read_dir(&scratch.0).unwrap().count(), 1);
    }

    #[test]
    fn every_bit_counts_in_a_checksum() {
        for len in [0, 1, 8, 63, 64, 65, 200] {
            let bytes: Vec<u8> = (0..len).map(|i| (i * 7) as u8).collect();
            let sum = checksum(&bytes);
            for bit in 0..len * 8 {
                let mut other = bytes.clone();
                other[bit / 8] ^= 1 << (bit % 8);
                assert_ne!(checksum(&other), sum, "{len} {bit}");
            }
            assert_ne!(checksum(&[&bytes[..], &[0]].concat()), sum, "{len}");
        }
    }
}
