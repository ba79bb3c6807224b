//! From the fields of a request to the engine's parameters: every value is checked here, before anything is tokenised.

use std::ops::RangeInclusive;

use cupola_engine::request::{SamplingParams, StopParams};
use cupola_models::GenerationDefaults;
use serde_json::{Map, Value};

use super::request::{GenerationRequest, Logprobs};
use crate::config::ServerConfig;
use crate::error::ApiError;
use crate::local::LocalModel;

/// Most log-probabilities reported for a token.
const MAX_TOP_LOGPROBS: u64 = 20;
/// Most stop texts, and their longest in bytes.
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 1024;
/// Most stop tokens and most biased tokens.
const MAX_STOP_TOKENS: usize = 256;
const MAX_BIASES: usize = 4096;
/// Longest cache salt in bytes.
const MAX_SALT_BYTES: usize = 1024;

/// The route a request came in on; the two differ in a few fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    Chat,
    Completions,
}

/// Everything asked for beside the prompt.
#[derive(Debug)]
pub(crate) struct Params {
    pub(crate) sampling: SamplingParams,
    pub(crate) stop: StopParams,
    pub(crate) logprobs: Option<u8>,
    pub(crate) choices: usize,
    pub(crate) use_prefix_cache: bool,
    pub(crate) stream: bool,
    /// A last event with the token counts.
    pub(crate) include_usage: bool,
    /// Token counts so far on every event.
    pub(crate) usage_everywhere: bool,
    pub(crate) return_token_ids: bool,
    pub(crate) timings: bool,
}

impl Params {
    /// Checks a request.
    ///
    /// # Errors
    /// The first field that is wrong or asks for what this server cannot do.
    pub(crate) fn of(
        request: &GenerationRequest,
        route: Route,
        config: &ServerConfig,
        model: &LocalModel,
    ) -> Result<Self, ApiError> {
        let vocab = model.engine.vocab_size();
        refuse_unsupported(request)?;
        let choices = request.n.unwrap_or(1);
        if choices == 0 || choices > config.max_choices as u64 {
            return Err(out_of_range("n", choices, format!("from 1 to {}", config.max_choices)));
        }
        if request.best_of.is_some_and(|best_of| best_of > choices) {
            return Err(ApiError::unsupported("best_of", "choosing the best of several answers"));
        }
        if let Some(salt) = &request.cache_salt
            && !(1..=MAX_SALT_BYTES).contains(&salt.len())
        {
            let expected = format!("1 to {MAX_SALT_BYTES} bytes long");
            return Err(out_of_range("cache_salt", format!("{} bytes", salt.len()), expected));
        }
        let options = request.stream_options.unwrap_or_default();
        let stream = request.stream.unwrap_or(false);
        let usage_everywhere = options.continuous_usage_stats.unwrap_or(false);
        Ok(Self {
            sampling: sampling(request, &model.defaults, vocab)?,
            stop: stop(request, route, vocab)?,
            logprobs: logprobs(request, route)?,
            choices: usize::try_from(choices).expect("not above a usize limit"),
            use_prefix_cache: request.cache_prompt.unwrap_or(true),
            stream,
            include_usage: options.include_usage.unwrap_or(false),
            usage_everywhere,
            return_token_ids: request.return_token_ids.unwrap_or(false),
            timings: request.timings.unwrap_or(false),
        })
    }
}

fn out_of_range(param: &str, got: impl std::fmt::Display, expected: impl std::fmt::Display) -> ApiError {
    ApiError::field(param, format!("`{param}` must be {expected}, got {got}"))
}

/// A number within a range, or its default.
fn number(param: &str, given: Option<f64>, default: f32, range: RangeInclusive<f64>) -> Result<f32, ApiError> {
    match given {
        None => Ok(default),
        // A NaN lies in no range.
        Some(value) if range.contains(&value) => Ok(value as f32),
        Some(value) => Err(out_of_range(param, value, format!("from {} to {}", range.start(), range.end()))),
    }
}

