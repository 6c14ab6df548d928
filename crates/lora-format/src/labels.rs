//! What a classifier tells apart: the names of its labels and how they are trained, as `config.json` says it, and as it
//! is kept beside an adapter, whose own configuration has no place for it.

use crate::adapter::{AdapterFolder, AdapterModule};
use crate::atomic::write_atomic;
use crate::error::{Error, Result};
use crate::fields::Fields;
use crate::json::read_json_object;
use serde_json::{Map, Value, json};
use std::path::Path;

/// The name of the file beside an adapter that says what its labels are.
pub const LABELS_FILE: &str = "labels.json";
/// The `task_type` of an adapter of a classifier.
pub const CLASSIFIER_TASK: &str = "SEQ_CLS";
/// The layers that score labels, by the names that families have for them.
const CLASSIFIER_HEADS: [&str; 3] = ["score", "classifier", "classifier.out_proj"];
/// More labels than any classifier has.
const MAX_LABELS: i64 = 1 << 20;
/// The end of the class of a classifier in `architectures`.
const CLASSIFIER: &str = "ForSequenceClassification";

/// What is predicted of a text, as `problem_type` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProblemType {
    /// One label of several: cross entropy.
    SingleLabel,
    /// Any of several labels: binary cross entropy on each.
    MultiLabel,
    /// Numbers: mean squared error.
    Regression,
}

impl ProblemType {
    /// Every kind of problem.
    pub const ALL: [Self; 3] = [Self::SingleLabel, Self::MultiLabel, Self::Regression];

    /// The name in `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::SingleLabel => "single_label_classification",
            Self::MultiLabel => "multi_label_classification",
            Self::Regression => "regression",
        }
    }
}

/// What a classifier predicts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labels {
    /// The names, by id; of a regression, the names of its numbers.
    pub names: Vec<String>,
    /// How they are trained.
    pub problem: ProblemType,
}

/// What a file says of labels; what it leaves open is told by the data.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LabelSettings {
    /// `id2label`, or `LABEL_0` and so on for `num_labels`.
    pub names: Option<Vec<String>>,
    /// `problem_type`
    pub problem: Option<ProblemType>,
}

/// `LABEL_0`, `LABEL_1`, ...: what labels without names are called.
pub fn numbered_labels(count: usize) -> Vec<String> {
    (0..count).map(|i| format!("LABEL_{i}")).collect()
}

impl LabelSettings {
    /// Reads `id2label`, `num_labels` and `problem_type` of an object that was read from `path`.
    ///
    /// # Errors
    /// [`Error::Field`] for ids with gaps, a name that appears twice, or a problem that is not known.
    pub fn of(path: &Path, map: &Map<String, Value>) -> Result<Self> {
        let f = Fields::new(path, "", map);
        let problem = match f.string("problem_type")? {
            None => None,
            Some(name) => Some(ProblemType::ALL.into_iter().find(|p| p.name() == name).ok_or_else(|| {
                f.wrong("problem_type", format!("one of {}", ProblemType::ALL.map(ProblemType::name).join(", ")))
            })?),
        };
        let count = f.int("num_labels", 1, MAX_LABELS)?;
        let names = match f.get("id2label") {
            None | Some(Value::Null) => count.map(|n| numbered_labels(usize::try_from(n).unwrap_or_default())),
            Some(Value::Object(table)) => Some(names_of(f, table)?),
            Some(_) => return Err(f.wrong("id2label", "a table from id to name")),
        };
        Ok(Self { names, problem })
    }

    /// The labels that are meant where nothing else is said: transformers' defaults.
    pub fn or_default(self) -> Labels {
        let names = self.names.unwrap_or_else(|| numbered_labels(2));
        let guess = if names.len() == 1 { ProblemType::Regression } else { ProblemType::SingleLabel };
        Labels { problem: self.problem.unwrap_or(guess), names }
    }
}

fn names_of(f: Fields<'_>, table: &Map<String, Value>) -> Result<Vec<String>> {
    let wrong = || f.wrong("id2label", "a table from every id, counted from 0, to a name of its own");
    let mut names = vec![String::new(); table.len()];
    for (id, name) in table {
        let place = id.parse::<usize>().ok().and_then(|id| names.get_mut(id)).ok_or_else(wrong)?;
        *place = name.as_str().filter(|name| !name.is_empty()).ok_or_else(wrong)?.to_string();
    }
    let mut sorted: Vec<&String> = names.iter().collect();
    sorted.sort_unstable();
    let twice = sorted.windows(2).any(|pair| pair[0] == pair[1]);
    if names.is_empty() || twice { Err(wrong()) } else { Ok(names) }
}

