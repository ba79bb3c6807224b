//! What the kernels of a forward pass read of its rows and sequences: one piece of device memory, filled by one copy.
//!
//! ```text
//!   words    [ tokens | kept rows | positions | places | items of attention, for each cut and set | block table ]
//!
//!   host     Pass ──lay out──> page-locked memory, two in turns ──one copy──> device memory, always the same
//! ```
//!
//! The stream copies a pass after the kernels of the one before have read theirs, so one piece of device memory is enough;
//! the host fills the next page-locked one meanwhile. A pass that will be repeated is laid out by its padded number of rows
//! alone: everything but the block tables, which come last, then lies at the same place with the same size, and what there
//! is too much of does nothing.
//!
//! Rows whose token ids are results of the pass before come with the numbers of these results in their places; one launch
//! behind the copy replaces them. It is no part of what is recorded, so recordings need not know where results lie.
//!
//! An op finds what it needs by comparing. What the pass was not told of replaces its like, with a copy of its own; a decoder
//! tells all.

use super::batch::{Cut, FEW, Item, Kinds, MANY, MOST_FEW, PIECE, SLOTS, cut_items};
use super::driver::{Arg, Device, DeviceBytes};
use super::pinned::Pinned;
use super::results::Source;
use crate::cpu::spans::Spans;
use crate::kv::{BLOCK_SIZE, BlockId, SeqSpan, blocks_for};
use crate::{Error, Pass, PassLimits, Result};

/// Position of a row that belongs to no sequence.
const NO_POSITION: u32 = u32::MAX;

/// What passes that can be repeated with the same launches have in common: padded rows, and pieces of attention for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PassKey {
    pub(super) rows: usize,
    pieces: usize,
}

/// The pass under way, in device memory.
#[derive(Default)]
pub(super) struct Passes {
    cuts: Vec<Cut>,
    memory: Option<DeviceBytes>,
    staging: [Option<Pinned>; 2],
    told: Told,
    layout: Layout,
    written: Vec<u64>,
    /// Nothing may be copied now.
    held: bool,
    /// Grows whenever addresses change.
    generation: u64,
    /// Copies so far.
    #[cfg(test)]
    pub(super) copies: usize,
}

/// Copies of what lies in device memory.
#[derive(Default)]
struct Told {
    tokens: Vec<u32>,
    /// Results of the pass before that take the places of the first tokens, and where they are.
    carried: Vec<u32>,
    source: Option<Source>,
    kept: Vec<u32>,
    /// Every row's sequences, and those of the last rows.
    sets: [Vec<SeqSpan>; 2],
    table: Vec<BlockId>,
    repeated: Option<usize>,
    /// No two sequences of the first set write one block.
    writable: bool,
}

/// Where it lies, in words.
#[derive(Default)]
struct Layout {
    rows: usize,
    kept: usize,
    positions: usize,
    places: usize,
    /// For each cut and set.
    items: Vec<[Section; 2]>,
    table: usize,
    /// One more than the last block.
    blocks: usize,
    key: Option<PassKey>,
}

/// Items of one cut and set.
#[derive(Clone, Copy, Default)]
struct Section {
    at: usize,
    counts: Kinds<usize>,
}

/// Addresses of one cut and set.
pub(super) struct View {
    /// Rows of the pass, padding included.
    pub(super) rows: usize,
    /// Rows beyond those of sequences count as written.
    pub(super) padded: bool,
    /// Position of each row, or `NO_POSITION`.
    pub(super) positions: Arg,
    /// Block and slot of each row.
    pub(super) places: Arg,
    /// Block tables of all spans.
    pub(super) table: Arg,
    /// The first item of each kind.
    pub(super) items: Kinds<Arg>,
    pub(super) counts: Kinds<usize>,
}

