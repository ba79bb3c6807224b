//! Why and how an answer ends: stop tokens and texts, lengths, and the text that was held back.

use cupola_engine::{Event, FinishReason, Request, SamplingParams, StopMatch, SubmitError};

use crate::fake::{E_ACUTE, EOS, Letters, encode};
use crate::support::{Plan, collect, greedy_answer};
use cupola_engine::TokenText;

fn text_of(tokens: &[u32]) -> String {
    let letters = Letters::new();
    let bytes: Vec<u8> =
        tokens.iter().filter(|token| **token != EOS).flat_map(|token| letters.token_bytes(*token)).copied().collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A greedy request that goes on past the end of sequence.
fn endless(prompt: &str, max_tokens: usize) -> Request {
    let mut request = Request::greedy(encode(prompt), max_tokens);
    request.stop.ignore_eos = true;
    request
}

/// A request that says these tokens, whatever the model thinks.
fn says(tokens: &[u32], max_tokens: usize) -> Request {
    let mut request = Request::greedy(vec![0], max_tokens);
    request.stop.ignore_eos = true;
    // Each token is likely until it was said often enough.
    request.sampling.logit_bias = (0..).zip(tokens).map(|(i, t)| (*t, 1000.0 - i as f32 * 10.0)).collect();
    request.sampling.presence_penalty = 500.0;
    request
}

#[test]
fn max_tokens_and_the_context_length_end_an_answer() {
    let rig = Plan { max_model_len: 50, ..Plan::default() }.start();
    let answer = rig.ask(endless("abc", 20));
    assert_eq!((answer.tokens.len(), answer.end), (20, Some((FinishReason::Length, None))));
    assert_eq!(answer.usage.completion_tokens, 20);
    let mut request = endless("abc", 0);
    request.stop.max_tokens = None;
    let answer = rig.ask(request);
    assert_eq!((answer.tokens.len(), answer.end), (47, Some((FinishReason::Length, None))));
    assert_eq!(rig.ask(endless("abc", 1000)).tokens.len(), 47);
    let too_long = rig.engine.submit_now(Request::greedy(vec![0; 50], 1)).expect_err("no room for an answer");
    assert_eq!(too_long, SubmitError::PromptTooLong { prompt: 50, max: 50 });
    rig.settle();
}

#[test]
fn no_answer_at_all_can_be_asked_for() {
    let rig = Plan { max_model_len: 50, ..Plan::default() }.start();
    let answer = rig.ask(Request::greedy(vec![0; 50], 0));
    assert_eq!((answer.tokens.len(), answer.end), (0, Some((FinishReason::Length, None))));
    assert_eq!(answer.usage.prompt_tokens, 50);
    rig.settle();
}

#[test]
fn the_end_of_sequence_ends_an_answer_without_showing() {
    let rig = Plan::default().start();
    // Some prompt whose greedy answer reaches the end of sequence after a few tokens.
    let (prompt, expected) = (0..)
        .map(|i| (vec![i % 26, i / 26 % 26], greedy_answer(&[i % 26, i / 26 % 26], 60, false)))
        .find(|(_, answer)| answer.last() == Some(&EOS) && answer.len() > 3)
        .expect("there is one");
    let answer = rig.ask(Request::greedy(prompt.clone(), 60));
    assert_eq!(answer.tokens, expected);
    assert_eq!(answer.end, Some((FinishReason::Stop, None)));
    assert_eq!(answer.text, text_of(&expected));
    assert_eq!(answer.usage.completion_tokens, expected.len());
    let mut request = Request::greedy(prompt.clone(), expected.len() + 3);
    request.stop.ignore_eos = true;
    assert_eq!(rig.ask(request).tokens, greedy_answer(&prompt, expected.len() + 3, true));
    let mut request = Request::greedy(prompt, 60);
    request.stop.min_tokens = expected.len() + 2;
    let longer = rig.ask(request);
    assert_eq!(longer.tokens[..expected.len() - 1], expected[..expected.len() - 1]);
    assert!(longer.tokens.len() >= expected.len() + 2 && longer.tokens[expected.len() - 1] != EOS);
    rig.settle();
}

#[test]
fn a_stop_token_ends_an_answer_and_is_named() {
    let rig = Plan::default().start();
    let expected = greedy_answer(&encode("hello"), 10, true);
    let mut request = endless("hello", 10);
    request.stop.token_ids = vec![expected[4]];
    let first = expected.iter().position(|token| *token == expected[4]).expect("it is there");
    let answer = rig.ask(request);
    assert_eq!(answer.tokens, expected[..=first]);
    assert_eq!(answer.end, Some((FinishReason::Stop, Some(StopMatch::Token(expected[4])))));
    assert_eq!(answer.text, text_of(&expected[..first]));
    rig.settle();
}

#[test]
fn stop_texts_are_found_across_tokens_and_never_shown() {
    let rig = Plan::default().start();
    let whole = text_of(&greedy_answer(&encode("stop"), 40, true));
    let characters: Vec<usize> = whole.char_indices().map(|(i, _)| i).collect();
    for (start, end) in [(0, 1), (3, 5), (7, 12), (20, 24)] {
        let stop = whole[characters[start]..characters[end]].to_string();
        let at = whole.find(&stop).expect("it is part of the text");
        for include in [false, true] {
            let mut request = endless("stop", 40);
            request.stop.strings = vec!["never".into(), stop.clone()];
            request.stop.include_stop = include;
            let mut stream = rig.engine.submit_now(request).expect("accepted");
            let mut shown = String::new();
            let expected = &whole[..if include { at + stop.len() } else { at }];
            loop {
                match stream.blocking_next().expect("the last event comes first") {
                    Event::Tokens { text, .. } => shown += &text,
                    Event::Finished { text, stop: found, reason, .. } => {
                        shown += &text;
                        assert_eq!((reason, found), (FinishReason::Stop, Some(StopMatch::Text(stop.clone()))));
                        break;
                    }
                    other => panic!("{other:?}"),
                }
                assert!(expected.starts_with(&shown), "{shown:?} goes beyond {expected:?}");
            }
            assert_eq!(shown, expected);
        }
    }
    rig.settle();
}

#[test]
fn text_held_back_comes_with_the_end() {
    let rig = Plan::default().start();
    let whole = text_of(&greedy_answer(&encode("held"), 12, true));
    let last = whole.chars().last().expect("not empty");
    let mut request = endless("held", 12);
    request.stop.strings = vec![format!("{last}@@@")];
    let answer = rig.ask(request);
    assert_eq!((answer.text, answer.end), (whole, Some((FinishReason::Length, None))));
    rig.settle();
}

#[test]
fn a_character_of_two_tokens_shows_once_it_is_whole() {
    let rig = Plan::default().start();
    let mut request = says(&E_ACUTE, 2);
    request.stop.strings = vec!["zz".into()];
    let mut stream = rig.engine.submit_now(request).expect("accepted");
    let mut texts = Vec::new();
    while let Some(event) = stream.blocking_next() {
        match event {
            Event::Tokens { text, .. } | Event::Finished { text, .. } => texts.push(text),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(texts, ["", "é", ""]);
    let cut = rig.ask(says(&E_ACUTE, 1));
    assert_eq!(cut.text, "\u{fffd}", "half a character at the end is shown as such");
    rig.settle();
}

#[test]
fn stop_texts_wait_for_min_tokens() {
    let rig = Plan::default().start();
    let whole = text_of(&greedy_answer(&encode("wait"), 30, true));
    let mut request = endless("wait", 30);
    request.stop.strings = whole.chars().map(|c| c.to_string()).collect();
    request.stop.min_tokens = 6;
    assert_eq!(rig.ask(request).tokens.len(), 7);
    rig.settle();
}

#[test]
fn bad_parameters_are_refused_before_anything_runs() {
    let rig = Plan::default().start();
    let mut request = Request::greedy(vec![1], 1);
    request.sampling = SamplingParams { temperature: f32::NAN, ..SamplingParams::default() };
    let error = rig.engine.submit_now(request).expect_err("NaN");
    assert!(error.to_string().contains("temperature must be at least 0, got NaN"), "{error}");
    assert_eq!(rig.engine.submit_now(Request::greedy(vec![], 1)).expect_err("empty"), SubmitError::Empty);
    assert_eq!((rig.engine.backlog(), rig.rows()), ((0, 0), 0), "permits came back");
}

#[test]
fn events_end_with_none() {
    let rig = Plan::default().start();
    let mut stream = rig.engine.submit_now(Request::greedy(vec![1], 1)).expect("accepted");
    while stream.blocking_next().is_some() {}
    assert!(stream.blocking_next().is_none());
    assert!(collect(rig.engine.submit_now(Request::greedy(vec![1], 1)).expect("accepted")).end.is_some());
}
