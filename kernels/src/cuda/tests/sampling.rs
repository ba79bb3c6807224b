//! Drawing tokens on the device, against the definition by a full sort in f64.
//!
//! A draw whose random point, or whose cut, lies within rounding of another token's may go either way; such draws are left
//! out, and there must be few of them.

use super::{backend, set};
use crate::cuda::CudaBackend;
use crate::{Backend, BufferId, Draw, DrawRows, Drawn, Error, NoToken, SamplerId};

/// What counts as rounding, relative to the weight of all tokens.
const ROUNDING: f64 = 1e-6;

/// Random numbers that repeat.
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// From 0 to below 1.
    pub(super) fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / 2f64.powi(53)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.bits() % bound as u64) as usize
    }

    /// Logits as a model's are: many small ones, a few large; every third row has many equal ones.
    fn logits(&mut self, vocab: usize) -> Vec<f32> {
        let coarse = self.below(3) == 0;
        let scale = [0.5, 3.0, 8.0][self.below(3)];
        let logit = |u: f64| (-(u.max(1e-9)).ln() * scale - 5.0) as f32;
        (0..vocab).map(|_| logit(self.unit())).map(|x| if coarse { (x * 2.0).round() / 2.0 } else { x }).collect()
    }
}

/// The tokens that may be drawn and their weights, in the order of tokens; `None` where a cut lies within rounding.
fn kept(logits: &[f32], draw: &Draw<'_>) -> Option<Vec<(u32, f64)>> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |logit: f32| ((f64::from(logit) - f64::from(largest)) / f64::from(draw.temperature)).exp();
    let mut all: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if draw.top_k > 0 {
        all.truncate(draw.top_k as usize);
    }
    let total: f64 = all.iter().map(|(_, logit)| weight(*logit)).sum();
    if draw.top_p < 1.0 {
        let target = f64::from(draw.top_p) * total;
        let (mut sum, mut count) = (0.0, 0);
        while count < all.len() && (sum < target || count == 0) {
            sum += weight(all[count].1);
            count += 1;
            if (sum - target).abs() < ROUNDING * total {
                return None;
            }
        }
        all.truncate(count);
    }
    let min_p = f64::from(draw.min_p);
    if all.iter().any(|(_, logit)| min_p > 0.0 && *logit < largest && (weight(*logit) / min_p - 1.0).abs() < 1e-5) {
        return None;
    }
    all.retain(|(_, logit)| *logit == largest || weight(*logit) >= min_p);
    all.sort_unstable_by_key(|(token, _)| *token);
    Some(all.into_iter().map(|(token, logit)| (token, weight(logit))).collect())
}

/// The logits that a token is drawn from.
fn adjusted(logits: &[f32], softcap: Option<f32>, draw: &Draw<'_>) -> Vec<f32> {
    let mut x: Vec<f32> = logits.iter().map(|&x| softcap.map_or(x, |cap| cap * (x / cap).tanh())).collect();
    if let Some(allowed) = draw.allowed {
        let out = |token: usize| allowed[token / 32] >> (token % 32) & 1 == 0;
        (0..x.len()).filter(|&token| out(token)).for_each(|token| x[token] = f32::NEG_INFINITY);
    }
    draw.bias.iter().for_each(|&(token, bias)| x[token as usize] += bias);
    for &(token, count) in draw.seen {
        let x = &mut x[token as usize];
        *x = if *x > 0.0 { *x / draw.repetition_penalty } else { *x * draw.repetition_penalty };
        if count > 0 {
            *x -= draw.presence_penalty + count as f32 * draw.frequency_penalty;
        }
    }
    draw.excluded.iter().for_each(|&token| x[token as usize] = f32::NEG_INFINITY);
    x
}

