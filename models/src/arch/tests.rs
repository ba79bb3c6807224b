//! Tests of the model families: metadata to spec, and what is refused.

use cupola_kernels::{GateFn, RopePairs, WeightType};
use serde_json::{Value, json};

use super::frequencies;
use crate::config::HfConfig;
use crate::testing::{CONTEXT, Scratch, gemma, real_model, tiny_writer};
use crate::weights::writer::{GgufWriter, Item};
use crate::{DecoderSpec, Model, Result};

fn open(file: &GgufWriter) -> Result<Model> {
    let scratch = Scratch::new("arch");
    let path = scratch.path().join("a.gguf");
    std::fs::write(&path, file.finish()).unwrap();
    Model::open(&path)
}

fn tiny() -> GgufWriter {
    tiny_writer(WeightType::F32, 1)
}

fn without(key: &str) -> GgufWriter {
    let mut file = tiny();
    file.keys.retain(|(name, _)| name != key);
    file
}

/// The spec of a Llama-like `config.json` with these changes.
fn config(changes: Value) -> Result<DecoderSpec> {
    let mut config = json!({
        "model_type": "llama", "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_hidden_layers": 16, "intermediate_size": 8192, "vocab_size": 128_256, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131_072, "rope_theta": 500_000.0, "hidden_act": "silu",
    });
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    let scratch = Scratch::new("config");
    let path = scratch.path().join("config.json");
    std::fs::write(&path, config.to_string()).unwrap();
    super::from_config(&HfConfig::read(&path)?)
}

#[test]
fn reads_the_tiny_model() {
    let spec = open(&tiny()).unwrap().spec;
    assert_eq!((spec.layers, spec.hidden, spec.ffn, spec.vocab, spec.max_positions), (2, 64, 128, 300, CONTEXT));
    assert_eq!((spec.heads.heads, spec.heads.kv_heads, spec.heads.head_dim), (4, 2, 16));
    assert_eq!((spec.query_scale, spec.rope.pairs), (0.25, RopePairs::Interleaved));
    assert_eq!(spec.rope.inv_freq, frequencies(10_000.0, 16));
}

#[test]
fn reads_the_real_model() {
    let Some(path) = real_model() else { return };
    let model = Model::open(&path).unwrap();
    assert_eq!(
        (model.spec.layers, model.spec.hidden, model.spec.vocab, model.spec.max_positions),
        (30, 576, 49_152, 8192)
    );
    assert_eq!(&*model.info.quantization, "Q4_1");
    assert_eq!(model.info.parameters, 134_515_008);
    assert_eq!(model.info.eos_tokens, [2, 0]);
}

#[test]
fn missing_and_contradicting_keys_are_named() {
    for key in ["general.architecture", "llama.block_count", "llama.embedding_length", "llama.attention.head_count"] {
        let message = open(&without(key)).unwrap_err().to_string();
        assert!(message.contains(&format!("has no key {key}")), "{message}");
    }
    let with = |key: &str, value: Item| {
        let mut file = without(key);
        file.key(key, value);
        open(&file).unwrap_err().to_string()
    };
    let text = |text: &str| Item::Text(text.to_owned());
    assert!(
        with("general.architecture", text("mamba"))
            .contains("architecture mamba is not supported: known ones are llama, gemma3")
    );
    assert!(with("llama.block_count", Item::U32(3)).contains("has no tensor blk.2.attn_norm.weight"));
    assert!(with("llama.block_count", Item::U32(0)).contains("number of layers is 0"));
    assert!(with("llama.block_count", Item::U32(u32::MAX)).contains("number of layers is 4294967295"));
    assert!(with("llama.block_count", text("two")).contains("is a string, expected an integer"));
    assert!(with("llama.attention.head_count", Item::U32(0)).contains("expected 1"));
    assert!(with("llama.attention.head_count_kv", Item::U32(3)).contains("not a multiple"));
    assert!(with("llama.feed_forward_length", Item::U32(64)).contains("has shape [128, 64], expected [64, 64]"));
    assert!(with("llama.rope.dimension_count", Item::U32(8)).contains("must equal the head dimension 16"));
    assert!(with("llama.rope.freq_base", Item::F32(f32::NAN)).contains("not finite"));
    assert!(with("llama.rope.scaling.type", text("yarn")).contains("rope scaling yarn is not supported"));
    assert!(with("llama.expert_count", Item::U32(8)).contains("mixture of experts"));
    assert!(with("llama.attention.layer_norm_rms_epsilon", Item::F32(-1.0)).contains("epsilon"));
}

