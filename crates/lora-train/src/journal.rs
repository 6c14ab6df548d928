//! What a run tells of itself in its folder: metrics, TensorBoard events, `run.json`, and the page.

use crate::error::Result;
use crate::events::{Event, EventSink};
use crate::metrics::{EndRecord, EvalRecord, MetricsWriter, StepRecord};
use crate::speed::{matrix_rate, operations_per_token};
use crate::trainer::Trainer;
use lora_format::write_atomic;
use lora_report::{About, AboutData, EventWriter, REPORT_FILE, RUN_FILE, Run, Status, page};
use lora_torch::{device_name, kind_name, libtorch_version, num_threads};
use serde::Serialize;
use serde_json::Value;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tch::Device;

/// Sides of the product that the machine is measured by: large enough for its full rate, small enough for a few hundredths
/// of a second.
const CPU_SIDE: i64 = 768;
const GPU_SIDE: i64 = 4096;
/// While a run goes on, its page is written again only after this many times what that took.
const PAGE_PAUSE: u32 = 50;

/// Writes what a run tells.
#[derive(Debug)]
pub(crate) struct Journal {
    metrics: MetricsWriter,
    board: EventWriter,
    about: About,
    matrix_rate: Option<f64>,
    /// When the page was written last, and how long that took.
    paged: Option<(Instant, Duration)>,
}

impl Journal {
    /// Begins, or goes on behind what the run's folder has up to the trainer's step.
    pub(crate) fn open(trainer: &Trainer, resolved: &str, sink: &mut dyn EventSink) -> Result<Self> {
        let plan = trainer.plan();
        let (out, step) = (&plan.config.output_dir, trainer.state().step);
        let metrics = match step {
            0 => MetricsWriter::create(out)?,
            step => MetricsWriter::resume(out, step)?,
        };
        let mut board = EventWriter::start(out, step)?;
        if step == 0 {
            // Four spaces before every line: Markdown shows it as it is.
            let text: String = resolved.lines().map(|line| format!("    {line}\n")).collect();
            board.text(0, "configuration", &text)?;
        }
        // A device with no room for it says nothing of its rate, and that is no reason not to train.
        let side = if plan.device == Device::Cpu { CPU_SIDE } else { GPU_SIDE };
        let matrix_rate = matrix_rate(plan.device, side).ok();
        let operations_per_token = operations_per_token(plan);
        if let Some(matrix_rate) = matrix_rate {
            sink.event(Event::Speed { matrix_rate, operations_per_token });
        }
        let about = About {
            trained_parameters: trainer.trained_parameters().unsigned_abs(),
            base_parameters: plan.base_parameters().unsigned_abs(),
            family: plan.model.family.clone(),
            device: device_name(plan.device),
            dtype: kind_name(plan.kind).into(),
            threads: num_threads(),
            libtorch: libtorch_version().into(),
            matrix_rate,
            operations_per_token: Some(operations_per_token),
            data: AboutData {
                rows: plan.rows_per_pass() as u64,
                eval_examples: plan.eval.len() as u64,
                eval_tokens: plan.eval.tokens() as u64,
                train: json(&plan.train_report),
                eval: plan.eval_report.as_ref().map_or(Value::Null, json),
            },
            ..About::default()
        };
        Ok(Self { metrics, board, about, matrix_rate, paged: None })
    }

    /// Operations a second of a large matrix product, where they could be measured.
    pub(crate) fn matrix_rate(&self) -> Option<f64> {
        self.matrix_rate
    }

    pub(crate) fn step(&mut self, record: &StepRecord) -> Result<()> {
        self.metrics.write_step(record)?;
        self.scalars(record.step, record)
    }

    pub(crate) fn eval(&mut self, record: &EvalRecord) -> Result<()> {
        self.metrics.write_eval(record)?;
        self.scalars(record.step, record)
    }

    /// Says why this start of the run ended.
    pub(crate) fn end(&mut self, record: &EndRecord) -> Result<()> {
        self.metrics.write_end(record)
    }

    /// Brings the metrics to the disk, before a checkpoint.
    pub(crate) fn sync(&self) -> Result<()> {
        self.metrics.sync()
    }

    /// Every number of a line of the metrics, named as the trainers of transformers name theirs.
    fn scalars(&mut self, step: u64, record: &impl Serialize) -> Result<()> {
        let fields = serde_json::to_value(record).unwrap_or_default();
        let tag = |name: &str| match name.strip_prefix("eval_") {
            Some(rest) => format!("eval/{rest}"),
            None => format!("train/{name}"),
        };
        let numbers = fields.as_object().into_iter().flatten().filter(|(name, _)| *name != "step");
        let values: Vec<(String, f64)> = numbers.filter_map(|(name, v)| Some((tag(name), v.as_f64()?))).collect();
        Ok(self.board.scalars(step, values.iter().map(|(tag, value)| (tag.as_str(), *value)))?)
    }

    /// Writes `run.json` and the page, each whole or not at all. A run never fails for its page; while it goes on, a page
    /// that takes long is written more seldom.
    pub(crate) fn page(&mut self, trainer: &Trainer, status: Status, sink: &mut dyn EventSink) {
        let start = Instant::now();
        let early = |(at, took): (Instant, Duration)| at.elapsed() < took * PAGE_PAUSE;
        if status == Status::Running && self.paged.is_some_and(early) {
            return;
        }
        if let Err(e) = self.write_page(trainer, status) {
            sink.event(Event::Note(format!("{REPORT_FILE} was not written: {e}")));
        }
        self.paged = Some((Instant::now(), start.elapsed()));
    }

    fn write_page(&mut self, trainer: &Trainer, status: Status) -> Result<()> {
        let (state, out) = (trainer.state(), &trainer.plan().config.output_dir);
        self.about = About {
            status,
            updated_at: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            step: state.step,
            total_steps: trainer.plan().total_steps,
            skipped_steps: state.skipped_steps,
            seconds: state.seconds,
            tokens: state.tokens,
            trained_tokens: state.trained_tokens,
            ..self.about.clone()
        };
        write_atomic(&out.join(RUN_FILE), format!("{:#}\n", json(&self.about)).as_bytes())?;
        let page = page(&[Run::read(out)?])?;
        Ok(write_atomic(&out.join(REPORT_FILE), page.as_bytes())?)
    }
}

/// What has only strings, numbers and lists of them always is JSON.
fn json(value: &impl Serialize) -> Value {
    serde_json::to_value(value).unwrap_or_default()
}
