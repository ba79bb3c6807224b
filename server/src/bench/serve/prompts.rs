//! Synthetic prompts of a wanted number of tokens, made of common words and fitted through the server's own tokenizer.
//!
//! ```text
//!   words ~ random(seed) --join--> text --POST /tokenize--> count == wanted ?  done
//!     ^                                                         |
//!     +--------------- drop or add as many words ---------------+--- in vain: cut the tokens, POST /detokenize
//! ```
//!
//! Most of the words are one token in most vocabularies, so the first or second look fits. Where the server has no
//! `/tokenize`, words stand for tokens, and the report says so.

use serde_json::{Value, json};

use super::Options;
use super::client::{Client, ClientError};
use super::exchange::Dialect;
use crate::bench::random::Random;

/// Looks through the tokenizer before words are given up for tokens.
const FITTING_ROUNDS: usize = 6;

/// One prompt and what is asked for it.
#[derive(Clone, Debug)]
pub(super) struct Prompt {
    /// The text.
    pub(super) text: String,
    /// Tokens it was to have, special ones of `/v1/completions` included.
    pub(super) wanted: usize,
    /// Tokens it has; exact only when [`Prompts::exact`] is set.
    pub(super) tokens: usize,
    /// Tokens to generate.
    pub(super) output_tokens: usize,
}

/// The prompts of a run.
#[derive(Clone, Debug)]
pub(super) struct Prompts {
    /// Sent before the run.
    pub(super) warmups: Vec<Prompt>,
    /// Sent and measured.
    pub(super) measured: Vec<Prompt>,
    /// Lengths were counted by the server's tokenizer.
    pub(super) exact: bool,
}

/// Draws a length from `len * (1 - ratio) ..= len * (1 + ratio)`, at least `least`.
fn draw_length(random: &mut Random, len: usize, ratio: f64, least: usize) -> usize {
    let low = (len as f64 * (1.0 - ratio)).floor() as usize;
    let high = (len as f64 * (1.0 + ratio)).ceil() as usize;
    let (low, high) = if ratio == 0.0 { (len, len) } else { (low, high) };
    (low + random.below(high - low + 1)).max(least)
}

fn draw_words(random: &mut Random, count: usize) -> Vec<&'static str> {
    (0..count).map(|_| WORDS[random.below(WORDS.len())]).collect()
}

/// Makes the prompts that `options` ask for.
///
/// # Errors
/// Those of the client, when the server's tokenizer answered once and then failed.
pub(super) async fn make(options: &Options, client: &Client, model: &str) -> Result<Prompts, ClientError> {
    let counter = Counter::probe(client, model, options.dialect).await?;
    let mut random = Random::new(options.seed, 0);
    let prefix_words = draw_words(&mut random, options.prefix_len);
    let prefix = fit(counter.as_ref(), String::new(), prefix_words, options.prefix_len, &mut random).await?.0;

    let mut prompts = Vec::with_capacity(options.num_warmups + options.num_prompts);
    // Warm-ups come from a stream of their own, so that their number does not change the measured prompts.
    for (stream, count) in [(1, options.num_warmups), (2, options.num_prompts)] {
        let mut random = Random::new(options.seed, stream);
        for _ in 0..count {
            let wanted = options.prefix_len + draw_length(&mut random, options.input_len, options.range_ratio, 1);
            let output_tokens = draw_length(&mut random, options.output_len, options.range_ratio, 1);
            let words = draw_words(&mut random, wanted - options.prefix_len);
            let (text, tokens) = fit(counter.as_ref(), prefix.clone(), words, wanted, &mut random).await?;
            prompts.push(Prompt { text, wanted, tokens, output_tokens });
        }
    }
    let measured = prompts.split_off(options.num_warmups);
    Ok(Prompts { warmups: prompts, measured, exact: counter.is_some() })
}

