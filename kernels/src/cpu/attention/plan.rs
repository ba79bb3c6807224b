//! Which rows are computed together, and which stretches apart: the work items of one attention op.

use super::{MAX_ROWS, STRETCH, TILE};
use crate::kv::SeqSpan;

/// Rows that share their keys and values: some query heads of one kv head, for consecutive tokens of one sequence.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    pub(super) span: usize,
    pub(super) kv_head: usize,
    /// First query head, counted over all of them.
    pub(super) head0: usize,
    pub(super) heads: usize,
    /// First token within the span.
    pub(super) token0: usize,
    pub(super) tokens: usize,
    /// Position of the first token.
    pub(super) first_position: usize,
}

impl Rows {
    pub(super) fn len(&self) -> usize {
        self.heads * self.tokens
    }
}

/// One piece of work: some positions for some rows.
///
/// ```text
///   positions   0 ....... start ................ end ....   of the sequence
///   stretches   |  512  |  512  |  512  |  512  |
/// ```
#[derive(Clone, Copy, Debug)]
pub(super) struct Item {
    pub(super) rows: Rows,
    /// First position, a multiple of [`TILE`].
    pub(super) start: usize,
    /// Position after the last.
    pub(super) end: usize,
    /// Where the partial results of the rows go when the item is one stretch of several.
    pub(super) slot: Option<usize>,
}

impl Item {
    fn cost(&self) -> usize {
        // The second term stands for reading keys and values, which the rows share.
        (self.end - self.start) * (self.rows.len() + 2)
    }
}

/// Partial results to be folded: for each row, `stretches` slots at a distance of `rows.len()`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fold {
    pub(super) rows: Rows,
    pub(super) slot0: usize,
    pub(super) stretches: usize,
}

/// Work items of one op; the memory is kept between ops.
pub(super) struct Plan {
    items: Vec<Item>,
    folds: Vec<Fold>,
    slots: usize,
    cost: usize,
}

impl Plan {
    /// A plan that may use `slots` slots for partial results.
    pub(super) fn new(slots: usize) -> Self {
        Self { items: Vec::with_capacity(4096), folds: Vec::with_capacity(512), slots, cost: 0 }
    }

    /// Items, the costliest first.
    pub(super) fn items(&self) -> &[Item] {
        &self.items
    }

    /// What to fold after all items are done.
    pub(super) fn folds(&self) -> &[Fold] {
        &self.folds
    }

    /// Sum of positions times rows over all items, roughly.
    pub(super) fn cost(&self) -> usize {
        self.cost
    }

    /// Plans for spans with `group` query heads to each of `kv_heads`.
    pub(super) fn make(
        &mut self,
        spans: &[SeqSpan],
        (group, kv_heads): (usize, usize),
        window: Option<usize>,
        threads: usize,
    ) {
        self.items.clear();
        self.folds.clear();
        let heads = group.min(MAX_ROWS);
        let tokens = MAX_ROWS / heads;
        for (index, span) in spans.iter().enumerate() {
            let (pos0, rows) = (span.pos0 as usize, span.rows as usize);
            for token0 in (0..rows).step_by(tokens) {
                let tokens = tokens.min(rows - token0);
                let first = pos0 + token0;
                let start = window.map_or(0, |window| (first + 1).saturating_sub(window) / TILE * TILE);
                for kv_head in 0..kv_heads {
                    for head0 in (0..group).step_by(heads) {
                        let rows = Rows {
                            span: index,
                            kv_head,
                            head0: kv_head * group + head0,
                            heads: heads.min(group - head0),
                            token0,
                            tokens,
                            first_position: first,
                        };
                        self.items.push(Item { rows, start, end: first + tokens, slot: None });
                    }
                }
            }
        }
        self.cost = self.items.iter().map(Item::cost).sum();
        if threads > 1 {
            self.split(self.cost / (4 * threads));
        }
        self.items.sort_unstable_by_key(|item| std::cmp::Reverse(item.cost()));
    }

    /// Splits items that are costlier than `limit` into their stretches, while there are slots. Whether an item is split
    /// changes who computes it, not what comes out.
    fn split(&mut self, limit: usize) {
        let mut free = 0;
        for index in 0..self.items.len() {
            let whole = self.items[index];
            let (first, last) = (whole.start / STRETCH, (whole.end - 1) / STRETCH);
            let stretches = last - first + 1;
            if stretches == 1 || whole.cost() <= limit || free + stretches * whole.rows.len() > self.slots {
                continue;
            }
            self.folds.push(Fold { rows: whole.rows, slot0: free, stretches });
            for stretch in first..=last {
                let start = whole.start.max(stretch * STRETCH);
                let end = whole.end.min((stretch + 1) * STRETCH);
                let item = Item { rows: whole.rows, start, end, slot: Some(free) };
                free += whole.rows.len();
                if stretch == first {
                    self.items[index] = item;
                } else {
                    self.items.push(item);
                }
            }
        }
    }
}
