//! Text tables whose columns line up.

use std::io::Write;

/// Which edge of its column a cell keeps to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Align {
    Left,
    Right,
}

/// Writes a heading and rows, two spaces between columns.
pub(crate) fn write<const N: usize>(
    out: &mut dyn Write,
    heading: [(&str, Align); N],
    rows: &[[String; N]],
) -> std::io::Result<()> {
    let widths: [usize; N] = std::array::from_fn(|column| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([heading[column].0.chars().count()]).max().unwrap_or(0)
    });
    let mut line = |cells: [&str; N]| {
        let padded: Vec<String> = (0..N)
            .map(|column| match heading[column].1 {
                Align::Left => format!("{:<width$}", cells[column], width = widths[column]),
                Align::Right => format!("{:>width$}", cells[column], width = widths[column]),
            })
            .collect();
        writeln!(out, "{}", padded.join("  ").trim_end())
    };
    line(heading.map(|(name, _)| name))?;
    rows.iter().try_for_each(|row| line(std::array::from_fn(|column| row[column].as_str())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut out = Vec::new();
        let rows = [["a".to_owned(), "1".to_owned()], ["größer".to_owned(), "1000".to_owned()]];
        write(&mut out, [("name", Align::Left), ("n", Align::Right)], &rows).expect("a vector takes everything");
        assert_eq!(String::from_utf8(out).expect("UTF-8"), "name       n\na          1\ngrößer  1000\n");
    }
}
