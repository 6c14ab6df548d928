//! What can go wrong in a run.

use crate::checkpoint::{Damage, Difference};
use crate::config::ConfigErrors;
use crate::lock::Holder;
use lora_format::ADAPTER_CONFIG;
use std::io;
use std::path::{Path, PathBuf};

/// The result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of a run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A mapped base is read by the CPU.
    #[error(
        "model.weights = \"mapped\" with model.device = \"{device}\": a mapped base is read by the CPU; use \"stored\", or \
         quantization = \"nf4\" to make it small"
    )]
    MappedOnDevice {
        /// The device that was asked for.
        device: String,
    },
    /// Something is to wait on the host for a device, and the host computes itself.
    #[error(
        "{key} = \"{value}\" on the CPU: it moves to the host what a CUDA device has no room for; set {key} = {instead}"
    )]
    NothingToOffload {
        /// The key.
        key: &'static str,
        /// Its value.
        value: &'static str,
        /// What to set.
        instead: &'static str,
    },
    /// The base is packed, and its weights are to be changed.
    #[error(
        "{key} = {value}: this changes the base's weights, of which {matrices} are packed already; give the unpacked checkpoint, or \
         {key} = {instead}"
    )]
    PackedBase {
        /// The key.
        key: &'static str,
        /// What it is.
        value: String,
        /// How many matrices are packed.
        matrices: usize,
        /// What it may be.
        instead: &'static str,
    },
    /// Evaluations are compared by a figure that they have not.
    #[error(
        "train.metric_for_best_model = \"{metric}\": an evaluation of this run has no such figure; choose another, as \"eval_loss\""
    )]
    NoMetric {
        /// The figure.
        metric: &'static str,
    },
    /// Answers are to be written, and there is nothing to answer.
    #[error(
        "train.predict_with_generate: none of the {examples} evaluation examples has a prompt before its answer; set it to false, or \
         give data.eval with prompts"
    )]
    NothingToAnswer {
        /// Examples of the evaluation.
        examples: usize,
    },
    /// Several processes cannot share the steps of an objective.
    #[error(
        "objective.name = \"{name}\": answers are written and rewarded by one process; start it alone, without `lora launch`"
    )]
    OneProcess {
        /// The objective.
        name: &'static str,
    },
    /// The model is to answer prompts, and an example has none.
    #[error(
        "{origin}: it has no prompt before its answer, and objective.name = \"grpo\" lets the model answer prompts; give it one"
    )]
    NoPrompt {
        /// The record.
        origin: String,
    },
    /// The program that is to reward answers cannot be started.
    #[error("{source}; give a program and its arguments, as [\"python3\", \"reward.py\"]")]
    RewardProgram {
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Answers were not rewarded.
    #[error("answers were not rewarded: {source}")]
    Reward {
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The configuration is at fault.
    #[error(transparent)]
    Config(#[from] ConfigErrors),
    /// The data is at fault.
    #[error(transparent)]
    Data(#[from] lora_data::DataError),
    /// The thread that makes batches could not be started, or broke down.
    #[error("no batches are made: {reason}; start again from the last checkpoint with --resume")]
    Loader {
        /// Why.
        reason: String,
    },
    /// What is told of a run could not be written.
    #[error(transparent)]
    Report(#[from] lora_report::Error),
    /// A file of a model or an adapter is at fault.
    #[error(transparent)]
    Format(#[from] lora_format::Error),
    /// The model refused something.
    #[error(transparent)]
    Model(#[from] lora_model::Error),
    /// An adapter refused something.
    #[error(transparent)]
    Core(#[from] lora_core::Error),
    /// libtorch failed, or memory ran out.
    #[error(transparent)]
    Torch(#[from] lora_torch::Error),
    /// The folder of the run cannot be made or written to.
    #[error("output_dir {}: not a folder that can be written to: {source}; choose another output_dir", path.display())]
    OutputDir {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// An example has more tokens than the model has positions.
    #[error(
        "an example has {tokens} tokens, and the model has {positions} positions and no more; set data.max_length = {positions}, and data.truncation to say what becomes of longer ones"
    )]
    TooLong {
        /// Tokens of the longest example.
        tokens: usize,
        /// `max_position_embeddings`.
        positions: i64,
    },
    /// Another run works in the folder.
    #[error("output_dir {}: another run is at work there ({holder}); wait for it or choose another output_dir", path.display())]
    Locked {
        /// The folder.
        path: PathBuf,
        /// Who has it.
        holder: Holder,
    },
    /// A file or folder could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The disk has no room for one more checkpoint.
    #[error(
        "{}: a checkpoint needs {needed} bytes and only {free} are free; free some space or lower train.save_total_limit",
        path.display()
    )]
    NoSpace {
        /// The folder of the run.
        path: PathBuf,
        /// Bytes of a checkpoint, with a fifth to spare.
        needed: u64,
        /// Free bytes of the file system.
        free: u64,
    },
    /// A checkpoint was to hold something that is not a plain file with a plain name.
    #[error("checkpoint entry {}: must be a plain file with a UTF-8 name other than manifest.json", path.display())]
    CheckpointEntry {
        /// The entry.
        path: PathBuf,
    },
    /// A checkpoint of the step is there already, and it is a different one.
    #[error("{}: a different checkpoint of this step exists; resume from it or choose another output_dir", path.display())]
    CheckpointExists {
        /// The folder of the checkpoint.
        path: PathBuf,
    },
    /// A checkpoint is not what was written.
    #[error("checkpoint {}: {damage}", path.display())]
    CheckpointDamaged {
        /// The folder of the checkpoint.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        damage: Damage,
    },
    /// A checkpoint was written by a later version of this program.
    #[error(
        "checkpoint {}: format_version = {found}, and this version reads up to {supported}; use the version that wrote it",
        path.display()
    )]
    CheckpointTooNew {
        /// The folder of the checkpoint.
        path: PathBuf,
        /// The version in the manifest.
        found: u64,
        /// The newest version that can be read.
        supported: u64,
    },
    /// Checkpoints are there and none can be used.
    #[error(
        "{}: no checkpoint can be used: {}; to start from the beginning choose another output_dir",
        path.display(),
        reasons.iter().map(|(path, reason)| format!("{}: {reason}", path.display())).collect::<Vec<_>>().join("; ")
    )]
    NoGoodCheckpoint {
        /// The folder of the checkpoints.
        path: PathBuf,
        /// Every checkpoint that was there, and what is wrong with it.
        reasons: Vec<(PathBuf, String)>,
    },
    /// The run to be resumed was another one.
    #[error(
        "this is not the run that the checkpoint belongs to: {}; set them back, or choose another output_dir{}",
        differences.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "),
        if differences.iter().any(|d| d.harmless) { " (those marked * are taken when given with --set)" } else { "" }
    )]
    ResumeMismatch {
        /// Every field that differs.
        differences: Vec<Difference>,
    },
    /// The metrics of an earlier part of the run cannot be continued.
    #[error("{}:{line}: not the metrics of this run: {reason}; move the file away to go on without it", path.display())]
    Metrics {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// There is no checkpoint to go on from.
    #[error("output_dir {}: there is no checkpoint to resume from; start without --resume", path.display())]
    NothingToResume {
        /// The folder of the run.
        path: PathBuf,
    },
    /// The folder holds another run, which would be written over.
    #[error("output_dir {}: it holds the checkpoints of a run; go on with it by --resume, or choose another output_dir", path.display())]
    OutputTaken {
        /// The folder.
        path: PathBuf,
    },
    /// A step has fewer micro-batches than there are processes to share them.
    #[error(
        "train.gradient_accumulation_steps = {micro_batches} for {world} ranks: a step's micro-batches are shared among them, so set it \
         to a multiple of {world}{}, or start fewer", same_step(*micro_batches, *rows, *world)
    )]
    TooFewMicroBatches {
        /// `per_device_train_batch_size`.
        rows: u32,
        /// `gradient_accumulation_steps`.
        micro_batches: u32,
        /// Processes.
        world: u32,
    },
    /// There are not as many processes as stages.
    #[error(
        "train.pipeline_stages = {stages} for {world} {}: each rank is one stage, and a divided model has no copies that would share \
         the rows; start {stages} ranks, as by `lora launch -n {stages}`, or set pipeline_stages = {}",
        if *world == 1 { "process" } else { "ranks" },
        if *world == 1 { 1 } else { *world }
    )]
    StagesAndRanks {
        /// `train.pipeline_stages`.
        stages: u32,
        /// Processes.
        world: u32,
    },
    /// A model cannot be divided so, or what is trained cannot be trained in stages.
    #[error("train.pipeline_stages = {stages}{}: {reason}", with_adapter(.adapter.as_deref()))]
    Stages {
        /// `train.pipeline_stages`.
        stages: u32,
        /// `lora.init_adapter`, where it is what cannot be.
        adapter: Option<PathBuf>,
        /// Why not, and what to do.
        reason: String,
    },
    /// What other stages have of a step was not brought here before it was to be written.
    #[error("step {step}: the parts of the other stages were not collected; every rank has to call what writes them")]
    NotCollected {
        /// The step.
        step: u64,
    },
    /// A process was to do another run than rank 0.
    #[error(
        "rank {rank} was started for another run than rank 0: {}; start every rank with the same program, configuration and data",
        differences.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    )]
    RanksDiffer {
        /// The first that differs.
        rank: u32,
        /// Rank 0's, and its own.
        differences: Vec<Difference>,
    },
    /// A process came to other parameters than rank 0.
    #[error(
        "step {step}: rank {rank} has other parameters than rank 0; its machine or libtorch computes something else. Go on with \
         --resume from the last checkpoint, on machines that are alike"
    )]
    RanksApart {
        /// The step.
        step: u64,
        /// The first that differs.
        rank: u32,
    },
    /// Another process failed.
    #[error("rank {rank} failed, and every rank left with it: {message}")]
    Peer {
        /// The process.
        rank: u32,
        /// What it said.
        message: String,
    },
    /// Nothing has a gradient.
    #[error("there is nothing to train: no parameter has a gradient")]
    NothingTrained,
    /// The state of a checkpoint does not fit the run.
    #[error("trainer_state.safetensors: `{name}` must be {expected}, found {found}; the checkpoint is of another run")]
    StateMismatch {
        /// The tensor.
        name: String,
        /// What the run has.
        expected: String,
        /// What the checkpoint has.
        found: String,
    },
    /// Loss or gradient were not finite three times in a row.
    #[error(
        "step {step}: loss = {loss}, grad_norm = {grad_norm} at learning_rate = {learning_rate:e}, for the third time in a row; \
         these steps changed nothing. Lower train.learning_rate, set train.max_grad_norm, or look at the rows that were named"
    )]
    NotFinite {
        /// The step.
        step: u64,
        /// Its loss.
        loss: f64,
        /// Its gradient norm.
        grad_norm: f64,
        /// Its learning rate.
        learning_rate: f64,
    },
    /// A trained parameter is not finite, and such an adapter is never saved.
    #[error(
        "step {step}: a trained parameter is not finite, and nothing was saved; lower train.learning_rate or set train.max_grad_norm"
    )]
    AdapterNotFinite {
        /// The step.
        step: u64,
    },
    /// A run that was under way had to end.
    #[error("stopped at step {step}: {source}; {}", remedy(source, checkpoint.as_deref()))]
    Stopped {
        /// Optimizer steps done.
        step: u64,
        /// Why.
        #[source]
        source: Box<Error>,
        /// The newest checkpoint that is whole.
        checkpoint: Option<PathBuf>,
    },
    /// A round of a watch that was under way had to end.
    #[error(
        "round {} stopped at step {step}: {source}; put that right and start the watch again: it goes on with this round",
        crate::versions::version_name(*version)
    )]
    RoundStopped {
        /// The round.
        version: u64,
        /// Optimizer steps done.
        step: u64,
        /// Why.
        #[source]
        source: Box<Error>,
    },
    /// More examples were to be held out than there are.
    #[error("data.eval_split = {split} leaves none of the {examples} examples to train on; lower it")]
    EvalSplit {
        /// The setting.
        split: f64,
        /// Examples in all.
        examples: usize,
    },
    /// A watch cannot work with the configuration.
    #[error("{key}: {reason} (for --watch)")]
    Watch {
        /// The key.
        key: &'static str,
        /// Why, and what to do.
        reason: &'static str,
    },
    /// The folder that is to be watched cannot be read.
    #[error("--watch {}: not a folder that can be read: {source}; make it first", path.display())]
    WatchFolder {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A record of a watch or of a version is not one.
    #[error("{}: cannot be read: {reason}; put it back from a copy, or move its folder away", path.display())]
    WatchFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no such version.
    #[error(
        "{}: there is no published version {wanted}; {}", dir.display(),
        if published.is_empty() { "`lora train --watch` publishes versions".to_string() } else { format!("there are {published:?}, see `lora versions`") }
    )]
    NoVersion {
        /// The output folder.
        dir: PathBuf,
        /// What was wanted.
        wanted: String,
        /// Those that are there.
        published: Vec<u64>,
    },
    /// `current` is not what publishing made.
    #[error("{}: must be a link to a version as versions/0001; move it away", path.display())]
    CurrentLink {
        /// The path.
        path: PathBuf,
    },
    /// Of two sets that are trained together one has nothing left.
    #[error("{key}: none of its rows is left to train on; `lora data stats` says what became of them")]
    NoRows {
        /// The set.
        key: &'static str,
    },
    /// The tokenizer makes ids that the model has no row for.
    #[error(
        "{origin}: token id {id} is outside the model's vocabulary of {vocab_size}; tokenizer and model do not belong together"
    )]
    TokenOutsideModel {
        /// The id.
        id: u32,
        /// Rows of the model's embedding.
        vocab_size: i64,
        /// The record.
        origin: String,
    },
    /// Token ids for a benchmark have another shape than the benchmark.
    #[error("input_ids must be batch x seq = {expected} ids, got {found}")]
    BenchInput {
        /// Ids of the benchmark.
        expected: usize,
        /// Ids that were given.
        found: usize,
    },
    /// Something could not be written as JSON.
    #[error("cannot write {what} as JSON: {source}")]
    Json {
        /// What it is.
        what: &'static str,
        /// What the writer said.
        #[source]
        source: serde_json::Error,
    },
}

