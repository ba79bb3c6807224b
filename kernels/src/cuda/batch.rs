//! What a batch's sequences mean for the kernels: where each row stands, block tables, and the pieces of work of attention.
//!
//! ```text
//!   spans, block table ──┬── per row: position, place in the pool            (rope_store)
//!                        └── items, cut by query rows and by positions       (attention)
//!
//!   query rows of a span   r = token * group + head of the group
//!   few (decoding)         16 query rows x 256 positions; several pieces of one sequence are merged
//!   many (prefill)         64 query rows x all that they see
//! ```
//!
//! Every layer asks for the same tables, so the last few are kept on the device and looked up by what they were made from.

use super::driver::{Arg, Device, DeviceBytes};
use crate::cpu::spans::Spans;
use crate::kv::{BLOCK_SIZE, BlockId, SeqSpan};
use crate::{Error, Result};

/// Sets of tables that are kept: every row and the last rows, with and without a sliding window.
const KEPT: usize = 6;
/// A row that belongs to no sequence.
const NO_POSITION: u32 = u32::MAX;
/// An item that is the whole of its rows' attention.
const NO_SLOT: u32 = u32::MAX;
/// Query rows of an item with few rows, and of one with many.
const FEW: usize = 16;
const MANY: usize = 64;
/// Spans of up to this many query rows are read once for each 16 of them.
const MOST_FEW: usize = 32;
/// Positions of a piece of a sequence.
const PIECE: usize = 256;
/// Slots of pieces; a batch that needs more is cut into longer pieces.
pub(super) const SLOTS: usize = 512;

/// What tables are made from, beside spans and block table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    /// Query heads for each key/value head.
    pub(super) group: usize,
    /// Positions that a row sees.
    pub(super) window: Option<usize>,
}

/// Items of attention, in the order in which they lie in the table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) few: usize,
    pub(super) many: usize,
    pub(super) merges: usize,
}

/// Tables in device memory.
pub(super) struct Tables {
    spans: Vec<SeqSpan>,
    table: Vec<BlockId>,
    cut: Option<Cut>,
    memory: Option<DeviceBytes>,
    /// Number of rows, the last one included.
    pub(super) rows: usize,
    pub(super) counts: Counts,
}

impl Tables {
    /// Position of each row, or `NO_POSITION`.
    pub(super) fn positions(&self) -> Arg {
        self.at(0)
    }

    /// Block and slot of each row.
    pub(super) fn places(&self) -> Arg {
        self.at(self.rows)
    }

    /// Block tables of all spans.
    pub(super) fn block_table(&self) -> Arg {
        self.at(2 * self.rows)
    }

    /// The first item for few rows, many rows, and of merging.
    pub(super) fn items(&self) -> [Arg; 3] {
        let items = self.items_at();
        [0, self.counts.few, self.counts.few + self.counts.many].map(|item| self.at(items + item * Item::WORDS))
    }

    /// Items begin at a multiple of 32 bytes.
    fn items_at(&self) -> usize {
        (2 * self.rows + self.table.len()).next_multiple_of(Item::WORDS)
    }

    fn at(&self, word: usize) -> Arg {
        self.memory.as_ref().map_or(Arg::Pointer(0), |memory| memory.at(4 * word))
    }
}

/// `Item` of `cu/attention.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Item {
    row0: u32,
    rows: u32,
    pos0: u32,
    table0: u32,
    query0: u32,
    begin: u32,
    end: u32,
    slot: u32,
}

impl Item {
    const WORDS: usize = 8;

    fn words(&self) -> [u32; Item::WORDS] {
        [self.row0, self.rows, self.pos0, self.table0, self.query0, self.begin, self.end, self.slot]
    }
}

/// The tables of the last batches.
#[derive(Default)]
pub(super) struct Batches {
    kept: Vec<Tables>,
    host: Vec<u32>,
    written: Vec<u64>,
}

