//! How a training run looks on stderr.

use crate::out;
use crate::progress::{ByteBar, CountBar, NowAndThen, above, bar};
use indicatif::ProgressBar;
use lora_data::Scores;
use lora_train::{EvalRecord, Event, EventSink, Rewards, StepRecord, Version, version_name};
use std::time::Instant;

/// Shows the events of a run: a bar on a terminal, else a line now and then; notes always.
#[derive(Debug)]
pub(crate) struct TrainView {
    quiet: bool,
    tokenising: Option<CountBar>,
    loading: Option<ByteBar>,
    reference: Option<CountBar>,
    training: Option<Training>,
    speed: Option<Speed>,
    lines: NowAndThen,
}

#[derive(Debug)]
struct Training {
    bar: ProgressBar,
    pace: Pace,
    total_steps: u64,
    eval: Option<f64>,
}

/// How fast the machine is, and what a token of training needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Speed {
    /// Operations a second of a large matrix product.
    pub(crate) matrix_rate: f64,
    /// Operations of a token, in the mean.
    pub(crate) operations_per_token: f64,
}

impl Speed {
    /// The share of that rate which so many tokens a second come to.
    pub(crate) fn share(&self, tokens_per_second: f64) -> f64 {
        self.operations_per_token * tokens_per_second / self.matrix_rate
    }
}

/// When the first step of this process was done, and which it was: it is slower than the others.
#[derive(Debug, Default)]
pub(crate) struct Pace(Option<(Instant, u64)>);

impl Pace {
    /// Seconds from this step to the last; not a number at the first step.
    pub(crate) fn left(&mut self, step: u64, total_steps: u64) -> f64 {
        let (start, first) = *self.0.get_or_insert((Instant::now(), step));
        match step.saturating_sub(first) {
            0 => f64::NAN,
            done => start.elapsed().as_secs_f64() / done as f64 * total_steps.saturating_sub(step) as f64,
        }
    }
}

impl TrainView {
    /// A view; a quiet one shows notes only.
    pub(crate) fn new(quiet: bool) -> Self {
        Self {
            quiet,
            tokenising: None,
            loading: None,
            reference: None,
            training: None,
            speed: None,
            lines: NowAndThen::default(),
        }
    }

    /// Takes the bar away.
    pub(crate) fn finish(&mut self) {
        if let Some(t) = self.training.take() {
            t.bar.finish_and_clear();
        }
    }

    fn say(&self, line: &str) {
        above(self.training.as_ref().map(|t| &t.bar), line);
    }

    fn tokenising(&mut self, done: usize, of: usize) {
        let bar = self.tokenising.get_or_insert_with(|| CountBar::new("tokenising"));
        bar.set(done, of);
        if done == of {
            bar.finish();
            self.tokenising = None;
        }
    }

    fn loading(&mut self, done: u64, of: u64) {
        let bar = self.loading.get_or_insert_with(|| ByteBar::new("loading"));
        bar.set(done, of);
        if done == of {
            bar.finish();
            self.loading = None;
        }
    }

    fn reference(&mut self, done: usize, of: usize) {
        let bar = self.reference.get_or_insert_with(|| CountBar::new("asking the reference"));
        bar.set(done, of);
        if done == of {
            bar.finish();
            self.reference = None;
        }
    }

    fn started(&mut self, step: u64, total_steps: u64) {
        let bar = bar("{bar:20} {pos}/{len}  {msg}");
        bar.set_length(total_steps);
        bar.set_position(step);
        self.training = Some(Training { bar, pace: Pace::default(), total_steps, eval: None });
    }

    fn step(&mut self, record: &StepRecord) {
        let Some(t) = &mut self.training else { return };
        let left = t.pace.left(record.step, t.total_steps);
        // On a narrow terminal the end is cut off: what is looked for most comes first.
        let text = format!(
            "left {}  loss {:.4}{}{}  lr {:.2e}  {:.0} tok/s{}  {}",
            out::seconds(left),
            record.loss,
            record.rewards.map(|rewards| reward_in_short(&rewards)).unwrap_or_default(),
            t.eval.map(|e| format!("  eval {e:.4}")).unwrap_or_default(),
            record.learning_rate,
            record.tokens_per_second,
            self.speed.map(|s| percent_of_rate(s.share(record.tokens_per_second))).unwrap_or_default(),
            out::bytes(record.peak_memory_bytes)
        );
        if out::live() {
            t.bar.set_position(record.step);
            t.bar.set_message(text);
        } else if self.lines.due() || record.step == t.total_steps {
            out::note(format!("step {}/{}  {text}", record.step, t.total_steps));
        }
    }
}

