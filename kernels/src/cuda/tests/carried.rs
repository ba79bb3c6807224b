//! Passes whose token ids are what the pass before has chosen.

use super::{backend, get, input, loaded, set};
use crate::cpu::{CpuBackend, CpuConfig};
use crate::cuda::CudaBackend;
use crate::{
    Backend, BufferId, Draw, DrawRows, Error, LinearId, NoToken, PartOrder, Pass, Recorded, Result, SamplerId, Turn,
    WeightType, drawn,
};

const VOCAB: usize = 40;
const COLS: usize = 96;
const ROWS: usize = 8;

struct Rig {
    backend: CudaBackend,
    table: LinearId,
    out: BufferId,
    logits: BufferId,
    sampler: SamplerId,
    turn: Turn,
    /// Times that the ops of a pass were run.
    ran: usize,
}

impl Rig {
    fn new() -> Self {
        let mut backend = backend();
        let (table, _) = loaded(&mut backend, &[(WeightType::Bf16, VOCAB)], COLS, PartOrder::Concat, None);
        let out = backend.alloc_buffer(ROWS, COLS).unwrap();
        let logits = backend.alloc_buffer(ROWS, VOCAB).unwrap();
        let sampler = backend.alloc_sampler(ROWS, VOCAB).unwrap().unwrap();
        Self { backend, table, out, logits, sampler, turn: Turn::A, ran: 0 }
    }

    fn begin(&mut self, tokens: &[u32], carried: &[u32], repeated: Option<usize>) -> Result<()> {
        self.turn = self.turn.other();
        let turn = self.turn;
        let empty = Pass { tokens, carried, turn, spans: &[], last_spans: &[], kept: &[], block_table: &[], repeated };
        self.backend.begin_pass(&empty)
    }

    /// The pass under way chooses these tokens, or has a row that nothing can be chosen from.
    fn choose(&mut self, tokens: &[Option<u32>]) {
        let value = |row: usize, col: usize| match tokens[row] {
            Some(token) => f32::from(u8::from(token as usize == col)),
            None => f32::NAN,
        };
        set(&mut self.backend, self.logits, tokens.len(), value);
        let draws: Vec<_> = (0..tokens.len() as u32).map(|row| (row, Draw::GREEDY)).collect();
        // In two rounds.
        let (first, second) = draws.split_at(tokens.len() / 2);
        for (draws, at) in [(first, 0), (second, first.len())] {
            let op = DrawRows { sampler: self.sampler, logits: self.logits, softcap: None, draws };
            self.backend.submit_draws(op, at).unwrap();
        }
    }

    /// The embeddings of a pass of rows that are carried, padded to `rows`.
    fn carry(&mut self, carried: &[u32], rows: usize, repeated: Option<usize>) -> Vec<Vec<f32>> {
        let padded = vec![0; rows];
        self.begin(&padded, carried, repeated).unwrap();
        let Self { table, out, .. } = *self;
        let mut count = 0;
        let mut ops = |backend: &mut dyn Backend| {
            count += 1;
            backend.embed(table, &padded, 1.0, out)
        };
        self.backend.replay(&mut ops).unwrap();
        self.ran += count;
        get(&mut self.backend, out, carried.len())
    }

    /// The embeddings of tokens that are known.
    fn known(&mut self, tokens: &[u32]) -> Vec<Vec<f32>> {
        let mut plain = Rig::new();
        plain.backend.embed(plain.table, tokens, 1.0, plain.out).unwrap();
        get(&mut plain.backend, plain.out, tokens.len())
    }
}

#[test]
fn carried_rows_are_those_of_the_tokens_that_were_chosen() {
    let mut rig = Rig::new();
    rig.begin(&[1, 2, 3, 4], &[], None).unwrap();
    rig.choose(&[Some(5), Some(39), Some(0), Some(7)]);
    let got = rig.carry(&[3, 0, 1, 1], 4, None);
    assert_eq!(got, rig.known(&[7, 5, 39, 39]));
    // What this pass chooses goes to the other place: the host still reads what the one before has chosen.
    rig.choose(&[Some(10), Some(11)]);
    assert_eq!(rig.backend.chosen(rig.turn.other(), 4).unwrap(), [5, 39, 0, 7]);
    assert_eq!(rig.backend.chosen(rig.turn, 2).unwrap(), [10, 11]);
    let got = rig.carry(&[1], 1, None);
    assert_eq!(got, rig.known(&[11]));
}

