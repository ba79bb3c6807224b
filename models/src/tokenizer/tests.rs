//! Tests of both tokenizer kinds, from GGUF files and from folders.

use cupola_kernels::WeightType;

use super::Tokenizer;
use super::bpe::{ByteAlphabet, byte_characters};
use crate::testing::{EOS, SPECIALS, Scratch, VOCAB, real_model, tiny_gguf, tiny_safetensors, tiny_writer};
use crate::weights::writer::{GgufWriter, Item};
use crate::{Model, Result};

const TEXTS: [&str; 7] = [
    "",
    "the cat and the hat in 2024",
    "  two  spaces\n\n\ttab",
    "naïve café — 日本語 🦀 e\u{301}",
    "it's we'll I'D 3.14159",
    "\u{0}\u{7f}\u{ff}\u{10ffff}",
    "<|im_start|>user\nof<|im_end|>\n",
];

fn open(file: &GgufWriter) -> Result<Tokenizer> {
    let scratch = Scratch::new("tokenizer");
    let path = scratch.path().join("a.gguf");
    std::fs::write(&path, file.finish()).unwrap();
    Ok(Model::open(&path)?.tokenizer)
}

fn with(key: &str, item: Option<Item>) -> GgufWriter {
    let mut file = tiny_writer(WeightType::F32, 1);
    file.keys.retain(|(name, _)| name != key);
    if let Some(item) = item {
        file.key(key, item);
    }
    file
}

/// A SentencePiece vocabulary of 300 tokens: specials, 256 bytes, some pieces.
fn sentence_piece() -> GgufWriter {
    let pieces = ["▁", "a", "b", "c", "d", "ab", "abc", "▁a", "▁ab", "cd", "▁abcd", "bc"];
    let mut texts: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    texts.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    texts.extend(pieces.map(str::to_owned));
    let mut kinds = vec![2, 3, 3];
    kinds.extend([6; 256]);
    kinds.extend([1; 12]);
    let mut scores = vec![0.0; 3 + 256];
    // Single characters score low, as in real files; a join's score is its rank.
    scores.extend([-100.0, -101.0, -102.0, -103.0, -104.0, -2.0, -5.0, -1.0, -3.0, -4.0, -6.0, -1.5]);
    while texts.len() < VOCAB {
        texts.push(format!("unused{}", texts.len()));
        kinds.push(5);
        scores.push(0.0);
    }
    let mut file = tiny_writer(WeightType::F32, 1);
    file.keys.retain(|(name, _)| !name.starts_with("tokenizer."));
    file.text("tokenizer.ggml.model", "llama")
        .key("tokenizer.ggml.tokens", Item::Texts(texts))
        .key("tokenizer.ggml.token_type", Item::I32s(kinds))
        .key("tokenizer.ggml.scores", Item::F32s(scores))
        .u32("tokenizer.ggml.bos_token_id", 1)
        .u32("tokenizer.ggml.eos_token_id", 2);
    file
}

fn texts_of(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    ids.iter().map(|&id| String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned()).collect()
}

#[test]
fn the_byte_alphabet_is_its_own_inverse() {
    let characters = byte_characters();
    assert_eq!((characters[b' ' as usize], characters[b'a' as usize], characters[0]), ('Ġ', 'a', 'Ā'));
    assert_eq!(characters[0xAD], '\u{143}');
    let text: String = characters.iter().collect();
    let mut bytes = Vec::new();
    ByteAlphabet::new().decode(&text, &mut bytes).unwrap();
    assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
    assert!(ByteAlphabet::new().decode("日", &mut bytes).is_none());
}

