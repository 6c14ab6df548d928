//! Lets a chat template pay for values that hold themselves over and over, before anything walks through them.
//!
//! The engine counts instructions and bytes, but a list that holds itself twice, forty times nested, is small in memory
//! and endless as text, in a comparison or as a key. So the source is rewritten: what a `[...]`, `{...}` or `(..., ...)`
//! makes, what `~` and the comparisons take, and what `set` keeps goes through a filter that counts it first.

use std::collections::BTreeSet;

/// The filter for values that a literal makes: pays for all that they hold, and refuses a namespace in them.
pub(crate) const HELD: &str = "__held";
/// The filter for operands: pays for all that they hold.
pub(crate) const WEIGHED: &str = "__weighed";
/// The filter for what a variable is set to: slices of slices become lists.
pub(crate) const SETTLED: &str = "__settled";
/// The same for an attribute of a namespace, which must not be a namespace, lest it hold itself.
pub(crate) const SETTLED_ATTRIBUTE: &str = "__settled_attribute";

/// Rewrites a template; none when its code cannot be read.
pub(crate) fn guard(source: &str) -> Option<String> {
    let mut edits: Vec<(usize, String)> = Vec::new();
    let mut at = 0;
    while let Some(found) = source[at..].find('{') {
        let start = at + found;
        let rest = &source[start..];
        at = if rest.starts_with("{#") {
            start + rest.find("#}")? + 2
        } else if rest.starts_with("{{") || rest.starts_with("{%") {
            let (tokens, end) = tokens(source, start + 2, if rest.starts_with("{{") { "}}" } else { "%}" })?;
            if rest.starts_with("{%") && tokens.first().is_some_and(|token| token.text == "raw") {
                end + end_of_raw(&source[end..])?
            } else {
                let mut code = Code { pairs: pairs(&tokens)?, tokens, edits: Vec::new() };
                code.block(rest.starts_with("{%"));
                edits.append(&mut code.edits);
                end
            }
        } else {
            start + 1
        };
    }
    // Of edits at one place the inner ones come first, as they were made first.
    edits.sort_by_key(|(place, _)| *place);
    let mut out = String::with_capacity(source.len() + edits.iter().map(|(_, text)| text.len()).sum::<usize>());
    let mut from = 0;
    for (place, text) in edits {
        out.push_str(&source[from..place]);
        out.push_str(&text);
        from = place;
    }
    out.push_str(&source[from..]);
    Some(out)
}

/// The length of the text up to and with `{% endraw %}`.
fn end_of_raw(text: &str) -> Option<usize> {
    let mut at = 0;
    loop {
        at += text[at..].find("{%")? + 2;
        let inner = &text[at..][..text[at..].find("%}")?];
        if inner.trim_matches(['-', '+']).trim() == "endraw" {
            return Some(at + inner.len() + 2);
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Word,
    /// A string or a number.
    Constant,
    Operator,
    Open,
    Close,
}

#[derive(Clone, Copy, Debug)]
struct Token<'a> {
    kind: Kind,
    text: &'a str,
    start: usize,
}

impl Token<'_> {
    fn end(&self) -> usize {
        self.start + self.text.len()
    }
}

/// Brackets nested deeper than this are not read; the engine refuses them too.
const MAX_BRACKETS: usize = 150;

/// The tokens of a block that begins at `at`, and where it ends.
fn tokens<'a>(source: &'a str, mut at: usize, close: &str) -> Option<(Vec<Token<'a>>, usize)> {
    let mut tokens = Vec::new();
    let mut depth = 0_usize;
    if source[at..].starts_with(['-', '+']) {
        at += 1;
    }
    loop {
        let rest = &source[at..];
        let first = rest.chars().next()?;
        if depth == 0 {
            let trimmed = rest.strip_prefix(['-', '+']).unwrap_or(rest);
            if trimmed.starts_with(close) {
                return Some((tokens, at + (rest.len() - trimmed.len()) + close.len()));
            }
        }
        let is_word = |c: char| c.is_alphanumeric() || c == '_' || !c.is_ascii();
        let (kind, length) = match first {
            c if c.is_whitespace() => {
                at += c.len_utf8();
                continue;
            }
            '"' | '\'' => (Kind::Constant, string_length(rest, first)?),
            c if c.is_ascii_digit() => {
                (Kind::Constant, rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len()))
            }
            c if is_word(c) => (Kind::Word, rest.find(|c: char| !is_word(c)).unwrap_or(rest.len())),
            '(' | '[' | '{' => {
                depth += 1;
                if depth > MAX_BRACKETS {
                    return None;
                }
                (Kind::Open, 1)
            }
            ')' | ']' | '}' => {
                depth = depth.checked_sub(1)?;
                (Kind::Close, 1)
            }
            _ => {
                let two = ["**", "//", "==", "!=", "<=", ">="].iter().any(|operator| rest.starts_with(operator));
                (Kind::Operator, if two { 2 } else { first.len_utf8() })
            }
        };
        tokens.push(Token { kind, text: &rest[..length], start: at });
        at += length;
    }
}

