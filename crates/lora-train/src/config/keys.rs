//! The keys of a configuration: what each may hold. The structs and this table are made from one text by [`section!`], so
//! that a key, its default, what it allows and its documentation cannot drift apart.

use std::time::Duration;
use toml::Value;

/// One key.
#[derive(Debug)]
pub(crate) struct Key {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) doc: &'static str,
}

/// What a key may hold.
#[derive(Debug)]
pub(crate) enum Kind {
    Bool,
    Integer {
        min: i64,
        max: i64,
    },
    Number(Range),
    /// A text that is not empty.
    Text,
    Choice(&'static [&'static str]),
    /// One of the first, or another name of one of them.
    Named(&'static [&'static str], &'static [(&'static str, &'static str)]),
    Device,
    /// A list of texts; one text is taken for a list of one.
    Texts,
    /// A list of indices; one integer is taken for a list of one.
    Indices,
    /// A list of indices, or a table from texts to such lists.
    IndicesOrMap,
    /// A list of names, or a text.
    Modules,
    /// `true`, `false` or one of these texts.
    BoolOr(&'static [&'static str]),
    /// A table from texts to values of this kind.
    Map(&'static Kind),
    /// Any value.
    Any,
    /// A day, as `2026-11-24`.
    Date,
    /// A span of time, as `2h30m`.
    Span,
    /// 0, a fraction below 1, or a whole number.
    Split,
    /// A list of tables with these keys; a text is taken for `{ path = TEXT }`.
    Tables(&'static [Key]),
}

/// A range of finite numbers.
#[derive(Debug)]
pub(crate) enum Range {
    Positive,
    NotNegative,
    ZeroToOne,
    ZeroToBelowOne,
}

impl Range {
    fn holds(&self, x: f64) -> bool {
        x.is_finite()
            && match self {
                Range::Positive => x > 0.0,
                Range::NotNegative => x >= 0.0,
                Range::ZeroToOne => (0.0..=1.0).contains(&x),
                Range::ZeroToBelowOne => (0.0..1.0).contains(&x),
            }
    }
}

impl Kind {
    /// Whether the value is allowed. The elements of [`Kind::Tables`] are checked one by one elsewhere.
    pub(crate) fn accepts(&self, value: &Value) -> bool {
        let text = value.as_str();
        let all = |f: &dyn Fn(&Value) -> bool| value.as_array().is_some_and(|list| list.iter().all(f));
        match self {
            Kind::Bool => value.is_bool(),
            Kind::Integer { min, max } => value.as_integer().is_some_and(|i| (*min..=*max).contains(&i)),
            Kind::Number(range) => number(value).is_some_and(|x| range.holds(x)),
            Kind::Text => text.is_some_and(|s| !s.trim().is_empty()),
            Kind::Choice(names) | Kind::Named(names, _) => text.is_some_and(|s| names.contains(&s)),
            Kind::Device => text.is_some_and(|s| {
                ["auto", "cpu", "cuda"].contains(&s)
                    || s.strip_prefix("cuda:").is_some_and(|n| n.parse::<u16>().is_ok())
            }),
            Kind::Texts => all(&|v| Kind::Text.accepts(v)),
            Kind::Indices => all(&|v| INDEX.accepts(v)),
            Kind::IndicesOrMap => match value.as_table() {
                Some(table) => {
                    table.iter().all(|(k, v)| !k.trim().is_empty() && v.is_array() && Kind::Indices.accepts(v))
                }
                None => Kind::Indices.accepts(value),
            },
            // "q_proj,v_proj" is how other tools write a list; as a regular expression it can match no module.
            Kind::Modules => text
                .map_or(Kind::Texts.accepts(value), |s| !s.trim().is_empty() && !s.contains(", ") && !is_comma_list(s)),
            Kind::BoolOr(names) => {
                let fits = |v: &str, name: &str| name.strip_suffix('*').map_or(v == name, |start| v.starts_with(start));
                value.is_bool() || value.as_str().is_some_and(|v| names.iter().any(|name| fits(v, name)))
            }
            Kind::Map(of) => {
                value.as_table().is_some_and(|t| t.iter().all(|(k, v)| !k.trim().is_empty() && of.accepts(v)))
            }
            Kind::Any => true,
            Kind::Date => text.is_some_and(|s| lora_data::Clock::from_date(s).is_some()),
            Kind::Span => text.is_some_and(|s| span(s).is_some()),
            Kind::Split => {
                number(value).is_some_and(|x| (0.0..1.0).contains(&x) || (x.fract() == 0.0 && (1.0..1e15).contains(&x)))
            }
            Kind::Tables(_) => all(&|v| v.is_table()),
        }
    }

    /// What is allowed, in words that follow "must be".
    pub(crate) fn allowed(&self) -> String {
        let quoted = |names: &[&str]| names.iter().map(|n| format!("\"{n}\"")).collect::<Vec<_>>().join(", ");
        match self {
            Kind::Bool => "true or false".into(),
            Kind::Integer { min, max: i64::MAX } => format!("an integer of at least {min}"),
            Kind::Integer { min, max } => format!("an integer from {min} to {max}"),
            Kind::Number(Range::Positive) => "a finite number above 0".into(),
            Kind::Number(Range::NotNegative) => "a finite number of at least 0".into(),
            Kind::Number(Range::ZeroToOne) => "a number from 0 to 1".into(),
            Kind::Number(Range::ZeroToBelowOne) => "a number from 0 to below 1".into(),
            Kind::Text => "a text that is not empty".into(),
            Kind::Choice(names @ [_]) => quoted(names),
            Kind::Choice(names) | Kind::Named(names, _) => format!("one of {}", quoted(names)),
            Kind::Device => "one of \"auto\", \"cpu\", \"cuda\", \"cuda:N\"".into(),
            Kind::Texts => "a text or a list of texts".into(),
            Kind::Indices => "an integer of at least 0 or a list of them".into(),
            Kind::IndicesOrMap => {
                "a list of integers of at least 0, or a table of such lists as { embed_tokens = [3, 5] }".into()
            }
            Kind::Modules => {
                "a list of names as [\"q_proj\", \"v_proj\"], a regular expression, or \"all-linear\" where targets are meant".into()
            }
            Kind::BoolOr(names) => format!("true, false or {}", quoted(names)),
            Kind::Map(Kind::Any) => "a table".into(),
            Kind::Map(of) => format!("a table whose values are each {}", of.allowed()),
            Kind::Any => "any value".into(),
            Kind::Date => "a day, as \"2026-11-24\"".into(),
            Kind::Span => "a time, as \"2h30m\", \"90m\" or \"45s\"".into(),
            Kind::Split => "0, a fraction below 1, or a whole number of examples".into(),
            Kind::Tables(_) => "a path, a list of paths, or a list of tables as [{ path = \"train.jsonl\" }]".into(),
        }
    }

    /// Whether what follows `=` on a command line is meant as a text even when it looks like a number.
    pub(crate) fn is_text(&self) -> bool {
        matches!(self, Kind::Text | Kind::Choice(_) | Kind::Named(..) | Kind::Device | Kind::Date | Kind::Span)
    }

    /// Brings the short forms of a value to the long one, and other names to our own.
    pub(crate) fn normalise(&self, value: &mut Value) {
        if let (Kind::Named(_, others), Some(name)) = (self, value.as_str())
            && let Some((_, own)) = others.iter().find(|(other, _)| *other == name)
        {
            *value = Value::String((*own).to_string());
        }
        let is_single = match self {
            Kind::Texts => value.is_str(),
            Kind::Indices | Kind::IndicesOrMap => value.is_integer(),
            Kind::Tables(_) => value.is_str() || value.is_table(),
            _ => false,
        };
        if is_single {
            *value = Value::Array(vec![value.clone()]);
        }
        if let (Kind::Tables(_), Some(list)) = (self, value.as_array_mut()) {
            for entry in list.iter_mut().filter(|entry| entry.is_str()) {
                *entry = Value::Table([("path".to_string(), entry.clone())].into_iter().collect());
            }
        }
    }
}

const INDEX: Kind = Kind::Integer { min: 0, max: u32::MAX as i64 };

fn number(value: &Value) -> Option<f64> {
    value.as_float().or_else(|| value.as_integer().map(|i| i as f64))
}

/// A time of whole days, hours, minutes and seconds, each at most once and the longest first: `2h30m`, `90m`, `45s`.
pub(crate) fn span(text: &str) -> Option<Duration> {
    let (mut rest, mut seconds) = (text.trim(), 0u64);
    if rest.is_empty() {
        return None;
    }
    for (unit, each) in [('d', 86_400), ('h', 3_600), ('m', 60), ('s', 1)] {
        if let Some((count, after)) = rest.split_once(unit)
            && count.bytes().all(|b| b.is_ascii_digit())
        {
            seconds = seconds.checked_add(count.parse::<u64>().ok()?.checked_mul(each)?)?;
            rest = after;
        }
    }
    (rest.is_empty() && seconds > 0).then(|| Duration::from_secs(seconds))
}

fn is_comma_list(s: &str) -> bool {
    s.contains(',') && s.chars().all(|c| c.is_ascii_alphanumeric() || "_,. ".contains(c))
}

/// Makes a section: the struct, its defaults, and its keys. Every field is `/// doc`, `name: type = default, kind;`.
macro_rules! section {
    ($(#[doc = $about:literal])+ $name:ident {
        $($(#[doc = $doc:literal])+ $(#[serde $serde:tt])? $field:ident: $type:ty = $default:expr, $kind:expr;)+
    }) => {
        $(#[doc = $about])+
        #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(default, deny_unknown_fields)]
        #[allow(non_snake_case, reason = "a key is spelled as PEFT spells it, and one of AdaLoRA's is `deltaT`")]
        pub struct $name {
            $($(#[doc = $doc])+ $(#[serde $serde])? pub $field: $type,)+
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $default,)+ }
            }
        }

        impl $name {
            pub(crate) const KEYS: &'static [$crate::config::keys::Key] = &[
                $($crate::config::keys::Key { name: stringify!($field), kind: $kind, doc: concat!($($doc),+) },)+
            ];
        }
    };
}

/// Makes an enum of words, with the list of the words.
macro_rules! choice {
    ($(#[doc = $about:literal])+ $name:ident {
        $($(#[doc = $doc:literal])+ $variant:ident = $word:literal,)+
    }) => {
        $(#[doc = $about])+
        #[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        pub enum $name {
            $($(#[doc = $doc])+ #[serde(rename = $word)] $variant,)+
        }

        impl $name {
            /// Every choice.
            pub const ALL: &'static [$name] = &[$($name::$variant,)+];
            /// The words of the choices, as a configuration spells them.
            pub const NAMES: &'static [&'static str] = &[$($word,)+];

            /// The word, as a configuration spells it.
            pub fn name(self) -> &'static str {
                match self { $($name::$variant => $word,)+ }
            }
        }
    };
}

pub(crate) use {choice, section};