impl Error {
    /// Whether the command line, the configuration or the data is at fault, and not the run (exit code 2 and not 1).
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Model(e) => !matches!(e, lora_model::Error::Torch(_) | lora_model::Error::Core(_)),
            Self::Torch(e) => e.is_usage(),
            Self::Config(_)
            | Self::Data(_)
            | Self::Format(_)
            | Self::OutputDir { .. }
            | Self::OutputTaken { .. }
            | Self::NothingToResume { .. }
            | Self::ResumeMismatch { .. }
            | Self::TooFewMicroBatches { .. }
            | Self::StagesAndRanks { .. }
            | Self::Stages { .. }
            | Self::RanksDiffer { .. }
            | Self::EvalSplit { .. }
            | Self::NoRows { .. }
            | Self::Watch { .. }
            | Self::WatchFolder { .. }
            | Self::WatchFile { .. }
            | Self::NoVersion { .. }
            | Self::CurrentLink { .. }
            | Self::NothingToAnswer { .. }
            | Self::NoPrompt { .. }
            | Self::RewardProgram { .. }
            | Self::OneProcess { .. }
            | Self::TokenOutsideModel { .. }
            | Self::TooLong { .. }
            | Self::MappedOnDevice { .. }
            | Self::NothingToOffload { .. }
            | Self::PackedBase { .. }
            | Self::BenchInput { .. } => true,
            _ => false,
        }
    }

    /// Whether memory ran out, on the host or on a device.
    pub(crate) fn is_out_of_memory(&self) -> bool {
        use lora_torch::Error::OutOfMemory;
        matches!(
            self,
            Self::Torch(OutOfMemory { .. })
                | Self::Model(lora_model::Error::Torch(OutOfMemory { .. }))
                | Self::Core(lora_core::Error::Torch(OutOfMemory { .. }))
                | Self::Model(lora_model::Error::Core(lora_core::Error::Torch(OutOfMemory { .. })))
        )
    }

    /// Wraps an error of the system with what was tried on which path.
    pub(crate) fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { action, path, source }
    }
}

