//! A run for programs: each event on stderr as a line of JSON.

use crate::out;
use crate::summary::PlanSummary;
use crate::train_view::{Pace, Speed, TrainView};
use lora_train::{Event, EventSink, StepRecord};
use serde::Serialize;
use serde_json::{Value, json};

/// How a run is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum LogFormat {
    /// A bar on a terminal, else a line now and then
    #[default]
    Text,
    /// A line of JSON for each event
    Json,
}

/// A run's view, in the form that was asked for.
#[derive(Debug)]
pub(crate) enum View {
    /// For a reader.
    Text(TrainView),
    /// For programs.
    Json(JsonLog),
}

impl View {
    /// A view; a quiet one shows notes only. Of the steps every `logging_steps`-th becomes a line of JSON.
    pub(crate) fn new(format: LogFormat, quiet: bool, logging_steps: u64) -> Self {
        match format {
            LogFormat::Text => Self::Text(TrainView::new(quiet)),
            LogFormat::Json => Self::Json(JsonLog {
                quiet,
                logging_steps: logging_steps.max(1),
                total_steps: 0,
                speed: None,
                pace: Pace::default(),
            }),
        }
    }

    /// Shows what will be done.
    pub(crate) fn plan(&self, summary: &PlanSummary) {
        match self {
            Self::Text(_) => out::note(format!("{summary}\n")),
            Self::Json(_) => line("plan", fields(summary)),
        }
    }

    /// Takes the bar away.
    pub(crate) fn finish(&mut self) {
        if let Self::Text(view) = self {
            view.finish();
        }
    }
}

impl EventSink for View {
    fn event(&mut self, event: Event) {
        match self {
            Self::Text(view) => view.event(event),
            Self::Json(log) => log.event(event),
        }
    }
}

/// Writes events as lines of JSON.
#[derive(Debug)]
pub(crate) struct JsonLog {
    quiet: bool,
    logging_steps: u64,
    total_steps: u64,
    speed: Option<Speed>,
    pace: Pace,
}

impl JsonLog {
    fn step(&mut self, record: &StepRecord) {
        let left = self.pace.left(record.step, self.total_steps);
        if !record.step.is_multiple_of(self.logging_steps) && record.step != self.total_steps {
            return;
        }
        let mut step = fields(record);
        step["total_steps"] = self.total_steps.into();
        step["seconds_left"] = json!(left);
        if let Some(speed) = self.speed {
            step["of_matrix_rate"] = json!(speed.share(record.tokens_per_second));
        }
        line("step", step);
    }
}

impl EventSink for JsonLog {
    fn event(&mut self, event: Event) {
        match event {
            Event::Note(text) => line("note", json!({ "text": text })),
            Event::Skipped { step, loss, grad_norm, rows } => {
                let fields = json!({ "step": step, "loss": loss, "grad_norm": grad_norm, "rows": rows });
                line("skipped", fields);
            }
            Event::Speed { matrix_rate, operations_per_token } => {
                self.speed = Some(Speed { matrix_rate, operations_per_token });
            }
            Event::Refused(file) => line("refused", fields(&file)),
            _ if self.quiet => {}
            Event::Round(version) => line("round", fields(&version)),
            Event::Started { step, total_steps } => {
                self.total_steps = total_steps;
                line("started", json!({ "step": step, "total_steps": total_steps }));
            }
            Event::Step(record) => self.step(&record),
            Event::Evaluated(record) => line("evaluated", fields(&record)),
            Event::Saved(path) => line("saved", json!({ "path": path })),
            // How far a part of the work is, many times a second, is for eyes.
            _ => {}
        }
    }
}

fn fields(value: &impl Serialize) -> Value {
    serde_json::to_value(value).unwrap_or_default()
}

/// The event first, then what it has.
fn line(event: &str, fields: Value) {
    let mut whole = json!({ "event": event });
    if let (Value::Object(whole), Value::Object(fields)) = (&mut whole, fields) {
        whole.extend(fields);
    }
    out::note(whole.to_string());
}
