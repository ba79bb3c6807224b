//! Drawing tokens from logits that stay on the device: memory and launches of `cu/sampling.cu`.
//!
//! ```text
//!   Draw, a row ──┬── Row            what is asked, in numbers; how far the kernels are   ┐
//!                 ├── adjustments    bias, seen, excluded: pairs of words                 ├─ one copy to the device
//!                 └── masks          allowed tokens, a bit each                           ┘
//!   sample_prepare, _adjust ──> _largest ──> _select, a digit at a time ──> _draw ──> a word a row
//! ```
//!
//! What is sent goes through page-locked memory, of which there are several pieces in turns, so that the host does not wait for the
//! device; adjustments and masks that are too large for them go as they are.
//!
//! Kernels that no row asks for are not launched. All memory is allocated once; rows whose adjustments do not fit together
//! are drawn in several rounds, and those of a single row always fit.

use super::driver::{Arg, Device, DeviceBytes, Launch};
use super::pinned::Pinned;
use crate::draw::{Draw, Drawn, drawn};
use crate::{Error, Result};

/// Threads of a block, and logits that one block looks at, as in `cu/sampling.cu`.
const THREADS: usize = 256;
const SLICE: usize = 4096;
/// Values of a digit of a cut.
const DIGITS: usize = 2048;
/// Digits of two cuts: top_k, top_p.
const CUT_DIGITS: u32 = 3;
/// Bytes of a `Row`, of an adjustment, and of a `Slice`.
const ROW: usize = 96;
const ADJUSTMENT: usize = 8;
const SLICE_STATE: usize = 16;
/// Adjustments that there is always room for.
const ADJUSTMENTS: usize = 1 << 16;
/// Rounds that are sent before the host waits for the first of them to arrive, and adjustments of each: those of rows without
/// penalties are few.
const STAGED_ROUNDS: usize = 8;
const STAGED_ADJUSTMENTS: usize = 4096;
/// A row of which every token is allowed.
const NO_MASK: u32 = u32::MAX;
/// The largest vocabulary: a thread for each slice.
const MOST_TOKENS: usize = THREADS * SLICE;

const OP: &str = "draw";

/// Memory to draw tokens from up to `rows` rows of `vocab` logits.
pub(super) struct Sampler {
    rows: usize,
    vocab: usize,
    /// Rows, adjustments and masks of a round.
    sent: DeviceBytes,
    /// Page-locked memory for a round each, and which is next.
    staging: Vec<Pinned>,
    next: usize,
    /// Zeros between launches.
    histograms: DeviceBytes,
    slices: DeviceBytes,
    /// A word a row, of draws that are waited for.
    tokens: DeviceBytes,
    /// What is sent next.
    round: Round,
    words: Vec<u8>,
}

/// Rows that are drawn together.
#[derive(Default)]
struct Round {
    rows: Vec<u8>,
    adjustments: Vec<u8>,
    masks: Vec<u8>,
    cuts: [bool; 2],
}

/// Adjustments that fit at once: those of any single row, and at least [`ADJUSTMENTS`].
fn most_adjustments(vocab: usize) -> usize {
    (3 * vocab).max(ADJUSTMENTS)
}

fn mask_words(vocab: usize) -> usize {
    vocab.div_ceil(32)
}

impl Sampler {
    /// Bytes of device memory: what is sent, histograms, slices, tokens.
    fn parts(rows: usize, vocab: usize) -> [usize; 4] {
        let sent = rows * ROW + most_adjustments(vocab) * ADJUSTMENT + rows * mask_words(vocab) * 4;
        [sent, rows * DIGITS * 8, rows * vocab.div_ceil(SLICE) * SLICE_STATE, rows * 4]
    }

    /// Bytes of device memory that [`Sampler::new`] allocates.
    pub(super) fn bytes(rows: usize, vocab: usize) -> usize {
        Self::parts(rows, vocab).iter().sum()
    }

    /// Allocates all that drawing needs.
    ///
    /// # Errors
    /// [`Error::Shape`] for a vocabulary that is empty or larger than kernels take, and those of [`Device::alloc`].
    pub(super) fn new(device: &mut Device, rows: usize, vocab: usize) -> Result<Self> {
        if !(1..=MOST_TOKENS).contains(&vocab) {
            let expected = format!("a vocabulary of 1 to {MOST_TOKENS} tokens");
            return Err(Error::Shape { op: "alloc_sampler", expected, got: vocab.to_string() });
        }
        let [sent, histograms, slices, tokens] = Self::parts(rows, vocab);
        let staged = (rows * ROW + STAGED_ADJUSTMENTS * ADJUSTMENT) / 4;
        let staging = (0..STAGED_ROUNDS).map(|_| Pinned::new(device, staged, "what tokens are drawn by"));
        let staging = staging.collect::<Result<_>>()?;
        Ok(Self {
            rows,
            vocab,
            staging,
            next: 0,
            sent: device.alloc(sent, "what tokens are drawn by")?,
            histograms: device.alloc_zeroed(histograms, "histograms of logits")?,
            slices: device.alloc(slices, "slices of logits")?,
            tokens: device.alloc(tokens, "tokens that are drawn")?,
            round: Round::default(),
            words: Vec::new(),
        })
    }

