//! SentencePiece BPE: merges recovered from scores, and tokens that stand for single bytes.

use tokenizers::models::bpe::{Merges, Vocab};

/// The character that stands for a space in SentencePiece vocabularies.
pub(super) const SPACE: char = '\u{2581}';

/// Merges that rebuild `pieces` (text and score) within `vocab`, the most likely first.
///
/// SentencePiece keeps no merge list: it joins the neighbours whose union has the highest score. A list that orders all
/// ways to split each piece by the piece's score, longer left halves first among equals, does the same; it is the order
/// in which Hugging Face converts such files.
pub(super) fn merges(pieces: &[(&str, f64)], vocab: &Vocab) -> Merges {
    let mut found: Vec<(f64, &str, &str)> = Vec::with_capacity(2 * pieces.len());
    let mut local: Vec<(u32, u32, &str, &str)> = Vec::new();
    for &(piece, score) in pieces {
        local.clear();
        for (at, _) in piece.char_indices().skip(1) {
            let (left, right) = piece.split_at(at);
            if let (Some(&l), Some(&r)) = (vocab.get(left), vocab.get(right)) {
                local.push((l, r, left, right));
            }
        }
        local.sort_unstable_by_key(|&(l, r, ..)| (l, r));
        found.extend(local.iter().map(|&(.., left, right)| (score, left, right)));
    }
    let key = |&(score, left, right): &(f64, &str, &str)| (score, left.chars().count(), right.chars().count());
    found.sort_by(|a, b| {
        let ((a_score, a_left, a_right), (b_score, b_left, b_right)) = (key(a), key(b));
        b_score.total_cmp(&a_score).then(b_left.cmp(&a_left)).then(b_right.cmp(&a_right))
    });
    found.into_iter().map(|(_, left, right)| (left.to_owned(), right.to_owned())).collect()
}

/// The byte of a token like `<0x0A>`.
pub(super) fn byte_token(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// Bytes of an ordinary piece: its text with spaces put back.
pub(super) fn piece_bytes(text: &str) -> Vec<u8> {
    text.replace(SPACE, " ").into_bytes()
}
