//! Training: configuration, objective, optimizer, schedule, the step, checkpoints, metrics.
//!
//! A run is [`RunConfig`] (what the user wrote) -> [`RunPlan`] (files opened, data checked, counts known) -> [`train`] (the
//! loop) -> [`Trainer::step`] (the step). A program that wants to own the loop calls [`Trainer`] itself.

mod allocation;
mod answering;
mod answers;
mod bench;
pub mod checkpoint;
mod class_eval;
mod classes;
mod comparing;
pub mod config;
mod datasets;
mod digest;
mod error;
mod eval;
mod events;
mod exchange;
mod follow;
mod gathering;
#[cfg(test)]
mod golden;
mod journal;
mod link;
mod loader;
mod lock;
mod metrics;
mod moments;
pub mod objective;
mod overrides;
mod params;
mod pipeline;
mod plan;
mod policy;
pub mod policy_loss;
mod resume_point;
mod reward;
mod run;
mod samples;
mod schedule;
mod share;
mod speed;
mod stages;
mod suggest;
mod team;
mod trainer;
mod versions;
mod watch;

pub use answering::{Question, answer_questions, questions, stop_ids};
pub use answers::Answers;
pub use bench::{BenchOptions, BenchReport, bench_step};
pub use class_eval::{ClassReport, ClassScores, LabelScores, evaluate_classes, predict, probabilities};
pub use classes::{ClassLabel, ClassPlan, known_labels, labels_of, split_texts};
pub use comparing::Rewards;
pub use config::{ConfigErrors, RunConfig};
pub use datasets::{
    answer_kind, cache_note, data_options, data_sources, data_tokenizer, model_folder, new_and_old, replayed,
    token_cache, trained_sources,
};
pub use error::{Error, Result};
pub use eval::{EvalReport, evaluate};
pub use events::{Event, EventSink, NoEvents};
pub use lock::{Holder, RunLock};
pub use metrics::{EndRecord, EvalRecord, METRICS_FILE, MetricsWriter, StepRecord};
pub use objective::{Answer, Judgement, Objective};
pub use overrides::Override;
pub use params::{FlatParams, LoraPlus};
pub use plan::{RunPlan, Trained};
pub use reward::{Completion, Reward, RewardCommand, RewardFault};
pub use run::{EndedBy, RunReport, TrainOptions, claim, train, train_claimed, train_with};
pub use schedule::{Schedule, ScheduleKind, ScheduleOptions};
pub use speed::{matrix_rate, operations_per_step, operations_per_token, share_of_matrix_rate};
pub use suggest::nearest;
pub use team::Team;
pub use trainer::{StepOutcome, Trainer};
pub use versions::{
    CURRENT_LINK, REJECTED_DIR, TakenFile, VERSION_FILE, VERSIONS_DIR, Version, Versions, version_name,
};
pub use watch::{RefusedFile, WatchOptions, WatchReport, watch};
