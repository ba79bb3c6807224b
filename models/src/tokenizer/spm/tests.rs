//! Tests of SentencePiece joining: against the rule spelt out, the `tokenizers` crate, and ids that llama.cpp gives.

use tokenizers::Model as _;
use tokenizers::models::bpe::{BPE, Merges, Vocab};

use super::{Pieces, Role, SPACE, byte_token, piece_bytes};
use crate::Model;
use crate::testing::real_gemma;
use crate::tokenizer::{TokenTable, Tokenizer};
use crate::weights::gguf::Gguf;

/// A vocabulary by spelling and score.
struct World {
    spellings: Vec<(String, f32)>,
    table: TokenTable,
    pieces: Pieces,
}

impl World {
    fn new(spellings: Vec<(String, f32)>, leading_space: bool) -> Self {
        let mut table = TokenTable::default();
        let roles: Vec<Role> = spellings
            .iter()
            .map(|(text, score)| match byte_token(text) {
                Some(byte) => {
                    table.push([byte], false).unwrap();
                    Role::Byte(byte)
                }
                None => {
                    table.push(piece_bytes(text).iter().copied(), false).unwrap();
                    if text == "<unk>" { Role::Unknown } else { Role::Piece(*score) }
                }
            })
            .collect();
        let pieces = Pieces::new(&table, roles, leading_space);
        Self { spellings, table, pieces }
    }

    fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        self.pieces.encode(&self.table, text, &mut ids).unwrap();
        ids
    }

    fn find(&self, spelling: &str) -> Option<u32> {
        self.spellings.iter().position(|(known, _)| known == spelling).map(|id| id as u32)
    }

    /// The rule itself: as long as two neighbours make a piece, join those that make the best one, the first of equals.
    fn encode_by_the_rule(&self, text: &str) -> Vec<u32> {
        let mut parts: Vec<String> = text.replace(' ', "\u{2581}").chars().map(String::from).collect();
        loop {
            let unions = parts.windows(2).enumerate().filter_map(|(at, pair)| Some((at, self.find(&pair.concat())?)));
            let score = |id: u32| self.spellings[id as usize].1;
            let Some((at, _)) = unions.reduce(|best, next| if score(next.1) > score(best.1) { next } else { best })
            else {
                break;
            };
            let right = parts.remove(at + 1);
            parts[at].push_str(&right);
        }
        let bytes = |part: &str| {
            let byte = |byte| self.find(&format!("<0x{byte:02X}>")).unwrap();
            part.bytes().map(byte).collect::<Vec<_>>()
        };
        parts.iter().flat_map(|part| self.find(part).map_or_else(|| bytes(part), |id| vec![id])).collect()
    }
}

/// Numbers below `n`, the same for every run.
fn numbers(mut state: u64) -> impl FnMut(usize) -> usize {
    move |n| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    }
}

#[test]
fn joins_as_the_rule_says() {
    for seed in 0..200 {
        let mut below = numbers(seed);
        let mut spellings: Vec<(String, f32)> = (0..=255).map(|byte| (format!("<0x{byte:02X}>"), 0.0)).collect();
        spellings.extend(["a", "b", "c", "é", "\u{2581}"].map(|text| (text.to_owned(), -1e3)));
        for _ in 0..2 + below(30) {
            let part = |at: usize| spellings[256 + at].0.clone();
            let count = spellings.len() - 256;
            let union = part(below(count)) + &part(below(count));
            // Few distinct scores, so that many unions are equally good.
            if union.chars().count() < 9 && !spellings.iter().any(|(known, _)| *known == union) {
                spellings.push((union, -(below(6) as f32)));
            }
        }
        let world = World::new(spellings, false);
        for _ in 0..20 {
            let letters = ["a", "b", "c", "é", " ", "a", "aa", "日"];
            let text: String = (0..below(40)).map(|_| letters[below(letters.len())]).collect();
            assert_eq!(world.encode(&text), world.encode_by_the_rule(&text), "seed {seed}: {text:?}");
        }
    }
}

#[test]
fn what_has_no_piece_becomes_bytes_or_unknown_or_an_error() {
    let spell = |texts: &[&str]| texts.iter().map(|text| ((*text).to_owned(), -1.0)).collect::<Vec<_>>();
    // Without all bytes of a character the unknown token stands for it, once for a run.
    let world = World::new(spell(&["<unk>", "a", "<0x62>", "\u{2581}"]), false);
    assert_eq!(world.encode("ab日本a日 日"), [1, 2, 0, 1, 0, 3, 0]);
    let world = World::new(spell(&["a"]), false);
    let refused = world.pieces.encode(&world.table, "a日", &mut Vec::new()).unwrap_err().to_string();
    assert!(refused.contains("has nothing for \"日\""), "{refused}");
    // A space of its own before the text, and a literal stand-in that means one.
    let world = World::new(spell(&["a", "\u{2581}", "\u{2581}a"]), true);
    assert_eq!((world.encode(""), world.encode("aa"), world.encode("\u{2581}a")), (vec![], vec![2, 0], vec![1, 2]));
    assert_eq!(world.pieces.token_id(&world.table, "\u{2581}a"), Some(2));
    assert_eq!(world.pieces.token_id(&world.table, "<0x41>"), None);
}

