//! Chat templates: the generation tag, Python's ways, and what an evil template cannot do.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::time::Instant;

use common::chain;
use lora_data::{ChatTemplate, Clock, DataError};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

/// An evil template ends sooner than this, in seconds; a tenth of it is usual, but other tests run beside this one.
const LONGEST_S: f64 = 5.0;

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new(source, "test", [("eos_token".to_owned(), json!("</s>"))].into()).unwrap()
}

fn render(source: &str, variables: Value) -> Result<String, DataError> {
    let Value::Object(extra) = variables else { panic!() };
    template(source).render(&[json!({"role": "user", "content": "hi"})], None, true, &extra)
}

#[test]
fn python_ways() {
    let table = [
        ("{{ eos_token }}{{ messages[0].content }}{{ add_generation_prompt }}{{ none }}", "</s>hiTrueNone"),
        (
            "{{ {'b': 1, 'a': '<é\"\\n>', 'c': [1.0, true, none]} | tojson }}",
            r#"{"b": 1, "a": "<é\"\n>", "c": [1.0, true, null]}"#,
        ),
        ("{{ {'b': 1, 'a': []} | tojson(sort_keys=true, indent=2) }}", "{\n  \"a\": [],\n  \"b\": 1\n}"),
        ("{{ [1, {'a': 2}] | tojson(separators=(',', ':')) }}", r#"[1,{"a":2}]"#),
        ("{{ 'é🦀' | tojson(ensure_ascii=true) }}", r#""\u00e9\ud83e\udd80""#),
        ("{{ 'a-b-c'.split('-')[-1] }}{{ ' x '.strip() }}{{ 'abc'[::-1] }}", "cxcba"),
        ("{{ 'pre-x'.removeprefix('pre-') }}{{ 'a.b.c'.rsplit('.', 1)[0] }}{{ 'k=v=w'.partition('=')[2] }}", "xa.bv=w"),
        (
            "{% set ns = namespace(n=0) %}{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
            "3",
        ),
        ("a\r\n  {% if true %}\r\nb\r\n  {% endif %}\nc\n", "a\nb\nc"),
        ("{% for k, v in {'x': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "x1"),
        // What CPython gives for the same expressions.
        ("{{ 'abc'.center(6) }}|{{ 'abc'.center(8, '*') }}|{{ 'ab'.center(7) }}", " abc  |**abc***|   ab  "),
        ("{{ 'a'.ljust(3) }}|{{ 'a'.rjust(3, '-') }}|{{ '-7'.zfill(4) }}|{{ 'aBc'.swapcase() }}", "a  |--a|-007|AbC"),
        (
            "{{ 'a b  c '.rsplit() }}{{ 'a b  c '.rsplit(none, 1) }}{{ ' a b'.rsplit(none, 1) }}",
            "['a', 'b', 'c']['a b', 'c'][' a', 'b']",
        ),
        (
            "{{ 'abcb'.rindex('b') }}{{ 'Straße'.casefold() }}{{ '12'.isdecimal() }}{{ ['a', 'b', 'a'].count('a') }}",
            "3strasseTrue2",
        ),
        ("{{ none is iterable }}{{ 'a' is iterable }}{{ missing is defined }}", "FalseTrueFalse"),
    ];
    for (source, wanted) in table {
        assert_eq!(render(source, json!({})).unwrap(), wanted, "{source}");
    }
    let dated = template("{{ strftime_now('%d %b %Y') }}").with_clock(Clock::Fixed(1_709_210_096));
    assert_eq!(dated.render(&[], None, false, &Map::new()).unwrap(), "29 Feb 2024");
    let error = render("{{ raise_exception('no tools here') }}", json!({})).unwrap_err();
    assert!(chain(&error).contains("no tools here"), "{}", chain(&error));
}

#[test]
fn generation_blocks_become_spans() {
    let source = "{% set x = 1 %}{% for m in messages %}<{{ m.role }}>\n  {%- if m.role == 'assistant' %}\n  {% generation %}\n{% set x = 2 %}{{ m.content }}</s>\n  {%- endgeneration %}\n\n{% else %}{{ m.content }}{% endif %}{% endfor %}{{ x }}";
    let messages = [
        json!({"role": "user", "content": "é"}),
        json!({"role": "assistant", "content": "one"}),
        json!({"role": "assistant", "content": "zwei"}),
    ];
    let rendered = template(source).render_spans(&messages, None, false, &Map::new()).unwrap();
    let spans: Vec<&str> = rendered.spans.iter().map(|span| &rendered.text[span.clone()]).collect();
    assert_eq!(spans, ["one</s>", "zwei</s>"]);
    // What a block sets stays in the block, and no mark is left in the text.
    assert!(rendered.text.ends_with('1') && rendered.text.starts_with("<user>"), "{:?}", rendered.text);
    assert!(rendered.text.chars().all(|c| c < '\u{10FFFC}'));

    let sly = [json!({"role": "assistant", "content": "a\u{10FFFD}b"})];
    let error = template(source).render(&sly, None, false, &Map::new()).unwrap_err();
    assert!(error.to_string().contains("U+10FFFD"), "{error}");
    assert!(ChatTemplate::new("{% generation %}", "test", BTreeMap::new()).is_err());
}

#[test]
fn evil_templates_end_soon() {
    let doubling = "{% set ns = namespace(s='xxxxxxxxxxxxxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}";
    let nested_lists = "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l | tojson }}";
    let table = [
        doubling.to_owned(),
        doubling.replace("ns.s ~ ns.s", "ns.s + ns.s"),
        doubling.replace("ns.s ~ ns.s", "(ns.s ~ '').replace('x', 'xxxxxxxx')"),
        doubling.replace("ns.s ~ ns.s", "ns.s * 1000"),
        nested_lists.to_owned(),
        nested_lists.replace("| tojson", "| string"),
        nested_lists.replace("| tojson", ""),
        nested_lists.replace("ns.l | tojson", "', '.join(ns.l)"),
        "{% for a in range(100000) %}{% for b in range(100000) %}{% for c in range(100000) %}{% endfor %}{% endfor %}{% endfor %}".to_owned(),
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".to_owned(),
        "{% include '/etc/passwd' %}".to_owned(),
        "{{ range(1000000000) | list }}".to_owned(),
        "{{ 'x' * 100000000000 }}".to_owned(),
        "{{ [1] | tojson(indent=1000000000) }}".to_owned(),
        "{% set ns = namespace(l=[]) %}{% for i in range(300) %}{% set ns.l = [ns.l] %}{% endfor %}{{ ns.l | tojson }}".to_owned(),
        "{{ '%1000000000d' % 1 }}".to_owned(),
        "{{ '{:1000000000}'.format(1) }}".to_owned(),
        "{{ '{:{}}'.format(1, 1000000000) }}".to_owned(),
        "{{ 'x'.center(1000000000) }}".to_owned(),
        "{{ ('x' * 1000) | indent(1000000000) }}".to_owned(),
    ];
    for source in table {
        let start = Instant::now();
        let result = render(&source, json!({}));
        assert!(result.is_err(), "{source} gave {} bytes", result.map_or(0, |text| text.len()));
        assert!(start.elapsed().as_secs_f64() < LONGEST_S, "{source} took {:?}", start.elapsed());
    }
    let deep = format!("{{{{ {}1{} }}}}", "(".repeat(10_000), ")".repeat(10_000));
    for source in [deep, "{% if true %}".repeat(10_000), "x".repeat(10 << 20), "{% for".to_owned()] {
        assert!(ChatTemplate::new(&source, "test", BTreeMap::new()).is_err());
    }
    assert_eq!(render("{{ ''.__class__.__mro__ }}", json!({})).unwrap_or_default(), "");
}

/// A list that holds itself over and over, and every way to walk through it.
#[test]
fn values_that_hold_themselves_end_soon() {
    let doubled = |use_of_it: &str| {
        format!(
            "{{% set ns = namespace(l=[1], m=[1]) %}}{{% for i in range(60) %}}{{% set ns.l = [ns.l, ns.l] %}}{{% set ns.m = [ns.m, ns.m] %}}{{% endfor %}}{use_of_it}"
        )
    };
    let uses = [
        "{{ (ns.l ~ '')|length }}",
        "{{ ns.l == ns.m }}",
        "{{ ns.l in [ns.m] }}",
        "{{ ns.l|join|length }}",
        "{{ ns.l|upper }}",
        "{{ '%s'|format(ns.l) }}",
        "{{ {ns.l: 1}|length }}",
        "{{ [ns.l, ns.m]|sort }}",
        "{{ [ns.l, ns.m]|unique }}",
        "{{ ns.l is eq(ns.m) }}",
        "{{ [ns.l]|select('equalto', ns.m)|list }}",
        "{{ {'a': 1}[ns.l] }}",
        "{{ ns.l.count(ns.m) }}",
    ];
    let mut table: Vec<String> = uses.iter().map(|use_of_it| doubled(use_of_it)).collect();
    let grown = |body: &str| {
        format!(
            "{{% set ns = namespace(l=[1]) %}}{{% for i in range(90000) %}}{{% set ns.l = {body} %}}{{% endfor %}}{{{{ ns.l }}}}"
        )
    };
    table.extend(
        [
            "[ns.l]",
            "(ns.l, 1)",
            "{'a': ns.l}",
            "dict(a=ns.l)",
            "ns.l + ns.l",
            "ns.l + [1]",
            "namespace(a=ns.l)",
            "ns",
            "[ns]",
            "ns.l|batch(1)|list",
            "{'a': ns.l}|items",
            "ns.l * 2",
        ]
        .map(grown),
    );
    table.push(
        "{% macro f(l, n) %}{% if n %}{{ f([l, l], n - 1) }}{% else %}{{ l }}{% endif %}{% endmacro %}{{ f([1], 60) }}"
            .to_owned(),
    );
    table.push("{% set a = [1] %}".to_owned() + &"{% set a = [a, a] %}".repeat(60) + "{{ a ~ '' }}");
    table.push("{% set a = 1, 1 %}".to_owned() + &"{% set a = a, a %}".repeat(60) + "{{ a ~ '' }}");
    table.push("{% set ns = namespace(l=[1]) %}{% for i in range(100000) %}{% for j in range(100000) %}{% if messages == messages[0:] %}{% endif %}{% endfor %}{% endfor %}".to_owned());
    for source in table {
        let start = Instant::now();
        let result = render(&source, json!({}));
        assert!(result.is_err(), "{source} gave {} bytes", result.map_or(0, |text| text.len()));
        assert!(start.elapsed().as_secs_f64() < LONGEST_S, "{source} took {:?}", start.elapsed());
    }
    // Slices of slices are slow in the engine alone.
    let start = Instant::now();
    assert_eq!(render(&grown("ns.l[0:]"), json!({})).unwrap(), "[1]");
    assert!(start.elapsed().as_secs_f64() < LONGEST_S);
}

/// The guards change nothing of what an honest template writes.
#[test]
fn guarded_expressions_have_their_values() {
    let table = [
        ("{{ -1 ~ 'a' ~ 2 * 3 }}", "-1a6"),
        ("{{ 1 + 2 == 3 and 'a' in 'cat' ~ 's' and not 'x' in ['y'] }}", "True"),
        (
            "{% set a = [messages[0].content, 'b'] %}{{ a + ['c'] }}{{ (a + ['c'])[1:] }}{{ a[::-1]|join('-') }}",
            "['hi', 'b', 'c']['b', 'c']b-hi",
        ),
        (
            "{% set d = {'k': messages[0]['role']} %}{% for k, v in d.items() %}{{ k ~ v }}{% endfor %}{{ d | items | list }}",
            "kuser[('k', 'user')]",
        ),
        (
            "{% set ns = namespace(x=[]) %}{% for i in range(3) %}{% set ns.x = ns.x + [i] %}{% endfor %}{{ ns.x }}",
            "[0, 1, 2]",
        ),
        ("{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set t = a, b %}{{ t }}", "12(1, 2)"),
        ("{{ [3, 1, 2]|sort(reverse=true) }}{{ ['a', 'b']|join(', ') }}{{ [1, 1]|unique|list }}", "[3, 2, 1]a, b[1]"),
        (
            "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}{{ 1 is in [1, 2] }}{{ 3 is eq 3 }}",
            "1TrueTrue",
        ),
        ("{{ namespace(a=1).a }}{{ dict(a=2)['a'] }}{{ 'a' if messages[0]['role'] == 'user' else 'b' }}", "12a"),
        ("{% macro m(x, y=[1, 2]) %}{{ x ~ y }}{% endmacro %}{{ m('z') }}", "z[1, 2]"),
    ];
    for (source, wanted) in table {
        assert_eq!(render(source, json!({})).unwrap(), wanted, "{source}");
    }
}

/// A long but honest conversation stays far below the limits.
#[test]
fn a_megabyte_of_talk_renders() {
    let source =
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}";
    let messages: Vec<Value> = (0..2000).map(|_| json!({"role": "user", "content": "word ".repeat(1000)})).collect();
    assert!(template(source).render(&messages, None, false, &Map::new()).unwrap().len() > 10_000_000);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2048))]

    /// Whatever stands in a template, compiling and rendering it ends with text or an error.
    #[test]
    fn mutated_templates_never_panic(edits in prop::collection::vec((any::<prop::sample::Index>(), 0..128_u8, 0..3_u8), 1..6)) {
        let seed = "{%- for m in messages -%}{% generation %}{{ m['content'] | trim }}{% endgeneration %}{% endfor %}{{ eos_token if x is defined }}";
        let mut text: Vec<char> = seed.chars().collect();
        for (place, byte, edit) in edits {
            let at = place.index(text.len());
            match edit {
                0 => text[at] = char::from(byte),
                1 => { text.remove(at); }
                _ => text.insert(at, char::from(byte)),
            }
        }
        let source: String = text.into_iter().collect();
        if let Ok(template) = ChatTemplate::new(&source, "test", BTreeMap::new()) {
            let _ = template.render(&[json!({"role": "user", "content": "a"})], None, false, &Map::new());
        }
    }

    /// `tojson` writes what JSON readers read back.
    #[test]
    fn tojson_round_trips(text in "\\PC*", number: f64, integer: i64) {
        prop_assume!(number.is_finite());
        let value = json!({"t": text, "n": number, "i": integer, "l": [text, {"x": null}]});
        let written = render("{{ v | tojson }}", json!({"v": value})).unwrap();
        prop_assert_eq!(serde_json::from_str::<Value>(&written).unwrap(), value);
    }
}
