//! From what the user wrote to a run that can start: files opened, data tokenised and checked, counts known, and nothing
//! expensive done yet.

use crate::answering::{Question, questions};
use crate::answers::Answers;
use crate::classes::{ClassPlan, KnownClasses, check_head};
use crate::config::{
    Checkpointing, DType, FinetuningType, InitLoraWeights, Length, LoraConfig, Modules, RunConfig, TaskType, Tokens,
    Weights,
};
use crate::datasets::{base_name, compared_answers, data_tokenizer, datasets, model_folder};
use crate::digest;
use crate::error::{Error, Result};
use crate::events::{Event, EventSink};
use crate::policy::check_policy;
use crate::schedule::Schedule;
use crate::stages::stages_of;
use lora_data::{DataReport, Replay, RowPlan, Rows, Tokenizer};
use lora_format::{
    AdapterConfig, AdapterFolder, AdapterModule, InitLoraWeights as PeftInit, Method, TargetModules, TokenIndices,
    read_adapter,
};
use lora_model::{
    InjectionPlan, ModelConfig, Packing, Storage, check_adapter, check_weights, packed_already, plan_injection,
    saved_form,
};
use lora_torch::{DeviceChoice, resolve_device, use_device_kernels};
use std::collections::BTreeMap;
use std::path::PathBuf;
use tch::{Device, Kind};

/// The digest of the data that is evaluated on.
pub(crate) const EVAL_DATA: &str = "eval data";

/// What is trained.
#[derive(Debug)]
pub enum Trained {
    /// Fresh adapters.
    Fresh(Box<InjectionPlan>),
    /// An adapter that goes on.
    Existing(Box<AdapterFolder>),
    /// Every weight.
    Everything,
}

/// A run whose every setting has been resolved.
#[derive(Debug)]
pub struct RunPlan {
    /// The configuration.
    pub config: RunConfig,
    /// The base checkpoint's folder.
    pub model_dir: PathBuf,
    /// The model.
    pub model: ModelConfig,
    /// What is trained.
    pub trained: Trained,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Examples to train on.
    pub train: Rows,
    /// What became of the training data's records.
    pub train_report: DataReport,
    /// Examples to evaluate on.
    pub eval: Rows,
    /// What became of the evaluation data's records, where it has files of its own.
    pub eval_report: Option<DataReport>,
    /// The labels of `train` and `eval`, where a classifier is trained.
    pub classes: Option<ClassPlan>,
    /// What is to be answered in an evaluation, where `predict_with_generate` asks for it.
    pub questions: Vec<Question>,
    /// The answers whose rows `train` and `eval` are, where answers are compared or rated.
    pub answers: Option<[Answers; 2]>,
    /// Rows of the training data: indices into `train`, one for each row, or several where rows are packed.
    pub rows: RowPlan,
    /// How many of them each dataset has, where datasets are trained one after the other.
    pub stages: Option<Vec<usize>>,
    /// Which of the rows are an old set's, and how many of those a pass has, where some are replayed.
    pub replay: Option<Replay>,
    /// Optimizer steps of one pass over the rows.
    pub steps_per_epoch: u64,
    /// Optimizer steps of the run.
    pub total_steps: u64,
    /// The learning rate.
    pub schedule: Schedule,
    /// Where it runs.
    pub device: Device,
    /// What it computes in.
    pub kind: Kind,
    /// Bytes of the matrices of the base that its checkpoint has packed, by path; they are kept so.
    pub packed: BTreeMap<String, i64>,
    /// Fingerprints of what the configuration only names: `base`, `data`, `eval data`, `tokenizer`.
    pub digests: BTreeMap<String, String>,
}