fn sampling(
    request: &GenerationRequest,
    defaults: &GenerationDefaults,
    vocab: usize,
) -> Result<SamplingParams, ApiError> {
    let repetition = match (request.repetition_penalty, request.repeat_penalty) {
        (None, Some(other)) => ("repeat_penalty", Some(other)),
        (given, _) => ("repetition_penalty", given),
    };
    let top_k = match request.top_k {
        None => defaults.top_k.unwrap_or(0),
        Some(-1) => 0,
        Some(k) => u32::try_from(k).map_err(|_| out_of_range("top_k", k, "-1, 0 (both keep all) or more"))?,
    };
    let top_p = number("top_p", request.top_p, defaults.top_p.unwrap_or(1.0), 0.0..=1.0)?;
    Ok(SamplingParams {
        temperature: number("temperature", request.temperature, defaults.temperature.unwrap_or(1.0), 0.0..=100.0)?,
        top_k,
        // A share of nothing still keeps the most likely token.
        top_p: top_p.max(f32::MIN_POSITIVE),
        min_p: number("min_p", request.min_p, defaults.min_p.unwrap_or(0.0), 0.0..=1.0)?,
        repetition_penalty: number(
            repetition.0,
            repetition.1,
            defaults.repetition_penalty.unwrap_or(1.0),
            0.01..=100.0,
        )?,
        presence_penalty: number("presence_penalty", request.presence_penalty, 0.0, -2.0..=2.0)?,
        frequency_penalty: number("frequency_penalty", request.frequency_penalty, 0.0, -2.0..=2.0)?,
        logit_bias: logit_bias(request.logit_bias.as_ref(), vocab)?,
        seed: request.seed.map(|seed| seed.0),
    })
}

fn logit_bias(given: Option<&Map<String, Value>>, vocab: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(given) = given else { return Ok(Vec::new()) };
    if given.len() > MAX_BIASES {
        return Err(out_of_range("logit_bias", given.len(), format!("at most {MAX_BIASES} tokens")));
    }
    let one = |(token, bias): (&String, &Value)| {
        let param = format!("logit_bias.{token}");
        let token =
            token.parse::<u32>().map_err(|_| ApiError::field(&param, "`logit_bias` maps token ids to numbers"))?;
        known_token(&param, token, vocab)?;
        match bias.as_f64() {
            Some(bias) if (-100.0..=100.0).contains(&bias) => Ok((token, bias as f32)),
            _ => Err(out_of_range(&param, bias, "a number from -100 to 100")),
        }
    };
    given.iter().map(one).collect()
}

fn known_token(param: &str, token: u32, vocab: usize) -> Result<(), ApiError> {
    if (token as usize) < vocab {
        return Ok(());
    }
    Err(out_of_range(param, token, format!("a token id below {vocab}")))
}

fn stop(request: &GenerationRequest, route: Route, vocab: usize) -> Result<StopParams, ApiError> {
    let strings = request.stop.as_ref().map(|stop| stop.0.clone()).unwrap_or_default();
    if strings.len() > MAX_STOPS {
        return Err(out_of_range("stop", strings.len(), format!("at most {MAX_STOPS} texts")));
    }
    for (index, text) in strings.iter().enumerate() {
        if !(1..=MAX_STOP_BYTES).contains(&text.len()) {
            let expected = format!("1 to {MAX_STOP_BYTES} bytes long");
            return Err(out_of_range(&format!("stop[{index}]"), format!("{} bytes", text.len()), expected));
        }
    }
    let token_ids = request.stop_token_ids.clone().unwrap_or_default();
    if token_ids.len() > MAX_STOP_TOKENS {
        return Err(out_of_range("stop_token_ids", token_ids.len(), format!("at most {MAX_STOP_TOKENS} tokens")));
    }
    for (index, &token) in token_ids.iter().enumerate() {
        known_token(&format!("stop_token_ids[{index}]"), token, vocab)?;
    }
    let max_tokens = max_tokens(request, route)?;
    let min_tokens = as_usize("min_tokens", request.min_tokens)?.unwrap_or(0);
    if let Some(max) = max_tokens
        && min_tokens > max
    {
        return Err(out_of_range("min_tokens", min_tokens, format!("at most max_tokens, {max}")));
    }
    Ok(StopParams {
        max_tokens,
        min_tokens,
        strings,
        token_ids,
        include_stop: request.include_stop_str_in_output.unwrap_or(false),
        ignore_eos: request.ignore_eos.unwrap_or(false),
    })
}

fn max_tokens(request: &GenerationRequest, route: Route) -> Result<Option<usize>, ApiError> {
    let (param, given) = match (route, request.max_completion_tokens) {
        (Route::Chat, Some(max)) => ("max_completion_tokens", Some(max)),
        _ => ("max_tokens", request.max_tokens),
    };
    // Nothing to generate makes sense only where the prompt itself is asked about.
    if given == Some(0) && !(route == Route::Completions && request.echo == Some(true)) {
        return Err(out_of_range(param, 0, "at least 1"));
    }
    as_usize(param, given)
}

fn as_usize(param: &str, given: Option<u64>) -> Result<Option<usize>, ApiError> {
    // More than 32 bits is no token count, and smaller numbers add up without overflow.
    match given {
        Some(value) if value > u64::from(u32::MAX) => Err(out_of_range(param, value, format!("at most {}", u32::MAX))),
        other => Ok(other.map(|value| usize::try_from(value).expect("32 bits fit"))),
    }
}

