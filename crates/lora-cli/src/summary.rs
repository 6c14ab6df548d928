//! A run in figures, before it starts.

use crate::out::{bytes, count};
use lora_data::Replay;
use lora_format::Method;
use lora_torch::{device_name, kind_name, num_threads};
use lora_train::config::{Checkpointing, ObjectiveName, Reference, RewardName};
use lora_train::{ClassPlan, RunPlan, Trained};
use serde::Serialize;
use std::fmt;
use std::path::PathBuf;

/// What will be trained, on what, and how long.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct PlanSummary {
    pub(crate) model: ModelFigures,
    pub(crate) trained: TrainedFigures,
    pub(crate) data: DataFigures,
    pub(crate) steps: StepFigures,
    pub(crate) output_dir: PathBuf,
}

/// The base model.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ModelFigures {
    pub(crate) path: PathBuf,
    pub(crate) family: String,
    pub(crate) layers: i64,
    pub(crate) parameters: i64,
    pub(crate) dtype: &'static str,
    pub(crate) device: String,
    pub(crate) threads: usize,
}

/// What has a gradient.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct TrainedFigures {
    pub(crate) what: String,
    pub(crate) parameters: i64,
    pub(crate) share: f64,
    /// What is minimised, where it is not the loss of the trained tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) objective: Option<String>,
}

/// The data.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct DataFigures {
    pub(crate) examples: usize,
    pub(crate) eval_examples: usize,
    pub(crate) tokens: usize,
    pub(crate) trained_tokens: usize,
    pub(crate) longest: usize,
    pub(crate) truncated: usize,
    pub(crate) dropped: usize,
    pub(crate) duplicates: usize,
    pub(crate) rows: usize,
    pub(crate) packing: bool,
    /// What a pass has of an old set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) replay: Option<Replay>,
    /// Choices that were made for the data, in words.
    pub(crate) notes: Vec<String>,
    /// Of a classifier, by label: the texts that are trained on and those that are held out.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) labels: Vec<LabelFigures>,
}

/// A label of a classifier.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct LabelFigures {
    pub(crate) label: String,
    pub(crate) examples: usize,
    pub(crate) eval_examples: usize,
}

/// The steps.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct StepFigures {
    pub(crate) total: u64,
    pub(crate) per_epoch: u64,
    pub(crate) rows_per_batch: u32,
    pub(crate) batches_per_step: u32,
    pub(crate) optim: &'static str,
    pub(crate) learning_rate: f64,
    pub(crate) schedule: String,
    pub(crate) gradient_checkpointing: Checkpointing,
}