impl RunPlan {
    /// Opens and checks everything that a run needs, in the order of what it costs.
    ///
    /// # Errors
    /// What is wrong with the configuration, the checkpoint's config, the adapter or the data; each names file and field.
    pub fn resolve(config: RunConfig, sink: &mut dyn EventSink) -> Result<Self> {
        config.validate()?;
        let device = resolve_device(config.model.device.parse::<DeviceChoice>()?)?;
        if config.model.threads > 0 {
            lora_torch::set_num_threads(config.model.threads as usize);
        }
        use_device_kernels(config.model.kernels.of_device())?;
        let model_dir = model_folder(&config)?;
        let mut model = ModelConfig::read(&model_dir)?;
        let known = KnownClasses::of(&config, &model_dir, &model)?;
        if let Some(known) = &known {
            // Until the data has told them all: enough to check the targets before it is read.
            model = model.for_classes(known.settings.clone().or_default());
        }
        check_weights(&model_dir, &model)?;
        let kind = compute_kind(&config, &model, device);
        if device != Device::Cpu && config.model.weights == Weights::Mapped {
            return Err(Error::MappedOnDevice { device: config.model.device.clone() });
        }
        check_on_host(&config, device)?;
        let mut trained = what_is_trained(&config, &model)?;
        let packed = packed_already(&model_dir, &model)?;
        check_packed(&packed, &config, &trained)?;
        if !packed.is_empty() && config.model.quantization.packing().is_some() {
            sink.event(Event::Note(format!(
                "model.quantization: {} matrices of the checkpoint are packed already and stay as they are",
                packed.len()
            )));
        }
        stages_of(&config, &model, &trained)?;
        let tokenizer = data_tokenizer(&model_dir, &config.data)?;

        let compared = config.objective.compares();
        let (train, stages, mut train_report, eval, eval_report, classes, answers, old) = match known {
            known if compared => {
                let data = compared_answers(&config, &tokenizer, sink)?;
                if let Some(known) = known {
                    model = model.for_classes(known.one_score());
                    trained = what_is_trained(&config, &model)?;
                    check_head(&model_dir, &model, &trained)?;
                }
                let [train, eval] = &data.answers;
                let (train, eval) = (train.rows.clone(), eval.rows.clone());
                (train, data.stages, data.report, eval, data.eval_report, None, Some(data.answers), data.old)
            }
            None => {
                let data = datasets(&config, &tokenizer, sink)?;
                (data.train, data.stages, data.report, data.eval, data.eval_report, None, None, data.old)
            }
            Some(known) => {
                let data = known.datasets(&config, &model, &tokenizer, sink)?;
                model = model.for_classes(data.classes.labels.clone());
                trained = what_is_trained(&config, &model)?;
                check_head(&model_dir, &model, &trained)?;
                (data.train, None, data.report, data.eval, None, Some(data.classes), None, 0)
            }
        };
        check_vocabulary(&model, &train)?;
        check_vocabulary(&model, &eval)?;
        let samples = config.objective.samples();
        if samples {
            check_policy(&config.objective, &trained, model.logits_softcap, [&train, &eval])?;
        }
        let questions = match config.train.predict_with_generate {
            true => questions(&eval, &tokenizer, config.train.generation_num_samples)?,
            false => Vec::new(),
        };
        let lengths = train.lengths();
        let longest = lengths.iter().copied().chain(eval.lengths()).max().unwrap_or(0);
        // Answers that the model writes end where its positions do.
        if !samples && model.layout.embed_positions.is_some() && longest as i64 > model.max_position_embeddings {
            return Err(Error::TooLong { tokens: longest, positions: model.max_position_embeddings });
        }
        let (packing, most) = (config.data.packing, config.data.max_length as usize);
        let mut old = old;
        let (rows, stages) = match (&answers, stages) {
            (Some([answers, _]), stages) => (answers.plan(), stages),
            // A packed row is new or old, so that the share is that of rows.
            (None, None) if packing && old > 0 => {
                let (rows, counts) = RowPlan::packed_stages(&lengths, &[train.len() - old, old], most);
                old = counts.last().copied().unwrap_or(0);
                (rows, None)
            }
            (None, Some(stages)) if packing => {
                let (rows, stages) = RowPlan::packed_stages(&lengths, &stages, most);
                (rows, Some(stages))
            }
            (None, None) if packing => (RowPlan::packed(&lengths, most), None),
            (None, stages) => (RowPlan::one_each(train.len()), stages),
        };
        let per_step =
            u64::from(config.train.per_device_train_batch_size) * u64::from(config.train.gradient_accumulation_steps);
        let replay = (old > 0).then(|| Replay::of(rows.len() - old, old, config.data.replay_share));
        train_report.replay = replay;
        if let Some(none) = replay.filter(|replay| replay.drawn == 0) {
            let (share, new) = (config.data.replay_share, none.new);
            sink.event(Event::Note(format!(
                "data.replay_share = {share} of {new} rows is less than a row: none is replayed"
            )));
        }
        let rows_per_pass = replay.map_or(rows.len(), |replay| replay.rows_per_pass());
        // Several steps learn from the same answers where that is asked for.
        let each = if samples { u64::from(config.objective.num_iterations) } else { 1 };
        let steps_per_epoch = (rows_per_pass as u64).div_ceil(per_step) * each;
        let total_steps = match config.train.length() {
            Length::Steps(steps) => steps,
            Length::Epochs(epochs) => (epochs * steps_per_epoch as f64).ceil() as u64,
        };
        let trained = with_total_step(trained, total_steps)?;
        let schedule = Schedule::new(&config.train, total_steps);
        if classes.is_none() && i64::from(config.data.max_length) > model.max_position_embeddings {
            sink.event(Event::Note(format!(
                "data.max_length = {} is beyond the {} positions that the model was made for",
                config.data.max_length, model.max_position_embeddings
            )));
        }
        let mut digests = BTreeMap::from([
            ("base".to_string(), digest::of_checkpoint(&model_dir)?),
            ("data".to_string(), train.digest()),
            ("tokenizer".to_string(), tokenizer.digest().to_string()),
        ]);
        if !eval.is_empty() {
            digests.insert(EVAL_DATA.to_string(), eval.digest());
        }
        if let Some(classes) = &classes {
            digests.insert("labels".to_string(), classes.digest());
        }
        if let Some([answers, _]) = &answers {
            digests.insert("answers".to_string(), answers.digest());
        }
        Ok(Self {
            config,
            model_dir,
            model,
            trained,
            tokenizer,
            train,
            train_report,
            eval,
            eval_report,
            classes,
            questions,
            answers,
            rows,
            stages,
            replay,
            steps_per_epoch,
            total_steps,
            schedule,
            device,
            kind,
            packed,
            digests,
        })
    }