fn logprobs(request: &GenerationRequest, route: Route) -> Result<Option<u8>, ApiError> {
    let (param, count) = match (route, request.logprobs, request.top_logprobs) {
        (Route::Chat, Some(Logprobs::Count(_)), _) => {
            return Err(ApiError::field("logprobs", "`logprobs` is a boolean here; `top_logprobs` takes the number"));
        }
        (Route::Completions, Some(Logprobs::Switch(true)), _) => {
            return Err(ApiError::field("logprobs", "`logprobs` is a whole number here: how many tokens to report"));
        }
        (Route::Chat, Some(Logprobs::Switch(true)), top) => ("top_logprobs", top.unwrap_or(0)),
        (Route::Chat, _, Some(top)) if top > 0 => {
            return Err(ApiError::field("top_logprobs", "`top_logprobs` needs `logprobs` to be true"));
        }
        (Route::Completions, Some(Logprobs::Count(count)), _) => ("logprobs", count),
        _ => return Ok(None),
    };
    match u8::try_from(count) {
        Ok(small) if count <= MAX_TOP_LOGPROBS => Ok(Some(small)),
        _ => Err(out_of_range(param, count, format!("from 0 to {MAX_TOP_LOGPROBS}"))),
    }
}

/// Refuses what would change the meaning of the answer if it were ignored.
fn refuse_unsupported(request: &GenerationRequest) -> Result<(), ApiError> {
    let refused = [
        ("suffix", &request.suffix, "completing in the middle of a text"),
        ("functions", &request.functions, "calling functions"),
        ("audio", &request.audio, "audio"),
        ("web_search_options", &request.web_search_options, "searching the web"),
        ("structured_outputs", &request.structured_outputs, "constraining the answer to a structure"),
        ("guided_json", &request.guided_json, "constraining the answer to a structure"),
        ("guided_regex", &request.guided_regex, "constraining the answer to a structure"),
        ("guided_choice", &request.guided_choice, "constraining the answer to a structure"),
        ("guided_grammar", &request.guided_grammar, "constraining the answer to a structure"),
        ("grammar", &request.grammar, "constraining the answer to a structure"),
        ("json_schema", &request.json_schema, "constraining the answer to a structure"),
        ("chat_template", &request.chat_template, "a chat template sent with the request"),
        ("continue_final_message", &request.continue_final_message, "continuing the last message"),
        ("use_beam_search", &request.use_beam_search, "beam search"),
        ("truncate_prompt_tokens", &request.truncate_prompt_tokens, "cutting the prompt"),
        ("prompt_embeds", &request.prompt_embeds, "a prompt of embeddings"),
    ];
    for (param, value, feature) in refused {
        let asked = match value {
            None | Some(Value::Null | Value::Bool(false)) => false,
            Some(Value::Array(list)) => !list.is_empty(),
            Some(Value::Object(map)) => !map.is_empty(),
            Some(Value::String(text)) => !text.is_empty(),
            Some(_) => true,
        };
        if asked {
            return Err(ApiError::unsupported(param, feature));
        }
    }
    if let Some(kinds) = &request.modalities
        && kinds.iter().any(|kind| kind != "text")
    {
        return Err(ApiError::unsupported("modalities", "an answer that is not text"));
    }
    refuse_tools(request)?;
    match request.response_format.as_ref().map(|format| &format["type"]) {
        None => Ok(()),
        Some(Value::String(kind)) if kind == "text" => Ok(()),
        Some(Value::String(kind)) if ["json_object", "json_schema", "structural_tag"].contains(&kind.as_str()) => {
            Err(ApiError::unsupported("response_format", "an answer held to JSON"))
        }
        Some(other) => Err(out_of_range("response_format.type", other, "\"text\"")),
    }
}

fn refuse_tools(request: &GenerationRequest) -> Result<(), ApiError> {
    let some_tools = request.tools.as_ref().is_some_and(|tools| !tools.is_empty());
    match &request.tool_choice {
        Some(Value::String(choice)) if choice == "none" => Ok(()),
        None | Some(Value::Null) if some_tools => Err(ApiError::unsupported("tools", "calling tools")),
        None | Some(Value::Null) => Ok(()),
        Some(Value::String(choice)) if choice == "auto" && !some_tools => Ok(()),
        Some(Value::String(choice)) if ["auto", "required"].contains(&choice.as_str()) => {
            Err(ApiError::unsupported("tools", "calling tools"))
        }
        Some(Value::Object(_)) => Err(ApiError::unsupported("tool_choice", "calling tools")),
        Some(other) => Err(out_of_range("tool_choice", other, "\"none\", \"auto\", \"required\" or a function")),
    }
}