impl Batches {
    /// Tables for these sequences, made now or before. A `cut` is needed for attention, `None` for storing alone.
    ///
    /// # Errors
    /// [`Error::Shape`] when the spans do not fit `rows` rows and a pool of `blocks` blocks, or without a cut, when two of
    /// them would write one block; [`Error::Device`].
    pub(super) fn tables(
        &mut self,
        device: &mut Device,
        (op, cut): (&'static str, Option<Cut>),
        (spans, table): (&[SeqSpan], &[BlockId]),
        (blocks, rows): (usize, usize),
    ) -> Result<&Tables> {
        let known = |kept: &Tables| kept.cut == cut && kept.spans == spans && kept.table == table && kept.rows <= rows;
        // What was checked against a pool of one size may still not fit a smaller one.
        let fits = table.iter().all(|block| (block.0 as usize) < blocks);
        if let (Some(found), true) = (self.kept.iter().position(known), fits) {
            return Ok(&self.kept[found]);
        }
        let checked = Spans::check(op, spans, table, blocks, rows)?;
        let rows = spans.iter().map(|span| (span.row0 + span.rows) as usize).max().unwrap_or(0);
        self.host.clear();
        self.host.resize(2 * rows, NO_POSITION);
        let (positions, places) = self.host.split_at_mut(rows);
        for span in spans {
            for i in 0..span.rows {
                let (row, position) = ((span.row0 + i) as usize, span.pos0 + i);
                let block = checked.table(span)[position as usize / BLOCK_SIZE];
                positions[row] = position;
                places[row] = block.0 * BLOCK_SIZE as u32 + position % BLOCK_SIZE as u32;
            }
        }
        if cut.is_none() {
            self.check_writes(op, blocks, &checked)?;
        }
        self.host.extend(table.iter().map(|block| block.0));
        let items_at = self.host.len().next_multiple_of(Item::WORDS);
        let (items, counts) = cut.map_or((Vec::new(), Counts::default()), |cut| cut_items(spans, cut));
        self.host.resize(items_at, 0);
        self.host.extend(items.iter().flat_map(Item::words));

        let bytes: Vec<u8> = self.host.iter().flat_map(|word| word.to_le_bytes()).collect();
        // The oldest leaves its memory to the new one.
        let mut memory = if self.kept.len() < KEPT { None } else { self.kept.remove(0).memory };
        if memory.as_ref().is_none_or(|memory| memory.len() < bytes.len()) {
            memory = Some(device.alloc(table_room(bytes.len()), "tables of a batch")?);
        }
        let mut memory = memory.expect("it was just made where there was none");
        device.upload(&mut memory, 0, &bytes)?;
        let (spans, table) = (spans.to_vec(), table.to_vec());
        self.kept.push(Tables { spans, table, cut, memory: Some(memory), rows, counts });
        let last = self.kept.len() - 1;
        debug_assert_eq!(self.kept[last].items_at(), items_at);
        Ok(&self.kept[last])
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

/// Bytes allocated for a table of this many.
fn table_room(bytes: usize) -> usize {
    bytes.next_power_of_two().max(1 << 16)
}

/// Bytes of all tables that are kept, for batches of up to so many rows and sequences, block tables of `table` blocks
/// together, and `group` query heads for each key/value head.
pub(super) fn most_table_bytes((rows, sequences): (usize, usize), table: usize, group: usize) -> usize {
    // Two items of few rows a sequence, each with a merge, and their pieces; the items of many rows.
    let items = 4 * sequences + SLOTS + sequences + (rows * group).div_ceil(MANY);
    KEPT * table_room(4 * (2 * rows + table + Item::WORDS * (items + 1)))
}

/// Cuts the attention of a batch into items: those with few rows, those with many, and merges. The longest come first, so
/// that the last ones to run are short.
fn cut_items(spans: &[SeqSpan], cut: Cut) -> (Vec<Item>, Counts) {
    let (mut few, mut many) = (Vec::new(), Vec::new());
    for span in spans {
        let queries = span.rows as usize * cut.group;
        let (step, items) = if queries <= MOST_FEW { (FEW, &mut few) } else { (MANY, &mut many) };
        for query0 in (0..queries).step_by(step) {
            let (first, last) = (query0 / cut.group, ((query0 + step).min(queries) - 1) / cut.group);
            let end = span.pos0 as usize + last + 1;
            let seen = span.pos0 as usize + first + 1;
            let begin = cut.window.map_or(0, |window| seen.saturating_sub(window)) / BLOCK_SIZE * BLOCK_SIZE;
            let &SeqSpan { row0, rows, pos0, table0, .. } = span;
            let [query0, begin, end] = [query0, begin, end].map(|n| n as u32);
            items.push(Item { row0, rows, pos0, table0, query0, begin, end, slot: NO_SLOT });
        }
    }
    let length = |item: &Item| std::cmp::Reverse(item.end - item.begin);
    many.sort_by_key(length);

    // Positions of a piece are counted from the start of the sequence, so they do not depend on the other sequences, unless
    // there are too many pieces for the slots.
    let pieces = |piece: usize| {
        let of = |item: &Item| (item.end as usize).div_ceil(piece) - item.begin as usize / piece;
        few.iter().map(of).filter(|&count| count > 1).sum::<usize>()
    };
    let mut piece = PIECE;
    while pieces(piece) > SLOTS {
        piece *= 2;
    }
    let (mut cut_few, mut merges, mut slot) = (Vec::new(), Vec::new(), 0);
    for item in few {
        let pieces = item.begin as usize / piece..(item.end as usize).div_ceil(piece);
        if pieces.len() == 1 {
            cut_few.push(item);
            continue;
        }
        merges.push(Item { slot, end: pieces.len() as u32, ..item });
        for index in pieces {
            let (begin, end) = ((index * piece) as u32, ((index + 1) * piece) as u32);
            cut_few.push(Item { begin: begin.max(item.begin), end: end.min(item.end), slot, ..item });
            slot += 1;
        }
    }
    cut_few.sort_by_key(length);
    let counts = Counts { few: cut_few.len(), many: many.len(), merges: merges.len() };
    cut_few.extend(many);
    cut_few.extend(merges);
    (cut_few, counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(row0: u32, rows: u32, pos0: u32) -> SeqSpan {
        SeqSpan { row0, rows, pos0, table0: 0, table_len: 99 }
    }

    /// How often each (row of the batch, head of the group, position) is covered by an item that is not a merge.
    fn covered(spans: &[SeqSpan], cut: Cut) -> Vec<((u32, u32, u32), usize)> {
        let (items, counts) = cut_items(spans, cut);
        let mut seen = std::collections::BTreeMap::new();
        for (i, item) in items[..counts.few + counts.many].iter().enumerate() {
            let size = if i < counts.few { FEW } else { MANY };
            for query in item.query0..(item.query0 + size as u32).min(item.rows * cut.group as u32) {
                let (token, head) = (query / cut.group as u32, query % cut.group as u32);
                for position in item.begin..item.end.min(item.pos0 + token + 1) {
                    *seen.entry((item.row0 + token, head, position)).or_default() += 1;
                }
            }
        }
        seen.into_iter().collect()
    }

    #[test]
    fn every_pair_of_row_and_position_is_in_one_item() {
        let spans =
            [span(0, 1, 700), span(1, 40, 0), span(41, 3, 254), span(44, 1, 0), span(45, 1, 255), span(46, 1, 256)];
        for group in [1, 3, 5, 20] {
            for window in [None, Some(1), Some(40), Some(300)] {
                let seen = covered(&spans, Cut { group, window });
                assert!(seen.iter().all(|(_, count)| *count == 1));
                for span in &spans {
                    for token in 0..span.rows {
                        let end = span.pos0 + token + 1;
                        let begin = window.map_or(0, |window| end.saturating_sub(window as u32));
                        for (head, position) in (0..group as u32).flat_map(|h| (begin..end).map(move |p| (h, p))) {
                            let key = (span.row0 + token, head, position);
                            assert!(seen.binary_search_by_key(&key, |(key, _)| *key).is_ok(), "{key:?} {window:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn pieces_have_slots_of_their_own_and_merges_name_them() {
        let spans: Vec<_> = (0..9).map(|i| span(i, 1, i * 300)).collect();
        let (items, counts) = cut_items(&spans, Cut { group: 4, window: None });
        assert_eq!((counts.many, counts.merges), (0, 8));
        for merge in &items[counts.few..] {
            let mut parts: Vec<_> = items[..counts.few].iter().filter(|item| item.row0 == merge.row0).collect();
            parts.sort_by_key(|item| item.begin);
            assert_eq!(
                parts.iter().map(|item| item.slot).collect::<Vec<_>>(),
                (merge.slot..merge.slot + merge.end).collect::<Vec<_>>()
            );
            assert_eq!((parts[0].begin, parts[parts.len() - 1].end), (0, merge.row0 * 300 + 1));
        }
    }

    #[test]
    fn too_many_pieces_become_longer_ones() {
        let spans: Vec<_> = (0..64).map(|i| span(i, 1, 9000)).collect();
        let (items, counts) = cut_items(&spans, Cut { group: 4, window: None });
        let slots = items[..counts.few].iter().map(|item| item.slot).max().unwrap();
        assert!((slots as usize) < SLOTS, "{slots}");
        assert_eq!(counts.merges, 64);
    }
}