impl EventSink for TrainView {
    fn event(&mut self, event: Event) {
        match event {
            Event::Note(note) => self.say(&format!("note: {note}")),
            Event::Skipped { step, loss, grad_norm, rows } => {
                let rows: Vec<String> = rows.iter().map(ToString::to_string).collect();
                self.say(&format!(
                    "warning: step {step} was left out: loss = {loss}, grad_norm = {grad_norm}; the parameters are as before. Its rows: {}",
                    rows.join(", ")
                ));
            }
            Event::Refused(file) => self.say(&format!("refused {}: {}", file.name, file.reason)),
            _ if self.quiet => {}
            Event::Round(version) => {
                self.finish();
                self.say(&round_in_words(&version));
            }
            Event::Tokenising { done, of } => self.tokenising(done, of),
            Event::Loading { done, of } => self.loading(done, of),
            Event::Reference { done, of } => self.reference(done, of),
            Event::Started { step, total_steps } => self.started(step, total_steps),
            Event::Speed { matrix_rate, operations_per_token } => {
                self.speed = Some(Speed { matrix_rate, operations_per_token });
            }
            Event::Sampling { done, of } => {
                if let Some(t) = &self.training {
                    t.bar.set_message(format!("asking for samples {done}/{of}"));
                }
            }
            Event::Step(record) => self.step(&record),
            Event::Evaluating { done, of } => {
                if let Some(t) = &self.training {
                    t.bar.set_message(format!("evaluating {done}/{of}"));
                }
            }
            Event::Evaluated(record) => {
                let reward = record.rewards.and_then(|rewards| rewards.mean);
                if let Some(t) = &mut self.training {
                    t.eval = Some(reward.unwrap_or(record.eval_loss));
                }
                let over = match (record.eval_accuracy, record.eval_macro_f1, record.rewards) {
                    (_, _, Some(rewards)) => rewards_in_words(&rewards),
                    (Some(accuracy), Some(f1), _) => {
                        format!("accuracy {accuracy:.4}, macro F1 {f1:.4}, over {} texts", record.eval_tokens)
                    }
                    (accuracy, ..) => language_in_words(accuracy, &record),
                };
                let what = match reward {
                    Some(reward) => format!("reward {reward:.4}"),
                    None => format!("loss {:.4}", record.eval_loss),
                };
                self.say(&format!("step {}: held-out {what} {over}", record.step));
            }
            Event::Saved(path) => self.say(&format!("saved {}", path.display())),
            _ => {}
        }
    }
}

/// As `version 0003 published: held-out loss 1.2034 -> 1.1020`.
fn round_in_words(version: &Version) -> String {
    let loss = |loss: Option<f64>| loss.map_or("-".to_string(), |loss| format!("{loss:.4}"));
    let (before, after) = (loss(version.eval_loss_before), loss(version.eval_loss));
    let name = version_name(version.version);
    match &version.rejected {
        None => format!("version {name} published: held-out loss {before} -> {after}"),
        Some(reason) => format!("round {name} not published: {reason}"),
    }
}

/// As `over 400 tokens, accuracy 0.7125, BLEU 34.20, chrF 51.03, ROUGE-L 0.5532, exact 0.1250`.
fn language_in_words(accuracy: Option<f64>, record: &EvalRecord) -> String {
    let mut text = format!("over {} tokens", record.eval_tokens);
    text += &accuracy.map(|accuracy| format!(", accuracy {accuracy:.4}")).unwrap_or_default();
    text + &record.generated.map(|scores| format!(", {}", scores_in_words(&scores))).unwrap_or_default()
}

/// As `BLEU 34.20, chrF 51.03, ROUGE-L 0.5532, exact 0.1250`.
pub(crate) fn scores_in_words(s: &Scores) -> String {
    format!("BLEU {:.2}, chrF {:.2}, ROUGE-L {:.4}, exact {:.4}", s.bleu, s.chrf, s.rouge_l, s.exact_match)
}

/// As ` (52 % of the matrix rate)`.
fn percent_of_rate(share: f64) -> String {
    format!(" ({:.0} % of the matrix rate)", 100.0 * share)
}

/// As `  margin 0.412`, or of answers that the model writes `  reward 0.512 +- 0.210  kl 0.013`.
fn reward_in_short(r: &Rewards) -> String {
    let mut text = r.margin.map(|margin| format!("  margin {margin:.3}")).unwrap_or_default();
    if let (Some(mean), Some(spread)) = (r.mean, r.spread) {
        text += &format!("  reward {mean:.3} +- {spread:.3}");
    }
    text + &r.kl.map(|kl| format!("  kl {kl:.4}")).unwrap_or_default()
}

/// As `reward margin 0.412 (1.203 - 0.791), accuracy 0.8125`.
fn rewards_in_words(r: &Rewards) -> String {
    let mut parts = Vec::new();
    if let (Some(margin), Some(chosen), Some(rejected)) = (r.margin, r.chosen, r.rejected) {
        parts.push(format!("reward margin {margin:.4} ({chosen:.4} and {rejected:.4})"));
    }
    parts.extend(r.accuracy.map(|accuracy| format!("accuracy {accuracy:.4}")));
    parts.extend(r.drift.map(|drift| format!("drift {drift:.4}")));
    if let (Some(length), Some(ended)) = (r.length, r.ended) {
        parts.push(format!("over answers of {length:.1} tokens, {:.0} % of them ended", 100.0 * ended));
    }
    parts.join(", ")
}