/// Joins `prefix` and `words` and changes the words until the text has `wanted` tokens; returns text and count.
async fn fit(
    counter: Option<&Counter<'_>>,
    prefix: String,
    mut words: Vec<&'static str>,
    wanted: usize,
    random: &mut Random,
) -> Result<(String, usize), ClientError> {
    let join = |words: &[&str]| {
        let separator = if prefix.is_empty() || words.is_empty() { "" } else { " " };
        format!("{prefix}{separator}{}", words.join(" "))
    };
    let Some(counter) = counter else { return Ok((join(&words), wanted)) };
    if wanted == 0 {
        return Ok((String::new(), 0));
    }
    let mut best: Option<(String, usize)> = None;
    let mut keep = |text: String, count: usize| {
        if best.as_ref().is_none_or(|(_, known)| count.abs_diff(wanted) < known.abs_diff(wanted)) {
            best = Some((text, count));
        }
    };
    for round in 0..FITTING_ROUNDS {
        let text = join(&words);
        let count = counter.count(&text).await?;
        let last_round = round + 1 == FITTING_ROUNDS;
        if count > wanted
            && last_round
            && let Some((text, count)) = counter.cut(&text, wanted).await?
        {
            keep(text, count);
        }
        keep(text, count);
        if count == wanted {
            break;
        }
        if count < wanted || round + 2 == FITTING_ROUNDS {
            // The last round needs more than enough to cut from.
            words.extend(draw_words(random, wanted.saturating_sub(count) + 1));
        } else if words.len() > count - wanted {
            words.truncate(words.len() - (count - wanted));
        } else {
            // Words of many tokens: there are fewer of them than surplus tokens.
            words.truncate(words.len() / 2);
        }
    }
    Ok(best.expect("at least one round counted"))
}

/// How a server wants to be asked for tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    /// `{"prompt", "add_special_tokens"}`, and `{"tokens"}` back into `{"prompt"}`: vLLM's, and ours.
    Prompt,
    /// `{"content", "add_special"}`, and `{"tokens"}` back into `{"content"}`: llama-server's. It answers the other
    /// shape with an empty list.
    Content,
}

/// The server's tokenizer.
struct Counter<'a> {
    client: &'a Client,
    model: &'a str,
    shape: Shape,
    /// Special tokens are part of the wanted length: true for plain completions, whose prompt is all there is.
    special: bool,
}

