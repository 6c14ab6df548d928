//! An adapter folder, and who can load it.

use crate::failure::usage;
use crate::out;
use anyhow::Result;
use lora_format::{
    ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterConfig, AdapterModule, CLASSIFIER_TASK, InitLoraWeights, Labels, Method,
    TargetModules, TensorFile, read_adapter,
};
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// vLLM refuses higher ranks unless it is told otherwise.
const VLLM_DEFAULT_RANK: i64 = 16;

/// What is known of an adapter.
#[derive(Serialize)]
pub(super) struct Found {
    kind: &'static str,
    peft_type: &'static str,
    path: PathBuf,
    base_model_name_or_path: Option<String>,
    r: i64,
    lora_alpha: f64,
    lora_dropout: f64,
    use_rslora: bool,
    use_dora: bool,
    target_modules: Value,
    modules_to_save: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    task_type: Option<String>,
    /// What it tells apart, where it was trained to classify.
    #[serde(skip_serializing_if = "Option::is_none")]
    labels: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target_parameters: Option<Vec<String>>,
    /// Rows of single tokens that are trained, in all modules together.
    #[serde(skip_serializing_if = "Option::is_none")]
    trained_tokens: Option<usize>,
    /// Modules with an adapter.
    modules: usize,
    /// The ranks that the tensors have.
    ranks: BTreeSet<i64>,
    parameters: u64,
    bytes: u64,
    loads_in: Vec<Loader>,
}

/// A program, and why it cannot load the adapter.
#[derive(Serialize)]
struct Loader {
    program: &'static str,
    loads: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<String>,
}

/// Reads an adapter.
///
/// # Errors
/// What is wrong with its files.
pub(super) fn find(path: &Path) -> Result<Found> {
    let config = AdapterConfig::read(&path.join(ADAPTER_CONFIG))?;
    let weights = path.join(ADAPTER_WEIGHTS);
    let read = read_adapter(path);
    let labels = read.as_ref().ok().map(|folder| Labels::of_adapter(path, folder, None)).transpose()?.flatten();
    if !weights.is_file() {
        // The reader knows a pickle when it sees one.
        read?;
        return Err(usage(format!("{}: there is no such file", weights.display())));
    }
    let (known, ours) = match read {
        Ok(folder) => (Some(folder.modules), None),
        Err(e) => (None, Some(e.to_string())),
    };
    let file = TensorFile::open(&weights)?;
    // VeRA's vector over the ranks stands for its A, which all modules share.
    let of_a = [".lora_A.weight", ".lora_embedding_A", ".lora_A", ".vera_lambda_d"];
    let is_a = |name: &str| of_a.iter().any(|suffix| name.ends_with(suffix));
    let mut ranks: BTreeSet<i64> =
        file.tensors().filter(|(name, _)| is_a(name)).filter_map(|(_, info)| info.shape.first().copied()).collect();
    if let Some(modules) = &known {
        // Of stacked experts the first size is that of all of them together.
        let low_rank =
            modules.iter().filter(|(_, m)| !matches!(m, AdapterModule::Saved { .. } | AdapterModule::Tokens(_)));
        ranks = low_rank.map(|(path, _)| config.rank_of(path)).collect::<Result<_, _>>()?;
    }
    let loads_in = loaders(&config, &ranks, ours);
    Ok(Found {
        kind: "adapter",
        peft_type: if config.is_tokens_alone() { "TRAINABLE_TOKENS" } else { config.method.peft_type() },
        path: path.to_path_buf(),
        base_model_name_or_path: config.base_model_name_or_path.clone(),
        r: config.r,
        lora_alpha: config.lora_alpha,
        lora_dropout: config.lora_dropout,
        use_rslora: config.use_rslora,
        use_dora: config.use_dora,
        target_modules: match &config.target_modules {
            Some(TargetModules::List(names)) => json!(names),
            Some(TargetModules::Pattern(pattern)) => json!(pattern),
            None => Value::Null,
        },
        modules_to_save: config.modules_to_save.clone().unwrap_or_default(),
        task_type: config.task_type.clone(),
        labels: labels.map(|l| l.names),
        target_parameters: config.target_parameters.clone().filter(|names| !names.is_empty()),
        trained_tokens: config
            .trainable_token_indices
            .as_ref()
            .map(|t| t.lists().iter().map(|(_, ids)| ids.len()).sum()),
        modules: file.names().filter(|name| is_a(name)).count(),
        ranks,
        // VeRA's shared pair is frozen.
        parameters: file
            .tensors()
            .filter(|(name, _)| !name.starts_with("base_model.vera_"))
            .map(|(_, info)| info.shape.iter().product::<i64>().unsigned_abs())
            .sum(),
        bytes: file.data_bytes(),
        loads_in,
    })
}

