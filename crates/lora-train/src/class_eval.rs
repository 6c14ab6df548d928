//! What a classifier gets right, and what it predicts.

use crate::classes::{ClassLabel, class_batch};
use crate::error::Result;
use crate::eval::EvalReport;
use crate::events::{Event, EventSink};
use lora_data::{ClassTarget, EncodedText, Rows};
use lora_format::ProblemType;
use lora_model::{ClassTargets, Decoder, Error as ModelError, Mode, TokenBatch};
use serde::Serialize;
use tch::{Kind, Tensor, no_grad};

/// How well a classifier does; each is there where it means something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct ClassScores {
    /// Share of the texts with the right label; of several labels all must be right.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// Mean of the F1 of the labels. Of a single label those count that a text has or is given, of several labels all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub macro_f1: Option<f64>,
    /// Mean squared error of a regression.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mse: Option<f64>,
    /// Pearson's correlation of a regression of one number; absent where either side is constant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pearson: Option<f64>,
}

/// How well a classifier does at one label.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LabelScores {
    /// Its name.
    pub label: String,
    /// Of the texts that are given it, the share that have it.
    pub precision: f64,
    /// Of the texts that have it, the share that are given it.
    pub recall: f64,
    /// Harmonic mean of the two; 0 where both are.
    pub f1: f64,
    /// Texts that have it.
    pub support: u64,
}

/// What an evaluation of a classifier found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ClassReport {
    /// Mean of the loss of the texts.
    pub loss: f64,
    /// The scores.
    #[serde(flatten)]
    pub scores: ClassScores,
    /// Texts.
    pub examples: usize,
    /// Tokens computed.
    pub tokens: u64,
    /// By label; empty for a regression.
    pub labels: Vec<LabelScores>,
}

impl ClassReport {
    /// The report as a run tells it.
    pub fn summary(&self) -> EvalReport {
        EvalReport {
            loss: self.loss,
            perplexity: self.loss.exp(),
            accuracy: self.scores.accuracy.unwrap_or(f64::NAN),
            tokens: self.examples as u64,
            examples: self.examples,
            classes: Some(self.scores),
            rewards: None,
            generated: None,
        }
    }
}

/// Evaluates a classifier on labelled texts, `rows` of them at a time.
///
/// # Errors
/// What the model reports.
pub fn evaluate_classes(
    model: &Decoder,
    texts: &Rows,
    labels: &[ClassLabel],
    rows: usize,
    sink: &mut dyn EventSink,
) -> Result<ClassReport> {
    let Some(known) = &model.config.labels else {
        return Err(ModelError::NoClasses { family: model.config.family.clone() }.into());
    };
    let (mut loss, mut tokens, mut predicted) = (0.0, 0, Vec::with_capacity(texts.len()));
    let rows = rows.max(1);
    for (number, labels_here) in labels.chunks(rows).enumerate() {
        let part = number * rows..texts.len().min((number + 1) * rows);
        let batch = texts.batch(part)?;
        let batch = class_batch(&model.config, &batch, labels_here.iter(), model.device())?;
        let logits = no_grad(|| model.class_logits(&batch, Mode::Eval))?;
        let sum = no_grad(|| model.class_loss(&logits, &batch))?;
        loss += sum.f_double_value(&[]).map_err(lora_torch::Error::from)?;
        tokens += batch.segments.total().unsigned_abs();
        predicted.extend(rows_of(&logits)?);
        sink.event(Event::Evaluating { done: predicted.len(), of: texts.len() });
    }
    let targets: Vec<&ClassTarget> = labels.iter().map(|l| &l.target).collect();
    let (scores, by_label) = scores(known.problem, &known.names, &predicted, &targets);
    let loss = loss / texts.len().max(1) as f64;
    Ok(ClassReport { loss, scores, examples: texts.len(), tokens, labels: by_label })
}

