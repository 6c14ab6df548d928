//! Which charts a page has: every number of the metrics is in one of them, by its name.

use crate::chart::{Chart, Curve, Stroke};
use crate::numbers::{Unit, smoothed, smoothing_reach};
use crate::run::{Run, Series};

/// Figures that say little over the steps: they come last, folded.
const MINOR: [&str; 6] = ["epoch", "seconds", "data_seconds", "tokens", "trained_tokens", "eval_tokens"];
/// Figures of the machinery: they come after those of the model.
const LATER: [&str; 4] = ["learning_rate", "grad_norm", "tokens_per_second", "peak_memory_bytes"];
/// Figures without noise.
const CALM: [&str; 7] =
    ["epoch", "seconds", "tokens", "trained_tokens", "learning_rate", "peak_memory_bytes", "rank_budget"];

/// What a figure is called in words.
pub(crate) fn title(name: &str) -> String {
    match name {
        "loss" => "Loss",
        "eval_loss" => "Held-out loss",
        "eval_accuracy" => "Held-out accuracy",
        "eval_macro_f1" => "Held-out macro F1",
        "eval_tokens" => "Held-out tokens",
        "grad_norm" => "Gradient norm",
        "learning_rate" => "Learning rate",
        "tokens_per_second" => "Tokens a second",
        "peak_memory_bytes" => "Peak memory",
        "data_seconds" => "Seconds that a step waited for its batches",
        "epoch" => "Passes over the data",
        "tokens" => "Tokens of a step",
        "trained_tokens" => "Trained tokens of a step",
        "seconds" => "Seconds of training",
        "rank_budget" => "Rank budget",
        "reward_chosen" => "Reward of better answers",
        "reward_rejected" => "Reward of worse answers",
        "reward_margin" => "Reward margin",
        "reward_accuracy" => "Reward accuracy",
        "reward_drift" => "Drift from the reference",
        "reward" => "Reward",
        "reward_std" => "Spread of rewards among answers",
        "reward_alike" => "Prompts whose answers are worth the same",
        "kl" => "Divergence from the reference",
        "clip_ratio" => "Tokens out of bounds",
        "completion_length" => "Tokens of an answer",
        "completion_ended" => "Answers that came to their end",
        other => match other.strip_prefix("eval_") {
            Some(rest) if title(rest) != rest => return format!("{}, held out", title(rest)),
            _ => other,
        },
    }
    .to_string()
}

/// The charts of a page: those of the model and the machinery, and those that are folded.
pub(crate) struct Charts {
    pub(crate) main: Vec<Chart>,
    pub(crate) minor: Vec<Chart>,
}

/// The charts of one run: a figure of the steps and the same of the evaluations share one.
pub(crate) fn of_one(run: &Run) -> Charts {
    let held_out = |name: &str| run.series(&format!("eval_{name}")).filter(|_| name != "tokens");
    let joins = |name: &str| name.strip_prefix("eval_").is_some_and(|n| n != "tokens" && run.series(n).is_some());
    let names = ordered(&[run]).into_iter().filter(|name| !joins(name));
    let chart = |name: String| {
        let own = run.series(&name);
        let (mut curves, mut remark) = (Vec::new(), name.clone());
        if let Some(series) = held_out(&name) {
            remark = format!("{remark}, {}", series.name);
            curves.push(dots(series, 1, "held out"));
        }
        if let Some(series) = own {
            curves.splice(0..0, of_series(series, 0, "training", &mut remark));
        }
        Chart { title: title(&name), remark, unit: Unit::of(&name), wide: is_wide(&name, &[run]), curves }
    };
    sorted(names.map(|name| (name.clone(), chart(name))))
}

/// The charts of several runs: each figure has one, with a curve for each run.
pub(crate) fn of_many(runs: &[Run], names: &[String]) -> Charts {
    let all: Vec<&Run> = runs.iter().collect();
    let chart = |name: String| {
        let mut remark = name.clone();
        let mut curves = Vec::new();
        for (i, run) in runs.iter().enumerate() {
            let Some(series) = run.series(&name) else { continue };
            let mut own = name.clone();
            let of_run = of_series(series, i, &names[i], &mut own);
            // One curve for each run: where it is smoothed, not the raw one too.
            let shown = of_run.into_iter().filter(|curve| curve.stroke != Stroke::Raw);
            curves.extend(shown.map(|curve| Curve { name: names[i].clone(), ..curve }));
            if own.len() > remark.len() {
                remark = own;
            }
        }
        Chart { title: title(&name), remark, unit: Unit::of(&name), wide: is_wide(&name, &all), curves }
    };
    sorted(ordered(&all).into_iter().map(|name| (name.clone(), chart(name))))
}

