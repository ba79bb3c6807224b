//! The scheduler as a pure function: what goes into a step, who waits, who makes room.

use super::*;
use crate::sequence::Sharing;

fn scheduler(max_seqs: usize, max_rows: usize, num_blocks: usize) -> Scheduler {
    Scheduler::new(Limits { max_seqs, max_rows }, num_blocks)
}

/// `len` tokens that differ from those of every other `kind`.
fn prompt(kind: u32, len: usize) -> Vec<u32> {
    (0..len).map(|i| kind * 10_000 + u32::try_from(i).expect("small")).collect()
}

fn add(scheduler: &mut Scheduler, arrival: u64, tokens: Vec<u32>) {
    scheduler.add(Sequence::for_test(arrival, tokens));
}

/// Plans and commits a step, appends a token to every sequence that sampled, and gives `(arrival, start, len)` of its
/// spans.
fn step(scheduler: &mut Scheduler) -> Vec<(u64, usize, usize)> {
    let step = scheduler.schedule();
    scheduler.check().expect("whole after schedule");
    let rows: usize = step.spans.iter().map(|span| span.len).sum();
    assert!(rows <= scheduler.limits.max_rows);
    finish_step(scheduler, &step);
    rows_of(&step)
}

/// `(arrival, start, len)` of the spans of a step.
fn rows_of(step: &Step) -> Vec<(u64, usize, usize)> {
    step.spans.iter().map(|span| (span.arrival, span.start, span.len)).collect()
}

/// Commits a step, and gives a token to every sequence that sampled and is still there.
fn finish_step(scheduler: &mut Scheduler, step: &Step) {
    scheduler.commit(step);
    for span in &step.spans {
        if let Some(sequence) = scheduler.get_mut(span.arrival)
            && span.start + span.len == sequence.known.len()
        {
            assert_eq!(span.first_output, Some(span.start + span.len - 1));
            sequence.learn(7);
        }
    }
    scheduler.check().expect("whole after commit");
}

fn finish(scheduler: &mut Scheduler, arrival: u64) {
    scheduler.remove_if(|sequence| sequence.arrival == arrival);
    scheduler.check().expect("whole after a sequence left");
}

#[test]
fn decode_rows_come_first_and_chunks_fill_the_rest() {
    let mut s = scheduler(4, 40, 100);
    add(&mut s, 0, prompt(0, 10));
    add(&mut s, 1, prompt(1, 100));
    assert_eq!(step(&mut s), [(0, 0, 10), (1, 0, 30)]);
    assert_eq!(step(&mut s), [(0, 10, 1), (1, 30, 39)]);
    add(&mut s, 2, prompt(2, 50));
    assert_eq!(step(&mut s), [(0, 11, 1), (1, 69, 31), (2, 0, 8)]);
    assert_eq!(step(&mut s), [(0, 12, 1), (1, 100, 1), (2, 8, 38)]);
}

#[test]
fn slots_limit_admission() {
    let mut s = scheduler(2, 64, 100);
    (0..3).for_each(|i| add(&mut s, i, prompt(u32::try_from(i).expect("small"), 5)));
    assert_eq!(step(&mut s), [(0, 0, 5), (1, 0, 5)]);
    finish(&mut s, 0);
    assert_eq!(step(&mut s), [(1, 5, 1), (2, 0, 5)]);
}

#[test]
fn admission_is_in_order_and_waits_for_the_whole_prompt() {
    let mut s = scheduler(4, 512, 4);
    add(&mut s, 0, prompt(0, 90));
    add(&mut s, 1, prompt(1, 60));
    add(&mut s, 2, prompt(2, 5));
    assert_eq!(step(&mut s), [(0, 0, 90)], "the second needs two blocks, one is left; the third may not pass it");
    finish(&mut s, 0);
    assert_eq!(step(&mut s), [(1, 0, 60), (2, 0, 5)]);
}