    /// Tokens of a row.
    pub(super) fn vocab(&self) -> usize {
        self.vocab
    }

    /// Draws a token for each `(row, draw)` from `logits` `[.., vocab]`, in place; the results are appended to `out`. That the
    /// rows lie in `logits` was checked by the caller.
    ///
    /// # Errors
    /// [`Error::Shape`] for what does not fit the vocabulary, before anything is drawn; those of [`Device::launch`].
    pub(super) fn draw(
        &mut self,
        device: &mut Device,
        logits: &DeviceBytes,
        asked: (Option<f32>, &[(u32, Draw<'_>)]),
        out: &mut Vec<Drawn>,
    ) -> Result<()> {
        self.submit(device, logits, asked, None)?;
        self.words.clear();
        self.words.resize(4 * asked.1.len(), 0);
        device.download(&self.tokens, 0, &mut self.words)?;
        out.extend(self.words.as_chunks::<4>().0.iter().map(|&word| drawn(u32::from_le_bytes(word), self.vocab)));
        Ok(())
    }

    /// The same without waiting: the results go to the words of `to` from a first one on, or are left for [`Sampler::draw`]. That
    /// they fit there was checked by the caller.
    ///
    /// # Errors
    /// As [`Sampler::draw`].
    pub(super) fn submit(
        &mut self,
        device: &mut Device,
        logits: &DeviceBytes,
        (softcap, draws): (Option<f32>, &[(u32, Draw<'_>)]),
        to: Option<(&DeviceBytes, usize)>,
    ) -> Result<()> {
        if draws.len() > self.rows {
            return Err(shape(format!("at most {} rows", self.rows), draws.len().to_string()));
        }
        for (_, draw) in draws {
            check(draw, self.vocab)?;
        }
        let room = most_adjustments(self.vocab);
        let mut start = 0;
        while start < draws.len() {
            let mut count = 0;
            let fits = |(_, draw): &&(u32, Draw<'_>)| {
                count += adjustments(draw);
                count <= room
            };
            let end = start + draws[start..].iter().take_while(fits).count();
            let words = to.map_or(self.tokens.at(4 * start), |(words, first)| words.at(4 * (first + start)));
            self.round(device, (logits, softcap), &draws[start..end], words)?;
            start = end;
        }
        Ok(())
    }

    /// Takes a round to the device.
    fn send(&mut self, device: &Device) -> Result<()> {
        let Round { rows, adjustments, masks, .. } = &self.round;
        let parts = [rows, adjustments, masks];
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        self.next = (self.next + 1) % self.staging.len();
        let staging = &mut self.staging[self.next];
        if bytes > 4 * staging.len() {
            let mut at = 0;
            for part in parts {
                device.upload(&mut self.sent, at, part)?;
                at += part.len();
            }
            return Ok(());
        }
        let words = parts.into_iter().flat_map(|part| part.as_chunks::<4>().0);
        for (to, &word) in staging.words_mut()?.iter_mut().zip(words) {
            *to = u32::from_ne_bytes(word);
        }
        staging.upload(device, bytes / 4, &mut self.sent)
    }

    /// Submits what draws the tokens of some rows, into the words from `to` on.
    fn round(
        &mut self,
        device: &mut Device,
        (logits, softcap): (&DeviceBytes, Option<f32>),
        draws: &[(u32, Draw<'_>)],
        to: Arg,
    ) -> Result<()> {
        self.round.clear();
        draws.iter().for_each(|(row, draw)| self.round.push(*row, draw, self.vocab));
        self.send(device)?;
        let Round { rows, adjustments, masks, cuts } = &self.round;
        let (adjustments_at, masks_at) = (rows.len(), rows.len() + adjustments.len());
        let (rows, vocab) = (self.sent.at(0), Arg::U32(self.vocab as u32));
        let count = draws.len() as u32;
        let slices = Launch { grid: (self.vocab.div_ceil(SLICE) as u32, count), block: THREADS as u32, shared: 0 };
        let logits = logits.at(0);
        if softcap.is_some() || !masks.is_empty() {
            let args = [logits, rows, self.sent.at(masks_at), vocab, Arg::F32(softcap.unwrap_or(0.0))];
            launch(device, "sample_prepare", slices, &args)?;
        }
        if !adjustments.is_empty() {
            let shape = Launch { grid: (count, 1), ..slices };
            let args = [logits, rows, self.sent.at(adjustments_at), vocab];
            launch(device, "sample_adjust", shape, &args)?;
        }
        launch(device, "sample_largest", slices, &[logits, rows, vocab])?;
        for digit in 0..2 * CUT_DIGITS {
            if cuts[(digit / CUT_DIGITS) as usize] {
                let args = [logits, rows, self.histograms.at(0), vocab, Arg::U32(digit)];
                launch(device, "sample_select", slices, &args)?;
            }
        }
        let args = [logits, rows, self.slices.at(0), to, vocab];
        launch(device, "sample_draw", slices, &args)
    }
}

impl Round {
    fn clear(&mut self) {
        self.rows.clear();
        self.adjustments.clear();
        self.masks.clear();
        self.cuts = [false; 2];
    }

    /// Adds a row: `Row` of `cu/sampling.cu`.
    fn push(&mut self, row: u32, draw: &Draw<'_>, vocab: usize) {
        let mut word = |word: u32| self.rows.extend_from_slice(&word.to_le_bytes());
        let greedy = draw.temperature == 0.0;
        // A k of the whole vocabulary keeps all.
        let top_k = if greedy || draw.top_k as usize >= vocab { 0 } else { draw.top_k };
        // 0 would keep all; a share that small keeps one token.
        let share = (f64::from(draw.top_p) * 2f64.powi(64)) as u64;
        let top_p = if greedy || draw.top_p >= 1.0 { 0 } else { share.max(1) };
        let uniform = (draw.uniform * 2f64.powi(53)) as u64;
        for wide in [uniform << 11, top_p, 0, 0] {
            word(wide as u32);
            word((wide >> 32) as u32);
        }
        word(row);
        word(top_k);
        let factor = if greedy { 0.0 } else { 1.0 / draw.temperature };
        let penalties = [draw.repetition_penalty, draw.presence_penalty, draw.frequency_penalty];
        [factor, draw.min_p].into_iter().chain(penalties).for_each(|x| word(x.to_bits()));
        let biases = (self.adjustments.len() / ADJUSTMENT) as u32;
        let seen = biases + draw.bias.len() as u32;
        let excluded = seen + draw.seen.len() as u32;
        let mask = if draw.allowed.is_some() { (self.masks.len() / 4) as u32 } else { NO_MASK };
        [biases, seen, excluded, excluded + draw.excluded.len() as u32, mask, 0, 0, 0, 0].into_iter().for_each(word);

        let bias = draw.bias.iter().map(|(token, bias)| [*token, bias.to_bits()]);
        let seen = draw.seen.iter().map(|(token, count)| [*token, *count]);
        let excluded = draw.excluded.iter().map(|token| [*token, 0]);
        let pairs = bias.chain(seen).chain(excluded);
        self.adjustments.extend(pairs.flatten().flat_map(u32::to_le_bytes));
        self.masks.extend(draw.allowed.unwrap_or(&[]).iter().flat_map(|word| word.to_le_bytes()));
        self.cuts[0] |= top_k > 0;
        self.cuts[1] |= top_p > 0;
    }
}

fn launch(device: &mut Device, name: &'static str, shape: Launch, args: &[Arg]) -> Result<()> {
    let kernel = device.kernel("sampling", name)?;
    device.launch(&kernel, shape, args)
}

fn adjustments(draw: &Draw<'_>) -> usize {
    draw.bias.len() + draw.seen.len() + draw.excluded.len()
}

fn shape(expected: String, got: String) -> Error {
    Error::Shape { op: OP, expected, got }
}

/// That the kernels may follow every number of a draw.
fn check(draw: &Draw<'_>, vocab: usize) -> Result<()> {
    let refuse = |expected: &str, got: String| Err(shape(expected.into(), got));
    // A temperature whose inverse is infinite would make 0 * infinity of the largest logit.
    if draw.temperature != 0.0 && !(draw.temperature >= f32::MIN_POSITIVE && draw.temperature.is_finite()) {
        return refuse("a temperature of 0 or more", draw.temperature.to_string());
    }
    if !(draw.top_p > 0.0 && (0.0..=1.0).contains(&draw.min_p) && (0.0..1.0).contains(&draw.uniform)) {
        let got = format!("{}, {}, {}", draw.top_p, draw.min_p, draw.uniform);
        return refuse("top_p above 0, min_p from 0 to 1, and a random number from 0 to below 1", got);
    }
    let ascending = draw.bias.is_sorted_by(|a, b| a.0 < b.0);
    if !ascending || draw.seen.len() > vocab || draw.excluded.len() > vocab {
        let got = format!("{} biases, {} seen, {} excluded", draw.bias.len(), draw.seen.len(), draw.excluded.len());
        return refuse("ascending biases, and each token once", got);
    }
    let tokens = draw.bias.iter().map(|(token, _)| *token).chain(draw.seen.iter().map(|(token, _)| *token));
    if let Some(token) = tokens.chain(draw.excluded.iter().copied()).find(|&token| token as usize >= vocab) {
        return Err(shape(format!("tokens below {vocab}"), token.to_string()));
    }
    match draw.allowed {
        Some(mask) if mask.len() != mask_words(vocab) => {
            Err(shape(format!("{} words of allowed tokens", mask_words(vocab)), mask.len().to_string()))
        }
        _ => Ok(()),
    }
}
