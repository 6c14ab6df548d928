//! chrF (Popović, "chrF: character n-gram F-score for automatic MT evaluation", 2015) of a corpus.

use super::{Written, is_space, runs};

/// Characters of the longest run.
const ORDER: usize = 6;
/// How much more recall counts than precision.
const BETA: f64 = 2.0;

/// For each length of run: those of the text, those of the reference, those of both.
type Counts = [[usize; 3]; ORDER];

/// 0 to 100.
pub(super) fn corpus(texts: &[Written]) -> f64 {
    let mut sum: Counts = Default::default();
    for one in texts {
        let text = characters(&one.text);
        // Of several references the one that is nearest, the first of equals.
        let mut best: Option<(f64, Counts)> = None;
        for reference in &one.references {
            let counts = counts(&text, &characters(reference));
            let f = f(&counts);
            if best.is_none_or(|(most, _)| f > most) {
                best = Some((f, counts));
            }
        }
        let Some((_, counts)) = best else { continue };
        sum.iter_mut().flatten().zip(counts.iter().flatten()).for_each(|(sum, count)| *sum += count);
    }
    f(&sum)
}

fn characters(text: &str) -> Vec<char> {
    text.chars().filter(|c| !is_space(*c)).collect()
}

fn counts(text: &[char], reference: &[char]) -> Counts {
    std::array::from_fn(|i| {
        let (own, wanted) = (runs(text, i + 1), runs(reference, i + 1));
        let both = own.iter().map(|(run, count)| *count.min(wanted.get(run).unwrap_or(&0))).sum();
        // Runs of a length that the reference has not are not counted, as in sacrebleu.
        let counted = if wanted.is_empty() { 0 } else { own.values().sum() };
        [counted, wanted.values().sum(), both]
    })
}

/// The F of the mean precision and the mean recall, over the lengths that both sides have.
fn f(counts: &Counts) -> f64 {
    let shares: Vec<(f64, f64)> = counts
        .iter()
        .filter(|[own, wanted, _]| *own > 0 && *wanted > 0)
        .map(|[own, wanted, both]| (*both as f64 / *own as f64, *both as f64 / *wanted as f64))
        .collect();
    let mean = |of: fn(&(f64, f64)) -> f64| shares.iter().map(of).sum::<f64>() / shares.len().max(1) as f64;
    let (precision, recall) = (mean(|s| s.0), mean(|s| s.1));
    if precision + recall == 0.0 {
        return 0.0;
    }
    let factor = BETA * BETA;
    100.0 * (1.0 + factor) * precision * recall / (factor * precision + recall)
}
