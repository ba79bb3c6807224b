//! Byte-level BPE: neighbours whose union comes first in a list of merges are joined
//! (Sennrich et al., Neural Machine Translation of Rare Words with Subword Units, <https://arxiv.org/abs/1508.07909>).
//!
//! ```text
//!   "the" ──bytes──> t h e ──first pair of the list──> th e ──> the ──> id
//! ```
//!
//! The library keeps the list and the vocabulary as strings, several times over: for 49,152 tokens that is 55 ms before the
//! first token. Here a token is a number, found by its bytes in the table of tokens, which is there anyway; the tests
//! compare with the library.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::hash::{BuildHasher, RandomState};

use super::bpe::ByteAlphabet;
use super::index::{Index, NONE};
use super::{MAX_VOCAB, TokenTable};
use crate::error::{Error, Result};

/// How words become tokens of a [`TokenTable`].
pub(super) struct Merges {
    alphabet: ByteAlphabet,
    /// Tokens that are spelt in the byte alphabet, by their bytes.
    index: Index,
    /// The token of each byte alone, [`NONE`] where there is none.
    bytes: [u32; 256],
    pairs: Pairs,
    /// A word that is a token is taken without joining.
    whole_words: bool,
}

/// A token of a word, in a list linked both ways; [`NONE`] once joined to the one before.
struct Symbol {
    id: u32,
    prev: u32,
    next: u32,
}

/// A pair that could be joined, the first of the list first, of equals the leftmost: rank, place, left token, right token,
/// union. Stale once other tokens are there.
type Join = Reverse<(u32, u32, u32, u32, u32)>;

impl Merges {
    /// From the spellings of all tokens in the order of `table`, and the lines of the list.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] for a line that does not join two tokens into a third.
    pub(super) fn new<'a>(
        table: &TokenTable,
        spellings: impl Iterator<Item = &'a str>,
        lines: impl ExactSizeIterator<Item = &'a [u8]>,
        whole_words: bool,
    ) -> Result<Self> {
        let alphabet = ByteAlphabet::new();
        let mut index = Index::with_room(table.len());
        let mut buffer = Vec::new();
        let mut indexed = Vec::with_capacity(table.len());
        for (id, spelling) in (0..).zip(spellings) {
            buffer.clear();
            // What is spelt otherwise, no text in the alphabet can become.
            let spelt = alphabet.decode(spelling, &mut buffer).is_some() && buffer == table.get(id);
            indexed.push(spelt && index.insert(table, id));
        }
        let bytes = std::array::from_fn(|byte| index.find(table, &[byte as u8]).unwrap_or(NONE));
        if lines.len() > 4 * MAX_VOCAB {
            let most = 4 * MAX_VOCAB;
            return Err(Error::Tokenizer(format!("it has {} merges, expected at most {most}", lines.len())));
        }
        let mut pairs = Pairs::with_room(lines.len());
        // Lists follow the order of the tokens that they make: mostly it is the one after the last.
        let mut expected: u32 = 0;
        for (rank, line) in (0..).zip(lines) {
            let bad = || {
                let line = String::from_utf8_lossy(line);
                Error::Tokenizer(format!("merge {line:?} does not join two tokens into a third"))
            };
            let text = std::str::from_utf8(line).map_err(|_| bad())?;
            // A half may itself begin with a space.
            let at = text.bytes().skip(1).position(|byte| byte == b' ').ok_or_else(bad)? + 1;
            buffer.clear();
            let first = alphabet.decode(&text[..at], &mut buffer);
            let half = buffer.len();
            let second = alphabet.decode(&text[at + 1..], &mut buffer);
            if first.is_none() || second.is_none() {
                // No text in the alphabet has such a half.
                continue;
            }
            let find = |bytes: &[u8]| index.find(table, bytes).ok_or_else(bad);
            let (left, right) = (find(&buffer[..half])?, find(&buffer[half..])?);
            let is_next = indexed.get(expected as usize) == Some(&true) && table.get(expected) == buffer;
            let union = if is_next { expected } else { find(&buffer)? };
            pairs.insert((left, right), (rank, union));
            expected = union + 1;
        }
        Ok(Self { alphabet, index, bytes, pairs, whole_words })
    }

    /// The token that the vocabulary spells this way.
    pub(super) fn token_id(&self, table: &TokenTable, spelling: &str) -> Option<u32> {
        let mut bytes = Vec::with_capacity(spelling.len());
        self.alphabet.decode(spelling, &mut bytes)?;
        self.index.find(table, &bytes)
    }

    /// Appends the tokens of a word that is written in the byte alphabet. Characters that are not are left out.
    pub(super) fn encode(&self, table: &TokenTable, word: &str, ids: &mut Vec<u32>) {
        let bytes: Vec<u8> = word.chars().filter_map(|c| self.alphabet.byte(c)).collect();
        if self.whole_words
            && let Some(id) = self.index.find(table, &bytes)
        {
            return ids.push(id);
        }
        let tokens = bytes.iter().map(|byte| self.bytes[*byte as usize]).filter(|id| *id != NONE);
        let symbol = |(at, id): (u32, u32)| Symbol { id, prev: at.wrapping_sub(1), next: at + 1 };
        let mut symbols: Vec<Symbol> = (0..).zip(tokens).map(symbol).collect();
        let join = |symbols: &[Symbol], left: u32, right: u32| -> Option<Join> {
            let (a, b) = (symbols.get(left as usize)?.id, symbols.get(right as usize)?.id);
            let (rank, union) = self.pairs.find((a, b))?;
            Some(Reverse((rank, left, a, b, union)))
        };
        let neighbours = (1..symbols.len() as u32).filter_map(|right| join(&symbols, right - 1, right));
        let mut queue: BinaryHeap<Join> = neighbours.collect::<Vec<_>>().into();
        while let Some(Reverse((_, left, a, b, union))) = queue.pop() {
            let right = symbols[left as usize].next;
            let current = symbols.get(right as usize).map(|right| (symbols[left as usize].id, right.id));
            if current != Some((a, b)) {
                continue;
            }
            let (before, after) = (symbols[left as usize].prev, symbols[right as usize].next);
            symbols[right as usize].id = NONE;
            symbols[left as usize].id = union;
            symbols[left as usize].next = after;
            if let Some(after) = symbols.get_mut(after as usize) {
                after.prev = left;
            }
            queue.extend(join(&symbols, before, left));
            queue.extend(join(&symbols, left, after));
        }
        ids.extend(symbols.into_iter().map(|symbol| symbol.id).filter(|id| *id != NONE));
    }
}