impl Passes {
    /// Makes room for every pass within limits.
    ///
    /// # Errors
    /// Those of [`Device::alloc`].
    pub(super) fn reserve(&mut self, device: &mut Device, limits: &PassLimits<'_>) -> Result<()> {
        let PassLimits { rows, sequences, group, .. } = *limits;
        self.cuts = limits.windows.iter().map(|&window| Cut { group, window }).collect();
        let table = sequences * blocks_for(limits.positions);
        self.fit(device, most_words((rows, sequences), table, (group, self.cuts.len())))
    }

    /// Grows whenever the addresses that kernels were given are no longer those of a pass.
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// What this pass has in common with others that its launches can be repeated for.
    pub(super) fn key(&self) -> Option<PassKey> {
        self.layout.key
    }

    /// While a pass is recorded, its copy must not become part of the recording: an op that needs one then fails.
    pub(super) fn hold(&mut self, held: bool) {
        self.held = held;
    }

    /// Takes all of a pass to the device.
    ///
    /// # Errors
    /// [`Error::Shape`] when its spans do not fit its rows and a pool of `blocks` blocks, or two of them would write one
    /// block; [`Error::Device`].
    pub(super) fn begin(
        &mut self,
        device: &mut Device,
        (pass, source): (&Pass<'_>, Option<Source>),
        blocks: usize,
    ) -> Result<()> {
        const OP: &str = "begin_pass";
        Spans::check(OP, pass.last_spans, pass.block_table, blocks, pass.tokens.len())?;
        let spans = Spans::check(OP, pass.spans, pass.block_table, blocks, pass.tokens.len())?;
        self.check_writes(OP, blocks, &spans)?;
        let told = &mut self.told;
        replace(&mut told.tokens, pass.tokens);
        replace(&mut told.carried, pass.carried);
        told.source = source;
        replace(&mut told.kept, pass.kept);
        replace(&mut told.sets[0], pass.spans);
        // The same items would do the same.
        replace(&mut told.sets[1], if pass.last_spans == pass.spans { &[] } else { pass.last_spans });
        replace(&mut told.table, pass.block_table);
        (told.repeated, told.writable) = (pass.repeated, true);
        self.stage(device)
    }

    /// Token ids on the device, for a table of `vocab` rows.
    ///
    /// # Errors
    /// [`Error::Shape`] when carried tokens may lie beyond the table, [`Error::Device`].
    pub(super) fn tokens(&mut self, device: &mut Device, (tokens, vocab): (&[u32], usize)) -> Result<Arg> {
        if self.told.tokens != tokens || self.memory.is_none() {
            replace(&mut self.told.tokens, tokens);
            (self.told.repeated, self.told.source) = (None, None);
            self.told.carried.clear();
            self.stage(device)?;
        }
        if let Some(source) = self.told.source.filter(|source| source.vocab > vocab) {
            let expected = format!("carried tokens below {vocab}");
            return Err(Error::Shape { op: "embed", expected, got: format!("those of {}", source.vocab) });
        }
        Ok(self.at(0))
    }

    /// Row numbers on the device.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub(super) fn kept(&mut self, device: &mut Device, rows: &[u32]) -> Result<Arg> {
        if self.told.kept != rows || self.memory.is_none() {
            replace(&mut self.told.kept, rows);
            self.told.repeated = None;
            self.stage(device)?;
        }
        Ok(self.at(self.layout.kept))
    }