/// The length of a string with its quotes.
fn string_length(text: &str, quote: char) -> Option<usize> {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return Some(at + 1),
            _ => {}
        }
    }
    None
}

/// For every bracket the place of its partner.
fn pairs(tokens: &[Token<'_>]) -> Option<Vec<usize>> {
    let mut pairs = vec![0; tokens.len()];
    let mut open = Vec::new();
    for (i, token) in tokens.iter().enumerate() {
        match token.kind {
            Kind::Open => open.push(i),
            Kind::Close => {
                let start: usize = open.pop()?;
                (pairs[start], pairs[i]) = (i, start);
            }
            _ => {}
        }
    }
    open.is_empty().then_some(pairs)
}

/// Words that end an operand. After one of them a bracket begins a value.
const SEPARATORS: [&str; 15] = [
    "if",
    "else",
    "elif",
    "and",
    "or",
    "not",
    "in",
    "do",
    "print",
    "include",
    "import",
    "extends",
    "from",
    "return",
    "autoescape",
];

/// What stands between two operands, by how loosely it binds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Separator {
    Concat,
    Sum,
    Compare,
    Other,
}

struct Code<'a> {
    tokens: Vec<Token<'a>>,
    pairs: Vec<usize>,
    edits: Vec<(usize, String)>,
}