    /// Whether the run begins with another model than the base: with an adapter that was trained, or a random one.
    pub fn starts_apart(&self) -> bool {
        match &self.trained {
            Trained::Fresh(plan) => plan.config.init_lora_weights == PeftInit::Random,
            Trained::Existing(_) => true,
            Trained::Everything => false,
        }
    }

    /// How the base is loaded and kept: what is to be packed comes from the mapped file, one matrix at a time.
    pub fn keeping(&self) -> (Storage, Option<Packing>) {
        keeping(&self.config.model)
    }

    /// Bytes of the frozen base in memory.
    pub fn base_bytes(&self) -> i64 {
        let (storage, packing) = (self.config.model.weights.storage(), self.config.model.quantization.packing());
        let stored = self.model.dtype.as_deref().and_then(lora_torch::parse_kind).unwrap_or(self.kind);
        lora_model::base_bytes(&self.model, storage, packing, self.kind, stored, &self.packed)
    }

    /// Rows of one pass: all of them, or with the part of an old set that a pass replays.
    pub fn rows_per_pass(&self) -> usize {
        self.replay.map_or(self.rows.len(), |replay| replay.rows_per_pass())
    }

    /// Tokens of every row; where the model writes the answers itself, all of a prompt's at their longest.
    pub fn row_lengths(&self) -> Vec<usize> {
        let lengths = self.rows.lengths(&self.train.lengths());
        let own = &self.config.objective;
        if !own.samples() {
            return lengths;
        }
        let (answers, longest) = (own.num_generations as usize, own.max_completion_length as usize);
        lengths.into_iter().map(|length| answers * (length + longest)).collect()
    }

    /// Trained parameters.
    pub fn trained_parameters(&self) -> i64 {
        match &self.trained {
            Trained::Fresh(plan) => plan.trained(),
            Trained::Existing(folder) => folder.modules.values().map(AdapterModule::trained).sum(),
            Trained::Everything => self.base_parameters(),
        }
    }

    /// Parameters of the base model.
    pub fn base_parameters(&self) -> i64 {
        lora_model::checkpoint_tensors(&self.model).iter().map(|(_, shape)| shape.iter().product::<i64>()).sum()
    }

