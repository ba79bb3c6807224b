//! SentencePiece BPE: neighbours whose union has the highest score are joined, what has no piece becomes bytes
//! (Kudo and Richardson, SentencePiece, <https://arxiv.org/abs/1808.06226>).
//!
//! ```text
//!   "the cat"  ──characters──> t h e ␣ c a t  ──best union first──> the ␣ cat ──> the ␣cat  ──> ids
//! ```
//!
//! Such a vocabulary has scores and no merge list. The library can work with a list that is recovered from the scores,
//! but for 262,144 pieces that is half a million pairs of strings: a second and 100 MiB before the first token. Here a
//! union is looked up by its bytes in the table of tokens, which is there anyway; the tests compare with the library.

use std::borrow::Cow;
use std::collections::BinaryHeap;

use super::TokenTable;
use super::index::{Index, NONE};
use crate::error::{Error, Result};

#[cfg(test)]
mod tests;

/// The character that stands for a space in SentencePiece vocabularies.
const SPACE: char = '\u{2581}';

/// How text becomes tokens of a [`TokenTable`].
pub(super) struct Pieces {
    /// Pieces that text may become, by their bytes.
    index: Index,
    /// Score of each token; NaN for those that no two neighbours may join to.
    scores: Vec<f32>,
    /// The token of each byte, [`NONE`] where there is none.
    bytes: [u32; 256],
    unknown: Option<u32>,
    /// Text begins with a space of its own.
    leading_space: bool,
}

/// What a token is to [`Pieces`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Role {
    /// Text becomes it by joining, the highest score first.
    Piece(f32),
    /// Text becomes it only where it is a single character.
    Character,
    Byte(u8),
    /// What a character becomes that nothing else stands for.
    Unknown,
    /// Found by other means or not at all.
    Other,
}

/// A run of the text, in a list linked both ways.
struct Symbol {
    start: u32,
    /// Bytes; 0 once joined to the one before.
    len: u32,
    prev: u32,
    next: u32,
}

/// Two neighbours that could be joined. Stale as soon as their sizes no longer add up to `size`.
struct Union {
    score: f32,
    left: u32,
    right: u32,
    size: u32,
}

impl Ord for Union {
    /// The best comes last, of equals the leftmost, as a heap wants it.
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Union {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Union {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Union {}

impl Pieces {
    /// `roles` has one entry a token of `table`.
    pub(super) fn new(table: &TokenTable, roles: impl IntoIterator<Item = Role>, leading_space: bool) -> Self {
        let mut pieces = Self {
            index: Index::with_room(table.len()),
            scores: Vec::with_capacity(table.len()),
            bytes: [NONE; 256],
            unknown: None,
            leading_space,
        };
        for (id, role) in (0..).zip(roles) {
            let mut own_score = f32::NAN;
            match role {
                Role::Piece(score) => {
                    // Minus zero and zero are equal scores.
                    own_score = score + 0.0;
                    _ = pieces.index.insert(table, id);
                }
                Role::Character => _ = pieces.index.insert(table, id),
                Role::Byte(byte) => pieces.bytes[byte as usize] = id,
                Role::Unknown => pieces.unknown = pieces.unknown.or(Some(id)),
                Role::Other => {}
            }
            pieces.scores.push(own_score);
        }
        pieces
    }

    /// The token that the vocabulary spells this way.
    pub(super) fn token_id(&self, table: &TokenTable, spelling: &str) -> Option<u32> {
        match byte_token(spelling) {
            Some(byte) => Some(self.bytes[byte as usize]).filter(|id| *id != NONE),
            None => self.index.find(table, &piece_bytes(spelling)),
        }
    }

    /// Appends the tokens of a text in which nothing is special.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] for a character that the vocabulary cannot express.
    pub(super) fn encode(&self, table: &TokenTable, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        // A literal U+2581 means a space too.
        let text: Cow<'_, str> = match (self.leading_space, text.contains(SPACE)) {
            (false, false) => text.into(),
            (true, _) => format!(" {}", text.replace(SPACE, " ")).into(),
            (false, true) => text.replace(SPACE, " ").into(),
        };
        if u32::try_from(text.len()).is_err() {
            return Err(Error::Tokenizer(format!("a text has {} bytes, expected less than 4 GiB", text.len())));
        }
        let mut last_unknown = false;
        for symbol in self.join(table, text.as_bytes()) {
            let part = &text[symbol.start as usize..(symbol.start + symbol.len) as usize];
            let mut unknown = false;
            if let Some(id) = self.index.find(table, part.as_bytes()) {
                ids.push(id);
            } else if part.bytes().all(|byte| self.bytes[byte as usize] != NONE) {
                ids.extend(part.bytes().map(|byte| self.bytes[byte as usize]));
            } else if let Some(id) = self.unknown {
                // A run of them is one.
                if !last_unknown {
                    ids.push(id);
                }
                unknown = true;
            } else {
                return Err(Error::Tokenizer(format!("the vocabulary has nothing for {part:?}")));
            }
            last_unknown = unknown;
        }
        Ok(())
    }

    /// Cuts a text into characters and joins them until no union of neighbours is a piece.
    fn join(&self, table: &TokenTable, text: &[u8]) -> impl Iterator<Item = Symbol> {
        let mut symbols = characters(text);
        let union = |symbols: &[Symbol], left: u32, right: u32| {
            let (a, b) = (symbols.get(left as usize)?, symbols.get(right as usize)?);
            let size = a.len + b.len;
            let id = self.index.find(table, &text[a.start as usize..(a.start + size) as usize])?;
            let score = self.scores[id as usize];
            (!score.is_nan()).then_some(Union { score, left, right, size })
        };
        let neighbours = (1..symbols.len() as u32).filter_map(|right| union(&symbols, right - 1, right));
        let mut queue: BinaryHeap<Union> = neighbours.collect::<Vec<_>>().into();
        while let Some(Union { left, right, size, .. }) = queue.pop() {
            let (a, b) = (&symbols[left as usize], &symbols[right as usize]);
            if a.len == 0 || b.len == 0 || a.len + b.len != size {
                continue;
            }
            let (before, after) = (a.prev, b.next);
            symbols[right as usize].len = 0;
            symbols[left as usize].len = size;
            symbols[left as usize].next = after;
            if let Some(after) = symbols.get_mut(after as usize) {
                after.prev = left;
            }
            queue.extend(union(&symbols, before, left));
            queue.extend(union(&symbols, left, after));
        }
        symbols.into_iter().filter(|symbol| symbol.len > 0)
    }
}

/// The characters of a UTF-8 text, linked.
fn characters(text: &[u8]) -> Vec<Symbol> {
    let mut symbols: Vec<Symbol> = Vec::with_capacity(text.len());
    for (at, byte) in (0..).zip(text) {
        match symbols.last_mut() {
            Some(last) if byte & 0xC0 == 0x80 => last.len += 1,
            _ => {
                let here = symbols.len() as u32;
                symbols.push(Symbol { start: at, len: 1, prev: here.wrapping_sub(1), next: here + 1 });
            }
        }
    }
    symbols
}

/// The byte of a token like `<0x0A>`.
pub(super) fn byte_token(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// Bytes of an ordinary piece: its text with spaces put back.
pub(super) fn piece_bytes(text: &str) -> Cow<'_, [u8]> {
    if text.contains(SPACE) { text.replace(SPACE, " ").into_bytes().into() } else { text.as_bytes().into() }
}
