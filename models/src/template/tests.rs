//! Tests of chat templates: what real ones rely on, and what a hostile one may not do.

use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::{ChatTemplate, strftime};
use crate::testing::real_model;
use crate::{Model, Result};

/// SmolLM2's, as its model file has it.
const SMOLLM2: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
    {{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}\
    {{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

fn render(source: &str, messages: Value) -> Result<String> {
    ChatTemplate::new(source, "<s>", "</s>")?.render(&messages, None, true, &Map::new())
}

fn refusal(source: &str) -> String {
    let message = render(source, json!([{"role": "user", "content": "Hi"}])).unwrap_err().to_string();
    assert!(message.starts_with("chat template: "), "{message}");
    message
}

#[test]
fn renders_smollm2() {
    let user = json!([{"role": "user", "content": "Hi"}]);
    let expected = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
                    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(render(SMOLLM2, user.clone()).unwrap(), expected);
    let with_system = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a\nb"}]);
    assert_eq!(
        render(SMOLLM2, with_system).unwrap(),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n"
    );
    let Some(path) = real_model() else { return };
    let template = Model::open(&path).unwrap().chat_template.unwrap();
    assert_eq!(template.render(&user, None, true, &Map::new()).unwrap(), expected);
    assert!(template.source().contains("add_generation_prompt"));
}

#[test]
fn text_parts_are_joined_only_for_templates_that_want_strings() {
    let parts = json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]);
    assert!(render(SMOLLM2, parts.clone()).unwrap().contains("user\na\nb<|im_end|>"));
    let reads_parts = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}\
        {% for part in m.content %}{{ part.text }}|{% endfor %}{% endif %}{% endfor %}";
    // This one adds a mark of its own, so it does not read parts like a string and gets a string.
    assert_eq!(render(reads_parts, parts.clone()).unwrap(), "a\nb");
    assert_eq!(render(&reads_parts.replace('|', ""), parts).unwrap(), "ab");
    let image = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]);
    assert!(render(SMOLLM2, image).unwrap_err().to_string().contains("a part of type image_url"));
}

#[test]
fn has_what_templates_expect() {
    let chat = json!([{"role": "user", "content": " Hi "}]);
    let cases = [
        ("{{ bos_token }}{{ messages[0]['content'] | trim }}{{ eos_token }}", "<s>Hi</s>"),
        ("{{ messages[0].content.strip().upper() }}", "HI"),
        ("{{ messages[0].content.split('i')[0] }}|{{ 'a,b'.split(',') | length }}", " H|2"),
        ("{% if tools is none %}none{% endif %}{% if documents is none %}none{% endif %}", "nonenone"),
        ("{% if nothing is defined %}x{% else %}y{% endif %}{{ nothing }}", "y"),
        (
            "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "02",
        ),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f('a') }}", "[a]"),
        ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n"),
        ("{{ '<b>&\"' }}", "<b>&\""),
        ("{%- generation %}\na{% endgeneration -%}\n b", "ab"),
        ("{{ messages[0].keys() | list | join(',') }}", "role,content"),
    ];
    for (source, expected) in cases {
        assert_eq!(render(source, chat.clone()).unwrap(), expected, "{source}");
    }
    let template = ChatTemplate::new("{{ enable_thinking }} {{ messages | length }}", "", "").unwrap();
    let kwargs = json!({"enable_thinking": false, "messages": "no"}).as_object().unwrap().clone();
    assert_eq!(template.render(&chat, None, false, &kwargs).unwrap(), "False 1", "kwargs replace nothing");
}

#[test]
fn json_is_written_like_python_does() {
    let tools =
        json!([{"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": [true, null, 1.5, "é<'"]}}}]);
    let render = |source: &str| {
        let template = ChatTemplate::new(source, "", "").unwrap();
        template.render(&json!([]), Some(&tools), false, &Map::new()).unwrap()
    };
    assert_eq!(
        render("{{ tools[0] | tojson }}"),
        r#"{"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": [true, null, 1.5, "é<'"]}}}"#
    );
    assert_eq!(render("{{ tools[0].function.parameters.b | tojson(indent=4) }}"), "1");
    assert_eq!(render("{{ {'b': [], 'a': {}} | tojson(sort_keys=true) }}"), r#"{"a": {}, "b": []}"#);
    assert_eq!(render("{{ {'a': [1]} | tojson(indent=2) }}"), "{\n  \"a\": [\n    1\n  ]\n}");
}

#[test]
fn exceptions_and_mistakes_are_told() {
    assert_eq!(
        refusal("{{ raise_exception('roles must alternate') }}"),
        "chat template: roles must alternate (line 1)"
    );
    assert!(refusal("{% if %}").contains("syntax error"));
    assert!(refusal("{{ messages[0].content.nosuch() }}").contains("nosuch"));
    assert!(refusal("a\n\n{{ none.x.y }}").contains("line 3"));
    assert!(refusal("{% include 'x' %}").contains("x"));
}

#[test]
fn a_hostile_template_ends() {
    assert!(
        refusal("{% for a in range(9999) %}{% for b in range(9999) %}{{ b }}{% endfor %}{% endfor %}").contains("fuel")
    );
    assert!(refusal("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}").contains("recursion"));
    let long = "x".repeat(1 << 16);
    let source = format!("{{% for a in range(5000) %}}{long}{{% endfor %}}");
    assert!(refusal(&source).contains("grows beyond"));
    assert!(ChatTemplate::new(&"x".repeat(2 << 20), "", "").is_err());
}

#[test]
fn dates_are_right() {
    let at = |seconds: u64, format: &str| strftime(UNIX_EPOCH + Duration::from_secs(seconds), format);
    assert_eq!(at(0, "%d %b %Y %H:%M:%S %A %j"), "01 Jan 1970 00:00:00 Thursday 001");
    assert_eq!(at(951_782_400, "%Y-%m-%d %a"), "2000-02-29 Tue");
    assert_eq!(at(1_735_689_599, "%F %T %j %p %I %y"), "2024-12-31 23:59:59 366 PM 11 24");
    assert_eq!(at(1_735_689_600, "%B %e, %Y%% %q %"), "January  1, 2025% %q %");
    assert_eq!(at(4_107_542_400, "%d %B %Y"), "01 March 2100");
    let today = render("{{ strftime_now('%Y') }}", json!([])).unwrap();
    assert!(today.parse::<u32>().unwrap() >= 2024);
}