    /// Positions, places and items of these sequences. A `cut` is needed for attention, `None` for storing alone.
    ///
    /// # Errors
    /// [`Error::Shape`] when the spans do not fit `rows` rows and a pool of `blocks` blocks, or without a cut, when two of
    /// them would write one block; [`Error::Device`].
    pub(super) fn view(
        &mut self,
        device: &mut Device,
        (op, cut): (&'static str, Option<Cut>),
        (spans, table): (&[SeqSpan], &[BlockId]),
        (blocks, rows): (usize, usize),
    ) -> Result<View> {
        let known_table = self.told.table == table && self.memory.is_some();
        let mut set = self.told.sets.iter().position(|known| known_table && known == spans);
        if cut.is_none() {
            set = set.filter(|&set| set == 0);
        }
        let index = cut.map(|cut| self.cuts.iter().position(|known| *known == cut));
        let end = spans.last().map_or(0, |span| (span.row0 + span.rows) as usize);
        // What was checked against a pool of one size may still not fit a smaller one.
        if set.is_none() || index == Some(None) || end > rows || self.layout.blocks > blocks {
            Spans::check(op, spans, table, blocks, rows)?;
        }
        if set.is_none() || index == Some(None) {
            let told = &mut self.told;
            // Other sequences of the same tables are taken for the last rows of the same pass.
            let to = usize::from(known_table && cut.is_some());
            if !known_table {
                replace(&mut told.table, table);
                told.sets[1].clear();
            }
            if set.is_none() {
                replace(&mut told.sets[to], spans);
                told.writable &= to == 1;
                set = Some(to);
            }
            if index == Some(None) {
                self.cuts.extend(cut);
            }
            self.told.repeated = None;
            self.stage(device)?;
        }
        if cut.is_none() && !self.told.writable {
            let spans = Spans::check(op, spans, table, blocks, rows)?;
            self.check_writes(op, blocks, &spans)?;
            self.told.writable = true;
        }
        let set = set.expect("it was found, or just set");
        let section = match cut.and_then(|cut| self.cuts.iter().position(|known| *known == cut)) {
            Some(cut) => self.layout.items[cut][set],
            None => Section::default(),
        };
        let item = |index: usize| self.at(section.at + index * Item::WORDS);
        let counts = section.counts;
        Ok(View {
            rows: self.layout.rows,
            padded: self.told.repeated.is_some(),
            positions: self.at(self.layout.positions),
            places: self.at(self.layout.places),
            table: self.at(self.layout.table),
            items: Kinds { few: item(0), many: item(counts.few), merges: item(counts.few + counts.many) },
            counts,
        })
    }

    fn at(&self, word: usize) -> Arg {
        self.memory.as_ref().map_or(Arg::Pointer(0), |memory| memory.at(4 * word))
    }

    fn fit(&mut self, device: &mut Device, words: usize) -> Result<()> {
        const WHAT: &str = "the rows and sequences of a pass";
        if self.memory.as_ref().is_some_and(|memory| memory.len() >= 4 * words) {
            return Ok(());
        }
        let words = room(words);
        self.generation += 1;
        (self.memory, self.staging) = (None, [None, None]);
        self.memory = Some(device.alloc(4 * words, WHAT)?);
        self.staging = [Some(Pinned::new(device, words, WHAT)?), Some(Pinned::new(device, words, WHAT)?)];
        Ok(())
    }

    /// Lays out what was told, and submits its copy.
    fn stage(&mut self, device: &mut Device) -> Result<()> {
        if self.held {
            let (expected, got) =
                ("what begin_pass was told, in a pass that is recorded".into(), "something else".into());
            return Err(Error::Shape { op: "replay", expected, got });
        }
        let told = &self.told;
        let end = told.sets[0].last().map_or(0, |span| (span.row0 + span.rows) as usize);
        let rows = told.tokens.len().max(end);
        let mut items: Vec<_> =
            self.cuts.iter().map(|&cut| told.sets.each_ref().map(|spans| cut_items(spans, cut))).collect();
        let key = told.repeated.map(|reach| pad(&mut items, &self.cuts, rows, reach));

        let kept = told.tokens.len();
        let positions = kept + told.kept.len();
        let places = positions + rows;
        let mut next = (places + rows).next_multiple_of(Item::WORDS);
        let sections = items.iter().map(|sets| {
            sets.each_ref().map(|items| {
                let section = Section { at: next, counts: items.counts() };
                next += section.counts.sum() * Item::WORDS;
                section
            })
        });
        let sections: Vec<_> = sections.collect();
        let (table, words) = (next, next + told.table.len());
        let blocks = told.table.iter().map(|block| block.0 as usize + 1).max().unwrap_or(0);
        self.layout = Layout { rows, kept, positions, places, items: sections, table, blocks, key };

        self.fit(device, words)?;
        self.staging.swap(0, 1);
        let staging = self.staging[0].as_mut().expect("`fit` made both");
        write(&mut staging.words_mut()?[..words], &self.told, &self.layout, &items);
        let memory = self.memory.as_mut().expect("`fit` made it");
        #[cfg(test)]
        {
            self.copies += 1;
        }
        staging.upload(device, words, memory)?;
        let told = &self.told;
        told.source.map_or(Ok(()), |source| source.carry(device, memory.at(0), told.carried.len()))
    }

    /// No two sequences may write one block.
    fn check_writes(&mut self, op: &'static str, blocks: usize, spans: &Spans<'_>) -> Result<()> {
        self.written.clear();
        self.written.resize(blocks.div_ceil(64), 0);
        for span in spans.spans {
            let (first, last) = (span.pos0 as usize / BLOCK_SIZE, (span.pos0 + span.rows - 1) as usize / BLOCK_SIZE);
            for block in &spans.table(span)[first..=last] {
                let (word, bit) = (block.0 as usize / 64, 1 << (block.0 % 64));
                if self.written[word] & bit != 0 {
                    return Err(Error::Shape {
                        op,
                        expected: "a block of its own for every sequence to write to".into(),
                        got: format!("{block:?} twice"),
                    });
                }
                self.written[word] |= bit;
            }
        }
        Ok(())
    }
}

/// Words of the largest pass of so many rows and sequences, block tables of `table` blocks together, `group` query heads for
/// each key/value head, and so many cuts.
fn most_words((rows, sequences): (usize, usize), table: usize, (group, cuts): (usize, usize)) -> usize {
    // Two items of few rows a sequence, each with a merge, and their pieces; the items of many rows.
    let items = 4 * sequences + SLOTS + sequences + rows * group / MANY;
    4 * rows + Item::WORDS * (2 * cuts * items + 1) + table
}

/// Words allocated for a pass of this many.
fn room(words: usize) -> usize {
    words.next_power_of_two().max(1 << 12)
}

/// Bytes on the device for the largest pass, as [`most_words`].
pub(super) fn most_pass_bytes(steps: (usize, usize), table: usize, cuts: (usize, usize)) -> usize {
    4 * room(most_words(steps, table, cuts))
}

/// Fills the items of a pass of `rows` rows of one token each up to numbers that depend on the key alone. Sequences have at
/// least `reach` positions on average, as far as the key is concerned.
///
/// A row has as many items as its group of query heads needs, times pieces of its sequence; the key holds the number of pieces
/// for each row, on average, rounded up to a power of two. With one piece nothing is merged.
fn pad(items: &mut [[Kinds<Vec<Item>>; 2]], cuts: &[Cut], rows: usize, reach: usize) -> PassKey {
    let unit = |cut: &Cut| if cut.group <= MOST_FEW { rows * cut.group.div_ceil(FEW) } else { 0 };
    let mut pieces = reach.div_ceil(PIECE).max(1).next_power_of_two();
    for (cut, [all, _]) in cuts.iter().zip(&*items) {
        let least = if all.merges.is_empty() { 1 } else { 2 };
        pieces = pieces.max(all.few.len().div_ceil(unit(cut).max(1)).max(least).next_power_of_two());
    }
    // More slots than there are cannot be taken, so that the longest sequences need no further key.
    let units = cuts.iter().map(unit).max().unwrap_or(0).max(1);
    pieces = pieces.min((units + SLOTS).div_ceil(units).next_power_of_two());
    for (cut, [all, _]) in cuts.iter().zip(items) {
        // A window begins at a multiple of a block's positions.
        let seen = cut.window.map_or(pieces, |window| pieces.min((window + BLOCK_SIZE - 1).div_ceil(PIECE) + 1));
        let few = (unit(cut) * seen).min(unit(cut) + SLOTS).max(all.few.len());
        all.few.resize(few, Item::NONE);
        all.merges.resize(if pieces > 1 { unit(cut) } else { 0 }, Item::NONE);
        let many = if cut.group > MOST_FEW { rows * cut.group.div_ceil(MANY) } else { 0 };
        all.many.resize(many, Item::NONE);
    }
    PassKey { rows, pieces }
}

fn write(words: &mut [u32], told: &Told, layout: &Layout, items: &[[Kinds<Vec<Item>>; 2]]) {
    words[..told.tokens.len()].copy_from_slice(&told.tokens);
    words[..told.carried.len()].copy_from_slice(&told.carried);
    words[layout.kept..][..told.kept.len()].copy_from_slice(&told.kept);
    words[layout.positions..][..2 * layout.rows].fill(NO_POSITION);
    for span in &told.sets[0] {
        for i in 0..span.rows {
            let (row, position) = ((span.row0 + i) as usize, span.pos0 + i);
            let block = told.table[span.table0 as usize + position as usize / BLOCK_SIZE];
            words[layout.positions + row] = position;
            words[layout.places + row] = block.0 * BLOCK_SIZE as u32 + position % BLOCK_SIZE as u32;
        }
    }
    for (sections, items) in layout.items.iter().zip(items) {
        for (section, items) in sections.iter().zip(items) {
            for (to, item) in words[section.at..].chunks_exact_mut(Item::WORDS).zip(items.iter()) {
                to.copy_from_slice(&item.words());
            }
        }
    }
    for (to, block) in words[layout.table..].iter_mut().zip(&told.table) {
        *to = block.0;
    }
}

fn replace<T: Copy>(to: &mut Vec<T>, from: &[T]) {
    to.clear();
    to.extend_from_slice(from);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(row0: u32, pos0: u32) -> SeqSpan {
        SeqSpan { row0, rows: 1, pos0, table0: 0, table_len: 999 }
    }

    /// Key and launch sizes of `lengths` in a pass of `rows` rows.
    fn padded(lengths: &[u32], rows: usize, cut: Cut) -> (PassKey, Kinds<usize>, Kinds<usize>) {
        let spans: Vec<_> = (0..).zip(lengths).map(|(row, &length)| span(row, length - 1)).collect();
        let mut items = [[cut_items(&spans, cut), Kinds::default()]];
        let real = items[0][0].counts();
        let key = pad(&mut items, &[cut], rows, 0);
        (key, real, items[0][0].counts())
    }

    #[test]
    fn passes_of_one_key_have_launches_of_one_size() {
        let mut seen = std::collections::BTreeMap::new();
        for group in [1, 4, 20, 40] {
            for window in [None, Some(300)] {
                let cut = Cut { group, window };
                for rows in [1usize, 2, 8, 64] {
                    for real in [1, rows.div_ceil(2), rows] {
                        for length in [1, 255, 256, 257, 700, 3000, 40_000] {
                            // One that is longer than the others.
                            let mut lengths = vec![length; real];
                            lengths[0] = lengths[0] * 2 + 1;
                            let (key, real, got) = padded(&lengths, rows, cut);
                            assert!(real.few <= got.few && real.many <= got.many && real.merges <= got.merges);
                            let sizes = seen.entry((group, window, key)).or_insert(got);
                            assert_eq!(*sizes, got, "{cut:?} {key:?} {lengths:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn short_sequences_have_no_merges_and_few_empty_items() {
        let cut = Cut { group: 4, window: None };
        let (key, _, got) = padded(&[100, 256, 3], 4, cut);
        assert_eq!((key.rows, key.pieces, got), (4, 1, Kinds { few: 4, many: 0, merges: 0 }));
        let (key, real, got) = padded(&[100, 1000, 3], 4, cut);
        assert_eq!((key.pieces, real.few, got), (2, 6, Kinds { few: 8, many: 0, merges: 4 }));
    }
}
