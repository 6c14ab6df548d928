//! `[train]`: the optimizer, its schedule, and when to evaluate and save. Names are those of `TrainingArguments`.

use super::checkpointing::Checkpointing;
use super::keys::{Kind, Range, choice, section, span};
use crate::eval::EvalReport;
use crate::params::LoraPlus;
use crate::schedule::ScheduleKind;
use std::time::Duration;

choice! {
    /// What is trained.
    FinetuningType {
        /// Adapters; the base model is frozen.
        Lora = "lora",
        /// Every weight of the base model.
        Full = "full",
    }
}

choice! {
    /// What an evaluation is judged by.
    BestMetric {
        /// The loss; the lower the better.
        Loss = "eval_loss",
        /// Share of trained tokens, of texts or of pairs that are right.
        Accuracy = "eval_accuracy",
        /// A classifier's mean F1.
        MacroF1 = "eval_macro_f1",
        /// BLEU of the answers that are written.
        Bleu = "eval_bleu",
        /// Their chrF.
        Chrf = "eval_chrf",
        /// Their ROUGE-L.
        RougeL = "eval_rouge_l",
        /// The share of those that are right to the letter.
        ExactMatch = "eval_exact_match",
        /// By how much better answers are preferred.
        RewardMargin = "eval_reward_margin",
    }
}

impl BestMetric {
    /// Whether it is told from answers that are written.
    pub fn of_answers(self) -> bool {
        matches!(self, Self::Bleu | Self::Chrf | Self::RougeL | Self::ExactMatch)
    }

    /// Whether less of it is better.
    pub(crate) fn is_loss(self) -> bool {
        self == Self::Loss
    }

    /// The figure of an evaluation, turned so that more is better; none where the evaluation has none.
    pub fn of(self, report: &EvalReport) -> Option<f64> {
        let value = match self {
            Self::Loss => Some(-report.loss),
            Self::Accuracy => Some(report.accuracy),
            Self::MacroF1 => report.classes.and_then(|scores| scores.macro_f1),
            Self::Bleu => report.generated.map(|scores| scores.bleu),
            Self::Chrf => report.generated.map(|scores| scores.chrf),
            Self::RougeL => report.generated.map(|scores| scores.rouge_l),
            Self::ExactMatch => report.generated.map(|scores| scores.exact_match),
            Self::RewardMargin => report.rewards.and_then(|rewards| rewards.margin),
        };
        value.filter(|value| !value.is_nan())
    }
}

choice! {
    /// What makes a step of a gradient.
    Optim {
        /// Two moments in float32.
        AdamW = "adamw",
        /// One moment, of which only signs count.
        Lion = "lion",
        /// Two moments in 8 bits.
        AdamW8 = "adamw_8bit",
    }
}

/// What Hugging Face calls them.
const OTHER_OPTIMS: &[(&str, &str)] = &[
    ("adamw_torch", "adamw"),
    ("adamw_torch_fused", "adamw"),
    ("adamw_bnb_8bit", "adamw_8bit"),
    ("lion_32bit", "lion"),
];

choice! {
    /// What numbers go from one stage of a divided model to the next as.
    PipelineDType {
        /// As they are computed on a CPU.
        Float32 = "float32",
        /// Rounded to 8 significant bits.
        BFloat16 = "bfloat16",
    }
}

const COUNT: Kind = Kind::Integer { min: 1, max: i64::MAX };
const COUNT_OR_ZERO: Kind = Kind::Integer { min: 0, max: i64::MAX };
const ROWS: Kind = Kind::Integer { min: 1, max: 1_048_576 };

/// How long a run is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Length {
    /// Passes over the data.
    Epochs(f64),
    /// Optimizer steps.
    Steps(u64),
}