/// The token by definition; `None` where rounding decides.
fn by_definition(logits: &[f32], softcap: Option<f32>, draw: &Draw<'_>) -> Option<Drawn> {
    let x = adjusted(logits, softcap, draw);
    if x.iter().any(|x| x.is_nan()) {
        return Some(Err(NoToken::NotANumber));
    }
    let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if largest.is_infinite() {
        return Some(Err(if largest > 0.0 { NoToken::Infinite } else { NoToken::Excluded }));
    }
    if draw.temperature == 0.0 {
        return Some(Ok(x.iter().position(|&x| x == largest).unwrap() as u32));
    }
    let kept = kept(&x, draw)?;
    let total: f64 = kept.iter().map(|(_, weight)| weight).sum();
    let point = draw.uniform * total;
    let mut sum = 0.0;
    for &(token, weight) in &kept {
        sum += weight;
        // The last token ends where the points do.
        if (point - sum).abs() < ROUNDING * total && sum < (1.0 - ROUNDING) * total {
            return None;
        }
        if point < sum {
            return Some(Ok(token));
        }
    }
    None
}

/// A device with rows of logits and room to draw from `rows` of them.
struct Rig {
    backend: CudaBackend,
    sampler: SamplerId,
    logits: BufferId,
}

impl Rig {
    fn new(rows: usize, vocab: usize) -> Self {
        let mut backend = backend();
        let logits = backend.alloc_buffer(rows, vocab).unwrap();
        let sampler = backend.alloc_sampler(rows, vocab).unwrap().unwrap();
        Self { backend, sampler, logits }
    }

