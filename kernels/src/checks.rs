//! Checks of arguments that every backend makes alike, with the same words when it refuses.

use crate::{Error, PartOrder, Result, WeightPart};

/// The handle of the item that is about to be pushed.
pub(crate) fn next_id<T>(items: &[T]) -> u32 {
    u32::try_from(items.len()).expect("fewer than 2^32 arenas")
}

/// That a matrix was packed for the op that reads it.
///
/// # Errors
/// [`Error::Shape`]
pub(crate) fn check_order(op: &'static str, packed: PartOrder, wanted: PartOrder) -> Result<()> {
    if packed == wanted {
        return Ok(());
    }
    Err(Error::Shape { op, expected: format!("a matrix packed as {wanted:?}"), got: format!("{packed:?}") })
}

/// That a row has as many columns as its reader expects.
///
/// # Errors
/// [`Error::Shape`]
pub(crate) fn check_cols(op: &'static str, expected: usize, got: usize) -> Result<()> {
    if expected == got {
        return Ok(());
    }
    Err(Error::Shape { op, expected: format!("{expected} columns"), got: got.to_string() })
}

/// That the parts of a matrix are of one width and as long as they say; returns that width.
///
/// # Errors
/// As [`crate::Backend::load_linear`].
pub(crate) fn check_parts(parts: &[WeightPart<'_>]) -> Result<usize> {
    let refuse = |expected: String, got: String| Err(Error::Shape { op: "load_linear", expected, got });
    let Some(cols) = parts.first().map(|part| part.cols) else {
        return refuse("at least one part".into(), "none".into());
    };
    for part in parts {
        let unsupported = |why| Error::UnsupportedWeight { ty: part.ty.name(), rows: part.rows, cols: part.cols, why };
        if part.rows == 0 || part.cols == 0 {
            return Err(unsupported("it is empty"));
        }
        if part.cols != cols {
            return refuse(format!("{cols} columns, as in the first part"), part.cols.to_string());
        }
        let row_bytes = part.ty.row_bytes(cols).ok_or_else(|| unsupported("its rows are not whole blocks"))?;
        if row_bytes.checked_mul(part.rows) != Some(part.data.len()) {
            return refuse(
                format!("{} rows of {row_bytes} bytes of {}", part.rows, part.ty.name()),
                format!("{} bytes", part.data.len()),
            );
        }
    }
    Ok(cols)
}
