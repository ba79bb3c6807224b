//! What a batch's sequences mean for attention: pieces of work, cut by query rows and by positions.
//!
//! ```text
//!   query rows of a span   r = token * group + head of the group
//!   few (decoding)         16 query rows x 256 positions; several pieces of one sequence are merged
//!   many (prefill)         64 query rows x all that they see
//! ```

use crate::kv::{BLOCK_SIZE, SeqSpan};

/// An item that is the whole of its rows' attention.
const NO_SLOT: u32 = u32::MAX;
/// Query rows of an item with few rows, and of one with many.
pub(super) const FEW: usize = 16;
pub(super) const MANY: usize = 64;
/// Spans of up to this many query rows are read once for each 16 of them.
pub(super) const MOST_FEW: usize = 32;
/// Positions of a piece of a sequence.
pub(super) const PIECE: usize = 256;
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

/// Items of attention, or how many of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Kinds<T> {
    pub(super) few: T,
    pub(super) many: T,
    pub(super) merges: T,
}

/// `Item` of `cu/attention.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Item {
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
    pub(super) const WORDS: usize = 8;
    /// Of no rows: kernels do nothing for it.
    pub(super) const NONE: Self =
        Self { row0: 0, rows: 0, pos0: 0, table0: 0, query0: 0, begin: 0, end: 0, slot: NO_SLOT };

    pub(super) fn words(&self) -> [u32; Item::WORDS] {
        [self.row0, self.rows, self.pos0, self.table0, self.query0, self.begin, self.end, self.slot]
    }
}

impl Kinds<Vec<Item>> {
    pub(super) fn counts(&self) -> Kinds<usize> {
        Kinds { few: self.few.len(), many: self.many.len(), merges: self.merges.len() }
    }

    /// All of them, one kind after the other.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Item> {
        self.few.iter().chain(&self.many).chain(&self.merges)
    }
}

impl Kinds<usize> {
    pub(super) fn sum(&self) -> usize {
        self.few + self.many + self.merges
    }
}

/// Cuts the attention of a batch into items: those with few rows, those with many, and merges. The longest come first, so
/// that the last ones to run are short.
pub(super) fn cut_items(spans: &[SeqSpan], cut: Cut) -> Kinds<Vec<Item>> {
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
    Kinds { few: cut_few, many, merges }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(row0: u32, rows: u32, pos0: u32) -> SeqSpan {
        SeqSpan { row0, rows, pos0, table0: 0, table_len: 99 }
    }

    /// How often each (row of the batch, head of the group, position) is covered by an item that is not a merge.
    fn covered(spans: &[SeqSpan], cut: Cut) -> Vec<((u32, u32, u32), usize)> {
        let items = cut_items(spans, cut);
        let mut seen = std::collections::BTreeMap::new();
        let sized = items.few.iter().map(|item| (item, FEW)).chain(items.many.iter().map(|item| (item, MANY)));
        for (item, size) in sized {
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
        let items = cut_items(&spans, Cut { group: 4, window: None });
        assert_eq!((items.many.len(), items.merges.len()), (0, 8));
        for merge in &items.merges {
            let mut parts: Vec<_> = items.few.iter().filter(|item| item.row0 == merge.row0).collect();
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
        let items = cut_items(&spans, Cut { group: 4, window: None });
        let slots = items.few.iter().map(|item| item.slot).max().unwrap();
        assert!((slots as usize) < SLOTS, "{slots}");
        assert_eq!(items.merges.len(), 64);
    }
}