#[test]
fn gguf_scaling_divides_frequencies() {
    let plain = frequencies(10_000.0, 16);
    let mut linear = tiny();
    linear.text("llama.rope.scaling.type", "linear").key("llama.rope.scaling.factor", Item::F32(4.0));
    let freq = open(&linear).unwrap().spec.rope.inv_freq;
    assert!(freq.iter().zip(&plain).all(|(f, p)| (f - p / 4.0).abs() < 1e-12));

    let mut factors = tiny();
    factors.tensor("rope_freqs.weight", &[8], WeightType::F32, &[1.0, 1.0, 1.0, 1.0, 2.0, 4.0, 8.0, 8.0]);
    let freq = open(&factors).unwrap().spec.rope.inv_freq;
    assert_eq!((freq[3], freq[4], freq[7]), (plain[3], plain[4] / 2.0, plain[7] / 8.0));
    let mut wrong = tiny();
    wrong.tensor("rope_freqs.weight", &[4], WeightType::F32, &[1.0; 4]);
    assert!(open(&wrong).unwrap_err().to_string().contains("has 4 values, expected 8"));
}

#[test]
fn config_json_variants() {
    let spec = config(json!({})).unwrap();
    assert_eq!((spec.heads.head_dim, spec.rope.pairs), (64, RopePairs::Halves));
    assert_eq!(spec.rope.inv_freq, frequencies(500_000.0, 64));
    assert_eq!(config(json!({"head_dim": 128})).unwrap().heads.head_dim, 128);
    assert_eq!(config(json!({"num_key_value_heads": null})).unwrap().heads.kv_heads, 32);

    let mistral = config(json!({"model_type": "mistral", "sliding_window": 4096})).unwrap();
    let sliding = mistral.sliding.unwrap();
    assert_eq!((sliding.window, sliding.layers), (4096, vec![true; 16]));
    assert!(config(json!({"model_type": "mistral", "sliding_window": null})).unwrap().sliding.is_none());

    let refused = |changes: Value| config(changes).unwrap_err().to_string();
    assert!(refused(json!({"model_type": "gpt5"})).contains("known ones are llama, mistral, gemma3_text, gemma3"));
    assert!(refused(json!({"hidden_size": "big"})).contains("hidden_size is \"big\", expected a whole number"));
    assert!(refused(json!({"hidden_size": null})).contains("has no key hidden_size"));
    assert!(refused(json!({"attention_bias": true})).contains("attention_bias"));
    assert!(refused(json!({"hidden_act": "gelu"})).contains("hidden_act gelu"));
    assert!(refused(json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})).contains("rope scaling yarn"));
    assert!(refused(json!({"rope_scaling": {"type": "linear"}})).contains("has no key rope_scaling.factor"));
}

