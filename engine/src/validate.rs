//! Ranges of a request's fields, checked before it enters the queue.

use crate::SubmitError;
use crate::request::{Request, SamplingParams, StopParams};

/// Checks a request against a vocabulary and the longest prompt plus answer.
pub(crate) fn validate(request: &Request, vocab: usize, max_model_len: usize) -> Result<(), SubmitError> {
    let prompt = request.prompt.len();
    if prompt == 0 {
        return Err(SubmitError::Empty);
    }
    let answer = request.stop.max_tokens.unwrap_or(1).min(1);
    if prompt + answer > max_model_len {
        return Err(SubmitError::PromptTooLong { prompt, max: max_model_len });
    }
    check_tokens(request.prompt.iter(), vocab)?;
    check_tokens(request.stop.token_ids.iter(), vocab)?;
    check_tokens(request.sampling.logit_bias.iter().map(|(token, _)| token), vocab)?;
    check_sampling(&request.sampling)?;
    check_stop(&request.stop)
}

fn check_tokens<'a>(mut tokens: impl Iterator<Item = &'a u32>, vocab: usize) -> Result<(), SubmitError> {
    match tokens.find(|token| **token as usize >= vocab) {
        Some(&token) => Err(SubmitError::TokenOutOfRange { token, vocab }),
        None => Ok(()),
    }
}

fn check_sampling(params: &SamplingParams) -> Result<(), SubmitError> {
    let ranges = [
        ("temperature", params.temperature, params.temperature >= 0.0, "at least 0"),
        ("top_p", params.top_p, params.top_p > 0.0 && params.top_p <= 1.0, "above 0 and at most 1"),
        ("min_p", params.min_p, (0.0..=1.0).contains(&params.min_p), "from 0 to 1"),
        ("repetition_penalty", params.repetition_penalty, params.repetition_penalty > 0.0, "above 0"),
        ("presence_penalty", params.presence_penalty, true, "finite"),
        ("frequency_penalty", params.frequency_penalty, true, "finite"),
    ];
    for (name, got, in_range, range) in ranges {
        if !(in_range && got.is_finite()) {
            return Err(SubmitError::InvalidParameter { name, message: format!("must be {range}, got {got}") });
        }
    }
    match params.logit_bias.iter().find(|(_, bias)| !bias.is_finite()) {
        Some((token, bias)) => Err(SubmitError::InvalidParameter {
            name: "logit_bias",
            message: format!("must be finite, got {bias} for token {token}"),
        }),
        None => Ok(()),
    }
}

fn check_stop(stop: &StopParams) -> Result<(), SubmitError> {
    if stop.strings.iter().any(String::is_empty) {
        let message = "must not hold an empty text, which would end every answer at once".into();
        return Err(SubmitError::InvalidParameter { name: "stop", message });
    }
    match stop.max_tokens {
        Some(max) if stop.min_tokens > max => Err(SubmitError::InvalidParameter {
            name: "min_tokens",
            message: format!("must be at most max_tokens, {max}, got {}", stop.min_tokens),
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl FnOnce(&mut Request)) -> SubmitError {
        let mut request = Request::greedy(vec![1, 2, 3], 4);
        change(&mut request);
        validate(&request, 10, 8).expect_err("out of range")
    }

    #[test]
    fn a_plain_request_passes() {
        validate(&Request::greedy(vec![1, 2, 9], 4), 10, 8).expect("in range");
        validate(&Request::greedy(vec![1; 8], 0), 10, 8).expect("no room is needed for an answer of nothing");
    }

    #[test]
    fn every_bad_field_is_named() {
        assert_eq!(refused(|r| r.prompt.clear()), SubmitError::Empty);
        assert_eq!(refused(|r| r.prompt = vec![1; 8]), SubmitError::PromptTooLong { prompt: 8, max: 8 });
        assert_eq!(refused(|r| r.prompt[1] = 10), SubmitError::TokenOutOfRange { token: 10, vocab: 10 });
        assert_eq!(refused(|r| r.stop.token_ids = vec![11]), SubmitError::TokenOutOfRange { token: 11, vocab: 10 });
        type Change = fn(&mut Request);
        let bad: [(&str, Change); 10] = [
            ("temperature", |r| r.sampling.temperature = -0.1),
            ("temperature", |r| r.sampling.temperature = f32::NAN),
            ("temperature", |r| r.sampling.temperature = f32::INFINITY),
            ("top_p", |r| r.sampling.top_p = 0.0),
            ("min_p", |r| r.sampling.min_p = 1.5),
            ("repetition_penalty", |r| r.sampling.repetition_penalty = 0.0),
            ("presence_penalty", |r| r.sampling.presence_penalty = f32::NAN),
            ("logit_bias", |r| r.sampling.logit_bias = vec![(1, f32::NAN)]),
            ("stop", |r| r.stop.strings = vec![String::new()]),
            ("min_tokens", |r| r.stop.min_tokens = 5),
        ];
        for (expected, change) in bad {
            let error = refused(change);
            assert!(matches!(error, SubmitError::InvalidParameter { name, .. } if name == expected), "{error:?}");
        }
    }
}