    /// Draws from these logits, all in one op.
    fn draw(&mut self, logits: &[Vec<f32>], softcap: Option<f32>, draws: &[(u32, Draw<'_>)]) -> Vec<Drawn> {
        set(&mut self.backend, self.logits, logits.len(), |row, col| logits[row][col]);
        let mut out = vec![Ok(7); 3];
        let op = DrawRows { sampler: self.sampler, logits: self.logits, softcap, draws };
        self.backend.draw(op, &mut out).unwrap();
        out
    }
}

/// Every filter on and off, with temperatures from almost greedy to almost even.
fn draws(dice: &mut Dice, vocab: usize, count: usize) -> Vec<Draw<'static>> {
    let one = |_| Draw {
        temperature: [0.0, 1e-5, 0.3, 0.8, 1.0, 1.7, 1e6][dice.below(7)],
        top_k: [0, 0, 1, 2, 40, vocab as u32 - 1, vocab as u32 + 5][dice.below(7)],
        top_p: [1.0, 1.0, 0.95, 0.5, 1e-30, 0.99][dice.below(6)],
        min_p: [0.0, 0.0, 0.05, 1.0][dice.below(4)],
        uniform: [dice.unit(), dice.unit(), dice.unit(), dice.unit(), dice.unit(), 0.0, 0.999][dice.below(7)],
        ..Draw::GREEDY
    };
    (0..count).map(one).collect()
}

#[test]
fn draws_are_those_of_the_definition_and_do_not_see_each_other() {
    const ROWS: usize = 24;
    let mut dice = Dice(1);
    let (mut compared, mut close) = (0, 0);
    for vocab in [1, 2, 31, 300, 4096, 4097, 9001] {
        let mut rig = Rig::new(ROWS, vocab);
        let logits: Vec<_> = (0..ROWS).map(|_| dice.logits(vocab)).collect();
        let draws: Vec<(u32, Draw<'_>)> = (0..).zip(draws(&mut dice, vocab, ROWS)).collect();
        let got = rig.draw(&logits, None, &draws);
        assert_eq!(got.len(), ROWS);
        for ((row, draw), got) in draws.iter().zip(&got) {
            match by_definition(&logits[*row as usize], None, draw) {
                Some(expected) => assert_eq!(*got, expected, "{vocab} {row} {draw:?}"),
                None => close += 1,
            }
            compared += 1;
        }
        // Alone, in another place, and in the company of others.
        for row in [0, 5, 17] {
            let alone = [logits[row].clone()];
            assert_eq!(rig.draw(&alone, None, &[(0, draws[row].1)]), [got[row]], "{vocab} {row}");
        }
        let some: Vec<_> = draws.iter().copied().filter(|(row, _)| row % 5 == 2).collect();
        let expected: Vec<_> = some.iter().map(|(row, _)| got[*row as usize]).collect();
        assert_eq!(rig.draw(&logits, None, &some), expected, "{vocab}");
    }
    assert!(close * 20 < compared, "{close} of {compared} draws could go either way");
}

#[test]
fn a_row_of_128256_tokens() {
    const VOCAB: usize = 128_256;
    let mut dice = Dice(2);
    let logits = [dice.logits(VOCAB)];
    let mut rig = Rig::new(1, VOCAB);
    for (temperature, top_k, top_p) in [(1.0, 0, 1.0), (0.9, 50, 0.9)] {
        let draw = Draw { temperature, top_k, top_p, uniform: dice.unit(), ..Draw::GREEDY };
        let expected = by_definition(&logits[0], None, &draw).unwrap();
        assert_eq!(rig.draw(&logits, None, &[(0, draw)]), [expected], "{draw:?}");
    }
}

#[test]
fn adjustments_masks_and_caps_come_in_their_order() {
    const ROWS: usize = 12;
    let mut dice = Dice(3);
    let (mut compared, mut close) = (0, 0);
    for (vocab, softcap) in [(70, None), (300, Some(4.0)), (4100, Some(30.0))] {
        let mut rig = Rig::new(ROWS, vocab);
        let logits: Vec<_> = (0..ROWS).map(|_| dice.logits(vocab)).collect();
        let every = |dice: &mut Dice, step: usize| (dice.below(step)..vocab).step_by(step).map(|i| i as u32);
        let biases: Vec<Vec<_>> =
            (0..ROWS).map(|_| every(&mut dice, 3).map(|t| (t, (t % 7) as f32 - 3.0)).collect()).collect();
        let seen: Vec<Vec<_>> = (0..ROWS).map(|_| every(&mut dice, 2).map(|t| (t, t % 4)).collect()).collect();
        let excluded: Vec<Vec<_>> = (0..ROWS).map(|_| every(&mut dice, 5).collect()).collect();
        let masks: Vec<Vec<_>> =
            (0..ROWS).map(|_| (0..vocab.div_ceil(32)).map(|_| (dice.bits() | dice.bits()) as u32).collect()).collect();
        let draws: Vec<(u32, Draw<'_>)> = draws(&mut dice, vocab, ROWS)
            .into_iter()
            .enumerate()
            .map(|(i, draw)| {
                let with = |n: usize| i % 4 == n || i % 4 == 3;
                let draw = Draw {
                    bias: if with(0) { &biases[i] } else { &[] },
                    seen: if with(1) { &seen[i] } else { &[] },
                    repetition_penalty: 1.3,
                    presence_penalty: 0.7,
                    frequency_penalty: -0.4,
                    excluded: if with(2) { &excluded[i] } else { &[] },
                    allowed: (i % 3 == 0).then_some(&masks[i]),
                    ..draw
                };
                (i as u32, draw)
            })
            .collect();
        let got = rig.draw(&logits, softcap, &draws);
        for ((row, draw), got) in draws.iter().zip(&got) {
            let logits = &logits[*row as usize];
            match by_definition(logits, softcap, draw) {
                Some(expected) => {
                    assert_eq!(*got, expected, "{vocab} {row} {draw:?}");
                    if let Ok(token) = got {
                        assert!(!draw.excluded.contains(token), "{token} is excluded");
                        assert!(draw.allowed.is_none_or(|mask| mask[*token as usize / 32] >> (token % 32) & 1 == 1));
                    }
                }
                None => close += 1,
            }
            compared += 1;
        }
    }
    assert!(close * 8 < compared, "{close} of {compared} draws could go either way");
}

#[test]
fn equal_logits_are_cut_by_token() {
    let mut rig = Rig::new(8, 5000);
    let flat = vec![vec![0.5; 5000]; 8];
    let mut reach = |draw: Draw<'_>| {
        let draws: Vec<_> = (0..8).map(|i| (i, Draw { uniform: (f64::from(i) + 0.5) / 8.0, ..draw })).collect();
        rig.draw(&flat, None, &draws).into_iter().map(Result::unwrap).collect::<Vec<_>>()
    };
    let even = Draw { temperature: 1.0, ..Draw::GREEDY };
    assert_eq!(reach(Draw { top_k: 8, ..even }), [0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(reach(Draw { top_k: 16, top_p: 0.25, ..even }), [0, 0, 1, 1, 2, 2, 3, 3]);
    // Half of 5000 exactly.
    assert_eq!(reach(Draw { top_p: 0.5, ..even }), [156, 468, 781, 1093, 1406, 1718, 2031, 2343]);
    assert_eq!(reach(Draw { top_k: 4800, ..even })[7], 4500);
    assert_eq!(reach(Draw::GREEDY), [0; 8]);
}

#[test]
fn extremes_are_drawn_or_refused_row_by_row() {
    const VOCAB: usize = 5000;
    let only = |token: usize, value: f32, others: f32| {
        let mut row = vec![others; VOCAB];
        row[token] = value;
        row
    };
    let (most, least) = (f32::MAX, f32::MIN);
    let rows = [
        only(4999, -3.0, f32::NEG_INFINITY),
        only(4321, f32::NAN, 1.0),
        only(77, f32::INFINITY, 1.0),
        only(0, f32::NEG_INFINITY, f32::NEG_INFINITY),
        only(4097, most, least),
        only(4097, -0.0, 0.0),
        only(9, 1e-40, -1e-40),
        only(2, -f32::NAN, 3.0),
    ];
    let expected = [
        Ok(4999),
        Err(NoToken::NotANumber),
        Err(NoToken::Infinite),
        Err(NoToken::Excluded),
        Ok(4097),
        Ok(0),
        Ok(9),
        Err(NoToken::NotANumber),
    ];
    let mut rig = Rig::new(rows.len(), VOCAB);
    for draw in [
        Draw::GREEDY,
        Draw { temperature: 1.0, top_k: 1, uniform: 0.9, ..Draw::GREEDY },
        Draw { temperature: 1e-5, top_p: f32::MIN_POSITIVE, uniform: 0.999, ..Draw::GREEDY },
        Draw { temperature: 1e30, top_k: 3, top_p: 1e-20, min_p: 1.0, ..Draw::GREEDY },
    ] {
        let draws: Vec<_> = (0..rows.len() as u32).map(|row| (row, draw)).collect();
        assert_eq!(rig.draw(&rows, None, &draws), expected, "{draw:?}");
    }
    // Without filters, a token that cannot be drawn is not drawn at either end.
    for uniform in [0.0, 1.0 - 2f64.powi(-53)] {
        let draw = Draw { temperature: 2.0, uniform, ..Draw::GREEDY };
        assert_eq!(rig.draw(&rows[..1], None, &[(0, draw)]), [Ok(4999)]);
    }
}

#[test]
fn shares_are_those_of_the_distribution() {
    const VOCAB: usize = 12;
    const ROWS: usize = 64;
    let mut dice = Dice(4);
    let logits: Vec<f32> = (0..VOCAB).map(|i| ((i * 5) % 12) as f32 * 0.3).collect();
    let mut rig = Rig::new(ROWS, VOCAB);
    let rows = vec![logits.clone(); ROWS];
    let plain = Draw { temperature: 0.9, ..Draw::GREEDY };
    for draw in [plain, Draw { top_k: 9, top_p: 0.9, min_p: 0.1, ..plain }] {
        let kept = kept(&logits, &draw).unwrap();
        let total: f64 = kept.iter().map(|(_, weight)| weight).sum();
        let mut counts = [0u32; VOCAB];
        let rounds = 16;
        for _ in 0..rounds {
            let draws: Vec<_> = (0..ROWS as u32).map(|row| (row, Draw { uniform: dice.unit(), ..draw })).collect();
            rig.draw(&rows, None, &draws).into_iter().for_each(|token| counts[token.unwrap() as usize] += 1);
        }
        let all = f64::from(rounds) * ROWS as f64;
        let mut chi_square = 0.0;
        for &(token, weight) in &kept {
            let expected = all * weight / total;
            chi_square += (f64::from(counts[token as usize]) - expected).powi(2) / expected;
        }
        let drawn: u32 = kept.iter().map(|(token, _)| counts[*token as usize]).sum();
        assert_eq!(f64::from(drawn), all, "a token was drawn that a filter leaves out");
        // Above this in one of a thousand samples for 11 degrees of freedom, and less often for fewer.
        assert!(chi_square < 31.3, "{chi_square} {counts:?}");
    }
}

#[test]
fn many_adjustments_take_several_rounds_and_no_memory() {
    const ROWS: usize = 150;
    let vocab = 150;
    let mut rig = Rig::new(ROWS, vocab);
    // 450 for each row, 67,500 together.
    let bias: Vec<_> = (0..vocab as u32).map(|token| (token, 1.0)).collect();
    let seen: Vec<_> = (0..vocab as u32).map(|token| (token, 1)).collect();
    let excluded: Vec<Vec<u32>> = (0..ROWS)
        .map(|row| (0..vocab as u32).map(|token| if token as usize == row { 0 } else { token }).collect())
        .collect();
    let draws: Vec<_> = (0..ROWS)
        .map(|row| {
            // All but one token of each row; of the first row, all.
            let draw = Draw { temperature: 1.0, uniform: 0.5, bias: &bias, seen: &seen, ..Draw::GREEDY };
            (row as u32, Draw { excluded: &excluded[row], presence_penalty: 3.0, ..draw })
        })
        .collect();
    let before = rig.backend.allocated_bytes();
    let got = rig.draw(&vec![vec![0.0; vocab]; ROWS], None, &draws);
    assert_eq!(rig.backend.allocated_bytes(), before);
    assert_eq!(got[0], Err(NoToken::Excluded));
    assert!(got[1..].iter().zip(1..).all(|(got, row)| *got == Ok(row)), "{got:?}");
}

#[test]
fn misuse_of_drawing_is_refused() {
    let mut rig = Rig::new(3, 40);
    let even = Draw { temperature: 1.0, ..Draw::GREEDY };
    let mut refused = |draws: &[(u32, Draw<'_>)], says: &str| {
        let op = DrawRows { sampler: rig.sampler, logits: rig.logits, softcap: None, draws };
        let error = rig.backend.draw(op, &mut Vec::new()).unwrap_err();
        assert!(matches!(error, Error::Shape { op: "draw", .. }) && error.to_string().contains(says), "{error}");
    };
    refused(&[(3, even)], "at most 3 rows");
    refused(&[(1, even), (0, even)], "ascending order");
    refused(&[(0, even), (0, even)], "ascending order");
    refused(&[(0, Draw { bias: &[(40, 1.0)], ..even })], "tokens below 40");
    refused(&[(0, Draw { seen: &[(400, 1)], ..even })], "tokens below 40");
    refused(&[(0, Draw { excluded: &[u32::MAX], ..even })], "tokens below 40");
    refused(&[(0, Draw { bias: &[(3, 1.0), (3, 2.0)], ..even })], "each token once");
    refused(&[(0, Draw { allowed: Some(&[0]), ..even })], "2 words");
    refused(&[(0, Draw { temperature: f32::NAN, ..even })], "temperature");
    refused(&[(0, Draw { temperature: -1.0, ..even })], "temperature");
    refused(&[(0, Draw { top_p: 0.0, ..even })], "top_p above 0");
    refused(&[(0, Draw { uniform: 1.0, ..even })], "below 1");
    let other = rig.backend.alloc_buffer(3, 41).unwrap();
    let op = DrawRows { sampler: rig.sampler, logits: other, softcap: None, draws: &[(0, even)] };
    assert!(rig.backend.draw(op, &mut Vec::new()).unwrap_err().to_string().contains("41 columns"));
    assert!(rig.backend.alloc_sampler(1, (1 << 20) + 1).unwrap_err().to_string().contains("1 to 1048576 tokens"));
}