impl PlanSummary {
    /// The figures of a plan.
    pub(crate) fn of(plan: &RunPlan) -> Self {
        let (config, model) = (&plan.config, &plan.model);
        let (base, trained) = (plan.base_parameters(), plan.trained_parameters());
        let what = match &plan.trained {
            Trained::Fresh(p) => {
                let modules = p.adapters.len() + p.saved.len() + p.stacked.len() + usize::from(p.tokens.is_some());
                let alpha = config.lora.lora_alpha;
                match &p.config.method {
                    Method::Lora => format!("r = {}, lora_alpha = {alpha}, {modules} modules", config.lora.r),
                    Method::Vera(_) => format!("VeRA, r = {}, {modules} modules", p.config.r),
                    Method::AdaLora(own) => format!(
                        "AdaLoRA, r = {} to {}, lora_alpha = {alpha}, {modules} modules",
                        own.init_r, own.target_r
                    ),
                }
            }
            Trained::Existing(folder) => format!("an existing adapter, {} modules", folder.modules.len()),
            Trained::Everything => "every weight".to_string(),
        };
        Self {
            model: ModelFigures {
                path: plan.model_dir.clone(),
                family: model.family.clone(),
                layers: model.num_hidden_layers,
                parameters: base,
                dtype: kind_name(plan.kind),
                device: device_name(plan.device),
                threads: num_threads(),
            },
            trained: TrainedFigures {
                what,
                parameters: trained,
                share: trained as f64 / base as f64,
                objective: objective(plan),
            },
            data: DataFigures {
                examples: plan.train.len(),
                eval_examples: plan.eval.len(),
                tokens: plan.train.tokens(),
                trained_tokens: plan.train.trained_tokens(),
                longest: plan.train.lengths().into_iter().max().unwrap_or(0),
                truncated: plan.train_report.truncated,
                dropped: plan.train_report.dropped.values().map(|d| d.count).sum(),
                duplicates: plan.train_report.duplicates,
                rows: plan.rows_per_pass(),
                replay: plan.replay,
                packing: config.data.packing,
                notes: data_notes(plan),
                labels: label_figures(plan),
            },
            steps: StepFigures {
                total: plan.total_steps,
                per_epoch: plan.steps_per_epoch,
                rows_per_batch: config.train.per_device_train_batch_size,
                batches_per_step: config.train.gradient_accumulation_steps,
                optim: config.train.optim.name(),
                learning_rate: config.train.learning_rate,
                schedule: config.train.lr_scheduler_type.name().to_string(),
                gradient_checkpointing: config.train.gradient_checkpointing,
            },
            output_dir: config.output_dir.clone(),
        }
    }
}

/// As `dpo (sigmoid), beta 0.1, kept near to the base`, or `grpo, 8 answers of at most 256 tokens to a prompt, rewarded by
/// exact_match`.
fn objective(plan: &RunPlan) -> Option<String> {
    let own = &plan.config.objective;
    if !own.compares() && !own.samples() {
        return None;
    }
    let mut text = own.name.name().to_string();
    if own.samples() {
        text +=
            &format!(", {} answers of at most {} tokens to a prompt", own.num_generations, own.max_completion_length);
        let command = || own.reward_command.join(" ");
        text += &match own.reward {
            Some(RewardName::Command) => format!(", rewarded by `{}`", command()),
            Some(reward) => format!(", rewarded by {}", reward.name()),
            None => String::new(),
        };
    }
    if matches!(own.name, ObjectiveName::Dpo | ObjectiveName::Kto) {
        text += &format!(" ({})", own.loss_type.name());
    }
    text += &own.beta().map(|beta| format!(", beta {beta}")).unwrap_or_default();
    let policy_near = own.samples() && own.policy_loss().beta > 0.0;
    if policy_near || own.objective().is_some_and(|objective| objective.needs_reference()) {
        let reference = match own.reference {
            Reference::Base => "the base",
            Reference::Start => "the model as it begins",
        };
        text += &format!(", kept near to {reference}");
    }
    Some(text)
}

/// What was chosen for the data without being asked, so that nothing of it is silent.
fn data_notes(plan: &RunPlan) -> Vec<String> {
    let mut notes = Vec::new();
    let sets = [("", Some(&plan.train_report)), ("evaluation: ", plan.eval_report.as_ref())];
    for (set, report) in sets.into_iter().filter_map(|(set, report)| Some((set, report?))) {
        let mut add = |n: usize, what: &str| {
            if n > 0 {
                notes.push(format!("{set}{} {what}", count(n as u64)));
            }
        };
        if !set.is_empty() {
            add(report.truncated, "truncated");
            add(report.dropped.values().map(|d| d.count).sum(), "dropped");
        }
        add(report.cut_tokens + report.dropped_tokens, "tokens lost by truncating and dropping");
        add(report.cut_trained_tokens + report.dropped_trained_tokens, "of them were to be trained");
        add(report.cut_turns, "turns left out");
        add(report.split_rows, "rows more by splitting");
        add(report.classic_prompts, "records laid out as plain text, as the tokenizer has no chat template");
        add(
            report.split_conversations,
            "conversations as a row per trained turn, as the template rewrites earlier turns",
        );
        add(report.without_end, "rows whose trained text does not end with an end token");
        add(report.merged_edges, "answers that begin or end inside a token");
        if report.template.as_ref().is_some_and(|t| t.writes_date) && plan.config.data.template_date.is_none() {
            notes.push(format!("{set}the chat template writes today's date; set data.template_date to fix it"));
        }
    }
    notes
}

