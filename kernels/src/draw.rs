//! What it takes to draw a token from a row of logits, where a backend does that by itself.

/// How a token is drawn from a row of logits `[vocab]`. What is on is applied in this order:
///
/// ```text
///   softcap ──> allowed ──> bias ──> penalties on seen ──> excluded ──┬── temperature 0 ──> the largest, the lowest among equals
///                                                                     └── top_k ──> top_p ──> min_p ──> uniform ──> token
/// ```
///
/// A token's weight is `e^((logit - largest) / temperature)`. `top_k` keeps the largest logits, then `top_p` the fewest of
/// the heaviest that reach this share of their weight, lower tokens first among equals, and `min_p` those of at least this
/// weight. What is left lies end to end in the order of tokens, and `uniform` is a point on it.
#[derive(Clone, Copy, Debug)]
pub struct Draw<'a> {
    /// 0 takes the largest logit.
    pub temperature: f32,
    /// Keep this many tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep this share, above 0; 1 keeps all.
    pub top_p: f32,
    /// Keep what has this share of the largest probability, from 0 to 1; 0 keeps all.
    pub min_p: f32,
    /// The random number of this draw, from 0 to below 1.
    pub uniform: f64,
    /// Added to the logits of these tokens; tokens ascend.
    pub bias: &'a [(u32, f32)],
    /// Tokens with penalties, each once, and how often they are in the answer (0 for those of the prompt alone).
    pub seen: &'a [(u32, u32)],
    /// Divides positive and multiplies negative logits of `seen`; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of `seen` that are in the answer.
    pub presence_penalty: f32,
    /// Subtracted once for every time that one of `seen` is in the answer.
    pub frequency_penalty: f32,
    /// Tokens that are not drawn.
    pub excluded: &'a [u32],
    /// A bit for each token that may be drawn, 32 to a word from the lowest bit on; `None` allows all.
    pub allowed: Option<&'a [u32]>,
}

impl Draw<'_> {
    /// The largest logit as it is.
    pub const GREEDY: Draw<'static> = Draw {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        uniform: 0.0,
        bias: &[],
        seen: &[],
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        excluded: &[],
        allowed: None,
    };
}

/// Why a row of logits has no token to draw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoToken {
    /// Some logit is not a number.
    NotANumber,
    /// The largest logit is infinite.
    Infinite,
    /// Every token is excluded.
    Excluded,
}

impl NoToken {
    /// One sentence for the client.
    pub const fn message(self) -> &'static str {
        match self {
            NoToken::NotANumber => "the model's output is not a number",
            NoToken::Infinite => "the model's output is infinite",
            NoToken::Excluded => "every token is excluded",
        }
    }
}

/// The token of a row, or why there is none.
pub type Drawn = std::result::Result<u32, NoToken>;

/// A result of [`Backend::chosen`](crate::Backend::chosen): a token below `vocab`, or why there is none.
pub fn drawn(word: u32, vocab: usize) -> Drawn {
    match word {
        token if (token as usize) < vocab => Ok(token),
        0xffff_fffe => Err(NoToken::Infinite),
        0xffff_fffd => Err(NoToken::Excluded),
        _ => Err(NoToken::NotANumber),
    }
}