#[test]
fn both_files_of_the_tiny_model_give_the_same_ids() {
    let scratch = Scratch::new("both");
    let gguf = Model::open(&tiny_gguf(scratch.path(), WeightType::F32, 1)).unwrap().tokenizer;
    let json = Model::open(&tiny_safetensors(scratch.path(), WeightType::F32, 1)).unwrap().tokenizer;
    for text in TEXTS {
        let ids = gguf.encode(text, true).unwrap();
        assert_eq!(ids, json.encode(text, true).unwrap(), "{text:?}");
        assert_eq!(gguf.encode_plain(text).unwrap(), json.encode_plain(text).unwrap());
        for tokenizer in [&gguf, &json] {
            assert_eq!(tokenizer.decode(&ids, false), text);
            let plain = tokenizer.encode_plain(text).unwrap();
            assert_eq!(tokenizer.decode(&plain, true), text, "plain text has nothing to skip");
            assert!(plain.iter().all(|&id| !tokenizer.is_special(id)));
        }
    }
    for tokenizer in [&gguf, &json] {
        assert_eq!(tokenizer.vocab_size(), VOCAB);
        assert_eq!(tokenizer.bos(), Some(1));
        assert_eq!(tokenizer.token_bytes(EOS), b"<|im_end|>");
        assert_eq!(tokenizer.token_bytes(VOCAB as u32), b"");
        assert_eq!(tokenizer.token_bytes(u32::MAX), b"");
        assert!(!tokenizer.is_special(u32::MAX) && !tokenizer.strips_leading_space());
        for (id, text) in (0..).zip(SPECIALS) {
            assert_eq!(tokenizer.token_id(text), Some(id));
            assert!(tokenizer.is_special(id));
        }
    }
    assert_eq!(gguf.eos(), [2, 0]);
    assert_eq!(
        texts_of(&gguf, &gguf.encode("<|im_start|>of the<|im_end|>", false).unwrap())[..3],
        ["<|im_start|>", "of", " the"]
    );
    assert_eq!(gguf.decode(&[1, 2, 0], true), "");
}

#[test]
fn bos_and_eos_are_added_as_the_file_says() {
    let mut file = with("tokenizer.ggml.add_bos_token", Some(Item::Bool(true)));
    file.key("tokenizer.ggml.add_eos_token", Item::Bool(true));
    let tokenizer = open(&file).unwrap();
    let bare = tokenizer.encode("in", false).unwrap();
    assert_eq!(tokenizer.encode("in", true).unwrap(), [&[1][..], &bare, &[EOS]].concat());
    let llama3 = with("tokenizer.ggml.pre", Some(Item::Text("llama-bpe".into())));
    let mut file = llama3.clone();
    file.keys.retain(|(name, _)| name != "tokenizer.ggml.add_bos_token");
    assert_eq!(open(&file).unwrap().encode("", true).unwrap(), [1], "this kind adds BOS unless told");
    assert!(open(&llama3).unwrap().encode("", true).unwrap().is_empty());
}

#[test]
fn every_known_splitter_keeps_the_text() {
    for pre in ["gpt-2", "default", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o"] {
        let tokenizer = open(&with("tokenizer.ggml.pre", Some(Item::Text(pre.into())))).unwrap();
        for text in TEXTS {
            let back = tokenizer.decode(&tokenizer.encode(text, false).unwrap(), false);
            // Qwen composes accents.
            let expected = if pre == "qwen2" { text.replace("e\u{301}", "é") } else { text.to_owned() };
            assert_eq!(back, expected, "{pre}");
        }
    }
}

#[test]
fn what_is_missing_or_wrong_is_named() {
    let refused = |file: &GgufWriter| open(file).unwrap_err().to_string();
    let text = |text: &str| Some(Item::Text(text.to_owned()));
    assert!(refused(&with("tokenizer.ggml.model", None)).contains("has no tokenizer"));
    assert!(refused(&with("tokenizer.ggml.model", text("t5"))).contains("tokenizer kind t5 is not supported"));
    let message = refused(&with("tokenizer.ggml.pre", text("klingon")));
    assert!(message.contains("pre-tokenizer klingon is not supported: known ones are") && message.contains("smollm"));
    assert!(refused(&with("tokenizer.ggml.tokens", None)).contains("has no key tokenizer.ggml.tokens"));
    assert!(refused(&with("tokenizer.ggml.tokens", Some(Item::Texts(vec![])))).contains("0 entries"));
    assert!(refused(&with("tokenizer.ggml.merges", None)).contains("has no key tokenizer.ggml.merges"));
    assert!(
        refused(&with("tokenizer.ggml.token_type", Some(Item::I32s(vec![1])))).contains("has 1 entries, expected 300")
    );
    assert!(
        refused(&with("tokenizer.ggml.eos_token_id", Some(Item::U32(300)))).contains("expected a token id below 300")
    );
    for merge in ["nospace", "zz zz", "<|endoftext|> <|endoftext|>", " ", ""] {
        let message = refused(&with("tokenizer.ggml.merges", Some(Item::Texts(vec![merge.to_owned()]))));
        assert!(message.starts_with("tokenizer: "), "{message}");
    }
    let mut no_scores = sentence_piece();
    no_scores.keys.retain(|(name, _)| name != "tokenizer.ggml.scores");
    assert!(refused(&no_scores).contains("has no key tokenizer.ggml.scores"));

    let scratch = Scratch::new("no-tokenizer");
    let folder = tiny_safetensors(scratch.path(), WeightType::F32, 1);
    std::fs::rename(folder.join("tokenizer.json"), folder.join("tokenizer.model")).unwrap();
    let message = Model::open(&folder).unwrap_err().to_string();
    assert!(message.contains("has no tokenizer.json (tokenizer.model alone is not enough)"), "{message}");
}