/// What two tokens become: open addressing, at least half empty.
struct Pairs {
    /// Left and right token, and rank and union; a left token of [`NONE`] where there is nothing.
    slots: Vec<((u32, u32), (u32, u32))>,
    /// An odd number of this process's own: the list comes with a file that is not trusted.
    factor: u64,
    /// Of the 64 bits of a product, those that are not the place.
    shift: u32,
}

impl Pairs {
    fn with_room(pairs: usize) -> Self {
        let len = (2 * pairs).next_power_of_two().max(2);
        let factor = RandomState::new().hash_one(0) | 1;
        Self { slots: vec![((NONE, NONE), (0, 0)); len], factor, shift: 64 - len.ilog2() }
    }

    /// Where a pair is or would be.
    fn slot(&self, pair: (u32, u32)) -> usize {
        let key = u64::from(pair.0) << 32 | u64::from(pair.1);
        let mut at = (key.wrapping_mul(self.factor) >> self.shift) as usize;
        while self.slots[at].0 != pair && self.slots[at].0.0 != NONE {
            at = (at + 1) & (self.slots.len() - 1);
        }
        at
    }

    /// The last one of equal pairs counts.
    fn insert(&mut self, pair: (u32, u32), to: (u32, u32)) {
        let at = self.slot(pair);
        self.slots[at] = (pair, to);
    }

    fn find(&self, pair: (u32, u32)) -> Option<(u32, u32)> {
        let (found, to) = self.slots[self.slot(pair)];
        (found.0 != NONE && found == pair).then_some(to)
    }
}

#[cfg(test)]
mod tests {
    use tokenizers::Model as _;
    use tokenizers::models::bpe::{BPE, Vocab};

    use super::*;
    use crate::testing::real_model;
    use crate::tokenizer::bpe::byte_characters;
    use crate::weights::gguf::Gguf;

    /// Words of a vocabulary of few letters: most unions exist by several ways, and ranks collide with lengths.
    fn small() -> (Vec<String>, Vec<String>) {
        let mut tokens: Vec<String> = byte_characters().map(String::from).to_vec();
        let merges = ["a b", "b a", "ab a", "b b", "a a", "aa a", "ab ab", "bb a", "aba b", "aa aa", "c a", "ca b"];
        for merge in merges {
            let union = merge.replace(' ', "");
            if !tokens.contains(&union) {
                tokens.push(union);
            }
        }
        (tokens, merges.map(str::to_owned).to_vec())
    }