impl fmt::Display for PlanSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = |x: usize| count(x as u64);
        let p = |x: i64| count(x.unsigned_abs());
        let (m, t, d, s) = (&self.model, &self.trained, &self.data, &self.steps);
        writeln!(
            f,
            "model    {}  {}, {} layers, {} parameters",
            m.path.display(),
            m.family,
            m.layers,
            p(m.parameters)
        )?;
        writeln!(f, "         {} on {}, {} threads", m.dtype, m.device, m.threads)?;
        writeln!(f, "trained  {} parameters ({:.3} %): {}", p(t.parameters), 100.0 * t.share, t.what)?;
        if let Some(objective) = &t.objective {
            writeln!(f, "learns   {objective}")?;
        }
        writeln!(
            f,
            "data     {} examples, {} tokens ({} trained), longest {}; {} held out",
            n(d.examples),
            n(d.tokens),
            n(d.trained_tokens),
            n(d.longest),
            n(d.eval_examples)
        )?;
        if !d.labels.is_empty() {
            let one = |l: &LabelFigures| format!("{} {} + {}", l.label, n(l.examples), n(l.eval_examples));
            let mut list: Vec<String> = d.labels.iter().take(LABELS_SHOWN).map(one).collect();
            if d.labels.len() > LABELS_SHOWN {
                list.push(format!("and {} more", d.labels.len() - LABELS_SHOWN));
            }
            writeln!(f, "labels   {} (trained on + held out)", list.join(", "))?;
        }
        if d.truncated + d.dropped + d.duplicates > 0 {
            writeln!(
                f,
                "         {} truncated, {} dropped, {} duplicates",
                n(d.truncated),
                n(d.dropped),
                n(d.duplicates)
            )?;
        }
        if let Some(replay) = d.replay {
            let (drawn, share, all) = (n(replay.drawn), 100.0 * replay.share(), n(replay.rows_per_pass()));
            writeln!(f, "replay   {drawn} of {all} rows a pass ({share:.1} %), from an old set of {}", n(replay.old))?;
        }
        for note in &d.notes {
            writeln!(f, "         {note}")?;
        }
        let pairs = d.replay.map_or(d.rows, |replay| replay.new + replay.old) < d.examples && !d.packing;
        let rows = if d.packing {
            "packed rows"
        } else if pairs {
            "pairs"
        } else {
            "rows"
        };
        writeln!(
            f,
            "steps    {} of {} x {} {rows}; {} a pass over {} {rows}",
            count(s.total),
            s.batches_per_step,
            s.rows_per_batch,
            count(s.per_epoch),
            n(d.rows)
        )?;
        writeln!(f, "         {}, learning rate {:e}, {}", s.optim, s.learning_rate, s.schedule)?;
        write!(f, "output   {}", self.output_dir.display())
    }
}

/// So many labels are listed for a reader; JSON has them all.
const LABELS_SHOWN: usize = 20;

fn label_figures(plan: &RunPlan) -> Vec<LabelFigures> {
    let counts = plan.classes.as_ref().map(ClassPlan::counts).unwrap_or_default();
    let figures = |(label, examples, eval_examples): (&str, usize, usize)| LabelFigures {
        label: label.to_string(),
        examples,
        eval_examples,
    };
    counts.into_iter().map(figures).collect()
}

/// The size of a file for reading, or a dash.
pub(crate) fn file_size(path: &std::path::Path) -> String {
    std::fs::metadata(path).map_or_else(|_| "-".into(), |m| bytes(m.len()))
}
