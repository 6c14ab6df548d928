//! Whether what a round trained is to be published: its evaluation against that of the adapter that it went on from, over the
//! same held-out set, as `metrics.jsonl` has them. So it is told after a kill, too.

use crate::config::TrainConfig;
use crate::error::{Error, Result};
use crate::metrics::METRICS_FILE;
use serde_json::Value;
use std::path::Path;

/// The evaluations of a round, and the verdict.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Outcome {
    /// The loss before the first step.
    pub(super) before: Option<f64>,
    /// The loss of the adapter that is the result.
    pub(super) after: Option<f64>,
    /// Why it is not to be published.
    pub(super) rejected: Option<String>,
}

/// Reads what a finished run measured.
pub(super) fn outcome(run_dir: &Path, config: &TrainConfig, tolerance: f64) -> Result<Outcome> {
    let path = run_dir.join(METRICS_FILE);
    let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let evaluations: Vec<Value> = lines.filter(|line| line.get("eval_tokens").is_some()).collect();
    Ok(judge(&evaluations, config, tolerance))
}

fn judge(evaluations: &[Value], config: &TrainConfig, tolerance: f64) -> Outcome {
    let loss = |line: &Value| line["eval_loss"].as_f64();
    let before = evaluations.iter().find(|line| line["step"] == 0).and_then(loss);
    let after = result_of(evaluations, config).and_then(loss);
    let rejected = match (before, after) {
        (Some(before), Some(after)) if after <= before + tolerance => None,
        (Some(before), Some(after)) => Some(format!("the held-out loss went from {before:.6} to {after:.6}")),
        _ => Some("there is no held-out loss to judge it by: it was not finite, or not measured".to_string()),
    };
    Outcome { before, after, rejected }
}

/// The evaluation of the adapter that the run left: of the last, or of the best as the run chose it.
fn result_of<'a>(evaluations: &'a [Value], config: &TrainConfig) -> Option<&'a Value> {
    if !config.load_best_model_at_end {
        return evaluations.last();
    }
    let metric = config.metric_for_best_model;
    let mut best: Option<(f64, &Value)> = None;
    for line in evaluations {
        let Some(value) = line[metric.name()].as_f64() else { continue };
        let value = if metric.is_loss() { -value } else { value };
        if best.is_none_or(|(most, _)| value > most + config.early_stopping_threshold) {
            best = Some((value, line));
        }
    }
    best.map(|(_, line)| line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::BestMetric;
    use serde_json::json;

    fn line(step: u64, loss: Value, accuracy: f64) -> Value {
        json!({ "step": step, "eval_loss": loss, "eval_tokens": 10, "eval_accuracy": accuracy })
    }

    #[test]
    fn what_is_not_worse_is_published_and_what_is_no_number_is_not() {
        let config = TrainConfig::default();
        let verdict =
            |after: Value, tolerance| judge(&[line(0, json!(2.0), 0.1), line(9, after, 0.2)], &config, tolerance);
        assert_eq!(verdict(json!(1.5), 0.0), Outcome { before: Some(2.0), after: Some(1.5), rejected: None });
        assert_eq!(verdict(json!(2.0), 0.0).rejected, None, "the same is not worse");
        let worse = verdict(json!(2.25), 0.0).rejected.unwrap();
        assert!(worse.contains("2.000000") && worse.contains("2.250000"), "{worse}");
        assert_eq!(verdict(json!(2.25), 0.25).rejected, None);
        assert!(verdict(Value::Null, 100.0).rejected.is_some());
        // Without the first evaluation nothing is said of what was before.
        assert!(judge(&[line(9, json!(1.0), 0.2)], &config, 0.0).rejected.is_some());
        assert!(judge(&[], &config, 0.0).rejected.is_some());
    }

    #[test]
    fn the_best_is_judged_where_the_best_is_the_result() {
        let lines =
            [line(0, json!(2.0), 0.1), line(2, json!(1.0), 0.5), line(4, json!(1.5), 0.5), line(6, json!(3.0), 0.9)];
        let best = |metric, threshold| {
            let config = TrainConfig {
                load_best_model_at_end: true,
                metric_for_best_model: metric,
                early_stopping_threshold: threshold,
                ..TrainConfig::default()
            };
            judge(&lines, &config, 0.0).after
        };
        assert_eq!(best(BestMetric::Loss, 0.0), Some(1.0));
        assert_eq!(best(BestMetric::Accuracy, 0.0), Some(3.0));
        assert_eq!(best(BestMetric::Accuracy, 0.45), Some(3.0));
        assert_eq!(best(BestMetric::Loss, 1.0), Some(2.0), "not better by more than that");
        assert_eq!(judge(&lines, &TrainConfig::default(), 0.0).after, Some(3.0));
    }
}