/// The scores of the labels of texts, `rows` texts at a time: for each text a number for each label, before they become
/// [`probabilities`].
///
/// # Errors
/// What the model reports.
pub fn predict(model: &Decoder, texts: &[EncodedText], rows: usize) -> Result<Vec<Vec<f64>>> {
    let mut all = Vec::with_capacity(texts.len());
    for part in texts.chunks(rows.max(1)) {
        let ids: Vec<i64> = part.iter().flat_map(|t| t.ids.iter().map(|&id| i64::from(id))).collect();
        let types: Vec<i64> = part.iter().flat_map(|t| t.types.iter().map(|&t| i64::from(t))).collect();
        let lens: Vec<i64> = part.iter().map(|t| t.ids.len() as i64).collect();
        let unknown = ClassTargets::Unknown;
        let batch = TokenBatch::for_classes(&model.config, &ids, &types, &lens, unknown, model.device())?;
        all.extend(rows_of(&no_grad(|| model.class_logits(&batch, Mode::Eval))?)?);
    }
    Ok(all)
}

/// Softmax of the scores of one text, or for several labels the logistic function of each; a regression's are its values.
pub fn probabilities(problem: ProblemType, logits: &[f64]) -> Vec<f64> {
    match problem {
        ProblemType::SingleLabel => {
            let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = logits.iter().map(|x| (x - most).exp()).collect();
            let sum: f64 = weights.iter().sum();
            weights.into_iter().map(|w| w / sum).collect()
        }
        ProblemType::MultiLabel => logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
        ProblemType::Regression => logits.to_vec(),
    }
}

/// `[n, labels]` as numbers.
fn rows_of(logits: &Tensor) -> Result<Vec<Vec<f64>>> {
    let wide = logits.f_to_kind(Kind::Double).map_err(lora_torch::Error::from)?;
    Ok(Vec::<Vec<f64>>::try_from(&wide).map_err(lora_torch::Error::from)?)
}

