//! The labels of a classifier's run: what is known of them before the data, what the data says, and how texts with labels
//! become batches.

use crate::config::{RunConfig, SourceConfig, TaskType};
use crate::datasets::{data_options, data_sources, take_held_out};
use crate::digest::hex;
use crate::error::Result;
use crate::events::{Event, EventSink};
use crate::plan::Trained;
use lora_data::{
    Batch, ClassTarget, DataReport, KnownLabels, LabelKind, LabelSet, LabelledSet, LabelledText, Rows, Tokenizer,
    build_labelled, count_labels,
};
use lora_format::{HfConfig, LabelSettings, Labels, ProblemType, names_classifier, numbered_labels, read_hf_config};
use lora_model::{ClassTargets, ModelConfig, TokenBatch, absent_head};
use sha2::{Digest, Sha256};
use std::path::Path;
use tch::Device;

/// What a text of a run has besides its tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct ClassLabel {
    /// For each token, 0 in the first text of a pair and 1 in the second.
    pub token_types: Vec<u8>,
    /// What is to be predicted.
    pub target: ClassTarget,
}

/// The labels of a run's texts, in the order of its `train` and `eval`.
#[derive(Debug)]
pub struct ClassPlan {
    /// What the labels are.
    pub labels: Labels,
    /// Of the texts that are trained on.
    pub train: Vec<ClassLabel>,
    /// Of the texts that are held out.
    pub eval: Vec<ClassLabel>,
}

impl ClassPlan {
    /// How many texts of the training data and of the held-out data have each label; empty where labels are numbers.
    pub fn counts(&self) -> Vec<(&str, usize, usize)> {
        let set = LabelSet { names: self.labels.names.clone(), kind: kind_of(self.labels.problem) };
        let count = |list: &[ClassLabel]| count_labels(list.iter().map(|l| &l.target), &set);
        let counts = count(&self.train).into_iter().zip(count(&self.eval));
        self.labels.names.iter().zip(counts).map(|(name, (train, eval))| (name.as_str(), train, eval)).collect()
    }

    /// The sha256 of the names of the labels, and of the label and token types of each training text.
    pub(crate) fn digest(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(format!("{:?} {:?}\n", self.labels.problem, self.labels.names));
        for label in &self.train {
            hash.update((label.token_types.len() as u64).to_le_bytes());
            hash.update(&label.token_types);
            match &label.target {
                ClassTarget::Id(id) => hash.update(id.to_le_bytes()),
                ClassTarget::Values(values) => values.iter().for_each(|v| hash.update(v.to_le_bytes())),
            }
        }
        hex(&hash.finalize())
    }
}

/// The tokens of labelled texts, and the rest of them.
pub fn split_texts(texts: Vec<LabelledText>) -> (Rows, Vec<ClassLabel>) {
    let split = |t: LabelledText| (t.tokens, ClassLabel { token_types: t.token_types, target: t.target });
    let (tokens, labels): (Vec<_>, Vec<_>) = texts.into_iter().map(split).unzip();
    (tokens.into(), labels)
}

/// What is known of the labels before the data is read.
pub(crate) struct KnownClasses {
    pub(crate) settings: LabelSettings,
}

/// What a run's sources hold.
pub(crate) struct ClassData {
    pub(crate) train: Rows,
    pub(crate) report: DataReport,
    pub(crate) eval: Rows,
    pub(crate) classes: ClassPlan,
}

impl KnownClasses {
    /// What configuration, adapter and checkpoint say, in this order; `None` where no classifier is trained.
    pub(crate) fn of(config: &RunConfig, model_dir: &Path, model: &ModelConfig) -> Result<Option<Self>> {
        if config.lora.task_type != TaskType::SeqCls {
            return Ok(None);
        }
        let hf = read_hf_config(model_dir)?;
        let adapter = config.lora.init_adapter.as_deref().map(Labels::read).transpose()?.flatten();
        let own = match adapter {
            Some(labels) => LabelSettings { names: Some(labels.names), problem: Some(labels.problem) },
            None => of_checkpoint(&hf, model_dir, model)?,
        };
        let named = (!config.model.labels.is_empty()).then(|| config.model.labels.clone());
        let problem = config.model.problem_type.as_deref();
        let problem = problem.and_then(|name| ProblemType::ALL.into_iter().find(|p| p.name() == name));
        Ok(Some(Self { settings: LabelSettings { names: named.or(own.names), problem: problem.or(own.problem) } }))
    }

    /// Of a reward model: one number, whatever it is called.
    pub(crate) fn one_score(&self) -> Labels {
        let names = self.settings.names.clone().filter(|names| names.len() == 1);
        Labels { names: names.unwrap_or_else(|| numbered_labels(1)), problem: ProblemType::Regression }
    }