#[test]
fn blocks_promised_to_a_running_prompt_are_not_given_away() {
    let mut s = scheduler(4, 32, 4);
    add(&mut s, 0, prompt(0, 96));
    add(&mut s, 1, prompt(1, 60));
    assert_eq!(step(&mut s), [(0, 0, 32)]);
    assert_eq!(step(&mut s), [(0, 32, 32)]);
    assert_eq!(step(&mut s), [(0, 64, 32)]);
    assert_eq!(step(&mut s), [(0, 96, 1)], "the fourth block went to the first answer");
}

#[test]
fn the_youngest_makes_room_and_comes_back_with_its_tokens() {
    let mut s = scheduler(4, 512, 4);
    add(&mut s, 0, prompt(0, 62));
    add(&mut s, 1, prompt(1, 62));
    assert_eq!(step(&mut s).len(), 2);
    // Both answers grow to 64 tokens, which fill two blocks each; the 65th token of the first needs a fifth block.
    step(&mut s);
    step(&mut s);
    let planned = s.schedule();
    assert_eq!(planned.preempted, 1);
    assert_eq!(planned.spans.len(), 1);
    assert_eq!(s.waiting[0].arrival, 1);
    assert_eq!(s.waiting[0].generated(), 3);
    finish_step(&mut s, &planned);
    assert_eq!(step(&mut s), [(0, 65, 1)], "its place is not given back while it does not fit");
    finish(&mut s, 0);
    assert_eq!(step(&mut s), [(1, 32, 33)], "one of its blocks was still cached");
    assert_eq!(s.running[0].preemptions, 1);
}

#[test]
fn a_prompt_in_progress_waits_when_answers_take_its_last_block() {
    let mut s = scheduler(4, 10, 4);
    add(&mut s, 0, prompt(0, 30));
    add(&mut s, 1, prompt(1, 90));
    (0..4).for_each(|_| drop(step(&mut s)));
    // The first needs a second block at its 33rd token; the other one then lacks its third.
    let (mut widest, mut steps) = (0, 0);
    while s.running.len() == 2 && s.running[0].known.len() < 60 {
        step(&mut s);
        widest = widest.max(s.running[1].submitted);
        steps += 1;
    }
    assert!(steps > 20 && widest == 64, "{widest} rows after {steps} steps");
    finish(&mut s, 0);
    assert_eq!(step(&mut s), [(1, 64, 10)]);
}

#[test]
fn a_prefix_in_the_cache_is_not_computed_again_but_for_the_last_token() {
    let mut s = scheduler(4, 512, 20);
    add(&mut s, 0, prompt(0, 64));
    step(&mut s);
    finish(&mut s, 0);
    add(&mut s, 1, prompt(0, 64));
    assert_eq!(step(&mut s), [(1, 32, 32)], "the last token is computed, and so is its block");
    assert_eq!(s.running[0].cached, Some(32));
    let longer: Vec<u32> = prompt(0, 64).into_iter().chain([1, 2, 3]).collect();
    add(&mut s, 2, longer);
    assert_eq!(step(&mut s), [(1, 64, 1), (2, 64, 3)]);
}

#[test]
fn generated_tokens_are_cached_as_well() {
    let mut s = scheduler(4, 512, 20);
    add(&mut s, 0, prompt(0, 30));
    (0..4).for_each(|_| drop(step(&mut s)));
    let conversation: Vec<u32> = s.running[0].known.iter().copied().chain([1, 2]).collect();
    finish(&mut s, 0);
    add(&mut s, 1, conversation);
    assert_eq!(step(&mut s), [(1, 32, 4)]);
}

#[test]
fn equal_prompts_compute_their_prefix_once() {
    let mut s = scheduler(8, 512, 60);
    (0..4).for_each(|i| add(&mut s, i, prompt(0, 100)));
    assert_eq!(step(&mut s), [(0, 0, 100)], "the others wait for its blocks");
    assert_eq!(step(&mut s), [(0, 100, 1), (1, 96, 4), (2, 96, 4), (3, 96, 4)]);
}

