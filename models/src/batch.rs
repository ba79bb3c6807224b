//! The one input of a forward pass: rows of several sequences, prefill and decode mixed.

use cupola_kernels::{BlockId, SeqSpan, Turn};

/// Rows of one step.
///
/// ```text
///   tokens      [ seq a: 1 row | seq b: 5 rows          | seq c: 1 row ]
///   spans       [ a            | b                      | c            ]   positions follow from pos0
///   outputs     [ 0            |                      5 | 6            ]   rows whose logits are wanted
/// ```
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Token ids, one a row; of carried rows, any.
    pub tokens: Vec<u32>,
    /// For the first rows, on a device that chooses tokens by itself: which output rows of the batch of the other turn have
    /// chosen their tokens.
    pub carried: Vec<u32>,
    /// Where the tokens go that this batch chooses; those of the batch before stay in the other place.
    pub turn: Turn,
    /// The sequences, in row order, without gaps.
    pub spans: Vec<SeqSpan>,
    /// Block tables of all spans, one after the other.
    pub block_table: Vec<BlockId>,
    /// Rows whose logits are wanted, ascending.
    pub outputs: Vec<u32>,
    /// True when only the most likely token of each output row is wanted: logits are then not kept.
    pub greedy: bool,
}

impl Batch {
    /// Empties the batch and keeps its memory and its turn.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.carried.clear();
        self.spans.clear();
        self.block_table.clear();
        self.outputs.clear();
        self.greedy = false;
    }

    /// Appends consecutive tokens of one sequence, the first at position `pos0`; `blocks` covers every position up to
    /// the last one appended. Returns the index of the first row.
    pub fn push(&mut self, tokens: &[u32], pos0: usize, blocks: &[BlockId]) -> u32 {
        let row0 = u32::try_from(self.tokens.len()).expect("a batch has fewer than 2^32 rows");
        let span = SeqSpan {
            row0,
            rows: u32::try_from(tokens.len()).expect("a span has fewer than 2^32 rows"),
            pos0: u32::try_from(pos0).expect("positions are below 2^32"),
            table0: u32::try_from(self.block_table.len()).expect("a block table has fewer than 2^32 entries"),
            table_len: u32::try_from(blocks.len()).expect("a block table has fewer than 2^32 entries"),
        };
        self.tokens.extend_from_slice(tokens);
        self.spans.push(span);
        self.block_table.extend_from_slice(blocks);
        row0
    }

    /// Appends one row whose token is what an output row of the batch of the other turn has chosen. Returns its index.
    ///
    /// # Panics
    /// Behind rows whose tokens are known.
    pub fn push_carried(&mut self, output: u32, position: usize, blocks: &[BlockId]) -> u32 {
        assert_eq!(self.carried.len(), self.tokens.len(), "carried rows come first");
        self.carried.push(output);
        self.push(&[0], position, blocks)
    }
}