#[test]
fn equal_spellings_and_minus_zero_do_no_harm() {
    let spellings = [("a", 0.0), ("a", 5.0), ("b", 0.0), ("c", 0.0), ("ab", -0.0), ("bc", 0.0)];
    let world = World::new(spellings.map(|(text, score)| (text.to_owned(), score)).into(), false);
    // Equal scores join from the left; of equal spellings the first counts.
    assert_eq!((world.encode("abc"), world.encode("a")), (vec![4, 3], vec![0]));
}

/// Merges that rebuild a vocabulary in the library: all ways to split each piece, by the piece's score. It is the order
/// in which Hugging Face converts such files.
fn merges(pieces: &[(&str, f64)], vocab: &Vocab) -> Merges {
    let mut found: Vec<(f64, usize, &str, &str)> = Vec::new();
    for &(piece, score) in pieces {
        for (at, _) in piece.char_indices().skip(1) {
            let (left, right) = piece.split_at(at);
            if vocab.contains_key(left) && vocab.contains_key(right) {
                found.push((score, left.chars().count(), left, right));
            }
        }
    }
    found.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)));
    found.into_iter().map(|(_, _, left, right)| (left.to_owned(), right.to_owned())).collect()
}

/// The library's BPE over the normal pieces of a file.
fn library(gguf: &Gguf) -> BPE {
    let texts = gguf.texts("tokenizer.ggml.tokens").unwrap().unwrap();
    let texts: Vec<&str> = texts.map(|text| std::str::from_utf8(text).unwrap()).collect();
    let kinds = gguf.numbers("tokenizer.ggml.token_type").unwrap().unwrap();
    let scores = gguf.numbers("tokenizer.ggml.scores").unwrap().unwrap();
    let vocab: Vocab = texts.iter().map(|text| (*text).to_owned()).zip(0..).collect();
    let normal = texts.iter().zip(kinds).zip(scores).filter(|((_, kind), _)| *kind == 1.0);
    let pieces: Vec<(&str, f64)> = normal.map(|((text, _), score)| (*text, score)).collect();
    let merges = merges(&pieces, &vocab);
    BPE::builder().vocab_and_merges(vocab, merges).byte_fallback(true).build().unwrap()
}

const PLAIN: [&str; 9] = [
    "The lighthouse stood at the end of the long stone pier, and every evening its keeper climbed the steps.",
    "fn main() { println!(\"{:?}\", (0..10).map(|x| x * x).collect::<Vec<_>>()); }",
    "Größe, naïve façade, coöperation; À bientôt! ¿Qué tal? Ĝis revido. Þórr",
    "日本語のテキストと、中文文本，以及한국어 문장이 함께 있습니다。",
    "Привет, мир! مرحبا بالعالم हिन्दी में लिखा हुआ ไทยไม่มีช่องว่าง",
    "👩\u{200d}👩\u{200d}👧\u{200d}👦 🇫🇷 🦀🗼 e\u{301} a\u{300}\u{301}\u{302} \u{10ffff}\u{e000}",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis 3.14159 0123456789",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaabababababababababababababab",
    "\u{2581}literal\u{2581}block \u{0} \u{1} \u{7f} \u{a0} \u{3000} \u{200b}",
];

#[test]
fn the_real_gemma_agrees_with_the_library() {
    let Some(path) = real_gemma() else { return };
    let gguf = Gguf::open(&path).unwrap();
    let bpe = library(&gguf);
    let tokenizer = Model::open(&path).unwrap().tokenizer;
    for text in PLAIN {
        let expected = bpe.tokenize(&text.replace(' ', &SPACE.to_string())).unwrap();
        let expected: Vec<u32> = expected.into_iter().map(|token| token.id).collect();
        assert_eq!(tokenizer.encode_plain(text).unwrap(), expected, "{text:?}");
    }
}

type Known = (&'static str, &'static [u32]);