    /// Reads the data; its labels are checked against those that are known.
    pub(crate) fn datasets(
        &self,
        config: &RunConfig,
        model: &ModelConfig,
        tokenizer: &Tokenizer,
        sink: &mut dyn EventSink,
    ) -> Result<ClassData> {
        let mut options = data_options(&config.data);
        if model.layout.embed_positions.is_some() {
            let positions = usize::try_from(model.max_position_embeddings).unwrap_or(usize::MAX);
            options.max_length = options.max_length.min(positions);
        }
        let mut build = |list: &[SourceConfig], known: &KnownLabels| -> Result<LabelledSet> {
            let mut progress = |done, of| sink.event(Event::Tokenising { done, of });
            Ok(build_labelled(
                &data_sources(list, config.data.hub_cache.as_deref())?,
                tokenizer,
                &options,
                known,
                &mut progress,
            )?)
        };
        // Names that nobody gave are the data's to give.
        let unnamed = self.settings.names.as_ref().filter(|names| **names == numbered_labels(names.len()));
        let names = self.settings.names.clone().filter(|names| unnamed.is_none() || names.len() == 1);
        let known = KnownLabels { names, kind: self.settings.problem.map(kind_of) };
        let mut set = build(&config.data.train, &known)?;
        if let Some(all) = unnamed.filter(|all| all.len() > set.labels.names.len()) {
            let numbered = set.labels.names == numbered_labels(set.labels.names.len());
            if numbered && set.labels.kind == LabelKind::Single {
                set.labels.names.clone_from(all);
            }
        }
        let mut texts = set.texts;
        let eval = if config.data.eval.is_empty() {
            take_held_out(&mut texts, config)?
        } else {
            let known = KnownLabels { names: Some(set.labels.names.clone()), kind: Some(set.labels.kind) };
            build(&config.data.eval, &known)?.texts
        };
        let (train, train_labels) = split_texts(texts);
        let (eval, eval_labels) = split_texts(eval);
        let labels = labels_of(&set.labels);
        let classes = ClassPlan { labels, train: train_labels, eval: eval_labels };
        for (name, count, _) in classes.counts().into_iter().filter(|(_, count, _)| *count == 0) {
            sink.event(Event::Note(format!("{count} of the training texts have the label `{name}`")));
        }
        Ok(ClassData { train, report: set.report, eval, classes })
    }
}

fn of_checkpoint(hf: &HfConfig, dir: &Path, model: &ModelConfig) -> Result<LabelSettings> {
    let classifier = names_classifier(&hf.architectures) && model.labels.is_some();
    if classifier { Ok(LabelSettings::of(&dir.join("config.json"), &hf.raw)?) } else { Ok(LabelSettings::default()) }
}

/// The labels of a data set in the terms of a model's configuration.
pub fn labels_of(set: &LabelSet) -> Labels {
    let problem = match set.kind {
        LabelKind::Single => ProblemType::SingleLabel,
        LabelKind::Multi => ProblemType::MultiLabel,
        LabelKind::Number => ProblemType::Regression,
    };
    Labels { names: set.names.clone(), problem }
}

/// The labels of a model in the terms of a data set.
pub fn known_labels(labels: &Labels) -> KnownLabels {
    KnownLabels { names: Some(labels.names.clone()), kind: Some(kind_of(labels.problem)) }
}

fn kind_of(problem: ProblemType) -> LabelKind {
    match problem {
        ProblemType::SingleLabel => LabelKind::Single,
        ProblemType::MultiLabel => LabelKind::Multi,
        ProblemType::Regression => LabelKind::Number,
    }
}

/// A part of the head that the checkpoint lacks begins at random, so it must be trained and saved.
pub(crate) fn check_head(dir: &Path, model: &ModelConfig, trained: &Trained) -> Result<()> {
    let saved = |path: &str| match trained {
        Trained::Fresh(plan) => plan.saved.iter().any(|m| m.path == path),
        Trained::Existing(folder) => folder.modules.contains_key(path),
        Trained::Everything => true,
    };
    let modules: Vec<String> =
        absent_head(dir, model)?.into_iter().map(|m| m.path).filter(|path| !saved(path)).collect();
    if modules.is_empty() {
        return Ok(());
    }
    let remedy = "train them in full: lora.modules_to_save = [\"pooler\"]";
    Err(lora_model::Error::NoHead { dir: dir.into(), modules, remedy }.into())
}

/// A batch of labelled texts on the model's device; the labels are those of the texts, in their order.
pub(crate) fn class_batch<'a>(
    config: &ModelConfig,
    texts: &Batch,
    labels: impl Iterator<Item = &'a ClassLabel>,
    device: Device,
) -> Result<TokenBatch> {
    let (mut types, mut chosen, mut values) = (vec![], vec![], vec![]);
    for label in labels {
        types.extend(label.token_types.iter().map(|&t| i64::from(t)));
        match &label.target {
            ClassTarget::Id(id) => chosen.push(i64::from(*id)),
            ClassTarget::Values(v) => values.extend_from_slice(v),
        }
    }
    let targets = if values.is_empty() { ClassTargets::Ids(&chosen) } else { ClassTargets::Values(&values) };
    Ok(TokenBatch::for_classes(config, &texts.input_ids, &types, &texts.segment_lens, targets, device)?)
}