/// The loss has the whole width; a lone evaluation beside it has not.
fn is_wide(name: &str, runs: &[&Run]) -> bool {
    let losses = runs.iter().any(|run| run.series("loss").is_some());
    name == "loss" || (name == "eval_loss" && !losses)
}

fn sorted(charts: impl Iterator<Item = (String, Chart)>) -> Charts {
    let drawn = charts.filter(|(_, chart)| chart.curves.iter().any(|curve| !curve.points.is_empty()));
    let (minor, main): (Vec<_>, Vec<_>) = drawn.partition(|(name, _)| MINOR.contains(&name.as_str()));
    let charts = |list: Vec<(String, Chart)>| list.into_iter().map(|(_, chart)| chart).collect();
    Charts { main: charts(main), minor: charts(minor) }
}

/// The names of all figures: the loss, those of the model, those of the machinery.
pub(crate) fn ordered(runs: &[&Run]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for series in runs.iter().flat_map(|run| &run.series) {
        if !names.contains(&series.name) {
            names.push(series.name.clone());
        }
    }
    let place = |name: &String| {
        let later = LATER.iter().chain(&MINOR).position(|later| later == name).map(|at| at + 3);
        match name.as_str() {
            "loss" => 0,
            "eval_loss" => 1,
            _ => later.unwrap_or(2),
        }
    };
    names.sort_by_key(place);
    names
}

/// The curves of a figure: as it is, and calmed where it is long and noisy.
fn of_series(series: &Series, colour: usize, name: &str, remark: &mut String) -> Vec<Curve> {
    if series.name.starts_with("eval_") {
        return vec![dots(series, colour, name)];
    }
    let curve = |stroke, points| Curve { name: name.to_string(), colour, stroke, points };
    match smoothing_reach(series.points.len()).filter(|_| !CALM.contains(&series.name.as_str())) {
        None => vec![curve(Stroke::Line, series.points.clone())],
        Some(reach) => {
            *remark = format!("{remark}, smoothed over {}", 2 * reach + 1);
            let line = curve(Stroke::Line, smoothed(&series.points, reach));
            vec![curve(Stroke::Raw, series.points.clone()), Curve { name: format!("{name}, smoothed"), ..line }]
        }
    }
}

fn dots(series: &Series, colour: usize, name: &str) -> Curve {
    Curve { name: name.to_string(), colour, stroke: Stroke::Dots, points: series.points.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(names: &[&str]) -> Run {
        let series = |name: &&str| Series { name: (*name).into(), points: (1..=60).map(|i| (i, i as f64)).collect() };
        Run { series: names.iter().map(series).collect(), ..Run::default() }
    }

    #[test]
    fn every_figure_is_in_a_chart_and_loss_comes_first() {
        let run = run(&["eval_loss", "eval_tokens", "epoch", "grad_norm", "tokens", "loss", "my_own", "eval_my_own"]);
        let charts = of_one(&run);
        let titles = |list: &[Chart]| list.iter().map(|c| c.title.clone()).collect::<Vec<_>>();
        assert_eq!(titles(&charts.main), ["Loss", "my_own", "Gradient norm"]);
        assert_eq!(titles(&charts.minor), ["Passes over the data", "Tokens of a step", "Held-out tokens"]);
        let strokes: Vec<Stroke> = charts.main[0].curves.iter().map(|c| c.stroke).collect();
        assert_eq!(strokes, [Stroke::Raw, Stroke::Line, Stroke::Dots]);
        assert_eq!(charts.main[0].remark, "loss, eval_loss, smoothed over 9");
        assert_eq!(charts.main[1].remark, "my_own, eval_my_own, smoothed over 9");
    }

    #[test]
    fn several_runs_have_a_curve_each_in_every_chart() {
        let runs = [run(&["loss", "eval_loss"]), run(&["loss"])];
        let charts = of_many(&runs, &["a".into(), "b".into()]);
        let shape: Vec<(&str, usize)> = charts.main.iter().map(|c| (c.title.as_str(), c.curves.len())).collect();
        assert_eq!(shape, [("Loss", 2), ("Held-out loss", 1)]);
        assert_eq!(charts.main[0].curves[1].name, "b");
    }

    #[test]
    fn figures_have_words_and_others_their_name() {
        assert_eq!(title("eval_reward_margin"), "Reward margin, held out");
        assert_eq!(title("something"), "something");
        assert_eq!(title("eval_something"), "eval_something");
    }
}