/// Texts in which special tokens count.
#[rustfmt::skip]
const KNOWN: &[Known] = &[
    ("Hello world", &[9259, 1902]),
    ("The capital of France is", &[818, 5279, 529, 7001, 563]),
    (" leading", &[5830]),
    ("trailing ", &[136697, 236743]),
    ("two  spaces", &[13498, 138, 35220]),
    ("three   spaces here", &[19891, 139, 35220, 1590]),
    ("a    b     c      d", &[236746, 140, 236763, 141, 236755, 142, 236753]),
    ("                                        x", &[167, 145, 236781]),
    ("x                                 ", &[236781, 167, 138]),
    ("\n", &[107]),
    ("\n\n\n", &[109]),
    ("a\nb\n\nc\t\td\r\n", &[236746, 107, 236763, 108, 236755, 255969, 236753, 251, 107]),
    ("\t\ttab", &[255969, 4823]),
    ("naïve café — 日本語テスト 🦀🗼 e\u{301}", &[1789, 238527, 560, 33443, 2192, 33375, 238582, 88733, 236743, 248714, 254403, 545, 238288]),
    ("emoji 👩\u{200d}👩\u{200d}👧\u{200d}👦 🇫🇷", &[67906, 236743, 243767, 237243, 243767, 237243, 244814, 237243, 244990, 236743, 246598, 242644]),
    ("<bos>hi<eos>", &[2, 2202, 1]),
    ("<start_of_turn>user\nHi<end_of_turn>\n", &[105, 2364, 107, 10979, 106, 107]),
    ("<html><body><b>x</b></body>", &[217, 218, 200, 236781, 209, 229]),
    ("\u{2581}literal\u{2581}block", &[37087, 3355]),
    ("0123456789 3.14159", &[236771, 236770, 236778, 236800, 236812, 236810, 236825, 236832, 236828, 236819, 236743, 236800, 236761, 236770, 236812, 236770, 236810, 236819]),
    ("don't we'll I'D", &[13246, 236789, 236745, 692, 236789, 859, 564, 236789, 236796]),
    ("\u{0}\u{1}\u{7f}", &[238, 249732, 251541]),
    ("\u{10ffff}\u{e000}", &[482, 381, 429, 429, 245863]),
    ("مرحبا بالعالم", &[236873, 150345, 107602, 17193]),
    ("Привет, мир!", &[116130, 236764, 58562, 236888]),
    ("हिन्दी में", &[16017, 70249, 1019]),
    ("ไทย", &[49862]),
    ("한국어 문장", &[114216, 237430, 16950, 237851]),
    ("def f(x):\n    return x + 1\n", &[2063, 517, 236769, 236781, 1473, 107, 140, 2060, 1123, 900, 236743, 236770, 107]),
    ("https://example.com/a?b=c&d=%20", &[2574, 1411, 8358, 236761, 854, 236786, 236746, 236881, 236763, 236784, 236755, 236880, 236753, 38077, 236778, 236771]),
    ("antidisestablishmentarianism", &[638, 33090, 163524, 8225, 1929]),
    ("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", &[128820, 128820, 128820, 128820, 128820]),
    ("<unused5>x<0x0A>y<0xFF>", &[11, 236781, 236820, 236771, 236781, 236771, 236776, 236813, 236762, 236820, 236771, 29414, 236813]),
    ("[multimodal]<mask><pad>", &[5, 4, 0]),
    ("  \n  \n", &[138, 107, 138, 107]),
    ("mixed \u{a0}nbsp\u{3000}ideographic", &[63258, 236743, 432, 398, 11539, 465, 366, 366, 754, 9814]),
    ("zero\u{200b}width", &[13321, 237141, 2690]),
    ("a\u{300}\u{301}\u{302}", &[236746, 239101, 238288, 242238]),
    ("∑∫√π≈≠", &[240662, 240842, 239176, 237161, 240443, 242493]),
    (" ", &[236743]),
    ("  ", &[138]),
    ("\u{2581}\u{2581}", &[236743, 236743]),
    ("\u{2581} \u{2581}", &[236743, 236743, 236743]),
];

/// Texts in which they are text.
#[rustfmt::skip]
const KNOWN_PLAIN: &[Known] = &[
    ("<bos>hi<eos>", &[236820, 46757, 236813, 2202, 236820, 211827, 236813]),
    ("<start_of_turn>user\nHi<end_of_turn>\n", &[236820, 3041, 236779, 1340, 236779, 887, 236813, 2364, 107, 10979, 236820, 643, 236779, 1340, 236779, 887, 236813, 107]),
    ("<unused5>x<0x0A>y<0xFF>", &[236820, 63634, 236810, 236813, 236781, 236820, 236771, 236781, 236771, 236776, 236813, 236762, 236820, 236771, 29414, 236813]),
    ("[multimodal]<mask><pad>", &[5, 236820, 1080, 1798, 13039, 236813]),
];

/// Expected ids are those of llama.cpp's `/tokenize` for the same file.
#[test]
fn the_real_gemma_gives_known_ids() {
    let Some(path) = real_gemma() else { return };
    let tokenizer: Tokenizer = Model::open(&path).unwrap().tokenizer;
    assert_eq!((tokenizer.vocab_size(), tokenizer.bos(), tokenizer.eos()), (262_144, Some(2), &[1, 106][..]));
    for (text, ids) in KNOWN {
        assert_eq!(tokenizer.encode(text, false).unwrap(), *ids, "{text:?}");
        assert_eq!(tokenizer.decode(ids, false), text.replace(SPACE, " "));
    }
    for (text, ids) in KNOWN_PLAIN {
        assert_eq!(tokenizer.encode_plain(text).unwrap(), *ids, "{text:?}");
        assert_eq!(tokenizer.decode(ids, true), *text);
    }
    assert_eq!(tokenizer.encode("", true).unwrap(), [2], "BOS goes before a text");
    for (name, id) in [("<bos>", 2), ("\u{2581}the", 506), ("<0x0A>", 248), ("\n", 107)] {
        assert_eq!(tokenizer.token_id(name), Some(id), "{name:?}");
    }
}