#[test]
fn sentence_piece_joins_by_score_and_falls_back_to_bytes() {
    let tokenizer = open(&sentence_piece()).unwrap();
    assert!(tokenizer.strips_leading_space());
    let pieces = |text: &str| texts_of(&tokenizer, &tokenizer.encode(text, false).unwrap());
    // " a" scores best, then "bc"; " ab" would need the "b" that is taken.
    assert_eq!(pieces("abc"), [" a", "bc"]);
    assert_eq!(pieces("cab"), [" ", "c", "ab"]);
    assert_eq!(pieces("a b"), [" a", " ", "b"]);
    assert_eq!(tokenizer.encode("abc", true).unwrap()[0], 1, "this kind adds BOS");
    for text in ["abc", "a  b", "日本 c", "\n\td", "<s>", "x<0x0A>y"] {
        let plain = tokenizer.encode_plain(text).unwrap();
        assert_eq!(tokenizer.decode(&plain, true), text);
        assert!(plain.iter().all(|&id| !tokenizer.is_special(id)), "{text}");
    }
    let newline = tokenizer.encode("\n", false).unwrap();
    assert_eq!(tokenizer.token_bytes(*newline.last().unwrap()), b"\n");
    assert_eq!(tokenizer.encode("a</s>", false).unwrap().last(), Some(&2));
    assert_eq!(tokenizer.decode(&tokenizer.encode("</s>ab", false).unwrap(), true), "ab");

    let mut file = sentence_piece();
    file.key("tokenizer.ggml.add_space_prefix", Item::Bool(false));
    let tokenizer = open(&file).unwrap();
    assert!(!tokenizer.strips_leading_space());
    assert_eq!(texts_of(&tokenizer, &tokenizer.encode("ab c", false).unwrap()), ["ab", " ", "c"]);
}

/// Expected ids come from a plain implementation of the merge rule over the file's own merges.
#[test]
fn the_real_model_gives_known_ids() {
    let Some(path) = real_model() else { return };
    let tokenizer = Model::open(&path).unwrap().tokenizer;
    let known: [(&str, &[u32]); 6] = [
        ("The capital of France is", &[504, 3575, 282, 4649, 314]),
        ("Hello world, 2024!<|im_end|>\n", &[19556, 905, 28, 216, 34, 32, 34, 36, 17, 2, 198]),
        ("  two  spaces\n\n\ttab", &[216, 827, 216, 5600, 1116, 197, 15999]),
        (
            "naïve café — 日本語 🦀 e\u{301}",
            &[3546, 46494, 37366, 1841, 17097, 241, 115, 40993, 179, 120, 248, 15107, 116, 218, 297, 151, 219],
        ),
        ("it's we'll I'D 3.14159", &[269, 506, 392, 3060, 339, 23, 52, 216, 35, 30, 33, 36, 33, 37, 41]),
        ("<|im_start|>user\nHi<|im_end|>\n", &[1, 4093, 198, 26843, 2, 198]),
    ];
    for (text, ids) in known {
        assert_eq!(tokenizer.encode(text, true).unwrap(), ids, "{text:?}");
        assert_eq!(tokenizer.decode(ids, false), text);
    }
    for text in TEXTS {
        assert_eq!(tokenizer.decode(&tokenizer.encode_plain(text).unwrap(), true), text);
    }
}