    /// Compares with the library on `words`, which are written in the byte alphabet.
    fn compare(tokens: &[String], merges: &[String], words: &[String], whole_words: bool) {
        let alphabet = ByteAlphabet::new();
        let mut table = TokenTable::default();
        for token in tokens {
            let mut bytes = Vec::new();
            let known = alphabet.decode(token, &mut bytes).is_some();
            table.push(if known { bytes } else { token.clone().into_bytes() }, false).unwrap();
        }
        let lines: Vec<&[u8]> = merges.iter().map(|line| line.as_bytes()).collect();
        let spellings = tokens.iter().map(String::as_str);
        let ours = Merges::new(&table, spellings, lines.into_iter(), whole_words).unwrap();
        let mut vocab = Vocab::new();
        for (id, token) in (0..).zip(tokens) {
            vocab.entry(token.clone()).or_insert(id);
        }
        let halves = |line: &String| {
            let (left, right) = line.split_once(' ').unwrap();
            (left.to_owned(), right.to_owned())
        };
        let merges = merges.iter().map(halves).collect();
        let library = BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(whole_words).build().unwrap();
        for word in words {
            let mut got = Vec::new();
            ours.encode(&table, word, &mut got);
            let expected: Vec<u32> = library.tokenize(word).unwrap().into_iter().map(|token| token.id).collect();
            assert_eq!(got, expected, "{word:?}");
        }
        for token in tokens {
            let id = ours.token_id(&table, token);
            assert!(id.is_none_or(|id| tokens[id as usize] == *token), "{token:?} {id:?}");
        }
    }

    #[test]
    fn words_of_few_letters_join_as_in_the_library() {
        let (tokens, merges) = small();
        let words: Vec<String> = (0..4000_u32)
            .map(|seed| {
                let length = 1 + seed % 13;
                let letter =
                    |i: u32| ['a', 'b', 'a', 'c', 'b', 'x'][(seed.wrapping_mul(2_654_435_761) >> (2 * i)) as usize % 6];
                (0..length).map(letter).collect()
            })
            .chain(["ab".repeat(400), "a".repeat(1001), String::new()])
            .collect();
        for whole_words in [false, true] {
            compare(&tokens, &merges, &words, whole_words);
        }
    }

    #[test]
    fn the_real_vocabulary_joins_as_in_the_library() {
        let Some(path) = real_model() else { return };
        let gguf = Gguf::open(&path).unwrap();
        let texts = |key: &str| -> Vec<String> {
            let texts = gguf.texts(key).unwrap().unwrap();
            texts.map(|text| String::from_utf8(text.to_vec()).unwrap()).collect()
        };
        let (tokens, merges) = (texts("tokenizer.ggml.tokens"), texts("tokenizer.ggml.merges"));
        let prose = include_str!("../../../benches/data/alice.txt");
        let bytes = byte_characters();
        let mut words: Vec<String> = prose
            .split_inclusive(char::is_whitespace)
            .chain(["naïve café — 日本語", "\u{0}\u{7f}", "🦀e\u{301}", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"])
            .map(|word| word.bytes().map(|byte| bytes[byte as usize]).collect())
            .collect();
        // Neighbours in the vocabulary, as one word: they fall into tokens of every length.
        words.extend(tokens[256..].chunks_exact(7).map(|run| run[..2].concat()));
        assert!(words.len() > 7000);
        compare(&tokens, &merges, &words, false);
    }

    #[test]
    fn too_many_or_senseless_merges_are_refused() {
        let (tokens, _) = small();
        let mut table = TokenTable::default();
        tokens.iter().for_each(|token| table.push(token.bytes(), false).unwrap());
        let refused = |line: &'static [u8]| {
            Merges::new(&table, tokens.iter().map(String::as_str), [line].into_iter(), false).map(drop).unwrap_err()
        };
        for line in [&b"a"[..], b"x y", b"", b" ", b"\xff \xff"] {
            assert!(refused(line).to_string().contains("does not join two tokens into a third"));
        }
    }

    #[test]
    fn pairs_are_found_among_many() {
        let mut pairs = Pairs::with_room(1000);
        for i in 0..1000u32 {
            pairs.insert((i * 7919 % 1000, i), (i, i + 1));
        }
        for i in 0..1000u32 {
            assert_eq!(pairs.find((i * 7919 % 1000, i)), Some((i, i + 1)));
            assert_eq!(pairs.find((i, 1000 + i)), None);
        }
        pairs.insert((0, 0), (5, 6));
        assert_eq!(pairs.find((0, 0)), Some((5, 6)), "the last of equal pairs");
        assert_eq!(Pairs::with_room(0).find((1, 2)), None);
        assert_eq!(pairs.find((NONE, NONE)), None);
    }
}