/// Who can load it: other programs read fewer keys of the configuration than PEFT, and what they do not read must be absent.
fn loaders(config: &AdapterConfig, ranks: &BTreeSet<i64>, ours: Option<String>) -> Vec<Loader> {
    let mut common = Vec::new();
    if config.method != Method::Lora {
        common.push("peft_type");
    }
    if config.use_dora {
        common.push("use_dora");
    }
    if config.bias != "none" || config.lora_bias {
        common.push("bias");
    }
    if config.modules_to_save.as_ref().is_some_and(|m| !m.is_empty()) {
        common.push("modules_to_save");
    }
    if config.task_type.as_deref() == Some(CLASSIFIER_TASK) {
        common.push("task_type");
    }
    if config.trainable_token_indices.is_some() {
        common.push("trainable_token_indices");
    }
    if config.has_target_parameters() {
        common.push("target_parameters");
    }
    if !config.alpha_pattern.is_empty() {
        common.push("alpha_pattern");
    }
    let changed_base = match &config.init_lora_weights {
        InitLoraWeights::Named(name)
            if name.starts_with("pissa") || ["olora", "corda", "loftq", "lora_ga"].contains(&name.as_str()) =>
        {
            Some(name)
        }
        _ => None,
    };
    if changed_base.is_some() {
        common.push("init_lora_weights");
    }
    let refused = |program, more: &[&'static str]| {
        let reasons: Vec<&str> = common.iter().chain(more).copied().collect();
        let note = (!reasons.is_empty()).then(|| format!("it does not take {}", reasons.join(", ")));
        Loader { program, loads: note.is_none(), note }
    };
    // `lora export gguf-lora` puts each module's own scale into its B, so llama.cpp need not know of patterns and rsLoRA.
    let mut llama_cpp = refused("llama.cpp", &[]);
    let only_scales = common.iter().all(|reason| ["alpha_pattern", "peft_type"].contains(reason));
    if only_scales {
        (llama_cpp.loads, llama_cpp.note) = (true, Some("as a file of `lora export gguf-lora`".into()));
    }
    let mistral_rs = refused("mistral.rs", if config.rank_pattern.is_empty() { &[] } else { &["rank_pattern"] });
    // vLLM takes one rank for all.
    let mut vllm = refused("vLLM", if config.rank_pattern.is_empty() { &[] } else { &["rank_pattern"] });
    let highest = ranks.last().copied().unwrap_or(config.r);
    if vllm.loads && highest > VLLM_DEFAULT_RANK {
        vllm.note = Some(format!("start it with --max-lora-rank {}", highest.unsigned_abs().next_power_of_two()));
    }
    vec![
        Loader { program: "lora", loads: ours.is_none(), note: ours },
        Loader { program: "PEFT", loads: true, note: None },
        vllm,
        llama_cpp,
        mistral_rs,
    ]
}

/// Shows an adapter.
///
/// # Errors
/// As [`find`].
pub(super) fn show(path: &Path, as_json: bool) -> Result<()> {
    let found = find(path)?;
    if as_json { out::json(&found) } else { found.print() }
}

impl Found {
    /// Prints it for a reader.
    ///
    /// # Errors
    /// When stdout cannot be written to.
    pub(super) fn print(&self) -> Result<()> {
        let ranks: Vec<String> = self.ranks.iter().map(ToString::to_string).collect();
        out::line(format!("adapter     {}", self.path.display()))?;
        out::line(format!("base model  {}", self.base_model_name_or_path.as_deref().unwrap_or("not named")))?;
        let type_of = if self.peft_type == "LORA" { String::new() } else { format!("{}, ", self.peft_type) };
        out::line(format!(
            "settings    {type_of}r = {}, lora_alpha = {}, lora_dropout = {}{}{}",
            self.r,
            self.lora_alpha,
            self.lora_dropout,
            if self.use_rslora { ", use_rslora" } else { "" },
            if self.use_dora { ", use_dora" } else { "" }
        ))?;
        out::line(format!("targets     {}", self.target_modules))?;
        if !self.modules_to_save.is_empty() {
            out::line(format!("saved whole {}", self.modules_to_save.join(", ")))?;
        }
        if let Some(labels) = &self.labels {
            out::line(format!("classifies  {}", labels.join(", ")))?;
        }
        if let Some(parameters) = &self.target_parameters {
            out::line(format!("parameters of experts  {}", parameters.join(", ")))?;
        }
        if let Some(tokens) = self.trained_tokens {
            out::line(format!("tokens      {tokens} rows"))?;
        }
        out::line(format!("modules     {} of rank {}", self.modules, ranks.join(", ")))?;
        out::line(format!("parameters  {}, {}", out::count(self.parameters), out::bytes(self.bytes)))?;
        for loader in &self.loads_in {
            let note = loader.note.as_ref().map(|n| format!(": {n}")).unwrap_or_default();
            out::line(format!(
                "{:<10}  {}{note}",
                loader.program,
                if loader.loads { "loads it" } else { "cannot load it" }
            ))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_that_read_less_are_told_apart() {
        let loads = |config: &AdapterConfig, rank: i64| -> Vec<bool> {
            loaders(config, &BTreeSet::from([rank]), None).iter().map(|l| l.loads).collect()
        };
        let plain = AdapterConfig::default();
        assert_eq!(loads(&plain, 8), [true; 5]);
        assert!(loaders(&plain, &BTreeSet::from([64]), None)[2].note.as_ref().unwrap().contains("64"));
        assert_eq!(loads(&AdapterConfig { use_dora: true, ..plain.clone() }, 8)[2..], [false; 3]);
        assert_eq!(loads(&AdapterConfig { use_rslora: true, ..plain.clone() }, 8)[2..], [true; 3]);
        let alphas = AdapterConfig { alpha_pattern: vec![("q".into(), 4.0)], ..plain.clone() };
        assert_eq!(loads(&alphas, 8)[2..], [false, true, false]);
        assert_eq!(
            loads(&AdapterConfig { rank_pattern: vec![("q".into(), 4)], ..plain.clone() }, 8)[2..],
            [false, true, false]
        );
        assert_eq!(
            loads(&AdapterConfig { modules_to_save: Some(vec!["lm_head".into()]), ..plain }, 8)[2..],
            [false; 3]
        );
    }
}
