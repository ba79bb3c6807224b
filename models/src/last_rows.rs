//! The rows that the last layer has to finish: only those whose logits are wanted.

use cupola_kernels::SeqSpan;

use crate::Batch;

/// What the last layer still has to compute once its keys and values are stored: the rows whose logits are wanted, moved
/// together.
///
/// ```text
///   rows      0 1 2 3 4 5 6 7 8      of the batch
///   outputs           3       7 8    -->   0 1 2
///   spans     [a      ][b        ]   -->  [a][b ]   with the positions and tables that the rows had
/// ```
#[derive(Default)]
pub(crate) struct LastRows {
    /// Their indices among the rows kept: `0..n`.
    pub(crate) outputs: Vec<u32>,
    /// Where they lie in their sequences.
    pub(crate) spans: Vec<SeqSpan>,
}

impl LastRows {
    /// Room for this many rows.
    pub(crate) fn with_capacity(rows: usize) -> Self {
        Self { outputs: Vec::with_capacity(rows), spans: Vec::with_capacity(rows) }
    }

    /// Finds the rows of a batch.
    ///
    /// # Panics
    /// When an output row lies in no span.
    pub(crate) fn set(&mut self, batch: &Batch) {
        self.spans.clear();
        let mut spans = batch.spans.iter();
        let mut source = None;
        let mut before = None;
        for (to, &row) in (0..).zip(&batch.outputs) {
            while source.is_none_or(|span: &SeqSpan| row >= span.row0 + span.rows) {
                source = Some(spans.next().expect("every output row lies in a span"));
                before = None;
            }
            let source = source.expect("the loop above ends with a span");
            match self.spans.last_mut() {
                Some(span) if before.is_some_and(|before| before + 1 == row) => span.rows += 1,
                _ => self.spans.push(SeqSpan { row0: to, rows: 1, pos0: source.pos0 + row - source.row0, ..*source }),
            }
            before = Some(row);
        }
        self.outputs.clear();
        self.outputs.extend(0..batch.outputs.len() as u32);
    }
}

#[cfg(test)]
mod tests {
    use cupola_kernels::BlockId;

    use super::*;

    #[test]
    fn rows_keep_their_positions_and_tables() {
        let mut batch = Batch::default();
        batch.push(&[1, 2, 3, 4, 5], 40, &[BlockId(7), BlockId(8)]);
        batch.push(&[6], 0, &[BlockId(1)]);
        batch.push(&[7, 8, 9], 10, &[BlockId(2)]);
        batch.outputs = vec![1, 3, 4, 6, 8];
        let mut last = LastRows::default();
        last.set(&batch);
        let found: Vec<_> = last.spans.iter().map(|s| (s.row0, s.rows, s.pos0, s.table0, s.table_len)).collect();
        assert_eq!(found, [(0, 1, 41, 0, 2), (1, 2, 43, 0, 2), (3, 1, 10, 3, 1), (4, 1, 12, 3, 1)]);
        assert_eq!(last.outputs, [0, 1, 2, 3, 4]);

        batch.outputs = (0..9).collect();
        last.set(&batch);
        assert_eq!(last.spans, batch.spans);
        batch.outputs.clear();
        last.set(&batch);
        assert!(last.spans.is_empty() && last.outputs.is_empty());
    }
}