section! {
    /// The training itself. A step is an optimizer step: `per_device_train_batch_size` times
    /// `gradient_accumulation_steps` rows.
    TrainConfig {
        /// What is trained: `lora` trains adapters, `full` every weight.
        finetuning_type: FinetuningType = FinetuningType::Lora, Kind::Choice(FinetuningType::NAMES);
        /// Passes over the data; 3 when neither this nor `max_steps` is given.
        #[serde(skip_serializing_if = "Option::is_none")]
        num_train_epochs: Option<f64> = None, Kind::Number(Range::Positive);
        /// Optimizer steps of the run, instead of `num_train_epochs`.
        #[serde(skip_serializing_if = "Option::is_none")]
        max_steps: Option<u64> = None, COUNT;
        /// Ends the run at the first step that is done after this time, as `2h30m`, `90m` or `45s`; `--resume` goes on, with the
        /// same time again. It counts from the loading of the model. The learning rate goes as if there were no such end.
        #[serde(skip_serializing_if = "Option::is_none")]
        max_time: Option<String> = None, Kind::Span;
        /// Rows (examples, or packed rows) of one forward pass of training.
        per_device_train_batch_size: u32 = 8, ROWS;
        /// Rows of one forward pass of evaluation.
        per_device_eval_batch_size: u32 = 8, ROWS;
        /// Forward passes whose gradients are summed for one optimizer step. The loss is the mean over all their trained
        /// tokens, so the split does not change it. Processes that train together share them: it is the number of all.
        gradient_accumulation_steps: u32 = 1, ROWS;
        /// Highest learning rate of the schedule. The default suits adapters; full training wants about 1e-5.
        learning_rate: f64 = 2e-4, Kind::Number(Range::Positive);
        /// Learning rate of B as a multiple of `learning_rate` (LoRA+; its authors suggest 16); as A's when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        loraplus_lr_ratio: Option<f64> = None, Kind::Number(Range::Positive);
        /// With `loraplus_lr_ratio`, the learning rate of adapters of embeddings.
        loraplus_lr_embedding: f64 = 1e-6, Kind::Number(Range::Positive);
        /// How the learning rate goes after the warm-up: `linear` and `cosine` fall to 0 at the last step; `constant` has no
        /// warm-up.
        lr_scheduler_type: ScheduleKind = ScheduleKind::Linear, Kind::Choice(ScheduleKind::NAMES);
        /// What some schedules are told besides, as `{ num_cycles = 3 }`: `num_cycles` of `cosine_with_restarts`, `min_lr` or
        /// `min_lr_rate` of `cosine_with_min_lr`, `power` and `lr_end` of `polynomial`, `timescale` of `inverse_sqrt`,
        /// `num_decay_steps` and `min_lr_ratio` of `warmup_stable_decay`.
        #[serde(skip_serializing_if = "toml::Table::is_empty")]
        lr_scheduler_kwargs: toml::Table = toml::Table::new(), Kind::Map(&Kind::Number(Range::NotNegative));
        /// Optimizer steps over which the learning rate rises from 0; none when neither this nor `warmup_ratio` is given.
        #[serde(skip_serializing_if = "Option::is_none")]
        warmup_steps: Option<u64> = None, COUNT_OR_ZERO;
        /// Part of all optimizer steps over which the learning rate rises, instead of `warmup_steps`; rounded up.
        #[serde(skip_serializing_if = "Option::is_none")]
        warmup_ratio: Option<f64> = None, Kind::Number(Range::ZeroToOne);
        /// What makes a step of a gradient: `adamw` where nothing is said (also `adamw_torch`, `adamw_torch_fused`), `lion` (also
        /// `lion_32bit`; half the memory for moments, and a learning rate a third to a tenth of AdamW's), `adamw_8bit` (also
        /// `adamw_bnb_8bit`; a quarter of the memory for moments).
        #[serde(skip_serializing_if = "is_adamw")]
        optim: Optim = Optim::AdamW, Kind::Named(Optim::NAMES, OTHER_OPTIMS);
        /// Decay of the weights in a step, as a multiple of the learning rate. Biases and weights of norms do not
        /// decay.
        weight_decay: f64 = 0.0, Kind::Number(Range::NotNegative);
        /// Gradients are scaled down so that their common 2-norm is at most this; 0 leaves them as they are.
        max_grad_norm: f64 = 1.0, Kind::Number(Range::NotNegative);
        /// Decay of AdamW's mean of the gradients; in Lion the share of the old gradients in the direction of a step.
        adam_beta1: f64 = 0.9, Kind::Number(Range::ZeroToBelowOne);
        /// Decay of AdamW's mean of the squared gradients, and of Lion's mean of the gradients, where 0.99 is the default.
        adam_beta2: f64 = 0.999, Kind::Number(Range::ZeroToBelowOne);
        /// Added to AdamW's denominator.
        adam_epsilon: f64 = 1e-8, Kind::Number(Range::Positive);
        /// Noise on the embeddings while training (NEFTune; its authors take 5 to 15): uniform, of this over the root of an
        /// example's tokens times the hidden size. 0, where nothing is said, takes none.
        #[serde(skip_serializing_if = "is_zero")]
        neftune_noise_alpha: f64 = 0.0, Kind::Number(Range::NotNegative);
        /// What is kept for the backward pass: everything (`false`, also `none`); everything but what norms and gates give, which
        /// is computed again (`selective`: a third less of that, hardly more time); or the inputs of the blocks only
        /// (`true`, also `full`: the least memory, about a third more time).
        gradient_checkpointing: Checkpointing = Checkpointing::None, Kind::BoolOr(Checkpointing::NAMES);
        /// Of so many blocks, the first that are trained, only the inputs are kept, as `full` keeps of all: for a run that fits with
        /// a part of them computed again. Of the others is kept what `gradient_checkpointing` says. `lora plan` proposes a number.
        #[serde(skip_serializing_if = "is_no_layer")]
        recompute_layers: u32 = 0, Kind::Integer { min: 0, max: 100_000 };
        /// Takes the micro-batches of a step through each block together, so that a base with `model.weights = "mapped"` is read from
        /// the disk twice a step, and not twice for each micro-batch; the inputs of the blocks are kept for all of them meanwhile.
        /// Needs `gradient_checkpointing = "full"`.
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        accumulate_by_block: bool = false, Kind::Bool;
        /// Evaluates every so many optimizer steps; 0 evaluates at the start and at the end only.
        eval_steps: u64 = 0, COUNT_OR_ZERO;
        /// Answers the prompts of the evaluation, too, and compares what is written with what stands there: BLEU, chrF, ROUGE-L and
        /// exact match.
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        predict_with_generate: bool = false, Kind::Bool;
        /// Most tokens of such an answer.
        #[serde(skip_serializing_if = "is_usual_answer")]
        generation_max_new_tokens: u32 = MOST_OF_ANSWER, ROWS;
        /// Answers the first so many prompts only; all when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        generation_num_samples: Option<u32> = None, ROWS;
        /// Saves a checkpoint every so many optimizer steps; 0 saves one at the end only.
        save_steps: u64 = 500, COUNT_OR_ZERO;
        /// Checkpoints that are kept, the newest ones; at least 2, so that a damaged one never costs the run.
        save_total_limit: u32 = 2, Kind::Integer { min: 2, max: 1_000_000 };
        /// Seconds that processes which train together wait for each other, at the start and in a step.
        #[serde(skip_serializing_if = "is_usual_wait")]
        ddp_timeout: u64 = USUAL_WAIT, Kind::Integer { min: 1, max: 31_536_000 };
        /// Compares the parameters of processes that train together every so many optimizer steps, and at the end.
        #[serde(skip_serializing_if = "is_usual_check")]
        ddp_check_steps: u64 = USUAL_CHECK, COUNT;
        /// Processes among which the blocks of a frozen base are divided, each with the weights and adapters of its own alone: for
        /// a base that is larger than one machine's memory. There must be as many processes.
        #[serde(skip_serializing_if = "is_one")]
        pipeline_stages: u32 = 1, ROWS;
        /// What hidden states and their gradients go from one such process to the next as: `float32`, or `bfloat16`, which halves the
        /// bytes and rounds them.
        #[serde(skip_serializing_if = "is_float32")]
        pipeline_dtype: PipelineDType = PipelineDType::Float32, Kind::Choice(PipelineDType::NAMES);
        /// Writes every so many-th optimizer step, and the last, to `metrics.jsonl`.
        logging_steps: u64 = 1, COUNT;
        /// Prompts that the model answers before the first step and after the last, for `samples.jsonl` and `report.html`: each
        /// a user's message where there is a chat template and the data has messages. When empty, the first `sample_count`
        /// examples of the evaluation data are asked, or of the training data where nothing is held out.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        sample_prompts: Vec<String> = Vec::new(), Kind::Texts;
        /// Examples that are asked when there are no `sample_prompts`; 0 asks nothing at all.
        sample_count: u32 = 3, Kind::Integer { min: 0, max: 10_000 };
        /// Tokens of an answer at most. Answers end early where all of them would take longer than a hundredth of the run is
        /// expected to take, and than five seconds.
        sample_max_new_tokens: u32 = 64, ROWS;
        /// Keeps the best evaluation's adapter in `best` of the run's folder, and makes it the result at the end.
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        load_best_model_at_end: bool = false, Kind::Bool;
        /// What the best is told by: `eval_loss`, `eval_accuracy` (of tokens, texts or pairs), `eval_macro_f1`,
        /// `eval_reward_margin`, or with `predict_with_generate` `eval_bleu`, `eval_chrf`, `eval_rouge_l`, `eval_exact_match`.
        #[serde(skip_serializing_if = "is_loss")]
        metric_for_best_model: BestMetric = BestMetric::Loss, Kind::Choice(BestMetric::NAMES);
        /// Ends the run after so many evaluations in a row without a better one; it goes on to its end when absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        early_stopping_patience: Option<u32> = None, ROWS;
        /// By how much an evaluation must be better to count as such.
        #[serde(skip_serializing_if = "is_zero")]
        early_stopping_threshold: f64 = 0.0, Kind::Number(Range::NotNegative);
    }
}

