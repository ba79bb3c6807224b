//! Packed weight matrices and the memory they lie in.
//!
//! ```text
//!   Linear   parts ── each: rows of one type ──> panels of 16 rows, the last one padded with zero rows
//!   Store    chunks of 32 MiB in huge pages  [ panels of matrix 0 | panels of matrix 1 | ... ]
//!            or one mapped file of panels that were packed before: see `packed`
//! ```
//!
//! Matrices follow each other in load order, which is the order of use: prefetching past the end of one reads the next.

use std::ops::{Deref, Range};
use std::path::PathBuf;

use super::act::Form;
use super::packed::{self, Reader, Written};
use super::pool::Pool;
use crate::checks::check_parts;
use crate::format::pack::{PANEL, pack_panel, panel_bytes};
use crate::memory::{ALIGN, Arena, MappedFile, SharedMut};
use crate::{Error, LinearId, PartOrder, Result, WeightPart, WeightType};

/// Bytes of an ordinary chunk of the store.
const CHUNK: usize = 32 << 20;

/// Where bytes lie in the store.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    chunk: usize,
    offset: usize,
    len: usize,
}

/// A piece of the store.
enum Chunk {
    /// Packed by this process.
    Own(Arena<u8>),
    /// Packed before.
    File(MappedFile),
}

impl Deref for Chunk {
    type Target = [u8];

    #[inline(always)]
    fn deref(&self) -> &[u8] {
        match self {
            Chunk::Own(arena) => arena,
            Chunk::File(file) => file.bytes(),
        }
    }
}

/// A file of packed weights that the store reads from, or will be written to.
struct Cache {
    path: PathBuf,
    /// What the weights are packed from.
    source: u64,
    /// What the file holds, if it is whole.
    reader: Option<Reader>,
    /// Everything in the store, in load order: type, rows, columns, sample of the source.
    parts: Vec<(WeightType, usize, usize, u64, Place)>,
    /// Something had to be packed.
    stale: bool,
}

/// The memory of all packed weights.
#[derive(Default)]
pub(super) struct Store {
    chunks: Vec<Chunk>,
    cache: Option<Cache>,
    /// Bytes in use of the last chunk.
    used: usize,
    /// Bytes in use of all chunks.
    total: u64,
}

impl Store {
    fn reserve(&mut self, len: usize) -> Result<Place> {
        if self.chunks.last().is_none_or(|chunk| chunk.len() - self.used < len) {
            self.chunks.push(Chunk::Own(Arena::zeroed(len.max(CHUNK), "packed weights")?));
            self.used = 0;
        }
        let place = Place { chunk: self.chunks.len() - 1, offset: self.used, len };
        let used = (self.used + len).next_multiple_of(ALIGN).min(self.chunks[place.chunk].len());
        self.total += (used - self.used) as u64;
        self.used = used;
        Ok(place)
    }

    /// Takes weights from the file at `path` as long as it holds them, and makes it hold them at [`Store::loaded`]. Before
    /// the first matrix.
    ///
    /// # Errors
    /// Why the file cannot be used as it is, as a clause.
    pub(super) fn use_file(&mut self, path: PathBuf, source: u64, pool: &mut Pool) -> std::result::Result<(), String> {
        let opened = Reader::open(&path, source, pool);
        let (reader, result) = match opened {
            Ok((reader, file)) => {
                self.used = file.bytes().len();
                self.chunks.push(Chunk::File(file));
                (Some(reader), Ok(()))
            }
            Err(why) => (None, Err(why)),
        };
        self.cache = Some(Cache { path, source, stale: reader.is_none(), reader, parts: Vec::new() });
        result
    }

    /// All matrices are there: writes the file if it did not hold just these.
    ///
    /// # Errors
    /// [`Error::PackedFile`]; the store is as good without the file.
    pub(super) fn loaded(&mut self, pool: &mut Pool) -> Result<()> {
        let Some(cache) = self.cache.take() else { return Ok(()) };
        if !cache.stale && cache.reader.is_some_and(|reader| reader.is_used_up()) {
            return Ok(());
        }
        let written = |&(ty, rows, cols, sample, place): &(_, _, _, _, Place)| Written {
            ty,
            rows,
            cols,
            sample,
            panels: self.bytes(place),
        };
        let parts: Vec<Written<'_>> = cache.parts.iter().map(written).collect();
        packed::save(&cache.path, cache.source, &parts, pool)
    }