#[test]
fn llama3_scaling_keeps_short_waves_and_stretches_long_ones() {
    let scaling = json!({"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192});
    let plain = frequencies(500_000.0, 64);
    for spec in [
        config(json!({"rope_scaling": scaling})).unwrap(),
        config(json!({"rope_theta": null, "rope_parameters": {
            "rope_theta": 500_000.0, "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}))
        .unwrap(),
    ] {
        let freq = spec.rope.inv_freq;
        assert_eq!(freq[0], plain[0]);
        assert!((freq[31] - plain[31] / 32.0).abs() < 1e-15);
        // Between the two: wave 16 turns 8192 * 500000^-0.5 / 2 pi = 1.844 times, a share of (1.844 - 1) / 3 is kept.
        let keep = (8192.0 * plain[16] / std::f64::consts::TAU - 1.0) / 3.0;
        assert!((0.2..0.4).contains(&keep));
        assert!((freq[16] - plain[16] * (keep + (1.0 - keep) / 32.0)).abs() < 1e-12);
    }
    let linear = config(json!({"rope_scaling": {"type": "linear", "factor": 2.0}})).unwrap();
    assert_eq!(linear.rope.inv_freq[5], frequencies(500_000.0, 64)[5] / 2.0);
}

/// The spec of a Gemma GGUF file with this key changed.
fn gemma(key: &str, value: Item) -> Result<DecoderSpec> {
    let mut file = gemma::writer(WeightType::F32, 1);
    file.keys.retain(|(name, _)| name != key);
    file.key(key, value);
    Ok(open(&file)?.spec)
}

#[test]
fn reads_the_tiny_gemma() {
    let scratch = Scratch::new("gemma");
    let gguf = Model::open(&gemma::tiny_gguf(scratch.path(), WeightType::F32, 1)).unwrap();
    let folder = Model::open(&gemma::tiny_safetensors(scratch.path(), WeightType::F32, 1)).unwrap();
    assert!(gguf.chat_template.is_none() && folder.chat_template.is_none());
    let spec = gguf.spec;
    assert_eq!((spec.layers, spec.hidden, spec.ffn, spec.heads.head_dim), (7, 64, 96, 32));
    assert_eq!((spec.gate, spec.qk_norm, spec.post_norms), (GateFn::GeluTanh, true, true));
    assert_eq!((spec.embedding_scale, spec.query_scale), (8.0, 1.0 / 32f32.sqrt()));
    assert_eq!((spec.rope.pairs, &spec.rope.inv_freq), (RopePairs::Halves, &frequencies(1e6, 32)));
    let sliding = spec.sliding.clone().unwrap();
    assert_eq!((sliding.window, &sliding.layers[..]), (24, &[true, true, true, true, true, false, true][..]));
    assert_eq!((sliding.rope.pairs, sliding.rope.inv_freq), (RopePairs::Halves, frequencies(1e4, 32)));
    // The folder says the same in other words; its norm weights lack the one.
    assert_eq!((spec.norm_offset, folder.spec.norm_offset), (0.0, 1.0));
    assert_eq!(DecoderSpec { norm_offset: 0.0, names: spec.names, ..folder.spec }, spec);
}

#[test]
fn gemma_keys_change_the_spec() {
    let slides = |spec: DecoderSpec| spec.sliding.map(|sliding| sliding.layers);
    let pattern = "gemma3.attention.sliding_window_pattern";
    let alternate = [true, false, true, false, true, false, true];
    assert_eq!(slides(gemma(pattern, Item::U32(2)).unwrap()), Some(alternate.to_vec()));
    assert_eq!(slides(gemma(pattern, Item::U32(0)).unwrap()), Some(vec![true; 7]));
    let listed = Item::I32s(alternate.map(i32::from).to_vec());
    assert_eq!(slides(gemma(pattern, listed).unwrap()), Some(alternate.to_vec()));
    let short = gemma(pattern, Item::I32s(vec![1, 0])).unwrap_err().to_string();
    assert!(short.contains("of 2 layers whether they slide, expected 7"), "{short}");
    assert_eq!(slides(gemma("gemma3.attention.sliding_window", Item::U32(0)).unwrap()), None);
    let local = gemma("gemma3.rope.freq_base_swa", Item::F32(5000.0)).unwrap().sliding.unwrap().rope;
    assert_eq!(local.inv_freq, frequencies(5000.0, 32));
    let capped = gemma("gemma3.final_logit_softcapping", Item::F32(30.0)).unwrap();
    assert_eq!((capped.logit_softcap, capped.attention_softcap), (Some(30.0), None));
    let message = gemma("gemma3.attention.value_length", Item::U32(16)).unwrap_err().to_string();
    assert!(message.contains("must equal the head dimension 32"), "{message}");

    // Scaling is for the layers that see everything.
    let mut file = gemma::writer(WeightType::F32, 1);
    file.text("gemma3.rope.scaling.type", "linear").key("gemma3.rope.scaling.factor", Item::F32(8.0));
    let spec = open(&file).unwrap().spec;
    assert_eq!(spec.rope.inv_freq[3], frequencies(1e6, 32)[3] / 8.0);
    assert_eq!(spec.sliding.unwrap().rope.inv_freq, frequencies(1e4, 32));
}

#[test]
fn the_largest_gemma_scales_queries_by_the_width_of_a_head() {
    // Its metadata alone: 62 layers of weights are not needed to read it.
    let mut file = gemma::writer(WeightType::F32, 1);
    file.keys.retain(|(name, _)| name != "gemma3.block_count");
    file.u32("gemma3.block_count", 62);
    let scratch = Scratch::new("gemma-27b");
    let path = scratch.path().join("a.gguf");
    std::fs::write(&path, file.finish()).unwrap();
    let spec = super::from_gguf(&crate::weights::gguf::Gguf::open(&path).unwrap()).unwrap();
    assert_eq!(spec.query_scale, 1.0 / (64.0f32 / 4.0).sqrt());
    assert!(open(&file).unwrap_err().to_string().contains("has no tensor blk.7.attn_norm.weight"));
}

/// The spec of a `config.json`.
fn read(config: &Value) -> Result<DecoderSpec> {
    let scratch = Scratch::new("gemma-config");
    let path = scratch.path().join("config.json");
    std::fs::write(&path, config.to_string()).unwrap();
    super::from_config(&HfConfig::read(&path)?)
}

#[test]
fn gemma_config_variants() {
    let with = |changes: Value| {
        let mut config = gemma::config();
        changes.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
        read(&config)
    };
    // Newer files have a section for each kind of layer and a list of the layers.
    let newer = with(json!({
        "rope_theta": null, "rope_local_base_freq": null, "sliding_window_pattern": null,
        "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}},
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention",
                        "sliding_attention", "full_attention", "full_attention"],
    }))
    .unwrap();
    assert_eq!(newer.rope.inv_freq[5], frequencies(1e6, 32)[5] / 8.0);
    let sliding = newer.sliding.unwrap();
    assert_eq!(sliding.layers, [true, false, true, false, true, false, false]);
    assert_eq!(sliding.rope.inv_freq, frequencies(2e4, 32));
    // Weights in bfloat16 were trained with a factor in bfloat16: sqrt(640) = 25.298 became 25.25.
    let scale = |dtype: Value| with(json!({"hidden_size": 640, "torch_dtype": dtype})).unwrap().embedding_scale;
    assert_eq!((scale(json!("bfloat16")), scale(json!(null))), (25.25, 640f32.sqrt()));
    assert_eq!(with(json!({"query_pre_attn_scalar": 168})).unwrap().query_scale, 1.0 / 168f32.sqrt());
    assert_eq!(with(json!({"final_logit_softcapping": 30.0})).unwrap().logit_softcap, Some(30.0));

    let refused = |changes: Value| with(changes).unwrap_err().to_string();
    assert!(refused(json!({"hidden_activation": "silu"})).contains("hidden_activation silu"));
    assert!(refused(json!({"attention_bias": true})).contains("attention_bias"));
    assert!(refused(json!({"use_bidirectional_attention": true})).contains("not embeddings"));
    assert!(refused(json!({"layer_types": ["chunked"]})).contains("expected a list of sliding_attention"));
    assert!(refused(json!({"sliding_window": 0})).contains("attention window is 0"));
    assert!(refused(json!({"final_logit_softcapping": "high"})).contains("final_logit_softcapping"));
}

#[test]
fn a_gemma_with_a_vision_part_is_read_by_its_text_part() {
    // The published 4B model leaves out whatever equals a default.
    let spec = read(&json!({"model_type": "gemma3", "torch_dtype": "bfloat16", "vision_config": {}, "text_config": {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}}))
    .unwrap();
    assert_eq!((spec.heads.heads, spec.heads.kv_heads, spec.heads.head_dim), (8, 4, 256));
    assert_eq!((spec.vocab, spec.max_positions, spec.query_scale), (262_208, 131_072, 1.0 / 16.0));
    assert_eq!((spec.embedding_scale, spec.names.embedding), (50.5, "language_model.model.embed_tokens.weight"));
    assert_eq!(spec.sliding.unwrap().layers.iter().filter(|slides| !**slides).count(), 5);

    // The names of the tensors are those that the weight files have.
    let scratch = Scratch::new("gemma-names");
    let folder = gemma::tiny_safetensors(scratch.path(), WeightType::F32, 1);
    let nested = json!({"model_type": "gemma3", "text_config": gemma::config()});
    std::fs::write(folder.join("config.json"), nested.to_string()).unwrap();
    assert_eq!(Model::open(&folder).unwrap().spec.names.embedding, "model.embed_tokens.weight");
}