    /// The adapter configuration that is saved; none for full training.
    pub fn adapter_config(&self) -> Option<AdapterConfig> {
        let base_model_name_or_path = Some(base_name(&self.config.model.path));
        match &self.trained {
            Trained::Fresh(plan) => Some(AdapterConfig { base_model_name_or_path, ..saved_form(plan.config.clone()) }),
            Trained::Existing(folder) => Some(AdapterConfig {
                base_model_name_or_path,
                lora_dropout: self.config.lora.dropout(),
                ..saved_form(folder.config.clone())
            }),
            Trained::Everything => None,
        }
    }
}

/// What waits on the host needs a device that it waits for.
fn check_on_host(config: &RunConfig, device: Device) -> Result<()> {
    let refuse = |key, value: &'static str, instead| Err(Error::NothingToOffload { key, value, instead });
    match (device, config.model.weights, config.train.gradient_checkpointing) {
        (Device::Cpu, weights @ Weights::Host, _) => {
            refuse("model.weights", weights.name(), "\"stored\" or \"mapped\"")
        }
        (Device::Cpu, _, choice @ Checkpointing::Offload) => {
            refuse("train.gradient_checkpointing", choice.name(), "\"full\"")
        }
        _ => Ok(()),
    }
}

/// How a base is loaded and kept.
pub(crate) fn keeping(c: &crate::config::ModelConfig) -> (Storage, Option<Packing>) {
    let packing = c.quantization.packing();
    (if packing.is_some() { Storage::Mapped } else { c.weights.storage() }, packing)
}

/// What changes the base's weights needs them unpacked.
fn check_packed(packed: &BTreeMap<String, i64>, config: &RunConfig, trained: &Trained) -> Result<()> {
    let refuse = |key, value: &str, instead| {
        Err(Error::PackedBase { key, value: value.into(), matrices: packed.len(), instead })
    };
    match (trained, &config.lora.init_lora_weights) {
        (Trained::Everything, _) if !packed.is_empty() => {
            refuse("train.finetuning_type", FinetuningType::Full.name(), "\"lora\"")
        }
        (Trained::Fresh(plan), InitLoraWeights::LoftQ | InitLoraWeights::Principal(_)) => {
            match plan.adapters.iter().any(|adapter| packed.contains_key(&adapter.module.path)) {
                true => {
                    let value = match &config.lora.init_lora_weights {
                        InitLoraWeights::Principal(name) => name,
                        _ => lora_core::LoftQ::NAME,
                    };
                    refuse("lora.init_lora_weights", value, "true")
                }
                false => Ok(()),
            }
        }
        _ => Ok(()),
    }
}

/// fp32 on the CPU, where half precision has no fast products; on a GPU what the checkpoint says, unless asked otherwise.
fn compute_kind(config: &RunConfig, model: &ModelConfig, device: Device) -> Kind {
    match (config.model.dtype, device) {
        (DType::Float32, _) | (_, Device::Cpu) => Kind::Float,
        (DType::BFloat16, _) => Kind::BFloat16,
        (DType::Float16, _) => Kind::Half,
        (DType::Auto, _) if config.train.finetuning_type == FinetuningType::Full => Kind::Float,
        (DType::Auto, _) => model.dtype.as_deref().and_then(lora_torch::parse_kind).unwrap_or(Kind::Float),
    }
}

fn what_is_trained(config: &RunConfig, model: &ModelConfig) -> Result<Trained> {
    if config.train.finetuning_type == FinetuningType::Full {
        if config.lora.task_type == TaskType::CausalLm {
            model.check_language("train")?;
        }
        return Ok(Trained::Everything);
    }
    let Some(dir) = &config.lora.init_adapter else {
        return Ok(Trained::Fresh(Box::new(plan_injection(model, &peft_config(&config.lora))?)));
    };
    let folder = read_adapter(dir)?;
    let task = config.lora.task_type.name();
    if folder.config.task_type.as_deref().is_some_and(|own| own != task) {
        let value = folder.config.task_type.unwrap_or_default();
        let reason = format!("{} was trained for another task than lora.task_type = \"{task}\"", dir.display());
        return Err(lora_model::Error::Adapter { field: "task_type", value, reason }.into());
    }
    check_adapter(model, &folder)?;
    if config.lora.lora_dropout > 0.0 && folder.config.has_target_parameters() {
        let reason =
            "the adapter in lora.init_adapter has target_parameters, which see no inputs to drop; leave it out";
        let (field, value) = ("lora.lora_dropout", config.lora.lora_dropout.to_string());
        return Err(lora_model::Error::Adapter { field, value, reason: reason.into() }.into());
    }
    Ok(Trained::Existing(Box::new(folder)))
}