fn with_adapter(dir: Option<&Path>) -> String {
    dir.map_or_else(String::new, |dir| format!(" with lora.init_adapter = {}", dir.display()))
}

/// The settings by which a step keeps its rows where there are more processes, if there are such.
fn same_step(micro_batches: u32, rows: u32, world: u32) -> String {
    let all = u64::from(micro_batches) * u64::from(rows);
    match all.is_multiple_of(u64::from(world)) {
        true => format!(
            ", as {world} with per_device_train_batch_size = {}, which keeps the {all} rows of a step",
            all / u64::from(world)
        ),
        false => String::new(),
    }
}

/// What to do after a run had to end, by the reason and by what was kept.
fn remedy(source: &Error, checkpoint: Option<&Path>) -> String {
    let Some(checkpoint) = checkpoint else {
        return "no checkpoint was saved yet: put that right and start again".into();
    };
    let whole = checkpoint.display();
    match source {
        // Another learning rate is another run.
        Error::NotFinite { .. } | Error::AdapterNotFinite { .. } => {
            let is_adapter = checkpoint.join(ADAPTER_CONFIG).is_file();
            let key = if is_adapter { "lora.init_adapter" } else { "model.path" };
            format!("{key} = \"{whole}\" begins another run, in another output_dir, from the last good state")
        }
        e if e.is_out_of_memory() => format!(
            "{whole} is whole: go on with --resume --set train.gradient_checkpointing=true, which changes no result, or with \
             more memory"
        ),
        _ => format!("{whole} is whole: put that right and go on with --resume"),
    }
}

impl From<tch::TchError> for Error {
    fn from(e: tch::TchError) -> Self {
        Self::Torch(e.into())
    }
}
