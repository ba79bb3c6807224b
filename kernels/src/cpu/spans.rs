//! Checks on the sequences of a batch, and where a position of one lies in the paged pool.

use crate::kv::{BLOCK_SIZE, BlockId, KvLayout, SeqSpan};
use crate::{Error, HeadShape, Result};

/// The sequences of a batch, checked: rows ascend and do not overlap, every position has a block, and every block lies
/// in the pool.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spans<'a> {
    pub(crate) spans: &'a [SeqSpan],
    table: &'a [BlockId],
}

impl<'a> Spans<'a> {
    /// Checks the spans of `op` for a batch of at most `rows` rows and a pool of `blocks` blocks.
    ///
    /// # Errors
    /// [`Error::Shape`] with the first thing that does not fit.
    pub(crate) fn check(
        op: &'static str,
        spans: &'a [SeqSpan],
        table: &'a [BlockId],
        blocks: usize,
        rows: usize,
    ) -> Result<Self> {
        let refuse = |expected: String, got: String| Err(Error::Shape { op, expected, got });
        let mut next_row = 0;
        for span in spans {
            let (row0, count) = (span.row0 as usize, span.rows as usize);
            if count == 0 || row0 < next_row || row0 + count > rows {
                return refuse(format!("rows from {next_row} up to {rows}"), format!("{span:?}"));
            }
            next_row = row0 + count;
            let Some(table) = table.get(span.table0 as usize..).and_then(|t| t.get(..span.table_len as usize)) else {
                return refuse(format!("a table within {} entries", table.len()), format!("{span:?}"));
            };
            if table.len() * BLOCK_SIZE < span.pos0 as usize + count {
                return refuse(format!("a block for each of {} positions", span.pos0 + span.rows), format!("{span:?}"));
            }
            if let Some(outside) = table.iter().find(|block| block.0 as usize >= blocks) {
                return refuse(format!("block ids below {blocks}"), format!("{outside:?}"));
            }
        }
        Ok(Self { spans, table })
    }

    /// The blocks of a span, in order of their positions.
    #[inline(always)]
    pub(crate) fn table(&self, span: &SeqSpan) -> &'a [BlockId] {
        &self.table[span.table0 as usize..][..span.table_len as usize]
    }
}

/// Checks a projected row's shape against the pool and the kernels.
///
/// # Errors
/// [`Error::Shape`]
pub(crate) fn check_heads(op: &'static str, shape: HeadShape, layout: KvLayout) -> Result<()> {
    let refuse = |expected: String, got: String| Err(Error::Shape { op, expected, got });
    let HeadShape { heads, kv_heads, head_dim } = shape;
    if head_dim == 0 || !head_dim.is_multiple_of(16) {
        return refuse("a head dimension that is a multiple of 16".into(), head_dim.to_string());
    }
    if kv_heads == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) {
        return refuse(
            "query heads that are a multiple of the key/value heads".into(),
            format!("{heads} and {kv_heads}"),
        );
    }
    if (layout.kv_heads, layout.head_dim) != (kv_heads, head_dim) {
        return refuse(format!("a pool of {kv_heads} heads of {head_dim}"), format!("{layout:?}"));
    }
    Ok(())
}