#[test]
fn a_recorded_pass_carries_what_was_chosen_last() {
    let mut rig = Rig::new();
    assert!(rig.backend.record_passes(true));
    rig.begin(&[0], &[], None).unwrap();
    rig.choose(&[Some(1), Some(2), Some(3)]);
    let mut expected = vec![1, 2, 3];
    for step in 0..8u32 {
        // The rows of a sequence that ended leave.
        let carried: Vec<u32> = (0..expected.len() as u32).filter(|row| row + 1 != step % 4).collect();
        let got = rig.carry(&carried, 4, Some(0));
        let tokens: Vec<u32> = carried.iter().map(|&row| expected[row as usize]).collect();
        assert_eq!(got, rig.known(&tokens), "step {step}");
        expected = (0..3).map(|row| (step * 5 + row * 11) % VOCAB as u32).collect();
        rig.choose(&expected.iter().copied().map(Some).collect::<Vec<_>>());
    }
    assert_eq!(rig.ran, 2, "once to load the kernels, once to record");
    assert_eq!(rig.backend.recorded(), Recorded { graphs: 1, failed: None });
}

#[test]
fn the_results_of_an_argmax_are_carried() {
    let mut rig = Rig::new();
    let (act, _) = input(&mut rig.backend, 3, COLS, rig.table);
    rig.begin(&[0], &[], None).unwrap();
    rig.backend.linear_argmax(act, 3, rig.table, 0).unwrap();
    rig.backend.linear_argmax(act, 2, rig.table, 3).unwrap();
    let got = rig.carry(&[4, 2, 0, 1, 3], 5, None);
    let best = rig.backend.chosen(rig.turn.other(), 5).unwrap().to_vec();
    assert_eq!(got, rig.known(&[best[4], best[2], best[0], best[1], best[3]]));
}

#[test]
fn a_row_without_a_token_goes_on_with_some_token_and_says_so() {
    let mut rig = Rig::new();
    rig.begin(&[0], &[], None).unwrap();
    rig.choose(&[Some(9), None, Some(4)]);
    let got = rig.carry(&[0, 1, 2], 3, None);
    assert_eq!(got, rig.known(&[9, 0, 4]));
    let words = rig.backend.chosen(rig.turn.other(), 3).unwrap();
    let tokens: Vec<_> = words.iter().map(|&word| drawn(word, VOCAB)).collect();
    assert_eq!(tokens, [Ok(9), Err(NoToken::NotANumber), Ok(4)]);
}

#[test]
fn tokens_that_cannot_be_carried_are_refused() {
    let mut rig = Rig::new();
    let says = |got: Result<()>, what: &str| {
        let error = got.unwrap_err();
        assert!(matches!(error, Error::Shape { .. }) && error.to_string().contains(what), "{error}");
    };
    says(rig.begin(&[0], &[0], None), "one of the 0 results");
    rig.begin(&[0], &[], None).unwrap();
    rig.choose(&[Some(1), Some(2)]);
    says(rig.begin(&[0, 0, 0], &[0, 2], None), "one of the 2 results");
    rig.turn = rig.turn.other();
    says(rig.begin(&[0], &[0, 1], None), "at most 1 carried");
    rig.turn = rig.turn.other();
    // A refused pass leaves the results of the one before alone.
    let got = rig.carry(&[1], 1, None);
    assert_eq!(got, rig.known(&[2]));
    // Nor may a token be carried into a table that does not have it.
    let (small, _) = loaded(&mut rig.backend, &[(WeightType::Bf16, VOCAB - 1)], COLS, PartOrder::Concat, None);
    says(rig.backend.embed(small, &[0], 1.0, rig.out), "carried tokens below 39");
    // Where tokens are known at once there is nothing to carry.
    let mut cpu = CpuBackend::new(CpuConfig { threads: Some(1), isa: None }).unwrap();
    let (turn, repeated) = (Turn::A, None);
    let pass =
        Pass { tokens: &[0], carried: &[0], turn, spans: &[], last_spans: &[], kept: &[], block_table: &[], repeated };
    says(cpu.begin_pass(&pass), "tokens that are known");
}