#[test]
fn a_chunked_prefix_is_shared_while_it_is_computed() {
    let mut s = scheduler(8, 50, 60);
    add(&mut s, 0, prompt(0, 100));
    add(&mut s, 1, prompt(0, 100));
    add(&mut s, 2, prompt(2, 20));
    let computed: usize = (0..4).flat_map(|_| step(&mut s)).filter(|(who, ..)| *who < 2).map(|(.., len)| len).sum();
    assert!(computed <= 100 + 4 + 8, "{computed} rows for one prefix of 96 tokens and two ends of 4");
}

#[test]
fn others_pass_a_sequence_that_waits_for_a_prefix() {
    let mut s = scheduler(8, 512, 60);
    add(&mut s, 0, prompt(0, 40));
    add(&mut s, 1, prompt(0, 40));
    add(&mut s, 2, prompt(2, 20));
    assert_eq!(step(&mut s), [(0, 0, 40), (2, 0, 20)]);
    assert_eq!(step(&mut s), [(0, 40, 1), (2, 20, 1), (1, 32, 8)]);
    assert!(s.running.is_sorted_by_key(|sequence| sequence.arrival));
}

#[test]
fn a_waiter_takes_over_when_the_owner_leaves() {
    let mut s = scheduler(8, 40, 60);
    add(&mut s, 0, prompt(0, 100));
    add(&mut s, 1, prompt(0, 100));
    assert_eq!(step(&mut s), [(0, 0, 40)]);
    finish(&mut s, 0);
    assert_eq!(step(&mut s), [(1, 32, 40)], "one block was written, the announced one was withdrawn");
}

#[test]
fn salts_and_private_sequences_do_not_share() {
    let mut s = scheduler(8, 512, 60);
    for (arrival, read, write, salt) in [(0, true, true, 1), (1, true, true, 2), (2, false, false, 1)] {
        let sharing = Sharing { read, write, salt };
        s.add(Sequence { sharing, ..Sequence::for_test(arrival, prompt(0, 64)) });
    }
    assert_eq!(step(&mut s), [(0, 0, 64), (1, 0, 64), (2, 0, 64)]);
}

#[test]
fn rows_scored_before_a_preemption_are_not_scored_again() {
    let mut sequence = Sequence { scored: Some(10), ..Sequence::for_test(0, prompt(0, 20)) };
    assert_eq!(sequence.first_output(0, 8), None);
    assert_eq!(sequence.first_output(0, 16), Some(10));
    sequence.scored = Some(19);
    assert_eq!(sequence.first_output(0, 19), None);
    assert_eq!(sequence.first_output(0, 20), Some(19));
    sequence.answers = false;
    assert_eq!(sequence.first_output(0, 20), None);
}

/// Random arrivals, departures and lengths over a small pool: no table ever breaks, and everyone finishes.
#[test]
fn a_random_day_keeps_every_table_whole() {
    for seed in 0..20u64 {
        let mut random = seed * 7919 + 1;
        let mut draw = |below: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % below
        };
        let mut s = scheduler(6, 24 + usize::try_from(draw(100)).expect("small"), 8);
        let (mut arrivals, mut left, mut steps) = (0, 0, 0);
        while left < 60 {
            steps += 1;
            assert!(steps < 20_000, "seed {seed}: no progress");
            if arrivals < 60 && draw(3) == 0 {
                let kind = u32::try_from(draw(3)).expect("small");
                let len = 1 + usize::try_from(draw(180)).expect("small");
                add(&mut s, arrivals, prompt(kind, len));
                arrivals += 1;
            }
            step(&mut s);
            if !s.is_empty() && s.running.is_empty() {
                panic!("seed {seed}: sequences wait and none runs");
            }
            let most = 8 * BLOCK_SIZE;
            let gone: Vec<u64> = s
                .running
                .iter()
                .chain(&s.waiting)
                .filter(|sequence| sequence.generated() >= 40 || sequence.known.len() >= most || draw(200) == 0)
                .map(|sequence| sequence.arrival)
                .collect();
            left += gone.len();
            gone.into_iter().for_each(|arrival| finish(&mut s, arrival));
        }
        assert_eq!(s.report().leased, 0);
    }
}