impl<'a> Counter<'a> {
    /// A counter if the server has `/tokenize`.
    async fn probe(client: &'a Client, model: &'a str, dialect: Dialect) -> Result<Option<Counter<'a>>, ClientError> {
        for shape in [Shape::Prompt, Shape::Content] {
            let counter = Self { client, model, shape, special: dialect == Dialect::Completions };
            match counter.count("hello world").await {
                Ok(0) => {}
                Ok(_) => return Ok(Some(counter)),
                // No such route, another shape of it, or not for this key.
                Err(ClientError::Status { .. } | ClientError::Nonsense(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    async fn count(&self, text: &str) -> Result<usize, ClientError> {
        let answer = self.tokenize(text, self.special).await?;
        let count = answer.get("count").and_then(Value::as_u64);
        let tokens = answer.get("tokens").and_then(Value::as_array).map(|tokens| tokens.len() as u64);
        count
            .or(tokens)
            .and_then(|n| usize::try_from(n).ok())
            .ok_or_else(|| ClientError::Nonsense("/tokenize gave neither count nor tokens".to_owned()))
    }

    async fn tokenize(&self, text: &str, special: bool) -> Result<Value, ClientError> {
        let body = match self.shape {
            Shape::Prompt => json!({"model": self.model, "prompt": text, "add_special_tokens": special}),
            Shape::Content => json!({"content": text, "add_special": special}),
        };
        self.client.post_json("/tokenize", &body).await
    }

    /// The beginning of `text` that has `wanted` tokens, and how many it really has: text cut between tokens need not
    /// fall into the same tokens again. `None` where the server cannot tell.
    async fn cut(&self, text: &str, wanted: usize) -> Result<Option<(String, usize)>, ClientError> {
        let plain = self.tokenize(text, false).await?;
        let Some(tokens) = plain.get("tokens").and_then(Value::as_array) else { return Ok(None) };
        let special = self.count(text).await?.saturating_sub(tokens.len());
        let kept = &tokens[..tokens.len().min(wanted.saturating_sub(special))];
        let body = json!({"model": self.model, "tokens": kept});
        let shorter = match self.client.post_json("/detokenize", &body).await {
            Ok(answer) => {
                let text = match self.shape {
                    Shape::Prompt => answer.get("prompt"),
                    Shape::Content => answer.get("content"),
                };
                text.and_then(Value::as_str).map(str::to_owned)
            }
            Err(ClientError::Status { .. }) => None,
            Err(error) => return Err(error),
        };
        let Some(shorter) = shorter else { return Ok(None) };
        let count = self.count(&shorter).await?;
        Ok(Some((shorter, count)))
    }
}

#[rustfmt::skip]
const WORDS: &[&str] = &[
    "able", "about", "above", "across", "action", "after", "again", "air", "all", "almost", "along", "also", "always",
    "and", "animal", "another", "answer", "any", "area", "around", "ask", "back", "base", "because", "become", "been",
    "before", "began", "being", "below", "best", "better", "between", "big", "bird", "black", "blue", "board", "boat",
    "body", "book", "both", "box", "boy", "bring", "brought", "build", "but", "call", "came", "can", "car", "care",
    "carry", "center", "change", "check", "children", "city", "class", "clear", "close", "cold", "color", "come",
    "common", "complete", "could", "country", "course", "cut", "dark", "day", "decide", "deep", "develop", "did",
    "different", "direct", "do", "does", "door", "down", "draw", "drive", "dry", "during", "each", "early", "earth",
    "east", "easy", "eat", "end", "enough", "even", "ever", "every", "example", "face", "fact", "fall", "family", "far",
    "farm", "fast", "feel", "feet", "few", "field", "figure", "final", "find", "fine", "fire", "first", "fish", "five",
    "follow", "food", "foot", "for", "force", "form", "found", "four", "free", "friend", "from", "front", "full",
    "game", "gave", "get", "girl", "give", "go", "gold", "good", "got", "great", "green", "ground", "group", "grow",
    "had", "half", "hand", "happen", "hard", "has", "have", "head", "hear", "heat", "help", "here", "high", "him",
    "his", "hold", "home", "horse", "hot", "hour", "house", "how", "idea", "if", "in", "inch", "interest", "into",
    "island", "just", "keep", "kind", "king", "know", "land", "language", "large", "last", "late", "laugh", "lay",
    "lead", "learn", "leave", "left", "less", "letter", "life", "light", "like", "line", "list", "listen", "little",
    "live", "long", "look", "love", "low", "made", "main", "make", "man", "many", "map", "mark", "may", "mean",
    "measure", "men", "might", "mile", "mind", "miss", "money", "moon", "more", "morning", "most", "mother", "mountain",
    "move", "much", "music", "must", "name", "near", "need", "never", "new", "next", "night", "north", "note",
    "nothing", "notice", "now", "number", "object", "off", "often", "old", "once", "one", "only", "open", "order",
    "other", "our", "over", "own", "page", "paper", "part", "pass", "pattern", "people", "perhaps", "person", "picture",
    "piece", "place", "plain", "plan", "plane", "plant", "play", "point", "poor", "port", "possible", "power", "press",
    "problem", "produce", "product", "pull", "put", "question", "quick", "rain", "ran", "reach", "read", "ready",
    "real", "record", "red", "remember", "rest", "right", "river", "road", "rock", "room", "round", "rule", "run",
    "said", "same", "saw", "say", "school", "science", "sea", "second", "see", "seem", "self", "sentence", "serve",
    "set", "several", "shape", "she", "ship", "short", "should", "show", "side", "simple", "since", "sing", "size",
    "sleep", "slow", "small", "snow", "some", "song", "soon", "sound", "south", "special", "spell", "stand", "star",
    "start", "state", "stay", "step", "still", "stood", "stop", "story", "street", "strong", "study", "such", "sun",
    "sure", "surface", "system", "table", "take", "talk", "teach", "tell", "ten", "test", "than", "that", "the",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_stay_in_their_range() {
        let mut random = Random::new(0, 0);
        assert_eq!(draw_length(&mut random, 128, 0.0, 1), 128);
        assert_eq!(draw_length(&mut random, 0, 0.0, 1), 1);
        let lengths: Vec<usize> = (0..2000).map(|_| draw_length(&mut random, 100, 0.2, 1)).collect();
        assert_eq!((lengths.iter().min(), lengths.iter().max()), (Some(&80), Some(&120)));
    }

    #[test]
    fn words_differ_from_each_other() {
        let mut sorted = WORDS.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), WORDS.len());
    }
}
