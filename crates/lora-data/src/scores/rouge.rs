//! ROUGE-L (Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004) of a text.

use super::Written;

/// The F of the nearest reference, 0 to 1.
pub(super) fn best(one: &Written) -> f64 {
    let text = words(&one.text);
    one.references.iter().map(|reference| f(&text, &words(reference))).fold(0.0, f64::max)
}

/// Runs of letters and digits of ASCII, in lower case.
fn words(text: &str) -> Vec<String> {
    let lower = text.to_lowercase();
    let parts = lower.split(|c: char| !c.is_ascii_lowercase() && !c.is_ascii_digit());
    parts.filter(|word| !word.is_empty()).map(str::to_string).collect()
}

/// The harmonic mean of the longest common subsequence's shares of both.
fn f(text: &[String], reference: &[String]) -> f64 {
    let common = longest_common(text, reference) as f64;
    if common == 0.0 {
        return 0.0;
    }
    let (precision, recall) = (common / text.len() as f64, common / reference.len() as f64);
    2.0 * precision * recall / (precision + recall)
}

/// Words of the longest common subsequence.
fn longest_common(a: &[String], b: &[String]) -> usize {
    // For each beginning of `b`, against what was seen of `a`.
    let mut lengths = vec![0usize; b.len() + 1];
    for word in a {
        let mut before = 0;
        for (j, other) in b.iter().enumerate() {
            let longest = if word == other { before + 1 } else { lengths[j].max(lengths[j + 1]) };
            before = std::mem::replace(&mut lengths[j + 1], longest);
        }
    }
    lengths.last().copied().unwrap_or(0)
}