/// AdaLoRA's schedule is that of the run, unless it was said otherwise.
fn with_total_step(mut trained: Trained, total_steps: u64) -> Result<Trained> {
    let config = match &mut trained {
        Trained::Fresh(plan) => &mut plan.config,
        Trained::Existing(folder) => &mut folder.config,
        Trained::Everything => return Ok(trained),
    };
    if let Method::AdaLora(own) = &mut config.method
        && own.rank_pattern.is_none()
    {
        let total = *own.total_step.get_or_insert(i64::try_from(total_steps).unwrap_or(i64::MAX));
        if own.tinit >= total - own.tfinal {
            let reason = format!(
                "ADALORA leaves no step to prune in: tinit must be below total_step - tfinal = {total} - {}; make the run \
                 longer or both shorter",
                own.tfinal
            );
            return Err(lora_model::Error::Adapter { field: "tinit", value: own.tinit.to_string(), reason }.into());
        }
    }
    Ok(trained)
}

/// The configuration in PEFT's terms.
fn peft_config(c: &LoraConfig) -> AdapterConfig {
    let targets = |m: &Modules| match m {
        Modules::Pattern(p) => TargetModules::Pattern(p.clone()),
        Modules::Names(names) => TargetModules::List(names.clone()),
    };
    let config = AdapterConfig {
        method: c.method(),
        r: c.r.into(),
        lora_alpha: c.lora_alpha,
        lora_dropout: c.dropout(),
        target_modules: Some(targets(&c.target_modules)),
        exclude_modules: c.exclude_modules.as_ref().map(targets),
        use_rslora: c.use_rslora,
        bias: c.bias.name().into(),
        use_dora: c.use_dora,
        lora_bias: c.lora_bias,
        init_lora_weights: match &c.init_lora_weights {
            InitLoraWeights::Kaiming | InitLoraWeights::LoftQ => PeftInit::Default,
            InitLoraWeights::Gaussian => PeftInit::Named("gaussian".into()),
            InitLoraWeights::Random => PeftInit::Random,
            InitLoraWeights::Principal(name) => PeftInit::Named(name.clone()),
        },
        rank_pattern: c.rank_pattern.iter().map(|(k, v)| (k.clone(), i64::from(*v))).collect(),
        alpha_pattern: c.alpha_pattern.clone(),
        layers_to_transform: c.layers_to_transform.as_ref().map(|l| l.iter().map(|i| i64::from(*i)).collect()),
        layers_pattern: c.layers_pattern.clone(),
        modules_to_save: (!c.modules_to_save.is_empty()).then(|| c.modules_to_save.clone()),
        trainable_token_indices: c.trainable_token_indices.as_ref().map(|tokens| match tokens {
            Tokens::Embedding(ids) => TokenIndices::Embedding(ids.iter().map(|id| i64::from(*id)).collect()),
            Tokens::ByModule(map) => TokenIndices::ByModule(
                map.iter().map(|(k, ids)| (k.clone(), ids.iter().map(|id| i64::from(*id)).collect())).collect(),
            ),
        }),
        ensure_weight_tying: c.ensure_weight_tying,
        target_parameters: (!c.target_parameters.is_empty()).then(|| c.target_parameters.clone()),
        task_type: Some(c.task_type.name().into()),
        ..AdapterConfig::default()
    };
    match &c.init_lora_weights {
        InitLoraWeights::LoftQ => config.with_loftq(c.loftq_iter.unwrap_or(1)),
        _ => config,
    }
}

fn check_vocabulary(model: &ModelConfig, rows: &Rows) -> Result<()> {
    if rows.highest_token()?.is_none_or(|id| i64::from(id) < model.vocab_size) {
        return Ok(());
    }
    for row in 0..rows.len() {
        let example = rows.example(row)?;
        if let Some(id) = example.input_ids.iter().find(|id| i64::from(**id) >= model.vocab_size) {
            return Err(Error::TokenOutsideModel {
                id: *id,
                vocab_size: model.vocab_size,
                origin: example.origin.to_string(),
            });
        }
    }
    Ok(())
}
