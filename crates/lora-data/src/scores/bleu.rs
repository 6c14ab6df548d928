//! BLEU (Papineni et al., "BLEU: a Method for Automatic Evaluation of Machine Translation", 2002) of a corpus, with the
//! tokenizer of mteval-v13a and its smoothing (Chen and Cherry, 2014, method 3).

use super::{Written, is_space, runs};
use std::collections::HashMap;

/// Words of the longest run.
const ORDER: usize = 4;

/// 0 to 100.
pub(super) fn corpus(texts: &[Written]) -> f64 {
    let (mut right, mut all) = ([0usize; ORDER], [0usize; ORDER]);
    let (mut written, mut wanted) = (0, 0);
    for one in texts {
        let text = words(&one.text);
        let references: Vec<Vec<String>> = one.references.iter().map(|reference| words(reference)).collect();
        written += text.len();
        // The nearest length, and of two the shorter.
        let nearest = references.iter().map(Vec::len).min_by_key(|length| (length.abs_diff(text.len()), *length));
        wanted += nearest.unwrap_or(0);
        for n in 1..=ORDER {
            let mut most: HashMap<&[String], usize> = HashMap::new();
            for reference in &references {
                for (run, count) in runs(reference, n) {
                    let known = most.entry(run).or_insert(0);
                    *known = count.max(*known);
                }
            }
            for (run, count) in runs(&text, n) {
                all[n - 1] += count;
                right[n - 1] += count.min(most.get(run).copied().unwrap_or(0));
            }
        }
    }
    if right.iter().all(|count| *count == 0) {
        return 0.0;
    }
    let (mut logs, mut smooth) = (0.0, 1.0);
    for (&right, &all) in right.iter().zip(&all) {
        if all == 0 {
            // No text has so many words.
            return 0.0;
        }
        let share = match right {
            0 => {
                smooth *= 2.0;
                100.0 / (smooth * all as f64)
            }
            right => 100.0 * right as f64 / all as f64,
        };
        logs += share.ln();
    }
    let brevity = if written < wanted { (1.0 - wanted as f64 / written as f64).exp() } else { 1.0 };
    brevity * (logs / ORDER as f64).exp()
}

/// The words of a text by the tokenizer 13a.
pub(super) fn words(text: &str) -> Vec<String> {
    let text = text.trim_end_matches(is_space).replace("<skipped>", "").replace("-\n", "").replace('\n', " ");
    let text = text.replace("&quot;", "\"").replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">");
    let mut spaced = Vec::new();
    for c in format!(" {text} ").chars() {
        match c {
            ' '..='&' | '('..='+' | '/' | ':'..='@' | '['..='`' | '{'..='~' => spaced.extend([' ', c, ' ']),
            other => spaced.push(other),
        }
    }
    let digit = |c: char| c.is_ascii_digit();
    let point = |c: char| matches!(c, '.' | ',');
    let spaced = pairs(&spaced, |a, b| !digit(a) && point(b), |a, b| [a, ' ', b, ' ']);
    let spaced = pairs(&spaced, |a, b| point(a) && !digit(b), |a, b| [' ', a, ' ', b]);
    let spaced = pairs(&spaced, |a, b| digit(a) && b == '-', |a, b| [a, ' ', b, ' ']);
    let text: String = spaced.into_iter().collect();
    text.split(is_space).filter(|word| !word.is_empty()).map(str::to_string).collect()
}

/// Puts something in the place of each pair of neighbours that is found, from left to right, none of them overlapping.
fn pairs(text: &[char], found: impl Fn(char, char) -> bool, put: impl Fn(char, char) -> [char; 4]) -> Vec<char> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [a, after @ ..] = rest {
        match after {
            [b, beyond @ ..] if found(*a, *b) => {
                out.extend(put(*a, *b));
                rest = beyond;
            }
            _ => {
                out.push(*a);
                rest = after;
            }
        }
    }
    out
}