fn ahead(scheduler: &mut Scheduler) -> Option<Step> {
    let step = scheduler.go_ahead(|_| true);
    scheduler.check().expect("whole after going ahead");
    step
}

#[test]
fn a_step_ahead_has_a_row_for_every_answer_that_goes_on() {
    let mut s = scheduler(4, 100, 100);
    for (arrival, longest) in [(0, 13), (1, 12), (2, usize::MAX)] {
        s.add(Sequence { longest, ..Sequence::for_test(arrival, prompt(arrival as u32, 10)) });
    }
    let first = s.schedule();
    assert_eq!(ahead(&mut s).map(|step| rows_of(&step)), Some(vec![(0, 10, 1), (1, 10, 1), (2, 10, 1)]));
    // The second ends with its second token, which is not known and not needed for that.
    finish_step(&mut s, &first);
    assert_eq!(s.get(1).map(|sequence| (sequence.known.len(), sequence.unknown)), Some((11, 1)));
    assert_eq!(ahead(&mut s).map(|step| rows_of(&step)), Some(vec![(0, 11, 1), (2, 11, 1)]));
}

#[test]
fn what_is_more_than_decoding_is_not_planned_ahead() {
    // A prompt in progress.
    let mut s = scheduler(4, 16, 100);
    add(&mut s, 0, prompt(0, 30));
    let first = s.schedule();
    assert_eq!(ahead(&mut s), None);
    finish_step(&mut s, &first);
    let second = s.schedule();
    let third = ahead(&mut s).expect("it decodes");
    finish_step(&mut s, &second);
    // A sequence that could be let in, until it leaves.
    add(&mut s, 1, prompt(1, 5));
    assert_eq!(ahead(&mut s), None);
    finish(&mut s, 1);
    // A row that needs what is not known.
    assert_eq!(s.go_ahead(|sequence| sequence.arrival != 0), None);
    let fourth = ahead(&mut s).expect("it decodes");
    finish_step(&mut s, &third);
    finish_step(&mut s, &fourth);
    // Nothing under way whose tokens could be waited for.
    assert_eq!(ahead(&mut s), None);
}

#[test]
fn a_sequence_that_cannot_be_let_in_holds_nobody_up() {
    let mut s = scheduler(2, 100, 4);
    add(&mut s, 0, prompt(0, 40));
    let first = s.schedule();
    add(&mut s, 1, prompt(1, 90));
    let second = ahead(&mut s).expect("two blocks are left, the newcomer needs three");
    finish_step(&mut s, &first);
    finish(&mut s, 0);
    assert_eq!(s.report().leased, 2, "its row of the second step is still written");
    finish_step(&mut s, &second);
    assert_eq!(s.report().leased, 0);
    assert_eq!(rows_of(&s.schedule()), [(1, 0, 90)]);
}

#[test]
fn a_missing_block_is_left_to_the_next_plan() {
    let mut s = scheduler(4, 512, 4);
    add(&mut s, 0, prompt(0, 64));
    add(&mut s, 1, prompt(1, 63));
    let first = s.schedule();
    assert_eq!(ahead(&mut s), None, "one of them would have to make room");
    finish_step(&mut s, &first);
    assert_eq!(s.schedule().preempted, 1);
}