impl Labels {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Reads `labels.json` of a folder, if it is there.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(LABELS_FILE);
        if !path.is_file() {
            return Ok(None);
        }
        let map = read_json_object(&path)?;
        let settings = LabelSettings::of(&path, &map)?;
        if settings.names.is_none() {
            return Err(Fields::new(&path, "", &map).wrong("id2label", "a table from id to name"));
        }
        Ok(Some(settings.or_default()))
    }

    /// The labels of an adapter that was trained to classify: those of its `labels.json`; else, as PEFT keeps none, those of
    /// the base's `config.json` where they are as many as the adapter's head scores; else numbers for names. `None` for an
    /// adapter of another task.
    ///
    /// # Errors
    /// What is wrong with a file; [`Error::Field`] for a `labels.json` of other labels than the head scores.
    pub fn of_adapter(dir: &Path, folder: &AdapterFolder, base: Option<&Labels>) -> Result<Option<Self>> {
        if folder.config.task_type.as_deref() != Some(CLASSIFIER_TASK) {
            return Ok(None);
        }
        let scored = CLASSIFIER_HEADS.iter().find_map(|path| match folder.modules.get(*path) {
            Some(AdapterModule::Saved { tensors }) => usize::try_from(*tensors.get("weight")?.size().first()?).ok(),
            _ => None,
        });
        let own = Self::read(dir)?;
        match (own, scored) {
            (Some(own), Some(scored)) if own.len() != scored => Err(Error::Field {
                path: dir.join(LABELS_FILE),
                field: "id2label".into(),
                value: format!("{} labels", own.len()),
                wanted: format!("the {scored} that the adapter's head scores"),
            }),
            (Some(own), _) => Ok(Some(own)),
            (None, scored) => {
                let count = scored.or(base.map(Labels::len)).unwrap_or(2);
                let same = base.filter(|base| base.len() == count).cloned();
                let settings = LabelSettings { names: Some(numbered_labels(count)), problem: None };
                Ok(Some(same.unwrap_or_else(|| settings.or_default())))
            }
        }
    }

    /// Writes `labels.json` into a folder.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, dir: &Path) -> Result<()> {
        let mut map = Map::new();
        self.put(&mut map);
        let path = dir.join(LABELS_FILE);
        let text = format!("{:#}\n", Value::Object(map));
        write_atomic(&path, text.as_bytes())
    }

    fn put(&self, map: &mut Map<String, Value>) {
        let id2label: Map<String, Value> =
            self.names.iter().enumerate().map(|(id, name)| (id.to_string(), json!(name))).collect();
        let label2id: Map<String, Value> =
            self.names.iter().enumerate().map(|(id, name)| (name.clone(), json!(id))).collect();
        map.insert("id2label".into(), Value::Object(id2label));
        map.insert("label2id".into(), Value::Object(label2id));
        map.insert("problem_type".into(), json!(self.problem.name()));
    }

    /// Makes a model's `config.json` that of a classifier with these labels.
    pub fn put_into_config(&self, config: &mut Map<String, Value>) {
        // The number is the length of `id2label` in files of today; a stale one beside it would contradict it.
        config.remove("num_labels");
        self.put(config);
        let stem = config.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str).map(|name| {
            let ends = [CLASSIFIER, "ForCausalLM", "ForMaskedLM", "ForPreTraining", "LMHeadModel", "Model"];
            ends.iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name).to_string()
        });
        let family = config.get("model_type").and_then(Value::as_str).and_then(class_stem).map(str::to_string);
        if let Some(stem) = family.or(stem) {
            config.insert("architectures".into(), json!([format!("{stem}{CLASSIFIER}")]));
        }
    }
}

/// What the classes of a family begin with, where it is not what any class of a checkpoint begins with.
fn class_stem(model_type: &str) -> Option<&'static str> {
    match model_type {
        "bert" => Some("Bert"),
        "roberta" => Some("Roberta"),
        _ => None,
    }
}

/// Whether a config's `architectures` name a classifier.
pub fn names_classifier(architectures: &[String]) -> bool {
    architectures.iter().any(|name| name.ends_with(CLASSIFIER))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<LabelSettings> {
        let Value::Object(map) = serde_json::from_str(text).unwrap() else { unreachable!() };
        LabelSettings::of(Path::new("config.json"), &map)
    }

    #[test]
    fn ids_names_and_problems_are_read_as_transformers_writes_them() {
        let two = of(r#"{"id2label": {"1": "yes", "0": "no"}}"#).unwrap().or_default();
        assert_eq!((two.names, two.problem), (vec!["no".to_string(), "yes".into()], ProblemType::SingleLabel));
        let one = of(r#"{"num_labels": 1}"#).unwrap().or_default();
        assert_eq!((one.names, one.problem), (numbered_labels(1), ProblemType::Regression));
        assert_eq!(of("{}").unwrap().or_default().names, ["LABEL_0", "LABEL_1"]);
        for wrong in [
            r#"{"id2label": {"0": "a", "2": "b"}}"#,
            r#"{"id2label": {"0": "a", "1": "a"}}"#,
            r#"{"id2label": {}}"#,
            r#"{"id2label": ["a"]}"#,
            r#"{"problem_type": "ranking"}"#,
            r#"{"num_labels": 0}"#,
        ] {
            let message = of(wrong).unwrap_err().to_string();
            assert!(message.contains("config.json"), "{wrong}: {message}");
        }
    }

    #[test]
    fn a_folder_keeps_them_and_a_config_becomes_a_classifiers() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Labels::read(dir.path()).unwrap(), None);
        let labels = Labels { names: vec!["b".into(), "a".into()], problem: ProblemType::MultiLabel };
        labels.write(dir.path()).unwrap();
        assert_eq!(Labels::read(dir.path()).unwrap(), Some(labels.clone()));

        let text = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_labels": 9}"#;
        let Value::Object(mut config) = serde_json::from_str(text).unwrap() else { unreachable!() };
        labels.put_into_config(&mut config);
        assert_eq!(config["architectures"], json!(["LlamaForSequenceClassification"]));
        assert_eq!(config["id2label"], json!({"0": "b", "1": "a"}));
        assert!(!config.contains_key("num_labels"));
        assert_eq!(LabelSettings::of(Path::new("x"), &config).unwrap().or_default(), labels);
    }
}