/// That of Lion's moment, as its authors have it.
pub(super) const LION_BETA2: f64 = 0.99;

/// Half an hour, as in PyTorch: an evaluation of rank 0 must end before.
const USUAL_WAIT: u64 = 1800;
const USUAL_CHECK: u64 = 100;

fn is_usual_wait(seconds: &u64) -> bool {
    *seconds == USUAL_WAIT
}

fn is_usual_check(steps: &u64) -> bool {
    *steps == USUAL_CHECK
}

fn is_one(stages: &u32) -> bool {
    *stages == 1
}

fn is_no_layer(layers: &u32) -> bool {
    *layers == 0
}

fn is_float32(dtype: &PipelineDType) -> bool {
    *dtype == PipelineDType::Float32
}

/// Tokens of an answer.
const MOST_OF_ANSWER: u32 = 128;

fn is_usual_answer(tokens: &u32) -> bool {
    *tokens == MOST_OF_ANSWER
}

fn is_adamw(optim: &Optim) -> bool {
    *optim == Optim::AdamW
}

fn is_loss(metric: &BestMetric) -> bool {
    *metric == BestMetric::Loss
}

fn is_zero(x: &f64) -> bool {
    *x == 0.0
}

impl TrainConfig {
    /// How long the run is.
    pub fn length(&self) -> Length {
        match (self.max_steps, self.num_train_epochs) {
            (Some(steps), _) => Length::Steps(steps),
            (None, epochs) => Length::Epochs(epochs.unwrap_or(3.0)),
        }
    }

    /// The time that a start of the run has.
    pub fn time_budget(&self) -> Option<Duration> {
        self.max_time.as_deref().and_then(span)
    }

    /// The learning rates that LoRA+ sets apart, where it is asked for.
    pub fn lora_plus(&self) -> Option<LoraPlus> {
        let embedding = self.loraplus_lr_embedding / self.learning_rate;
        self.loraplus_lr_ratio.map(|ratio| LoraPlus { ratio, embedding })
    }

    /// Optimizer steps of warm-up in a run of so many optimizer steps. A ratio is rounded up, as transformers does.
    pub fn warmup(&self, total_steps: u64) -> u64 {
        match (self.warmup_steps, self.warmup_ratio) {
            (Some(steps), _) => steps,
            (None, ratio) => (total_steps as f64 * ratio.unwrap_or(0.0)).ceil() as u64,
        }
    }
}