impl Code<'_> {
    fn text(&self, at: usize) -> &str {
        self.tokens.get(at).map_or("", |token| token.text)
    }

    fn block(&mut self, is_statement: bool) {
        let end = self.tokens.len();
        match self.text(0) {
            "set" if is_statement => {
                let Some(equals) = self.at_this_level(0, end).into_iter().find(|&i| self.text(i) == "=") else {
                    return self.level(0, end);
                };
                self.level(equals + 1, end);
                let is_attribute = (0..equals).any(|i| self.text(i) == ".");
                self.wrap(equals + 1, end, if is_attribute { SETTLED_ATTRIBUTE } else { SETTLED });
            }
            "for" if is_statement => {
                let start =
                    self.at_this_level(0, end).into_iter().find(|&i| self.text(i) == "in").map_or(end, |i| i + 1);
                self.level(start, end);
            }
            _ => self.level(0, end),
        }
    }

    /// The tokens of a range that are in no bracket; of a bracket, its opening only.
    fn at_this_level(&self, from: usize, to: usize) -> Vec<usize> {
        let mut level = Vec::new();
        let mut i = from;
        while i < to {
            level.push(i);
            i = if self.tokens[i].kind == Kind::Open { self.pairs[i] + 1 } else { i + 1 };
        }
        level
    }

    /// Whether a value may end with the token.
    fn ends_operand(&self, at: usize) -> bool {
        match self.tokens[at].kind {
            Kind::Constant | Kind::Close => true,
            Kind::Word => !SEPARATORS.contains(&self.text(at)) || at > 0 && [".", "|"].contains(&self.text(at - 1)),
            _ => false,
        }
    }

    /// Whether the word at a place is the name of a test: `x is in`, `x is not defined`.
    fn names_test(&self, at: usize) -> bool {
        at > 0 && (self.text(at - 1) == "is" || at > 1 && self.text(at - 1) == "not" && self.text(at - 2) == "is")
    }

    /// The operands of one level and the brackets in it.
    fn level(&mut self, from: usize, to: usize) {
        let level = self.at_this_level(from, to);
        // Where the operand of a sum and that of a comparison begin, and whether they need a guard.
        let (mut concat, mut compare) = ((from, false), (from, false));
        for i in level {
            if self.tokens[i].kind == Kind::Open {
                self.bracket(i, i > from && self.ends_operand(i - 1));
                continue;
            }
            let Some(separator) = self.separator(i, from) else { continue };
            if concat.1 || separator == Separator::Concat {
                self.wrap(concat.0, i, WEIGHED);
            }
            concat = (i + 1, separator == Separator::Concat);
            if matches!(separator, Separator::Compare | Separator::Other) {
                if compare.1 || separator == Separator::Compare {
                    self.wrap(compare.0, i, WEIGHED);
                }
                compare = (i + 1, separator == Separator::Compare);
            }
        }
        if concat.1 {
            self.wrap(concat.0, to, WEIGHED);
        }
        if compare.1 {
            self.wrap(compare.0, to, WEIGHED);
        }
    }

    fn separator(&self, at: usize, from: usize) -> Option<Separator> {
        let token = self.tokens[at];
        match (token.kind, token.text) {
            (Kind::Operator, "~") => Some(Separator::Concat),
            (Kind::Operator, "+" | "-") => (at > from && self.ends_operand(at - 1)).then_some(Separator::Sum),
            (Kind::Operator, "==" | "!=" | "<" | "<=" | ">" | ">=") => Some(Separator::Compare),
            (Kind::Operator, "," | ":" | "=") => Some(Separator::Other),
            (Kind::Word, word) if SEPARATORS.contains(&word) => {
                let is_name = at > from && [".", "|"].contains(&self.text(at - 1));
                let is_part_of_test = self.names_test(at) || word == "not" && at > from && self.text(at - 1) == "is";
                match word {
                    _ if is_name || is_part_of_test => None,
                    "in" => Some(Separator::Compare),
                    "not" if self.text(at + 1) == "in" => Some(Separator::Compare),
                    _ => Some(Separator::Other),
                }
            }
            _ => None,
        }
    }

    fn bracket(&mut self, open: usize, after_operand: bool) {
        let close = self.pairs[open];
        self.level(open + 1, close);
        let level = self.at_this_level(open + 1, close);
        let has = |code: &Self, sign: &str| level.iter().any(|&i| code.text(i) == sign);
        let is_value = !after_operand || self.text(open) == "[" && open > 0 && self.names_test(open - 1);
        match self.text(open) {
            "[" if !is_value => {
                if !has(self, ":") {
                    self.wrap(open + 1, close, WEIGHED);
                }
            }
            "(" if !is_value || !has(self, ",") => {}
            _ => {
                let constants = BTreeSet::from(["true", "false", "none", "True", "False", "None"]);
                let inner = &self.tokens[open + 1..close];
                if inner.iter().any(|token| token.kind == Kind::Word && !constants.contains(token.text)) {
                    self.wrap(open, close + 1, HELD);
                }
            }
        }
    }

    /// Sends the tokens of a range through a filter. Constants need none.
    fn wrap(&mut self, from: usize, to: usize, filter: &str) {
        let constant = to == from + 1 && self.tokens[from].kind == Kind::Constant;
        if from < to && !constant {
            self.edits.push((self.tokens[from].start, "((".to_owned()));
            self.edits.push((self.tokens[to - 1].end(), format!(")|{filter})")));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn short(source: &str) -> String {
        let names = [(SETTLED_ATTRIBUTE, "a"), (SETTLED, "s"), (HELD, "h"), (WEIGHED, "w")];
        names.iter().fold(guard(source).unwrap(), |text, (name, letter)| text.replace(name, letter))
    }

    #[test]
    fn operands_and_values_are_guarded() {
        let table = [
            ("a {{ b }} {# [x] #}", "a {{ b }} {# [x] #}"),
            ("{{ a ~ 'b' ~ c.d(1) }}", "{{ ((a)|w) ~ 'b' ~ ((c.d(1))|w) }}"),
            ("{{ a * -b ~ c + 1 }}", "{{ ((a * -b)|w) ~ ((c)|w) + 1 }}"),
            (
                "{%- if m['role'] == x and y not in z -%}",
                "{%- if ((m['role'])|w) == ((x)|w) and ((y)|w) not in ((z)|w) -%}",
            ),
            ("{% if x is not in [1] %}", "{% if x is not in [1] %}"),
            ("{% set ns.l = [ns.l, 1] %}", "{% set ns.l = (((([ns.l, 1])|h))|a) %}"),
            ("{% set t = a, b %}", "{% set t = ((a, b)|s) %}"),
            ("{% for k, (v, w) in [x] if v %}", "{% for k, (v, w) in (([x])|h) if v %}"),
            ("{{ f(a, b)[i][1:] }}", "{{ f(a, b)[((i)|w)][1:] }}"),
            ("{{ {'a': {'b': c}} }}", "{{ (({'a': (({'b': c})|h)})|h) }}"),
            (
                "{{ (a, b) }}{{ (a) }}{{ [] }}{{ ['}}', \"{%\"] }}",
                "{{ (((a, b))|h) }}{{ (a) }}{{ [] }}{{ ['}}', \"{%\"] }}",
            ),
            ("{% raw %}{{ a ~ b }}{%- endraw -%}{{ a }}", "{% raw %}{{ a ~ b }}{%- endraw -%}{{ a }}"),
            ("{{ a if b == 'c' else d }}", "{{ a if ((b)|w) == 'c' else d }}"),
        ];
        for (source, wanted) in table {
            assert_eq!(short(source), wanted);
        }
        for source in ["{{ 'a }}", "{{ (a] }", "{# a", "{% if", "{{ ) }}"] {
            assert_eq!(guard(source), None, "{source}");
        }
    }
}