/// Whether each label is given to a text.
fn given(problem: ProblemType, logits: &[f64]) -> Vec<bool> {
    match problem {
        ProblemType::SingleLabel => {
            let best = (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
            (0..logits.len()).map(|i| i == best).collect()
        }
        _ => logits.iter().map(|x| *x > 0.0).collect(),
    }
}

fn scores(
    problem: ProblemType,
    names: &[String],
    predicted: &[Vec<f64>],
    targets: &[&ClassTarget],
) -> (ClassScores, Vec<LabelScores>) {
    let n = predicted.len().max(1) as f64;
    if problem == ProblemType::Regression {
        let pairs: Vec<(f64, f64)> = predicted
            .iter()
            .zip(targets)
            .flat_map(|(logits, target)| {
                let values: &[f32] = if let ClassTarget::Values(values) = target { values } else { &[] };
                logits.iter().zip(values).map(|(p, t)| (*p, f64::from(*t)))
            })
            .collect();
        let mse = pairs.iter().map(|(p, t)| (p - t).powi(2)).sum::<f64>() / pairs.len().max(1) as f64;
        let pearson = (names.len() == 1).then(|| pearson(&pairs)).flatten();
        return (ClassScores { mse: Some(mse), pearson, ..ClassScores::default() }, Vec::new());
    }
    // Of each label: given and had, given, had.
    let (mut both, mut chosen, mut had) = (vec![0u64; names.len()], vec![0u64; names.len()], vec![0u64; names.len()]);
    let mut right = 0u64;
    for (logits, target) in predicted.iter().zip(targets) {
        let given = given(problem, logits);
        let has = |i: usize| match target {
            ClassTarget::Id(id) => *id as usize == i,
            ClassTarget::Values(values) => values.get(i).is_some_and(|v| *v > 0.5),
        };
        right += u64::from(given.iter().enumerate().all(|(i, g)| *g == has(i)));
        for (i, given) in given.into_iter().enumerate() {
            both[i] += u64::from(given && has(i));
            chosen[i] += u64::from(given);
            had[i] += u64::from(has(i));
        }
    }
    let share = |part: u64, of: u64| if of == 0 { 0.0 } else { part as f64 / of as f64 };
    let labels: Vec<LabelScores> = names
        .iter()
        .enumerate()
        .map(|(i, name)| LabelScores {
            label: name.clone(),
            precision: share(both[i], chosen[i]),
            recall: share(both[i], had[i]),
            f1: share(2 * both[i], chosen[i] + had[i]),
            support: had[i],
        })
        .collect();
    let counts = |i: &usize| problem == ProblemType::MultiLabel || chosen[*i] + had[*i] > 0;
    let f1: Vec<f64> = (0..names.len()).filter(counts).map(|i| labels[i].f1).collect();
    let macro_f1 = f1.iter().sum::<f64>() / f1.len().max(1) as f64;
    let accuracy = right as f64 / n;
    (ClassScores { accuracy: Some(accuracy), macro_f1: Some(macro_f1), ..ClassScores::default() }, labels)
}

fn pearson(pairs: &[(f64, f64)]) -> Option<f64> {
    let n = pairs.len() as f64;
    let (a, b) = pairs.iter().fold((0.0, 0.0), |(a, b), (p, t)| (a + p / n, b + t / n));
    let sum = |f: &dyn Fn(f64, f64) -> f64| pairs.iter().map(|(p, t)| f(p - a, t - b)).sum::<f64>();
    let (both, one, other) = (sum(&|p, t| p * t), sum(&|p, _| p * p), sum(&|_, t| t * t));
    (one > 0.0 && other > 0.0).then(|| both / (one * other).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sums of a few numbers in float64.
    const TOLERANCE: f64 = 1e-12;

    fn names(n: usize) -> Vec<String> {
        lora_format::numbered_labels(n)
    }

    #[test]
    fn scores_of_single_labels_are_those_of_scikit_learn() {
        // y_true = [0, 0, 1, 2], y_pred = [0, 1, 1, 1], labels 3 and 4 unknown to both:
        // accuracy 0.5, f1 = [2/3, 1/2, 0], macro over the labels that occur 7/18.
        let logits = [[2.0, 0.0, 1.0, -1.0], [0.0, 1.0, 0.5, 0.2], [0.0, 3.0, 1.0, 2.0], [0.0, 9.0, 1.0, 2.0]];
        let targets = [0, 0, 1, 2].map(ClassTarget::Id);
        let targets: Vec<&ClassTarget> = targets.iter().collect();
        let predicted: Vec<Vec<f64>> = logits.iter().map(|l| l.to_vec()).collect();
        let (scores, labels) = scores(ProblemType::SingleLabel, &names(4), &predicted, &targets);
        assert_eq!(scores.accuracy, Some(0.5));
        assert!((scores.macro_f1.unwrap() - 7.0 / 18.0).abs() < TOLERANCE);
        assert_eq!(labels.iter().map(|l| l.support).collect::<Vec<_>>(), [2, 1, 1, 0]);
        assert!((labels[1].precision - 1.0 / 3.0).abs() < TOLERANCE && labels[1].recall == 1.0);
    }

    #[test]
    fn scores_of_several_labels_count_a_text_as_right_when_all_are() {
        // y_true = [[1, 0], [1, 1], [0, 0]], y_pred = [[1, 0], [0, 1], [0, 0]]: subset accuracy 2/3, f1 = [2/3, 1].
        let predicted = vec![vec![1.0, -1.0], vec![-2.0, 0.5], vec![-1.0, -1.0]];
        let targets = [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]].map(|v| ClassTarget::Values(v.to_vec()));
        let targets: Vec<&ClassTarget> = targets.iter().collect();
        let (scores, _) = scores(ProblemType::MultiLabel, &names(2), &predicted, &targets);
        assert!((scores.accuracy.unwrap() - 2.0 / 3.0).abs() < TOLERANCE);
        assert!((scores.macro_f1.unwrap() - 5.0 / 6.0).abs() < TOLERANCE);
    }

    #[test]
    fn a_regression_has_its_error_and_correlation() {
        let predicted = vec![vec![1.0], vec![2.0], vec![4.0]];
        let targets = [2.0f32, 4.0, 8.0].map(|v| ClassTarget::Values(vec![v]));
        let targets: Vec<&ClassTarget> = targets.iter().collect();
        let (scores, labels) = scores(ProblemType::Regression, &names(1), &predicted, &targets);
        assert!((scores.mse.unwrap() - 7.0).abs() < TOLERANCE && (scores.pearson.unwrap() - 1.0).abs() < TOLERANCE);
        assert!(labels.is_empty() && scores.accuracy.is_none());
    }

    #[test]
    fn probabilities_sum_to_one_even_for_large_scores() {
        let p = probabilities(ProblemType::SingleLabel, &[1000.0, 999.0, -1000.0]);
        assert!((p.iter().sum::<f64>() - 1.0).abs() < TOLERANCE && p[0] > p[1] && p[2] == 0.0);
        assert_eq!(probabilities(ProblemType::MultiLabel, &[0.0]), [0.5]);
    }
}