    /// Where the file has the panels of a part; the next call is for the next part.
    fn cached(&mut self, part: &WeightPart<'_>) -> Option<Place> {
        let cache = self.cache.as_mut()?;
        let found = cache.reader.as_mut()?.take(part);
        cache.stale |= found.is_none();
        let entry = found?;
        self.total += entry.len.next_multiple_of(ALIGN) as u64;
        // The file's chunk is the first one.
        Some(Place { chunk: 0, offset: entry.offset, len: entry.len })
    }

    /// Remembers a part for [`Store::loaded`].
    fn note(&mut self, part: &WeightPart<'_>, place: Place) {
        if let Some(cache) = &mut self.cache {
            cache.parts.push((part.ty, part.rows, part.cols, packed::sample(part.data), place));
        }
    }

    /// Bytes of a place that was reserved.
    fn reserved(&mut self, place: Place) -> &mut [u8] {
        match &mut self.chunks[place.chunk] {
            Chunk::Own(arena) => &mut arena[place.offset..][..place.len],
            Chunk::File(_) => unreachable!("`reserve` gives places in arenas"),
        }
    }

    #[inline(always)]
    fn bytes(&self, place: Place) -> &[u8] {
        &self.chunks[place.chunk][place.offset..][..place.len]
    }

    /// Bytes in use.
    pub(super) fn total(&self) -> u64 {
        self.total
    }
}

/// Rows of one type.
struct Part {
    ty: WeightType,
    rows: usize,
    /// Index of the first row within the matrix.
    first: usize,
    place: Place,
    panel_bytes: usize,
}

impl Part {
    fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Panels `panels`, which this part has.
    #[inline]
    fn run<'a>(&self, store: &'a Store, panels: Range<usize>) -> Run<'a> {
        let offset = self.place.offset + panels.start * self.panel_bytes;
        let place = Place { offset, len: panels.len() * self.panel_bytes, ..self.place };
        let row = panels.start * PANEL;
        let rows = (panels.len() * PANEL).min(self.rows - row);
        Run { ty: self.ty, bytes: store.bytes(place), panel_bytes: self.panel_bytes, first: self.first + row, rows }
    }
}

/// Consecutive panels of one type.
#[derive(Clone, Copy)]
pub(super) struct Run<'a> {
    pub(super) ty: WeightType,
    pub(super) bytes: &'a [u8],
    pub(super) panel_bytes: usize,
    first: usize,
    rows: usize,
}

impl<'a> Run<'a> {
    /// One panel by itself.
    #[cfg(test)]
    pub(super) fn of_panel(ty: WeightType, bytes: &'a [u8]) -> Self {
        Run { ty, bytes, panel_bytes: bytes.len(), first: 0, rows: PANEL }
    }

    /// Number of panels.
    pub(super) fn len(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Index of the first row within the matrix.
    pub(super) fn first(&self) -> usize {
        self.first
    }

    /// Which rows each panel holds.
    #[inline]
    pub(super) fn panels(&self) -> impl Iterator<Item = Panel> + use<> {
        let Self { first, rows, .. } = *self;
        (0..rows).step_by(PANEL).map(move |row| Panel { first: first + row, rows: PANEL.min(rows - row) })
    }
}

/// Rows of a matrix that a panel holds.
#[derive(Clone, Copy)]
pub(super) struct Panel {
    /// Index of the first one within the matrix.
    pub(super) first: usize,
    /// Those that are not padding.
    pub(super) rows: usize,
}

/// A packed weight matrix of shape `[rows, cols]`.
pub(super) struct Linear {
    parts: Vec<Part>,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) order: PartOrder,
    pub(super) bias: Option<Vec<f32>>,
    /// What it needs its activations as.
    pub(super) form: Form,
    /// The matrix that was used after it, the last time.
    pub(super) next: Option<LinearId>,
}