#[test]
fn a_block_is_shared_when_its_tokens_are_known_and_computed() {
    let mut s = scheduler(4, 512, 20);
    add(&mut s, 0, prompt(0, 31));
    let mut under_way = s.schedule();
    // The 32nd token is chosen by the first step and computed by the second.
    let content: Vec<u32> = prompt(0, 31).into_iter().chain([7]).collect();
    let mut found = Vec::new();
    for _ in 0..3 {
        let next = ahead(&mut s).expect("it decodes");
        finish_step(&mut s, &under_way);
        found.push(s.blocks.find(crate::prefix::Parent::Root(0), &content));
        under_way = next;
    }
    assert_eq!(found[0], Found::Missing);
    assert!(matches!(found[1], Found::Ready(..)), "{found:?}");
    finish_step(&mut s, &under_way);
    let conversation: Vec<u32> = content.into_iter().chain([1, 2]).collect();
    add(&mut s, 1, conversation);
    assert_eq!(step(&mut s)[1], (1, 32, 2));
}

#[test]
fn blocks_are_free_when_the_last_step_that_writes_them_is_done() {
    let mut s = scheduler(4, 512, 20);
    add(&mut s, 0, prompt(0, 10));
    add(&mut s, 1, prompt(1, 10));
    let first = s.schedule();
    let second = ahead(&mut s).expect("they decode");
    finish_step(&mut s, &first);
    finish(&mut s, 0);
    let third = ahead(&mut s).expect("the other decodes");
    assert_eq!(rows_of(&third), [(1, 11, 1)]);
    assert_eq!(s.report().leased, 2);
    finish_step(&mut s, &second);
    assert_eq!(s.report().leased, 1, "the third step has no row of it");
    finish(&mut s, 1);
    s.end_all();
    assert_eq!(s.report().leased, 0);
    s.check().expect("whole");
}

/// As the day above, with steps that are planned ahead, and departures while they are under way.
#[test]
fn a_random_day_with_steps_ahead_keeps_every_table_whole() {
    for seed in 0..30u64 {
        let mut random = seed * 104_729 + 7;
        let mut draw = |below: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % below
        };
        let max_seqs = 3 + usize::try_from(draw(4)).expect("small");
        let mut s = scheduler(max_seqs, 24 + usize::try_from(draw(100)).expect("small"), 8);
        let (mut arrivals, mut left, mut steps, mut went_ahead) = (0u64, 0, 0, 0);
        let mut under_way: Option<Step> = None;
        while left < 60 {
            steps += 1;
            assert!(steps < 20_000, "seed {seed}: no progress");
            if arrivals < 60 && draw(4) == 0 {
                let kind = u32::try_from(draw(3)).expect("small");
                let len = 1 + usize::try_from(draw(180)).expect("small");
                let longest = (len + 1 + usize::try_from(draw(40)).expect("small")).min(8 * BLOCK_SIZE);
                s.add(Sequence { longest, ..Sequence::for_test(arrivals, prompt(kind, len)) });
                arrivals += 1;
            }
            let current = under_way.take().unwrap_or_else(|| s.schedule());
            if draw(5) > 0 && !current.spans.is_empty() {
                under_way = ahead(&mut s);
            }
            went_ahead += usize::from(under_way.is_some());
            let next = under_way.as_ref().map_or(&[][..], |step| &step.spans[..]);
            assert!(
                next.iter().all(|span| s.get(span.arrival).is_some_and(|found| found.scheduled_len() <= found.longest))
            );
            if !current.spans.is_empty() {
                finish_step(&mut s, &current);
            }
            let gone: Vec<u64> = s
                .running
                .iter()
                .chain(&s.waiting)
                .filter(|sequence| sequence.known.len() >= sequence.longest || draw(60) == 0)
                .map(|sequence| sequence.arrival)
                .collect();
            left += gone.len();
            gone.into_iter().for_each(|arrival| finish(&mut s, arrival));
            if s.is_empty()
                && let Some(step) = under_way.take()
            {
                s.end(&step);
            }
        }
        if let Some(step) = under_way {
            s.end(&step);
        }
        assert_eq!(s.report().leased, 0);
        assert!(went_ahead * 4 > steps, "seed {seed}: {went_ahead} of {steps} steps were planned ahead");
    }
}