impl Linear {
    /// Bytes of all parts.
    pub(super) fn bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.place.len as u64).sum()
    }

    /// Checks and packs the parts of a matrix.
    ///
    /// # Errors
    /// As [`crate::Backend::load_linear`].
    pub(super) fn pack(
        store: &mut Store,
        pool: &mut Pool,
        parts: &[WeightPart<'_>],
        order: PartOrder,
        bias: Option<&[f32]>,
    ) -> Result<Self> {
        const OP: &str = "load_linear";
        let refuse = |expected: String, got: String| Err(Error::Shape { op: OP, expected, got });
        let cols = check_parts(parts)?;
        let mut form = Form::default();
        for part in parts {
            let float = part.ty.is_float();
            form = form.union(Form { int8: !float, float });
        }
        if order == PartOrder::GateUp && (parts.len() != 2 || parts[0].rows != parts[1].rows || form == BOTH) {
            let shapes: Vec<_> = parts.iter().map(|p| format!("{} x {} of {}", p.rows, cols, p.ty.name())).collect();
            return refuse("gate and up of one shape, both floats or both blocks".into(), shapes.join(", "));
        }
        let rows = parts.iter().map(|part| part.rows).sum();
        if let Some(bias) = bias
            && bias.len() != rows
        {
            return refuse(format!("a bias of {rows} values"), bias.len().to_string());
        }
        let mut packed = Vec::with_capacity(parts.len());
        let mut first = 0;
        for part in parts {
            packed.push(pack_part(store, pool, part, first)?);
            first += part.rows;
        }
        Ok(Self { parts: packed, rows, cols, order, bias: bias.map(<[f32]>::to_vec), form, next: None })
    }

    /// Number of panels.
    pub(super) fn panels(&self) -> usize {
        self.parts.iter().map(Part::panels).sum()
    }

    /// Number of panels of a part.
    pub(super) fn part_panels(&self, part: usize) -> usize {
        self.parts[part].panels()
    }

    /// The panels `panels`, counted over all parts, in runs of at most `most` that lie in one part.
    #[inline]
    pub(super) fn runs<'a>(
        &self,
        store: &'a Store,
        panels: Range<usize>,
        most: usize,
    ) -> impl Iterator<Item = Run<'a>> {
        let starts = self.parts.iter().scan(0, |next, part| {
            let start = *next;
            *next += part.panels();
            Some(start)
        });
        self.parts.iter().zip(starts).enumerate().flat_map(move |(i, (part, start))| {
            let end = start + part.panels();
            let within = panels.start.clamp(start, end) - start..panels.end.clamp(start, end) - start;
            self.part_runs(store, i, within, most)
        })
    }

    /// At most `len` bytes of a part, from its panel `first` on.
    pub(super) fn part_bytes_from<'a>(&self, store: &'a Store, part: usize, first: usize, len: usize) -> &'a [u8] {
        let part = &self.parts[part];
        let bytes = &store.bytes(part.place)[first.min(part.panels()) * part.panel_bytes..];
        &bytes[..bytes.len().min(len)]
    }

    /// At most `len` bytes of the part that holds panel `first`, counted over all parts, from there on.
    pub(super) fn bytes_from<'a>(&self, store: &'a Store, mut first: usize, len: usize) -> &'a [u8] {
        for part in 0..self.parts.len() {
            let panels = self.parts[part].panels();
            if first < panels {
                return self.part_bytes_from(store, part, first, len);
            }
            first -= panels;
        }
        &[]
    }

    /// The panels `panels` of part `part` in runs of at most `most`.
    #[inline]
    pub(super) fn part_runs<'a>(
        &self,
        store: &'a Store,
        part: usize,
        panels: Range<usize>,
        most: usize,
    ) -> impl Iterator<Item = Run<'a>> {
        let part = &self.parts[part];
        let end = panels.end;
        panels.step_by(most).map(move |first| part.run(store, first..end.min(first + most)))
    }

    /// The panel that holds `row`, and the row's lane in it.
    pub(super) fn locate<'a>(&self, store: &'a Store, row: usize) -> (Run<'a>, usize) {
        let part = self.parts.iter().rfind(|part| part.first <= row).expect("the first part starts at row 0");
        let row = row - part.first;
        let panel = row / PANEL;
        (part.run(store, panel..panel + 1), row % PANEL)
    }
}

const BOTH: Form = Form { int8: true, float: true };

fn pack_part(store: &mut Store, pool: &mut Pool, part: &WeightPart<'_>, first: usize) -> Result<Part> {
    let &WeightPart { ty, rows, cols, data } = part;
    let panel_bytes = panel_bytes(ty, cols).expect("the shape was checked before");
    let source_bytes = data.len() / rows * PANEL;
    let panels = rows.div_ceil(PANEL);
    let len =
        panels.checked_mul(panel_bytes).ok_or(Error::OutOfMemory { bytes: usize::MAX, what: "packed weights" })?;
    if let Some(place) = store.cached(part) {
        store.note(part, place);
        return Ok(Part { ty, rows, first, place, panel_bytes });
    }
    let place = store.reserve(len)?;
    store.note(part, place);
    let target = SharedMut::new(store.reserved(place));
    pool.run(panels, &|panel, _worker| {
        let source = &data[panel * source_bytes..data.len().min((panel + 1) * source_bytes)];
        // SAFETY: each chunk of the job writes the panel of its own index.
        let target = unsafe { target.part(panel * panel_bytes, panel_bytes) };
        pack_panel(ty, cols, source, target);
    });
    Ok(Part { ty, rows, first, place, panel_bytes })
}
